"""An error that several ranks meet is told once, by rank zero where it can; what is not for users is not told."""

import os
import subprocess
import sys
import time
from argparse import ArgumentError

import pytest

from lightning_adam_mini.cli import telling
from lightning_adam_mini.cli.telling import is_for_users, one_teller, tell


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "ADAM_MINI_TOLD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(telling, "PATIENCE", 0.2)


def as_rank(monkeypatch, number):
    monkeypatch.setenv("LOCAL_RANK", str(number))


def test_one_process_tells_each_error(capsys):
    with one_teller():
        assert tell(ValueError("first"))
        assert tell(ValueError("second"))
    assert capsys.readouterr().err == "adam-mini: error: first\nadam-mini: error: second\n"
    assert "ADAM_MINI_TOLD" not in os.environ


def test_ranks_that_inherit_the_teller_tell_once(monkeypatch, capsys, tmp_path):
    with one_teller():
        as_rank(monkeypatch, 0)
        assert tell(ValueError("no data"))
        as_rank(monkeypatch, 1)
        assert tell(ValueError("no data"))
        assert tell(RuntimeError("Connection closed by peer"))
    assert capsys.readouterr().err == "adam-mini: error: no data\n"
    assert not list(tmp_path.iterdir())


def test_another_rank_tells_what_it_alone_has_met(monkeypatch, capsys):
    with one_teller():
        as_rank(monkeypatch, 1)
        assert tell(ValueError("no data here"))
        as_rank(monkeypatch, 0)
        assert tell(RuntimeError("Connection closed by peer")), "whose reason is told"
    assert capsys.readouterr().err == "adam-mini: error on rank 1: no data here\n"


def test_a_fault_of_the_program_needs_its_traceback(monkeypatch, capsys):
    with one_teller():
        assert not tell(RuntimeError("a fault"))
        as_rank(monkeypatch, 1)
        assert not tell(RuntimeError("a fault"))
    assert capsys.readouterr().err == ""


def test_ranks_of_another_launcher_have_their_parent_in_common(monkeypatch, capsys):
    as_rank(monkeypatch, 0)
    with one_teller():
        assert "ADAM_MINI_TOLD" not in os.environ
        tell(ValueError("no data"))
        as_rank(monkeypatch, 1)
        tell(ValueError("no data"))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        as_rank(monkeypatch, 0)
        tell(ValueError("again"))
    assert capsys.readouterr().err == "adam-mini: error: no data\nadam-mini: error: again\n"


def test_a_file_of_long_ago_silences_nobody(monkeypatch, capsys):
    as_rank(monkeypatch, 0)
    tell(ValueError("old"))
    os.utime(telling._file(), (0, time.time() - 1000))
    tell(ValueError("new"))
    assert capsys.readouterr().err == "adam-mini: error: old\nadam-mini: error: new\n"


def test_an_error_of_a_process_that_torch_has_forked(capsys):
    raised = type("ProcessRaisedException", (Exception,), {})
    text = "\n\n-- Process 1 terminated with the following error:\nTraceback (most recent call last):\n  File x\n"
    assert tell(raised(f"{text}FileNotFoundError: There is no file nowhere.txt\n"))
    assert capsys.readouterr().err == "adam-mini: error: There is no file nowhere.txt\n"
    assert not tell(raised(f"{text}ZeroDivisionError: division by zero\n"))


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
    application._made = []
    application._leave_nothing(ValueError("no data"))
    assert process.returncode is not None
    assert launcher.procs == []
