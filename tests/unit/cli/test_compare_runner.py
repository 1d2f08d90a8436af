"""Runs of a comparison as processes: how they end, stop, go on, and never outlive or disturb each other.

A stand-in takes the place of `adam-mini fit`, so that a run starts at once.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from filelock import FileLock

import stand_in_fit
from lightning_adam_mini.cli.compare import command, process
from lightning_adam_mini.cli.compare import job as job_module
from lightning_adam_mini.cli.compare.command import checkout_commit
from lightning_adam_mini.cli.compare.grid import Run, copy_recipe, read_recipe
from lightning_adam_mini.cli.compare.job import Job
from lightning_adam_mini.cli.compare.launchers import ClusterLauncher, LocalLauncher
from lightning_adam_mini.cli.compare.process import Interruption
from lightning_adam_mini.cli.compare.runner import train_all
from lightning_adam_mini.cli.compare.spec import parse_options, read_plan
from lightning_adam_mini.cli.compare.status import last_error, read_status, status_after, write_status
from lightning_adam_mini.cli.main import main
from tiny_runs import RECIPE, error_line

STAND_IN = (sys.executable, stand_in_fit.__file__)

# `adam-mini compare` as a process of its own, with the stand-in in place of `adam-mini fit`.
COMPARE = """
import sys
from lightning_adam_mini.cli.compare import command, job
command.first_error = lambda commands, folder: None
command.report = lambda arguments: 0
command.checkout_commit = lambda file: None
job.program = lambda: [sys.executable, sys.argv[1]]
from lightning_adam_mini.cli.main import main
sys.exit(main(["compare", *sys.argv[2:]]))
"""


def stand_in_job(folder, optimizer="AdamW", lr=1e-3, seed=0, steps=4, **others):
    arguments = ("fit", "--optimizer", optimizer, f"--optimizer.lr={lr}", f"--seed_everything={seed}")
    arguments += (f"--run_dir={folder}", f"--trainer.max_steps={steps}")
    run = Run("tiny", optimizer, lr, seed)
    return Job(
        run=run, arguments=arguments, folder=folder, working_folder=folder.parent, threads=1, program=STAND_IN, **others
    )


def begun(folder, checkpoint):
    """A run folder of `stand_in_job` with a checkpoint."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / checkpoint).write_text("2")
    write_status(folder, {"status": "running", "fingerprint": stand_in_job(folder).fingerprint})
    return folder


def steps_in(folder):
    path = folder / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not Path(f"/proc/{pid}/stat").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def test_a_run_that_finishes(tmp_path):
    status = stand_in_job(tmp_path / "run")()
    assert status == read_status(tmp_path / "run")
    assert (status["status"], status["exit_code"], status["message"], status["starts"]) == ("done", 0, "", 1)
    assert status["command"][:3] == ["adam-mini", "fit", "--optimizer"]
    assert status["wall_seconds"] > 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["hardware"]["threads"] == 1
    assert stand_in_job(tmp_path / "run")() == status, "what is done is not run again"


@pytest.mark.parametrize(
    ("options", "word", "code", "expected"),
    [
        ({"optimizer": "SGD"}, "failed", 1, "SGD cannot train this model"),
        ({"lr": 2.0}, "diverged", 3, "training has diverged: the training loss is not finite at step 2"),
    ],
)
def test_a_run_that_does_not(tmp_path, options, word, code, expected):
    status = stand_in_job(tmp_path / "run", **options)()
    assert (status["status"], status["exit_code"], status["message"]) == (word, code, expected)
    again = stand_in_job(tmp_path / "run", **options)()
    assert again.get("starts") == (2 if word == "failed" else 1), "failed runs are tried again, diverged ones are not"


@pytest.mark.slow
def test_a_run_that_takes_too_long_goes_on_at_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setenv("STAND_IN_STEP", "0.2")
    status = stand_in_job(tmp_path / "run", steps=30, timeout=2.0)()
    assert status["status"] == "timeout"
    taken = steps_in(tmp_path / "run")
    assert 0 < len(taken) < 30
    monkeypatch.setenv("STAND_IN_STEP", "0")
    status = stand_in_job(tmp_path / "run", steps=30, timeout=60.0)()
    assert (status["status"], status["starts"]) == ("done", 2)
    assert steps_in(tmp_path / "run") == list(range(1, 31)), "no step twice"


