"""`adam-mini study` as a user types it: its files, its report, and what is wrong in one line."""

import csv
import json
import logging
from argparse import ArgumentError
from pathlib import Path

import pytest
import torch

pytest.importorskip("jsonargparse")
pytest.importorskip("matplotlib")

from lightning_adam_mini.cli.studies import quadratic_cases
from lightning_adam_mini.cli.studies.command import main
from lightning_adam_mini.cli.studies.common import outcome

CHANGES = ("seeds=[0,1]", "top_eigenvalues=[2000]", "heterogeneous_spectra=null", "homogeneous_spectra=null")
QUICK = ("quadratic_cases", *(word for change in CHANGES for word in ("--set", change)))
FILES = ["figure.png", "result.json", "table.csv"]


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_a_study_leaves_a_table_a_picture_and_what_was_measured(caplog):
    caplog.set_level(logging.INFO, logger="lightning_adam_mini")
    logging.getLogger("lightning_adam_mini").propagate = True
    threads = torch.get_num_threads()
    assert main([*QUICK, "--out", "found"]) == 0
    assert torch.get_num_threads() == threads
    assert sorted(path.name for path in Path("found").iterdir()) == FILES, "nothing else, such as a file half written"
    with Path("found/table.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["seed"]) for row in rows] == [("2", "0"), ("2", "1"), ("4", "0"), ("4", "1")]
    result = json.loads(Path("found/result.json").read_text("utf-8"))
    assert result["command"].startswith("adam-mini study quadratic_cases --set 'seeds=[0,1]'")
    assert result["settings"]["seeds"] == [0, 1]
    assert result["hardware"]["cores"]
    assert "torch" in result["versions"]
    assert [set(claim) for claim in result["claims"]] == [{"text", "holds", "measured", "source"}] * 2
    assert Path("found/figure.png").read_bytes().startswith(b"\x89PNG")
    for claim in result["claims"]:
        verdict = "holds" if claim["holds"] else "DOES NOT HOLD"
        assert f"{verdict}: {claim['text']}" in caplog.text


def test_the_same_seeds_give_the_same_table():
    for folder in ("one", "two"):
        main([*QUICK, "--out", folder])
    assert Path("one/table.csv").read_bytes() == Path("two/table.csv").read_bytes()


def test_an_earlier_outcome_is_replaced_by_one_of_the_same_study():
    main([*QUICK, "--out", "found"])
    main([*QUICK, "--set", "seeds=[7]", "--out", "found"])
    assert json.loads(Path("found/result.json").read_text("utf-8"))["settings"]["seeds"] == [7]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_ends_a_study_leaves_the_earlier_outcome(monkeypatch, error):
    main([*QUICK, "--out", "found"])
    before = contents("found")

    def stop(*_):
        raise error

    for place in ("_row", "_draw"):
        with monkeypatch.context() as patch:
            patch.setattr(quadratic_cases, place, stop)
            with pytest.raises(error):
                main([*QUICK, "--set", "seeds=[7]", "--out", "found"])
        assert contents("found") == before


def test_a_result_belongs_to_the_table_beside_it(monkeypatch):
    """Where writing ends between the files, no earlier result stands beside the new table."""
    main([*QUICK, "--out", "found"])
    monkeypatch.setattr(outcome, "save_figure", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        main([*QUICK, "--set", "seeds=[7]", "--out", "found"])
    assert sorted(contents("found")) == ["figure.png", "table.csv"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("result.json", '{"study": "trajectories"}', "found/result.json is of the study trajectories: give another"),
        ("result.json", '{"mine": 1}', "found/result.json is of no finished study"),
        ("result.json", "[", "found/result.json is of no finished study"),
        ("table.csv", "mine", "found/table.csv is of no finished study: give another folder with --out, or remove it"),
    ],
)
def test_files_of_something_else_are_left_alone(monkeypatch, name, text, message):
    monkeypatch.setattr(quadratic_cases, "_row", lambda *_: pytest.fail("the work began"))
    Path("found").mkdir()
    Path("found", name).write_text(text, "utf-8")
    with pytest.raises(ValueError, match=message):
        main([*QUICK, "--out", "found"])
    assert contents("found") == {name: text.encode()}


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder that nobody can write to")
def test_a_folder_that_takes_no_files_is_refused_before_the_work(monkeypatch):
    monkeypatch.setattr(quadratic_cases, "_row", lambda *_: pytest.fail("the work began"))
    with pytest.raises(ValueError, match="--out /proc/self: /proc/self cannot be written to"):
        main([*QUICK, "--out", "/proc/self"])


def test_the_folder_is_named_after_the_recipe():
    Path("mine.yaml").write_text(
        "# My cases.\nstudy: quadratic_cases\nsettings: {seeds: [3], top_eigenvalues: [300], tolerance: 0.01,"
        " heterogeneous_spectra: null, homogeneous_spectra: null}\n",
        "utf-8",
    )
    assert main(["mine.yaml"]) == 0
    assert sorted(path.name for path in Path("runs/studies/mine").iterdir()) == FILES


@pytest.mark.parametrize("name", ["three_block_quadratic", "diagonal_preconditioner"])
def test_every_quadratic_study_draws(name):
    sizes = {
        "three_block_quadratic": ("block_size=4", "iterations=5", "rates=[0.3]"),
        "diagonal_preconditioner": ("dimensions=[4]", "condition_numbers=[100]"),
    }
    changes = [part for size in ("seeds=[0,1]", *sizes[name]) for part in ("--set", size)]
    assert main([name, *changes, "--out", "found"]) == 0
    assert sorted(path.name for path in Path("found").iterdir()) == FILES


@pytest.mark.slow
@pytest.mark.parametrize("name", ["leave_x_out", "trajectories", "sensitivity", "blockwise_gd"])
def test_every_study_on_text_draws(name):
    pytest.importorskip("transformers")
    pytest.importorskip("pytorch_optimizer")
    sizes = ["seeds=[0,1]", "steps=2", "width=8", "layers=1", "heads=2", "context=4", "batch_size=2"]
    sizes += ["validation_windows=2"]
    sizes += {
        "leave_x_out": ["factors=[1.0]", "more_out=[2]", "draws=1"],
        "trajectories": ["every=1"],
        "sensitivity": ["rates=[0.001,0.01]", "beta2s=[0.9]", "epss=[1e-8]"],
        "blockwise_gd": ["seeds=[0,1,2,3]", "rates=[0.01]", "sgd_rates=[0.1]"],
    }[name]
    assert main([name, *(part for size in sizes for part in ("--set", size)), "--out", "found"]) == 0
    assert sorted(path.name for path in Path("found").iterdir()) == FILES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quadratic_case"], "did you mean quadratic_cases"),
        ([*QUICK, "--set", "sseeds=[1]"], "no setting 'sseeds'; did you mean seeds"),
        ([*QUICK, "--threads", "0"], "--threads 0: at least 1"),
        ([*QUICK, "--out", "taken"], "--out taken: this is a file; give a folder"),
        ([*QUICK, "--output", "x"], "no option --output; did you mean --out"),
        ([], "the following arguments are required: NAME"),
        (["quadratic_cases", "--set", "heterogeneous_spectra=missing.csv"], "missing.csv"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_written(arguments, message):
    Path("taken").write_text("", "utf-8")
    with pytest.raises((ArgumentError, ValueError, OSError), match=message):
        main(arguments)
    assert not [path for path in Path().rglob("*") if path.name in FILES]
