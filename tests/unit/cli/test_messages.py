"""Errors in one line: from the messages of the installed jsonargparse, and reported once by several ranks."""

import os
import subprocess
import sys
import time
from argparse import ArgumentError
from dataclasses import dataclass, field
from typing import Literal

import pytest
from jsonargparse import ArgumentParser

from lightning_adam_mini.cli import messages
from lightning_adam_mini.cli.messages import is_for_users, near_option, one_line, report_error, report_once
from lightning_adam_mini.factory import OptimizerFactory


@dataclass
class Options:
    number: float = 1.0
    count: int | None = None
    flag: bool = False
    shape: Literal["round", "square"] = "round"
    cuts: dict[str, Literal["row", "whole"]] = field(default_factory=dict)
    pair: tuple[float, float] = (0.0, 1.0)
    either: Literal["low", "high"] | Literal["half", "full"] | None = None


def said(*arguments):
    """What jsonargparse says about a command line."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--options", type=Options, default=Options())
    parser.add_subclass_arguments(OptimizerFactory, "optimizer", instantiate=False, required=False)
    parser.set_defaults({"optimizer": {"class_path": "lightning_adam_mini.factory.AdamMini"}})
    parser.add_argument("--config", action="config")
    with pytest.raises(ArgumentError) as error:
        parser.parse_args(list(arguments))
    return str(error.value)


CHOICES = "Adafactor, Adam, AdamMini, AdamW, CAME, LAMB, Lion, Muon, NovoGrad, SGD, SM3"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--options.number", "many"], "options.number: expected a number, got many"),
        (["--options.count", "1.5"], "options.count: expected a whole number, got 1.5"),
        (["--options.flag", "maybe"], "options.flag: expected true or false, got maybe"),
        (["--options.pair", "[1]"], "options.pair: expected a tuple with 2 elements, got [1]"),
        (["--options.pair", "1"], "options.pair: expected a list, got 1"),
        (["--options.shape", "squar"], "options.shape: 'squar' is not one of round, square; did you mean square?"),
        (["--options.shape", "x"], "options.shape: 'x' is not one of round, square"),
        (["--options.cuts", "{a: rwo}"], "options.cuts: 'rwo' is not one of row, whole; did you mean row?"),
        (["--options.either", "hal"], "options.either: 'hal' is not one of low, high, half, full; did you mean half?"),
        (["--optimizer.lr", "fast"], "optimizer.lr: expected a number, got fast"),
        (
            ["--optimizer", "Adammini"],
            f"optimizer: there is no class 'Adammini'; did you mean AdamMini? Choose from: {CHOICES}",
        ),
        (["--optimizer", "1"], f"optimizer: there is no class '1'. Choose from: {CHOICES}"),
        (["--optimizer", "none.such.Class"], f"optimizer: there is no class 'none.such.Class'. Choose from: {CHOICES}"),
        (["--optimizer", "datetime.date"], f"optimizer: there is no class 'datetime.date'. Choose from: {CHOICES}"),
        (
            ["--optimizer", "Lion", "--optimizer.eps", "1"],
            "Lion has no option 'eps'. It has: lr, weight_decay, weight_decay_policy, betas",
        ),
        (
            ["--optimizer", "Lion", "--optimizer.beta", "1"],
            "Lion has no option 'beta'; did you mean betas? It has: lr, weight_decay, weight_decay_policy, betas",
        ),
    ],
)
def test_what_the_parser_says(arguments, expected):
    assert one_line(said(*arguments)) == expected


@pytest.mark.parametrize("content", ["", "text", "- a", "a: [\n", "options: {nmber: 1}", "options: {number: x}"])
def test_files(tmp_path, content):
    (tmp_path / "file.yaml").write_text(content, "utf-8")
    line = one_line(said("--config", str(tmp_path / "file.yaml")))
    assert "\n" not in line
    assert 10 < len(line) < 200
    assert "subtypes" not in line


def test_options_that_come_near():
    options = {"--options.number", "--optimizer", "--config"}
    assert near_option(said("--options.nmber", "1"), options).startswith(
        "there is no option --options.nmber; did you mean --options.number? "
    )
    assert near_option("unrecognized arguments: --xyz=3 more", options).startswith("there is no option --xyz. ")
    assert near_option("something else", options) == "something else"


def test_a_message_of_ours_stays_as_it_is():
    message = "lr must be a finite number of at least 0, not -1.0"
    assert one_line(message) == message
    assert one_line("first\n   second  third\n") == "first second third"
    assert one_line("") == ""


def test_an_error_in_a_class_is_the_cause():
    message = (
        "Does not validate against any of the Union subtypes\n"
        "Subtypes: [<class 'package.Task'>, <class 'NoneType'>]\n"
        "Errors:\n"
        "  - lr must be positive:\n"
        "    not -1\n"
        "  - Expected a <class 'NoneType'>\n"
        "Given value type: <class 'jsonargparse._namespace.Namespace'>\n"
        "Given value: Namespace(lr=-1)"
    )
    assert one_line(message) == "lr must be positive: not -1"


def test_an_error_of_a_reading_process_is_its_last_line():
    text = "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\n"
    assert one_line(text + "ValueError: cannot read a.png; remove it\n") == "cannot read a.png; remove it"


# Reported once


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "ADAM_MINI_REPORTED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(messages, "PATIENCE", 0.2)


def as_rank(monkeypatch, number):
    monkeypatch.setenv("LOCAL_RANK", str(number))


def test_one_process_tells_each_error(capsys):
    with report_once():
        assert report_error(ValueError("first"))
        assert report_error(ValueError("second"))
    assert capsys.readouterr().err == "adam-mini: error: first\nadam-mini: error: second\n"
    assert "ADAM_MINI_REPORTED" not in os.environ


def test_ranks_that_inherit_the_teller_tell_once(monkeypatch, capsys, tmp_path):
    with report_once():
        as_rank(monkeypatch, 0)
        assert report_error(ValueError("no data"))
        as_rank(monkeypatch, 1)
        assert report_error(ValueError("no data"))
        assert report_error(RuntimeError("Connection closed by peer"))
    assert capsys.readouterr().err == "adam-mini: error: no data\n"
    assert not list(tmp_path.iterdir())


def test_another_rank_tells_what_it_alone_has_met(monkeypatch, capsys):
    with report_once():
        as_rank(monkeypatch, 1)
        assert report_error(ValueError("no data here"))
        as_rank(monkeypatch, 0)
        assert report_error(RuntimeError("Connection closed by peer")), "whose reason is told"
    assert capsys.readouterr().err == "adam-mini: error on rank 1: no data here\n"


def test_a_fault_of_the_program_needs_its_traceback(monkeypatch, capsys):
    with report_once():
        assert not report_error(RuntimeError("a fault"))
        as_rank(monkeypatch, 1)
        assert not report_error(RuntimeError("a fault"))
    assert capsys.readouterr().err == ""


def test_ranks_of_another_launcher_have_their_parent_in_common(monkeypatch, capsys):
    as_rank(monkeypatch, 0)
    with report_once():
        assert "ADAM_MINI_REPORTED" not in os.environ
        report_error(ValueError("no data"))
        as_rank(monkeypatch, 1)
        report_error(ValueError("no data"))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        as_rank(monkeypatch, 0)
        report_error(ValueError("again"))
    assert capsys.readouterr().err == "adam-mini: error: no data\nadam-mini: error: again\n"


def test_a_file_of_long_ago_silences_nobody(monkeypatch, capsys):
    as_rank(monkeypatch, 0)
    report_error(ValueError("old"))
    os.utime(messages._file(), (0, time.time() - 1000))
    report_error(ValueError("new"))
    assert capsys.readouterr().err == "adam-mini: error: old\nadam-mini: error: new\n"


def test_an_error_of_a_process_that_torch_has_forked(capsys):
    raised = type("ProcessRaisedException", (Exception,), {})
    text = "\n\n-- Process 1 terminated with the following error:\nTraceback (most recent call last):\n  File x\n"
    assert report_error(raised(f"{text}FileNotFoundError: There is no file nowhere.txt\n"))
    assert capsys.readouterr().err == "adam-mini: error: There is no file nowhere.txt\n"
    assert not report_error(raised(f"{text}ZeroDivisionError: division by zero\n"))


def test_errors_for_users():
    assert all(map(is_for_users, (ValueError(), OSError(), ArgumentError(None, ""), ModuleNotFoundError())))
    assert not any(map(is_for_users, (TypeError(), RuntimeError(), KeyError())))


def test_processes_of_other_ranks_end_with_the_first():
    pytest.importorskip("lightning")
    from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

    from lightning_adam_mini.cli.application import Application

    launcher = object.__new__(_SubprocessScriptLauncher)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    launcher.procs = [process]
    application = object.__new__(Application)
    strategy = type("Strategy", (), {"launcher": launcher})
    application.trainer = type("Trainer", (), {"strategy": strategy})
    application._created = []
    application._clean_up(ValueError("no data"))
    assert process.returncode is not None
    assert launcher.procs == []