def test_an_interrupted_run_goes_on_at_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setenv("STAND_IN_STEP", "0.1")
    interruption, folder = Interruption(), tmp_path / "run"
    threading.Thread(target=lambda: (wait_for(lambda: steps_in(folder)), interruption.stop.set()), daemon=True).start()
    assert stand_in_job(folder, steps=50)(interruption)["status"] == "interrupted"
    monkeypatch.setenv("STAND_IN_STEP", "0")
    assert stand_in_job(folder, steps=50)()["status"] == "done"
    assert steps_in(folder) == list(range(1, 51))


@pytest.mark.slow
def test_a_run_that_does_not_stop_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "GRACE_SECONDS", 0.3)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    job = stand_in_job(tmp_path / "run", timeout=2.0)
    job = Job(**{**vars(job), "program": (sys.executable, "-c", deaf)})
    assert job()["status"] == "timeout"


def test_an_end_without_a_result_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("STAND_IN_RESULT", "no")
    folder = begun(tmp_path / "run", "last.ckpt")
    status = stand_in_job(folder)()
    assert (status["status"], status["message"]) == ("failed", "it ended without a result.json")
    assert [path.name for path in folder.glob("checkpoints*")] == ["checkpoints.unused-1"]
    monkeypatch.setenv("STAND_IN_RESULT", "yes")
    assert stand_in_job(folder)()["status"] == "done"


def test_a_run_that_was_killed_before_its_last_checkpoint_begins_anew(tmp_path):
    folder = begun(tmp_path / "run", "best-step=2.ckpt")
    status = stand_in_job(folder)()
    assert status["status"] == "done"
    assert "--ckpt_path=last" not in status["command"]
    assert (folder / "checkpoints.unused-1" / "best-step=2.ckpt").exists()


@pytest.mark.parametrize(
    ("exit_code", "stopped", "result", "status"),
    [
        (0, None, {"primary_metric": {"metric": "a", "value": 1.5}}, "done"),
        (0, None, {"primary_metric": {"metric": "a", "value": None}, "metrics": {"a": None}}, "diverged"),
        (0, None, {"primary_metric": {"metric": "a", "value": None}, "metrics": {}}, "failed"),
        (0, None, None, "failed"),
        (0, "timeout", {"primary_metric": {"metric": "a", "value": 1.5}}, "done"),  # it finished all the same
        (3, None, None, "diverged"),
        (1, None, None, "failed"),
        (143, "interrupted", None, "interrupted"),
        (130, None, None, "interrupted"),  # somebody stopped only this run
        (-15, None, None, "interrupted"),
        (143, "timeout", None, "timeout"),
        (-9, "timeout", None, "timeout"),
        (-9, None, None, "failed"),
        (-11, None, None, "failed"),
    ],
)
def test_how_a_run_ended(tmp_path, exit_code, stopped, result, status):
    if result is not None:
        (tmp_path / "result.json").write_text(json.dumps(result))
    word, message = status_after(exit_code, tmp_path, log_start=0, stopped=stopped)
    assert word == status
    assert bool(message) == (status != "done")
    if exit_code == -9 and stopped is None:
        assert message == "its process was killed by SIGKILL; is memory short?"


def test_the_line_that_says_why(tmp_path):
    log = tmp_path / "log.txt"
    assert last_error(log).startswith("it left no log")
    log.write_text("adam-mini: error: of an earlier start\n")
    start = log.stat().st_size
    with log.open("a") as file:
        file.write("Traceback\n  x\nRuntimeError: out of memory\n\n")
    assert last_error(log, start) == "RuntimeError: out of memory"
    with log.open("a") as file:
        file.write("adam-mini: error: lr must be\nlast words\n")
    assert last_error(log, start) == "lr must be"
    assert last_error(log, log.stat().st_size) == "its log is empty"


