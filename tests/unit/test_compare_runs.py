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

import pytest
import yaml
from filelock import FileLock

import stand_in_fit
from lightning_adam_mini.cli.compare import child, command
from lightning_adam_mini.cli.compare import job as job_module
from lightning_adam_mini.cli.compare.grid import Run
from lightning_adam_mini.cli.compare.job import Interruption, Job
from lightning_adam_mini.cli.compare.launchers import Local, Submitit
from lightning_adam_mini.cli.compare.status import last_error, outcome, read_status
from lightning_adam_mini.cli.main import main
from tiny_runs import RECIPE, error_line

STAND_IN = (sys.executable, stand_in_fit.__file__)

# `adam-mini compare` as a process of its own, with the stand-in in place of `adam-mini fit`.
COMPARE = """
import sys
from lightning_adam_mini.cli.compare import command, job
command.first_error = lambda commands, folder: None
command.report = lambda arguments: 0
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


def steps_in(folder):
    path = folder / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def wait_for(condition, seconds=60):
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


def test_a_run_that_comes_to_its_end(tmp_path):
    status = stand_in_job(tmp_path / "run")()
    assert status == read_status(tmp_path / "run")
    assert (status["status"], status["exit_code"], status["message"], status["starts"]) == ("done", 0, "", 1)
    assert status["command"][:3] == ["adam-mini", "fit", "--optimizer"]
    assert status["wall_seconds"] > 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["hardware"]["threads"] == 1
    assert stand_in_job(tmp_path / "run")() == status, "what is done is not run again"


@pytest.mark.parametrize(
    ("options", "word", "code", "told"),
    [
        ({"optimizer": "SGD"}, "failed", 1, "SGD cannot train this model"),
        ({"lr": 2.0}, "diverged", 3, "training has diverged: the training loss is not finite at step 2"),
    ],
)
def test_a_run_that_does_not(tmp_path, options, word, code, told):
    status = stand_in_job(tmp_path / "run", **options)()
    assert (status["status"], status["exit_code"], status["message"]) == (word, code, told)
    again = stand_in_job(tmp_path / "run", **options)()
    assert again.get("starts") == (2 if word == "failed" else 1), "failed runs are tried again, diverged ones are not"


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


def test_a_run_that_does_not_stop_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(job_module, "GRACE_SECONDS", 0.3)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    job = stand_in_job(tmp_path / "run", timeout=2.0)
    job = Job(**{**vars(job), "program": (sys.executable, "-c", deaf)})
    assert job()["status"] == "timeout"


def test_an_end_without_a_result_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("STAND_IN_RESULT", "no")
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").write_text("2")
    status = stand_in_job(folder)()
    assert (status["status"], status["message"]) == ("failed", "it ended without a result.json")
    assert [path.name for path in folder.glob("checkpoints*")] == ["checkpoints.unused-1"]
    monkeypatch.setenv("STAND_IN_RESULT", "yes")
    assert stand_in_job(folder)()["status"] == "done"


def test_a_run_that_was_killed_before_its_last_checkpoint_begins_anew(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "best-step=2.ckpt").write_text("2")
    status = stand_in_job(folder)()
    assert status["status"] == "done"
    assert "--ckpt_path=last" not in status["command"]
    assert (folder / "checkpoints.unused-1" / "best-step=2.ckpt").exists()


@pytest.mark.parametrize(
    ("exit_code", "stopped", "result", "status"),
    [
        (0, None, {"headline": {"metric": "a", "value": 1.5}}, "done"),
        (0, None, {"headline": {"metric": "a", "value": None}, "metrics": {"a": None}}, "diverged"),
        (0, None, {"headline": {"metric": "a", "value": None}, "metrics": {}}, "failed"),
        (0, None, None, "failed"),
        (0, "timeout", {"headline": {"metric": "a", "value": 1.5}}, "done"),  # it came to its end all the same
        (3, None, None, "diverged"),
        (1, None, None, "failed"),
        (143, "interrupted", None, "interrupted"),
        (130, None, None, "interrupted"),  # somebody stopped this run alone
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
    word, message = outcome(exit_code, tmp_path, log_start=0, stopped=stopped)
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
    assert last_error(log, log.stat().st_size) == "it left no word"


def test_a_folder_is_free_when_the_process_of_a_killed_comparison_has_gone(tmp_path, monkeypatch):
    hold = "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
    hold += "print(1, flush=True); time.sleep(60)"
    script = [sys.executable, "-c", hold, str(tmp_path / child.LOCK_NAME)]
    with subprocess.Popen(script, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        monkeypatch.setattr(child, "GRACE_SECONDS", -29.8)
        status = stand_in_job(tmp_path)()
        assert (status["status"], "another process still trains there" in status["message"]) == ("failed", True)
        assert not (tmp_path / "status.json").exists(), "it is the other's folder"
        process.kill()
    child.wait_until_free(tmp_path)


def recorded(launcher, jobs, interruption=None):
    """Statuses by folder, with the most jobs that ran at a time."""
    running, most, statuses = set(), [], {}

    def started(job):
        running.add(job.folder)
        most.append(len(running))

    def ended(job, status):
        running.discard(job.folder)
        statuses[job.folder.name] = status["status"]

    launcher.train(jobs, interruption or Interruption(), started, ended)
    return statuses, max(most, default=0)


def test_local_runs_two_at_a_time_and_deals_out_devices(tmp_path):
    jobs = [stand_in_job(tmp_path / name, **options) for name, options in {"a": {}, "b": {"optimizer": "SGD"}}.items()]
    jobs += [stand_in_job(tmp_path / "c", lr=3.0), stand_in_job(tmp_path / "d")]
    statuses, most = recorded(Local(2), jobs)
    assert statuses == {"a": "done", "b": "failed", "c": "diverged", "d": "done"}
    assert most <= 3, "a thread may note the start of the next run before this one notes the end of the last"
    seen = "import os, sys; sys.exit('devices ' + os.environ['CUDA_VISIBLE_DEVICES'])"
    jobs = [
        Job(**{**vars(job), "program": (sys.executable, "-c", seen), "folder": tmp_path / f"gpu{number}"})
        for number, job in enumerate(jobs)
    ]
    recorded(Local(2, ("4", "7")), jobs)
    told = [read_status(job.folder)["message"] for job in jobs]
    assert set(told) <= {"devices 4", "devices 7"}


def test_nothing_starts_after_an_interruption(tmp_path):
    interruption = Interruption()
    interruption.stop.set()
    assert recorded(Local(2), [stand_in_job(tmp_path / "a")], interruption) == ({}, 0)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("cluster", ["local", "debug"])
def test_submitit(tmp_path, cluster):
    pytest.importorskip("submitit")
    jobs = [stand_in_job(tmp_path / "a"), stand_in_job(tmp_path / "b", lr=2.0), stand_in_job(tmp_path / "c", "SGD")]
    launcher = Submitit(tmp_path / "jobs", 2, 1, {"cluster": cluster, "timeout_min": 5}, poll_seconds=0.2)
    statuses, most = recorded(launcher, jobs)
    assert statuses == {"a": "done", "b": "diverged", "c": "failed"}
    assert most <= 2


def test_a_job_that_its_cluster_loses_has_failed(tmp_path):
    pytest.importorskip("submitit")
    lost = Job(**{**vars(stand_in_job(tmp_path / "a")), "program": ("/nowhere/python",)})
    launcher = Submitit(tmp_path / "jobs", 1, 1, {"cluster": "local"}, poll_seconds=0.2)
    statuses, _ = recorded(launcher, [lost])
    assert statuses == {"a": "failed"}
    assert "did not end well" in read_status(tmp_path / "a")["message"]


def test_submitit_refuses_options_that_it_does_not_know(tmp_path):
    pytest.importorskip("submitit")
    with pytest.raises(ValueError, match=r"--launcher-options: .*slrm_partition"):
        Submitit(tmp_path, 1, 1, {"cluster": "local", "slrm_partition": "x"}).executor()


def test_submitit_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"pip install 'lightning-adam-mini\[cluster\]'"):
        Submitit(tmp_path, 1, 1).executor()


@pytest.fixture
def comparing(tmp_path, monkeypatch):
    """`adam-mini compare` in this process, with the stand-in; returns the exit code and the statuses by folder."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(RECIPE), "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "first_error", lambda commands, folder: None)
    monkeypatch.setattr(command, "report", lambda arguments: 0)
    monkeypatch.setattr(job_module, "program", lambda: list(STAND_IN))

    def compare(*arguments):
        code = main(["compare", *arguments, "--out", "out"])
        folders = [path.parent for path in sorted(Path("out").rglob("status.json"))]
        return code, {str(folder.relative_to("out/tiny")): read_status(folder) for folder in folders}

    return compare


