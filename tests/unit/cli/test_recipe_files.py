"""Files of YAML: what is no recipe is told with its place, and a key stands once."""

import pytest

from lightning_adam_mini.cli.arguments import UsageError
from lightning_adam_mini.cli.recipes import check_keys, list_recipes, read_yaml, resolve_configs


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a: 1\nb: 2\na: 3\n", r"x\.yaml, line 3: duplicate key 'a', first in line 1"),
        ("a:\n  b: {c: 1, c: 2}\n", r"x\.yaml, line 2: duplicate key 'c'; keep one"),
        ("a:\n- b: 1\n- c: 1\n  d: 2\n  c: 3\n", r"x\.yaml, line 5: duplicate key 'c', first in line 3"),
        ("'a': 1\na: 2\n", r"x\.yaml, line 2: duplicate key 'a'"),
        ('{"a": 1, "a": 2}', r"x\.yaml, line 1: duplicate key 'a'"),
        ("? {a: 1, a: 2}\n: 3\n", "found unhashable key|duplicate key"),
        ("a: &x {b: 1}\nc: {d: 1, <<: *x, d: 2}\n", r"x\.yaml, line 2: duplicate key 'd'"),
        ("optimizer:\n", r"x\.yaml: `optimizer:` is blank"),
        ("trainer: ~\n", r"x\.yaml: `trainer:` is blank"),
        ("data:\n  class_path:\n", r"x\.yaml, line 2: `class_path:` is blank"),
        ("a: [\n", r"x\.yaml: this is not YAML: .*line 2"),
        ("- a\n", r"x\.yaml: a recipe holds options such as `model: \.\.\.`, not a list"),
    ],
)
def test_what_is_refused(tmp_path, content, told):
    (tmp_path / "x.yaml").write_text(content, "utf-8")
    with pytest.raises(ValueError, match=told):
        read_yaml(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    "content",
    [
        "a: &x {b: 1}\nc: {<<: *x, b: 2}\n",
        "a: &x {b: 1}\ny: &y {b: 2}\nc: {<<: *x, d: 1}\nd: {<<: [*x, *y]}\n",
        "a: {b: 1}\nc: {b: 1}\n",
        "1: a\n'1': b\n",
        "\ufeffa: 1\n",
        "a: &x [1]\nb: *x\nc: *x\n",
        "a: &a\n  b: [*a]\n",
        "a: missing.yaml\n",
        "run_dir:\nckpt_path:\n",
    ],
)
def test_what_is_fine(tmp_path, content):
    (tmp_path / "x.yaml").write_text(content, "utf-8")
    assert read_yaml(tmp_path / "x.yaml")


def test_files_that_a_file_names(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "x.yaml").write_text("optimizer: below/y.yaml\n", "utf-8")
    (tmp_path / "below" / "y.yaml").write_text("a: ../x.yaml\nb: z.yaml\n", "utf-8")
    (tmp_path / "below" / "z.yaml").write_text("c: 1\nc: 2\n", "utf-8")
    with pytest.raises(ValueError, match=r"^z\.yaml, line 2: duplicate key 'c'"):
        read_yaml(tmp_path / "x.yaml")
    (tmp_path / "below" / "z.yaml").write_text("c: 1\n", "utf-8")
    assert read_yaml(tmp_path / "x.yaml") == {"optimizer": "below/y.yaml"}


def test_files_of_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text("- 1\n- {a: 1, a: 2}\n", "utf-8")
    for options in (["--callbacks", "x.yaml"], ["--callbacks=x.yaml"], ["--callbacks+=x.yaml"]):
        with pytest.raises(UsageError, match=r"x\.yaml, line 2: duplicate key 'a'"):
            resolve_configs(options)
    with pytest.raises(UsageError, match=r"--config x\.yaml: a recipe holds options"):
        resolve_configs(["--config", "x.yaml"])
    assert resolve_configs(["--path", "none.yaml", "--name=none.yaml"])[0] == [
        "--path",
        "none.yaml",
        "--name=none.yaml",
    ]


def test_a_text_that_is_no_yaml_is_for_its_reader():
    check_keys("a: [", "x")
    check_keys("", "x")


def test_every_packaged_recipe_is_read():
    assert all(resolve_configs(["--config", name]) for name in list_recipes())


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/gpt2_tiny-2/config.yaml", "gpt2_tiny-2"),
        ("runs/gpt2_tiny-2/config.1.yaml", "gpt2_tiny-2"),
        ("config.yaml", "here"),
        ("runs/other/config_of_mine.yaml", "config_of_mine"),
        ("small.yaml", "small"),
    ],
)
def test_a_run_is_named_after_its_recipe_or_the_run_that_this_is_of(tmp_path, monkeypatch, path, name):
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    (here / path).parent.mkdir(parents=True, exist_ok=True)
    (here / path).write_text("trainer: {}\n", "utf-8")
    for options in ([path], ["--config", path], [f"-c={path}"], ["--config", str(here / path)]):
        assert resolve_configs(options)[1] == name