def test_a_folder_is_free_when_the_process_of_a_killed_comparison_has_gone(tmp_path, monkeypatch):
    hold = "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
    hold += "print(1, flush=True); time.sleep(60)"
    script = [sys.executable, "-c", hold, str(tmp_path / process.LOCK_NAME)]
    with subprocess.Popen(script, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        monkeypatch.setattr(process, "GRACE_SECONDS", -29.8)
        status = stand_in_job(tmp_path)()
        assert (status["status"], "another process still trains there" in status["message"]) == ("failed", True)
        assert not (tmp_path / "status.json").exists(), "it is the other's folder"
        holder.kill()
    process.wait_until_free(tmp_path)


def test_status_has_the_circumstances(tmp_path):
    status = stand_in_job(tmp_path / "run", facts={"num_jobs": 3, "launcher": "local", "commit": "abc"})()
    assert (status["threads"], status["num_jobs"], status["launcher"], status["commit"]) == (1, 3, "local", "abc")


@pytest.mark.parametrize("trace", ["metrics.jsonl", "checkpoints/last.ckpt"])
@pytest.mark.parametrize("other", [{}, {"fingerprint": "another"}, {"fingerprint": "another", "status": "done"}])
def test_a_folder_with_another_run_is_left_as_it_is(tmp_path, trace, other):
    path = tmp_path / "run" / trace
    path.parent.mkdir(parents=True)
    path.write_text("2")
    if other:
        write_status(tmp_path / "run", {"status": "running", **other})
    job = stand_in_job(tmp_path / "run")
    before = read_status(tmp_path / "run")
    assert job() == {
        "status": "failed",
        "message": f"{job.folder} holds another run; remove it, or choose another --out",
    }
    assert read_status(tmp_path / "run") == before
    assert path.read_text() == "2"
    assert not job.is_finished()


def test_fingerprints_are_of_what_is_trained(tmp_path):
    def fingerprint(digest, *options):
        job = stand_in_job(tmp_path, digest=digest)
        return Job(**{**vars(job), "arguments": ("fit", *options)}).fingerprint

    first = fingerprint("1", "--config", "a.yaml", "--run_dir=here", "--optimizer.lr=1")
    assert first == fingerprint("1", "--config", "/b/a.yaml", "--run_dir=there", "--optimizer.lr=1", "--ckpt_path=last")
    assert first != fingerprint("2", "--config", "a.yaml", "--run_dir=here", "--optimizer.lr=1")
    assert first != fingerprint("1", "--config", "a.yaml", "--run_dir=here", "--optimizer.lr=2")


def test_finished_runs_of_earlier_versions_are_taken(tmp_path):
    job = stand_in_job(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    write_status(tmp_path, {"status": "done"})
    assert job.is_finished()
    assert job() == {"status": "done"}
    write_status(tmp_path, {"status": "interrupted"})
    assert job()["status"] == "failed"


def test_other_ranks_do_not_outlive_the_first(tmp_path):
    orphan = tmp_path / "orphan"
    code = (
        "import subprocess, sys; from pathlib import Path; "
        "rank = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        f"Path({str(orphan)!r}).write_text(str(rank.pid)); sys.exit(1)"
    )
    job = Job(**{**vars(stand_in_job(tmp_path / "run")), "program": (sys.executable, "-c", code)})
    assert job()["status"] == "failed"
    wait_for(lambda: not is_alive(int(orphan.read_text())), seconds=10)


def test_a_job_about_to_be_stopped_ends_its_process_and_is_queued_again(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setattr(process, "GRACE_SECONDS", 0.3)
    ready = tmp_path / "ready"
    deaf = (
        "import signal, time; from pathlib import Path; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"Path({str(ready)!r}).touch(); time.sleep(60)"
    )
    job = Job(**{**vars(stand_in_job(tmp_path / "run")), "program": (sys.executable, "-c", deaf)})
    thread = threading.Thread(target=job, daemon=True)
    thread.start()
    wait_for(ready.exists)
    assert job.checkpoint().function is job
    thread.join(30)
    assert not thread.is_alive()


def recorded(launcher, jobs, interruption=None, on_start=lambda: None):
    """Statuses by folder, with the most jobs that ran at a time."""
    running, most, statuses = set(), [], {}

    def started(job):
        running.add(job.folder)
        most.append(len(running))
        on_start()

    def ended(job, status):
        running.discard(job.folder)
        statuses[job.folder.name] = status["status"]

    train_all(jobs, launcher, interruption or Interruption(), SimpleNamespace(started=started, ended=ended))
    return statuses, max(most, default=0)


class Counted:
    """A job that notes how many of its kind run at a time."""

    at_a_time = 0
    most = 0
    lock = threading.Lock()

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, interruption, **environment):
        with self.lock:
            Counted.at_a_time += 1
            Counted.most = max(self.most, self.at_a_time)
        time.sleep(0.05)
        with self.lock:
            Counted.at_a_time -= 1
        return {"status": "done"}


def test_local_runs_two_at_a_time(tmp_path):
    statuses, _ = recorded(LocalLauncher(2, 1), [Counted(tmp_path / str(number)) for number in range(6)])
    assert len(statuses) == 6
    assert Counted.most == 2


def test_local_returns_statuses_and_assigns_devices(tmp_path):
    jobs = [stand_in_job(tmp_path / name, **options) for name, options in {"a": {}, "b": {"optimizer": "SGD"}}.items()]
    jobs += [stand_in_job(tmp_path / "c", lr=3.0), stand_in_job(tmp_path / "d")]
    statuses, _ = recorded(LocalLauncher(2, 1), jobs)
    assert statuses == {"a": "done", "b": "failed", "c": "diverged", "d": "done"}
    seen = "import os, sys; sys.exit('devices ' + os.environ['CUDA_VISIBLE_DEVICES'])"
    jobs = [
        Job(**{**vars(job), "program": (sys.executable, "-c", seen), "folder": tmp_path / f"gpu{number}"})
        for number, job in enumerate(jobs)
    ]
    recorded(LocalLauncher(2, 1, ("4", "7")), jobs)
    messages = [read_status(job.folder)["message"] for job in jobs]
    assert set(messages) <= {"devices 4", "devices 7"}


def test_an_error_stops_the_others_and_surfaces(tmp_path):
    interruption, seen = Interruption(), []

    class Broken(Counted):
        def __call__(self, interruption, **environment):
            raise OSError("no space left on device")

    class Waiting(Counted):
        def __call__(self, interruption, **environment):
            seen.append(interruption.stop.wait(30))
            return {"status": "interrupted"}

    jobs = [Waiting(tmp_path / "a"), Broken(tmp_path / "b"), Counted(tmp_path / "c")]
    with pytest.raises(OSError, match="no space left"):
        recorded(LocalLauncher(2, 1), jobs, interruption)
    assert seen == [True]


def test_every_job_is_stopped_although_one_cannot_be(tmp_path):
    stopped = []

    class Handle(SimpleNamespace):
        def done(self):
            return False

        def stop(self):
            stopped.append(self.job.folder.name)
            if self.job.folder.name == "b":
                raise OSError("no space left on device")
            return {"status": "interrupted"}

    interruption = Interruption()
    launcher = SimpleNamespace(num_jobs=None, poll_seconds=0.01, start=lambda job, _: Handle(job=job))
    progress = SimpleNamespace(started=lambda job: job.folder.name == "c" and interruption.stop.set(), ended=print)
    jobs = [Counted(tmp_path / name) for name in "abcd"]
    with pytest.raises(OSError, match="no space left"):
        train_all(jobs, launcher, interruption, progress)
    assert stopped == ["a", "b", "c"]


def test_nothing_starts_after_an_interruption(tmp_path):
    interruption = Interruption()
    interruption.stop.set()
    assert recorded(LocalLauncher(2, 1), [stand_in_job(tmp_path / "a")], interruption) == ({}, 0)
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["local", "debug"])
def test_submitit(tmp_path, cluster):
    pytest.importorskip("submitit")
    jobs = [stand_in_job(tmp_path / "a"), stand_in_job(tmp_path / "b", lr=2.0), stand_in_job(tmp_path / "c", "SGD")]
    launcher = ClusterLauncher(2, 1, tmp_path / "jobs", {"cluster": cluster, "timeout_min": 5}, poll_seconds=0.2)
    statuses, most = recorded(launcher, jobs)
    assert statuses == {"a": "done", "b": "diverged", "c": "failed"}
    assert most <= 2


def test_a_job_that_its_cluster_loses_has_failed(tmp_path):
    pytest.importorskip("submitit")
    lost = Job(**{**vars(stand_in_job(tmp_path / "a")), "program": ("/nowhere/python",)})
    launcher = ClusterLauncher(1, 1, tmp_path / "jobs", {"cluster": "local"}, poll_seconds=0.2)
    statuses, _ = recorded(launcher, [lost])
    assert statuses == {"a": "failed"}
    assert "its cluster job" in read_status(tmp_path / "a")["message"]


def test_submitit_refuses_options_that_it_does_not_know(tmp_path):
    pytest.importorskip("submitit")
    with pytest.raises(ValueError, match=r"--launcher-options: .*timeout_min.*expected type"):
        ClusterLauncher(1, 1, tmp_path, {"cluster": "local", "timeout_min": "soon"}).cluster()
    with pytest.raises(ValueError, match=r"--launcher-options: .*slrm_partition"):
        ClusterLauncher(1, 1, tmp_path, {"cluster": "local", "slrm_partition": "x"}).cluster()


def test_submitit_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"pip install 'lightning-adam-mini\[cluster\]'"):
        ClusterLauncher(1, 1, tmp_path).cluster()


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Programs that look like those of SLURM; `sbatch` accepts one job, and `scancel` notes what it cancels."""
    pytest.importorskip("submitit")
    programs = {
        "srun": "exit 0",
        "sacct": "exit 0",
        "sbatch": f"test -e {tmp_path}/used && echo 'no more jobs' >&2 && exit 1; touch {tmp_path}/used; "
        "echo Submitted batch job 7",
        "scancel": f"echo $1 >> {tmp_path}/cancelled",
    }
    for name, script in programs.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")


def test_a_refused_job_cancels_the_others(tmp_path, slurm):
    launcher = ClusterLauncher(None, None, tmp_path / "jobs")
    jobs = [stand_in_job(tmp_path / "a"), stand_in_job(tmp_path / "b", seed=1)]
    with pytest.raises(ValueError, match=r"a job could not be submitted, so those that were are cancelled: .*no more"):
        recorded(launcher, jobs)
    assert (tmp_path / "cancelled").read_text() == "7\n"
    assert read_status(tmp_path / "a")["status"] == "interrupted"
    assert read_status(tmp_path / "b")["status"] == "pending"
    assert stand_in_job(tmp_path / "a")()["status"] == "done", "the next start runs it"


def test_interrupted_jobs_are_cancelled_and_noted(tmp_path, slurm):
    interruption = Interruption()
    launcher = ClusterLauncher(1, None, tmp_path / "jobs", poll_seconds=0.1)
    jobs = [stand_in_job(tmp_path / "a"), stand_in_job(tmp_path / "b", seed=1)]
    assert recorded(launcher, jobs, interruption, interruption.stop.set) == ({"a": "interrupted"}, 1)
    assert (tmp_path / "cancelled").read_text() == "7\n"
    assert read_status(tmp_path / "a")["status"] == "interrupted"
    assert not (tmp_path / "b").exists()


def test_what_is_over_is_not_noted_as_cancelled(tmp_path):
    job = stand_in_job(tmp_path)
    done = job()
    assert job.note("interrupted", "its job was cancelled") == done == read_status(tmp_path)


def test_slurm_waits_for_the_checkpoint(tmp_path, slurm):
    launcher = ClusterLauncher(None, None, tmp_path / "jobs")
    assert launcher.cluster() == "slurm"
    assert launcher.executor(tmp_path / "jobs").parameters["signal_delay_s"] > process.GRACE_SECONDS


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "all at once, each with the threads of its job"),
        (["--launcher-options", "cpus_per_task=6"], "all at once, each with 6 thread(s)"),
        (
            ["--jobs", "3", "--threads", "2", "--launcher-options", "cpus_per_task=6"],
            "3 at a time, each with 2 thread(s)",
        ),
        (
            ["--launcher-options", "cluster=local", "--threads", "1", "--jobs", "2"],
            "2 at a time, each with 1 thread(s)",
        ),
    ],
)
def test_resources_of_a_cluster(comparing, slurm, capsys, options, expected):
    assert comparing("tiny.yaml", "--launcher", "submitit", *options, "--dry-run") == (0, {})
    assert expected in capsys.readouterr().out
    assert not Path("out").exists()


def test_a_job_may_decide_its_threads(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    job = Job(**{**vars(stand_in_job(tmp_path / "run")), "threads": None})
    assert job()["threads"] is None
    assert json.loads((tmp_path / "run" / "result.json").read_text())["hardware"]["threads"] == 5


@pytest.fixture
def comparing(tmp_path, monkeypatch):
    """`adam-mini compare` in this process, with the stand-in; returns the exit code and the statuses by folder."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(RECIPE), "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "first_error", lambda commands, folder: None)
    monkeypatch.setattr(command, "report", lambda arguments: 0)
    monkeypatch.setattr(command, "checkout_commit", lambda file: None)  # it takes longer than the runs
    monkeypatch.setattr(job_module, "program", lambda: list(STAND_IN))

    def compare(*arguments):
        code = main(["compare", *arguments, "--out", "out"])
        folders = [path.parent for path in sorted(Path("out").rglob("status.json"))]
        return code, {str(folder.relative_to("out/tiny")): read_status(folder) for folder in folders}

    return compare