GRID = ("tiny.yaml", "--optimizers", "AdamW", "AdamMini", "--lr", "1e-4", "1e-3")


def test_two_stages_and_extension(comparing, capsys):
    code, statuses = comparing(*GRID, "--seeds", "3", "--tuning-seeds", "1")
    assert code == 0
    assert {status["status"] for status in statuses.values()} == {"done"}
    assert set(statuses) == {
        f"{optimizer}/{place}"
        for optimizer in ("AdamW", "AdamMini")
        for place in ("lr_1e-4/seed_0", "lr_1e-3/seed_0", "lr_1e-3/seed_1", "lr_1e-3/seed_2")
    }
    told = capsys.readouterr().out
    assert "1 recipe(s) x 2 optimizer(s) x 2 learning rate(s) x 1 tuning seed(s): 4 runs" in told
    assert "then 2 more seed(s) at each best learning rate: 4 runs; 8 in all" in told
    assert "[8/8]" in told

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
    ("options", "code", "told"),
    [
        (["--seeds", "0"], 2, "--seeds 0: give their number"),
        (["--seeds", "1", "1"], 2, "a seed is given twice"),
        (["--tuning-seeds", "0"], 2, "--tuning-seeds 0"),
        (["--jobs", "0"], 2, "--jobs 0: at least 1"),
        (["--timeout", "-1"], 2, "--timeout -1.0: a positive number"),
        (["--lr-of", "AdamW"], 2, "--lr-of AdamW: write LABEL LR LR"),
        (["--launcher-options", "cluster=local"], 2, "--launcher-options are those of --launcher submitit"),
        (["--optimizer", "AdamW"], 2, "--optimizer"),
        (["--optimizers", "AdamMni"], 1, "did you mean AdamMini"),
    ],
)
def test_wrong_options(comparing, capsys, options, code, told):
    assert comparing("tiny.yaml", *options) == (code, {})
    assert told in error_line(capsys)
    assert not Path("out").exists()


