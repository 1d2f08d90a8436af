"""What the commands' options have in common."""

import argparse
from pathlib import Path

import pytest
import torch

from lightning_adam_mini.cli.arguments import Parser, check_place, cpu_threads, make_folder
from lightning_adam_mini.cli.main import main
from tiny_runs import error_line, write_recipe


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GB", 80_000_000_000),
        ("80 gib", 80 * 2**30),
        ("1.5MiB", 3 * 2**19),
        (".5GB", 500_000_000),
        ("2.tb", 2_000_000_000_000),
        ("1TiB", 2**40),
        (" 7 ", 7),
        ("7B", 7),
    ],
)
def test_memory(text, size):
    assert Parser().memory(text, least=1) == size


@pytest.mark.parametrize("text", ["", "much", "80 apples", "GB", ".", "1.2.3GB", "-1GB", "1e9", "9" * 400, "nan"])
def test_what_is_no_memory(text):
    with pytest.raises(argparse.ArgumentError, match=r"--memory .*give a number with a unit, such as 80GB"):
        Parser().memory(text, least=0)


def test_no_memory_is_for_those_who_can_do_without():
    assert Parser().memory("0", least=0) == 0
    with pytest.raises(argparse.ArgumentError, match=r"--memory 0\.4: more than nothing"):
        Parser().memory("0.4", least=1)


def test_threads_are_of_the_command_alone():
    before = torch.get_num_threads()
    with cpu_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with cpu_threads(None):
        assert torch.get_num_threads() == before


def test_threads_are_given_back_after_an_error():
    before = torch.get_num_threads()

    def fail():
        with cpu_threads(before + 1):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.get_num_threads() == before


def test_a_folder_is_made_and_tried(tmp_path):
    make_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--out .*file/below: .*file cannot be written to"):
        make_folder(tmp_path / "file" / "below")
    assert not (tmp_path / "file" / "below").exists()


def test_a_place_is_tried_and_left_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "a" / "b", tmp_path / "file", Path("relative")):
        check_place(place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(ValueError, match=r"--out .*file/below: .*file cannot be written to"):
        check_place(tmp_path / "file" / "below")
    with pytest.raises(ValueError, match=r"--out /proc/x: /proc cannot be written to"):
        check_place(Path("/proc/x"))

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ValueError, match=r"cannot be written to \(Permission denied\); choose another place"):
        check_place(tmp_path / "new")


def parser_with_recipe(**options):
    parser = Parser(prog="adam-mini some")
    parser.add_recipe(**options)
    parser.add_argument("--number", type=int)
    parser.add_argument("--names", nargs="+")
    return parser


@pytest.mark.parametrize(
    "arguments",
    [
        ["a", "--number", "3"],
        ["--config", "a", "--number", "3"],
        ["--number", "3", "-c", "a"],
        ["--config=a", "--number=3"],
        ["--number", "3", "a"],
    ],
)
def test_a_recipe_by_position_or_by_config(arguments):
    options = parser_with_recipe().parse_args(arguments)
    assert (options.recipe, options.number) == ("a", 3)
    options, rest = parser_with_recipe(nargs="?").parse_known_args([*arguments, "--model.size", "8"])
    assert (options.recipe, options.number, rest) == ("a", 3, ["--model.size", "8"])


def test_several_recipes():
    arguments = ["a", "--config", "b", "--names", "x", "y", "--config=c"]
    options = parser_with_recipe(nargs="*").parse_args(arguments)
    assert (options.recipe, options.names) == (["b", "c", "a"], ["x", "y"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--config", "b"], "unrecognized arguments: a"),
        (["--config"], "--config: expected one argument"),
        (["--config", "--number", "3"], "--config: expected one argument"),
        (["a", "--numbr", "3"], "no option --numbr; did you mean --number[?] `adam-mini some --help` lists all"),
        (["a", "--numbr=3"], "no option --numbr; did you mean --number"),
        (["a", "--num", "3"], "no option --num[.;]"),
        (["a", "--xyz"], r"no option --xyz\. `adam-mini some --help`"),
        (["a", "--number", "x"], "argument --number: invalid int value: 'x'"),
    ],
)
def test_what_is_wrong_with_a_command_line(arguments, message):
    with pytest.raises(argparse.ArgumentError, match=message):
        parser_with_recipe().parse_args(arguments)


WITH_RECIPE = {
    "fit": ["fit"],
    "predict": ["predict"],
    "explain": ["explain"],
    "bench": ["bench"],
    "bench throughput": ["bench", "throughput", "--memory", "1GB"],
    "compare": ["compare"],
    "hessian": ["hessian", "js"],
    "study": ["study"],
}


@pytest.mark.parametrize("command", WITH_RECIPE)
def test_a_wrong_recipe_in_every_command(capsys, command):
    """The same error in both forms, with a suggestion, and the exit code of a wrong command line."""
    words = WITH_RECIPE[command]
    name, near = ("mlp_hessia", "mlp_hessian") if command == "study" else ("resnet/mnist5k", "vision/mnist5k.yaml")
    lines = []
    for recipe in ([name], ["--config", name], [f"-c={name}"]):
        first = recipe if command in ("fit", "predict") else []
        last = [] if first else recipe
        assert main([words[0], *first, *words[1:], *last]) == 2
        lines.append(error_line(capsys))
    assert len(set(lines)) == 1
    assert f"did you mean {near}" in lines[0]


GPT2 = '{"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 10}'
COMMANDS = {
    "bench": ["bench", "--hf", GPT2, "--out"],
    "bench throughput": ["bench", "throughput", "--hf", GPT2, "--memory", "1GB", "--out"],
    "hessian": ["hessian", "js", "tiny.yaml", "--out"],
    "study": ["study", "three_block_quadratic", "--out"],
    "export": ["export", "run", "--out"],
    "convert": ["convert", "run.ckpt", "--out"],
    "compare": ["compare", "tiny.yaml", "--lr", "1e-3", "--out"],
    "compare --dry-run": ["compare", "tiny.yaml", "--lr", "1e-3", "--dry-run", "--out"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_tries_its_place_before_the_work(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: x\n", "utf-8")
    (tmp_path / "run.ckpt").touch()

    def work(*args, **kwargs):
        raise AssertionError("it begins to work")

    for place in ("application.Application", "bench.steps.run", "bench.throughput.run", "compare.command.first_error"):
        monkeypatch.setattr(f"lightning_adam_mini.cli.{place}", work)
    for out in ("run.ckpt/below", "/proc/x"):
        assert main([*COMMANDS[command], out]) in (1, 2)
        line = error_line(capsys)
        assert out.partition("/")[0] in line
        assert "cannot be written" in line or "is a file" in line or "No such file" in line, line