@pytest.fixture
def _untrained(monkeypatch):
    """For tests of plans, which need no run."""
    monkeypatch.setattr(command.GridRunner, "train", lambda runner, interruption: [])


GRID = ("tiny.yaml", "--optimizers", "AdamW", "AdamMini", "--lr", "1e-4", "1e-3")
ONE_RUN = ("tiny.yaml", "--optimizers", "AdamW", "--lr", "1e-4", "--seeds", "1")


def test_two_stages_and_extension(comparing, capsys):
    code, statuses = comparing(*GRID, "--seeds", "3", "--tuning-seeds", "1")
    assert code == 0
    assert {status["status"] for status in statuses.values()} == {"done"}
    assert set(statuses) == {
        f"{optimizer}/{place}"
        for optimizer in ("AdamW", "AdamMini")
        for place in ("lr_1e-4/seed_0", "lr_1e-3/seed_0", "lr_1e-3/seed_1", "lr_1e-3/seed_2")
    }
    printed = capsys.readouterr().out
    assert "1 recipe(s) x 2 optimizer(s) x 2 learning rate(s) x 1 tuning seed(s): 4 runs" in printed
    assert "then 2 more seed(s) at each best learning rate: 4 runs; 8 in all" in printed
    assert "[8/8]" in printed

    code, more = comparing("--optimizers", "Adam")
    assert code == 0
    assert len(more) == 12
    assert all(more[name] == status for name, status in statuses.items()), "what was done is not run again"


