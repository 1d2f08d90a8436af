"""Which folder a run gets, and which checkpoint a `--ckpt_path` means."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from lightning_adam_mini.cli.run_folder import (
    LOCK_NAME,
    choose_run_dir,
    forget_run_dir,
    last_checkpoint,
    lock_for_run,
    lock_run,
    resolve_checkpoint,
)
from lightning_adam_mini.tasks.data.cache import only_one


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    yield
    forget_run_dir()


def make_run(name, *checkpoints):
    folder = Path(name) / "checkpoints"
    folder.mkdir(parents=True)
    for number, checkpoint in enumerate(checkpoints):
        (folder / checkpoint).touch()
        os.utime(folder / checkpoint, (number, number))
    return Path(name)


def start(recipe="tiny", run_dir=None):
    return choose_run_dir(run_dir, recipe, starts_anew=True)


def go_on(recipe="tiny", run_dir=None):
    return choose_run_dir(run_dir, recipe, starts_anew=False)


def test_new_runs_are_numbered():
    names = []
    for _ in range(3):
        names.append(start())
        make_run(names[-1])
    assert names == [Path("runs/tiny"), Path("runs/tiny-2"), Path("runs/tiny-3")]
    assert go_on() == Path("runs/tiny-3")


def test_numbers_are_compared_as_numbers_and_gaps_stay():
    for number in (2, 9, 10):
        make_run(f"runs/tiny-{number}")
    assert start() == Path("runs/tiny-11")
    assert go_on() == Path("runs/tiny-10")


def test_other_recipes_do_not_count():
    for name in ("runs/tiny_llama", "runs/tiny-big", "runs/tiny.old", "runs/other-7"):
        make_run(name)
    assert start() == go_on() == Path("runs/tiny")
    assert start(recipe=None) == Path("runs/run")


def test_a_folder_without_a_run_is_taken():
    Path("runs/tiny/tensorboard").mkdir(parents=True)
    assert start() == Path("runs/tiny")


def test_a_named_folder():
    assert start(run_dir="mine") == go_on(run_dir="mine") == Path("mine")
    assert start(run_dir="~/mine") == Path.home() / "mine"
    make_run("mine")
    assert go_on(run_dir="mine") == Path("mine")
    with pytest.raises(ValueError, match="mine holds a run already; continue it with --ckpt_path last"):
        start(run_dir="mine")


def test_processes_of_other_ranks_take_the_folder_of_the_first(monkeypatch):
    folder = make_run(start())
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert start() == folder


def test_the_next_run_of_the_process_does_not(monkeypatch):
    make_run(start())
    forget_run_dir()
    monkeypatch.setenv("LOCAL_RANK", "0")  # which Lightning leaves behind in the process that started the others
    assert start() == Path("runs/tiny-2")


def test_last():
    run = make_run("run", "best-step=5.ckpt", "last.ckpt")
    assert resolve_checkpoint("last", run, may_start=False) == "run/checkpoints/last.ckpt"


def test_last_is_what_a_cluster_saved_later():
    run = make_run("run", "last.ckpt")
    (run / "hpc_ckpt_1.ckpt").touch()
    assert last_checkpoint(run) == run / "hpc_ckpt_1.ckpt"
    os.utime(run / "hpc_ckpt_1.ckpt", (-1, -1))
    assert last_checkpoint(run) == run / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("may_start", [True, False])
def test_no_last(may_start):
    """Only a command that names its run may start it."""
    run = make_run("run")
    if may_start:
        with pytest.warns(UserWarning, match="holds no checkpoint yet"):
            assert resolve_checkpoint("last", run, may_start=True) is None
    else:
        with pytest.raises(ValueError, match="no checkpoint in run/checkpoints"):
            resolve_checkpoint("last", run, may_start=False)


def test_a_lost_last_is_no_reason_to_start_over():
    run = make_run("run", "best-step=5.ckpt")
    with pytest.raises(ValueError, match="no checkpoint in"):
        resolve_checkpoint("last", run, may_start=True)


def test_best():
    run = make_run("run", "best-step=5.ckpt", "last.ckpt")
    assert resolve_checkpoint("best", run, may_start=False) == "run/checkpoints/best-step=5.ckpt"
    (run / "checkpoints" / "best-step=9.ckpt").touch()
    with pytest.raises(ValueError, match=r"holds: best-step=5\.ckpt, best-step=9\.ckpt"):
        resolve_checkpoint("best", run, may_start=False)


def test_a_path():
    run = make_run("run", "last.ckpt")
    path = str(run / "checkpoints" / "last.ckpt")
    assert resolve_checkpoint(path, Path("other"), may_start=False) == path
    with pytest.raises(ValueError, match=r"no\.ckpt: no such file"):
        resolve_checkpoint("no.ckpt", run, may_start=True)


TRAINING = """
import os, sys, time
from pathlib import Path
from lightning_adam_mini.cli.run_folder import lock_run
lock_run(Path(sys.argv[1]))
child = os.fork() if "fork" in sys.argv else 1  # as loaders are
print(flush=True)
time.sleep(120 if child else 3)
"""


@contextmanager
def training_in(folder, *options):
    """Another process that trains in a folder."""
    with subprocess.Popen([sys.executable, "-c", TRAINING, folder, *options], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def test_one_process_trains_in_a_folder():
    make_run("mine")
    with training_in("mine") as other:
        for begin in (lambda: start(run_dir="mine"), lambda: lock_run(Path("mine"))):
            with pytest.raises(ValueError, match=r"mine: another process still trains there \(process") as told:
                begin()
            assert f"(process {other.pid} on {socket.gethostname()}, since 20" in str(told.value)
            assert "wait for it, end it, or choose another --run_dir" in str(told.value)
        assert go_on(run_dir="mine") == Path("mine"), "to validate, say"
    with pytest.raises(ValueError, match="mine holds a run already"):
        start(run_dir="mine")


def test_a_process_that_was_killed_leaves_no_lock():
    """Nor do its loaders, which see a moment later that it is gone."""
    with training_in("mine", "fork") as other:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    lock_run(Path("mine")).release()
    loader = f"import fcntl, time; fcntl.flock(open('mine/{LOCK_NAME}'), fcntl.LOCK_EX); print(flush=True); "
    with subprocess.Popen([sys.executable, "-c", loader + "time.sleep(1)"], stdout=subprocess.PIPE) as orphan:
        orphan.stdout.readline()
        told = json.loads(Path("mine/.running.json").read_text())
        Path("mine/.running.json").write_text(json.dumps(told | {"pid": other.pid}))
        lock_run(Path("mine")).release()


def test_a_process_may_lock_a_folder_again_and_frees_it_at_last():
    """A run of a comparison has locked its folder before it begins."""
    outer = lock_run(Path("mine"))
    start(run_dir="mine")
    lock_for_run(Path("mine"))
    forget_run_dir()
    command = [sys.executable, "-c", TRAINING.replace("120", "0"), "mine"]
    assert b"another process still trains there" in subprocess.run(command, capture_output=True, check=False).stderr
    outer.release()
    assert subprocess.run(command, check=False).returncode == 0


def test_a_folder_without_a_word_of_its_holder_is_locked_too():
    with training_in("mine"):
        Path("mine/.running.json").write_text("[")
        with pytest.raises(ValueError, match="mine: another process still trains there; wait for it"):
            start(run_dir="mine")


@pytest.mark.parametrize("error", [NotImplementedError(), OSError(errno.ENOLCK, "No locks available")])
def test_a_file_system_without_locks_is_told(monkeypatch, caplog, error):
    def refused(*_, **__):
        raise error

    monkeypatch.setattr("filelock.BaseFileLock.acquire", refused)
    with pytest.warns(UserWarning, match="mine is on a file system without locks: a second run there"):
        start(run_dir="mine")
    with only_one(Path("cache")):
        assert "cache is on a file system without locks: processes may prepare the same data twice" in caplog.text


def test_runs_that_start_together_get_folders_of_their_own():
    """A run leaves traces only after its first steps; until then its lock keeps others out."""
    with training_in("runs/tiny"):
        assert start() == Path("runs/tiny-2")
    assert start() == Path("runs/tiny")


@pytest.mark.parametrize("name", ["RANK", "SLURM_PROCID", "NODE_RANK", "GROUP_RANK", "OMPI_COMM_WORLD_RANK"])
def test_the_first_rank_alone_locks(monkeypatch, name):
    with training_in("mine"):
        monkeypatch.setenv(name, "1")
        monkeypatch.setenv("LOCAL_RANK", "0")
        assert start(run_dir="mine") == Path("mine"), "its first rank has the lock, maybe"
        forget_run_dir()
        monkeypatch.setenv(name, "0")
        with pytest.raises(ValueError, match="another process still trains there"):
            start(run_dir="mine")


def test_ranks_that_start_together_never_part(monkeypatch):
    """The second would not know which folder the first has found free."""
    monkeypatch.setenv("RANK", "0")
    with training_in("runs/tiny"), pytest.raises(ValueError, match="runs/tiny: another process still trains there"):
        start()


def test_other_ranks_of_a_launcher_leave_no_trace(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    folder = start()
    assert not folder.exists()
    assert start() == folder