def test_nothing_to_continue(comparing, capsys):
    assert comparing() == (1, {})
    assert "holds no comparison to continue" in error_line(capsys)


def test_a_changed_recipe_or_option_is_refused(comparing, capsys):
    assert comparing(*GRID, "--seeds", "1", "--set", "trainer.max_steps=3")[0] == 0
    assert comparing(*GRID, "--seeds", "1", "--set", "trainer.max_steps=4")[0] == 1
    assert "begun with --set trainer.max_steps=3" in error_line(capsys)
    Path("tiny.yaml").write_text(yaml.safe_dump(RECIPE | {"seed_everything": 7}), "utf-8")
    assert comparing("--seeds", "2")[0] == 1
    assert "has changed since" in error_line(capsys)


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


ONE = ("tiny.yaml", "--optimizers", "AdamW", "--lr", "1e-4", "1e-3", "--seeds", "1", "--set", "trainer.max_steps=100")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stop_leaves_no_process_and_the_next_start_goes_on(comparing, tmp_path, signum):
    process, folders = start_compare(tmp_path, *ONE)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
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
        assert steps_in(folder) == list(range(1, 101)), "no step twice"


def test_one_comparison_at_a_time(comparing, capsys):
    Path("out").mkdir()
    with FileLock("out/.compare.lock"):
        assert comparing(*ONE) == (1, {})
    assert "another `adam-mini compare` runs there" in error_line(capsys)
    assert comparing(*ONE)[0] == 0


def test_no_guard_without_a_comparison(monkeypatch):
    for name in ("ADAM_MINI_COMPARE_PIPE", "ADAM_MINI_COMPARE_FOLDER"):
        monkeypatch.delenv(name, raising=False)
    before = threading.active_count()
    child.guard()
    assert threading.active_count() == before