def test_an_optimizer_that_cannot_run_is_tried_once_at_each_start(comparing):
    for starts in (1, 2):
        _, statuses = comparing("tiny.yaml", "--optimizers", "AdamW", "SGD", "--lr", "1e-3", "2", "--seeds", "1")
        assert {name: status["status"] for name, status in statuses.items()} == {
            "AdamW/lr_1e-3/seed_0": "done",
            "AdamW/lr_2e0/seed_0": "diverged",
            "SGD/lr_1e-3/seed_0": "failed",
            "SGD/lr_2e0/seed_0": "failed",
        }
        assert statuses["SGD/lr_1e-3/seed_0"]["starts"] == starts
        assert statuses["AdamW/lr_2e0/seed_0"]["starts"] == 1


def test_dry_run_leaves_nothing(comparing, tmp_path, capsys):
    code, statuses = comparing(*GRID, "--seeds", "2", "--dry-run")
    assert (code, statuses) == (0, {})
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().out.count("adam-mini fit --config") == 8


@pytest.mark.parametrize(
    ("options", "code", "expected"),
    [
        (["--seeds", "0"], 2, "--seeds 0: give their number"),
        (["--seeds", "1", "1"], 2, "a seed is given twice"),
        (["--tuning-seeds", "0"], 2, "--tuning-seeds 0"),
        (["--jobs", "0"], 2, "--jobs 0: at least 1"),
        (["--timeout", "-1"], 2, "--timeout -1.0: a positive number"),
        (["--lr-of", "AdamW"], 2, "--lr-of AdamW: write LABEL LR LR"),
        (["--launcher-options", "cluster=local"], 2, "--launcher-options are those of --launcher submitit"),
        (["--optimizer", "AdamW"], 2, "--optimizer"),
        (["--report-only"], 2, "--report-only"),
        (["--launcher", "submitit", "--launcher-options", "cluster=nowhere"], 1, "executor named nowhere"),
        (["--optimizers", "AdamMni"], 1, "did you mean AdamMini"),
    ],
)
def test_wrong_options(comparing, capsys, options, code, expected):
    assert comparing("tiny.yaml", *options) == (code, {})
    assert expected in error_line(capsys)
    assert not Path("out").exists()


def test_nothing_to_continue(comparing, capsys):
    assert comparing() == (1, {})
    assert "holds no comparison to continue" in error_line(capsys)


@pytest.mark.usefixtures("_untrained")
def test_a_changed_recipe_or_option_is_refused(comparing, capsys):
    assert comparing(*GRID, "--seeds", "1", "--set", "trainer.max_steps=3")[0] == 0
    assert comparing(*GRID, "--seeds", "1", "--set", "trainer.max_steps=4")[0] == 1
    assert "began with --set trainer.max_steps=3" in error_line(capsys)
    Path("tiny.yaml").write_text(yaml.safe_dump(RECIPE | {"seed_everything": 7}), "utf-8")
    assert comparing("--seeds", "2")[0] == 1
    assert "has changed since" in error_line(capsys)


def test_runs_train_from_the_copy_of_their_recipe(comparing, capsys):
    code, statuses = comparing(*ONE_RUN)
    copy = Path("out/recipes/tiny.yaml")
    assert code == 0
    assert copy.read_bytes() == Path("tiny.yaml").read_bytes()
    for status in statuses.values():
        assert status["command"][status["command"].index("--config") + 1] == str(copy.resolve())
    copy.write_text("model: x")
    assert comparing("--seeds", "2")[0] == 1
    assert "is not the recipe that this comparison began with" in error_line(capsys)


def test_packaged_recipes_keep_their_folders(tmp_path):
    recipe = read_recipe("llm/gpt2_tiny")
    copy_recipe(recipe, tmp_path)
    assert (tmp_path / "recipes/llm/gpt2_tiny.yaml").read_bytes() == recipe.path.read_bytes()
    copied = read_recipe("llm/gpt2_tiny", tmp_path)
    assert (copied.name, copied.digest, copied.folder) == ("llm/gpt2_tiny", recipe.digest, "llm__gpt2_tiny")


def test_runs_without_a_plan_are_refused(comparing, capsys):
    (Path("out") / "tiny" / "AdamMini").mkdir(parents=True)
    assert comparing(*GRID) == (1, {})
    assert "AdamMini holds runs, but" in error_line(capsys)
    assert not Path("out/plan.json").exists()


def test_other_seeds_wait_for_all_tuning_runs(comparing, capsys, monkeypatch):
    options = ("tiny.yaml", "--optimizers", "AdamW", "--lr", "1e-4", "1e-3", "--seeds", "2", "--tuning-seeds", "1")
    monkeypatch.setenv("STAND_IN_FAILS_AT", "0.001")
    code, statuses = comparing(*options)
    assert code == 1
    assert {name: status["status"] for name, status in statuses.items()} == {
        "AdamW/lr_1e-4/seed_0": "done",
        "AdamW/lr_1e-3/seed_0": "failed",
    }
    assert "AdamW: the other seeds wait, 1 tuning run(s) have no result yet" in capsys.readouterr().out
    monkeypatch.delenv("STAND_IN_FAILS_AT")
    code, statuses = comparing(*options)
    assert (code, statuses["AdamW/lr_1e-3/seed_1"]["status"]) == (0, "done")
    assert "AdamW/lr_1e-4/seed_1" not in statuses


def test_a_run_that_could_not_start_sets_the_exit_code(comparing):
    assert comparing(*ONE_RUN)[0] == 0
    Path("out/tiny/AdamW/lr_1e-4/seed_1").mkdir()
    Path("out/tiny/AdamW/lr_1e-4/seed_1/metrics.jsonl").touch()
    assert comparing("--seeds", "2")[0] == 1


def test_an_interrupted_run_alone_sets_the_exit_code(comparing, monkeypatch):
    monkeypatch.setenv("STAND_IN_INTERRUPTED", "1")
    code, statuses = comparing(*ONE_RUN)
    assert [status["status"] for status in statuses.values()] == ["interrupted"]
    assert code == 1


@pytest.mark.usefixtures("_untrained")
def test_learning_rates_of_a_later_start_do_not_replace_those_that_ran(comparing, capsys):
    assert comparing(*GRID, "--seeds", "1")[0] == 0
    assert comparing("--lr-of", "AdamMini", "1e-2", "3e-3")[0] == 1
    assert "same number of learning rates, not AdamW 2, AdamMini 4" in error_line(capsys)


@pytest.mark.usefixtures("_untrained")
def test_one_command_for_what_several_began(comparing):
    comparing(*GRID, "--seeds", "2", "--tuning-seeds", "1", "--set", "trainer.max_steps=3")
    comparing(
        "--optimizers", "mine=AdamW:betas=[0.9,0.99]", "--lr-of", "mine", "1e-2", "2e-2", "--reference", "AdamMini"
    )
    comparing("--seeds", "2", "5")
    plan = read_plan(Path("out"))
    assert plan.seeds == (0, 1, 2, 5)
    assert plan.command[-2:] == ("--out", "out")
    again = tuple("again" if word == "out" else word for word in plan.command[2:])
    assert parse_options(again).out == "again"
    assert main(["compare", *again]) == 0
    changed = ("created", "command")
    first, second = (
        {k: v for k, v in vars(one).items() if k not in changed} for one in (plan, read_plan(Path("again")))
    )
    assert first == second


def test_the_commit_of_a_checkout_alone(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ("git", "-C", tmp_path, *identity, *arguments), capture_output=True, text=True, check=True
        )

    (tmp_path / "kept.py").write_text("1")
    (tmp_path / "installed.py").write_text("1")
    assert checkout_commit(tmp_path / "kept.py") is None
    git("init")
    git("add", "kept.py")
    git("commit", "-m", "one")
    commit = git("rev-parse", "HEAD").stdout.strip()
    assert checkout_commit(tmp_path / "kept.py") == commit
    assert checkout_commit(tmp_path / "installed.py") is None, "it lies in the checkout of another project"
    (tmp_path / "kept.py").write_text("2")
    assert checkout_commit(tmp_path / "kept.py") == f"{commit}-dirty"


def start_compare(tmp_path, *arguments):
    """A comparison as a process of its own, once its first two runs have taken a step."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMPARE, stand_in_fit.__file__, *arguments, "--out", "out", "--jobs", "2"],
        cwd=tmp_path,
        env={**os.environ, "STAND_IN_STEP": "0.2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    folders = [tmp_path / "out" / "tiny" / "AdamW" / f"lr_{lr}" / "seed_0" for lr in ("1e-4", "1e-3")]
    wait_for(lambda: all(steps_in(folder) for folder in folders) or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    return process, folders


def pids_in(folder):
    return {json.loads(line)["pid"] for line in (folder / "metrics.jsonl").read_text().splitlines()}


TWO_LONG_RUNS = (*ONE_RUN[:4], "1e-4", "1e-3", "--seeds", "1", "--set", "trainer.max_steps=50")


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stop_leaves_no_process_and_the_next_start_goes_on(comparing, tmp_path, signum):
    process, folders = start_compare(tmp_path, *TWO_LONG_RUNS)
    process.send_signal(signum)
    out, err = process.communicate(timeout=300)
    if signum != signal.SIGKILL:
        assert process.returncode == 128 + signum, err
        assert "Continue with: adam-mini compare --out out" in out
        assert {read_status(folder)["status"] for folder in folders} == {"interrupted"}
    pids = {pid for folder in folders for pid in pids_in(folder)}
    wait_for(lambda: not any(is_alive(pid) for pid in pids))
    assert all((folder / "checkpoints" / "last.ckpt").exists() for folder in folders), "each has saved its step"
    assert comparing("--jobs", "2")[0] == 0
    for folder in folders:
        assert read_status(folder)["status"] == "done"
        assert steps_in(folder) == list(range(1, 51)), "no step twice"


def test_one_comparison_at_a_time(comparing, capsys):
    Path("out").mkdir()
    with FileLock("out/.compare.lock"):
        assert comparing(*ONE_RUN) == (1, {})
    assert "another `adam-mini compare` runs there" in error_line(capsys)
    assert comparing(*ONE_RUN)[0] == 0


def test_no_guard_without_a_comparison(monkeypatch):
    for name in ("ADAM_MINI_COMPARE_PIPE", "ADAM_MINI_COMPARE_FOLDER"):
        monkeypatch.delenv(name, raising=False)
    before = threading.active_count()
    process.guard()
    assert threading.active_count() == before
