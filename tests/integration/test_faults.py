"""Runs that are killed, or queued again, end with the weights of a run that nobody disturbed."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from checkout import ROOT
from lightning_adam_mini.cli.run_folder import last_checkpoint
from lightning_adam_mini.tasks.checkpoints.saving import AtomicCheckpointIO
from tiny_runs import assert_same_state
from two_nodes import members, start_in_session, wait_for_all

ENOUGH = 150  # seconds, on a machine with other work
KILLS = 4
STEPS_BETWEEN_KILLS = 4

FILE = ["--trainer.strategy", "fsdp2"]
FOLDER = ["--trainer.strategy", "lightning_adam_mini.tasks.parallel.FSDP2"]
FOLDER += ["--trainer.strategy.save_distributed_checkpoint", "true"]
OFTEN = ["--trainer.val_check_interval", 2, "--trainer.log_every_n_steps", 1]


def fit(folder, run_dir, *options, **environment):
    command = [sys.executable, "-m", "lightning_adam_mini.cli.main", "fit", "--config", "tiny.yaml"]
    command += ["--run_dir", run_dir, "--ckpt_path", "last", "--trainer.devices", 2, "--data.batch_size", 2]
    return start_in_session([*command, *OFTEN, *options], folder, **environment)


def read(path):
    return AtomicCheckpointIO().load_checkpoint(path, weights_only=True)


def wait_until(condition, process):
    """Whether it has come true before the process ended."""
    deadline = time.monotonic() + ENOUGH
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.001)
    return False


class Metrics:
    """The steps that a run logs from now on."""

    def __init__(self, run_dir):
        self.path = Path(run_dir) / "metrics.jsonl"
        self.seen = self.path.stat().st_size if self.path.exists() else 0

    def last_step(self):
        if not self.path.exists():
            return 0
        with self.path.open() as file:
            file.seek(self.seen)
            lines = [line for line in file.readlines() if line.endswith("\n")]
        return json.loads(lines[-1])["step"] if lines else 0


def half_written(run_dir):
    folder = Path(run_dir) / "checkpoints"
    return {path.name for path in folder.iterdir() if path.name.startswith(".")} if folder.is_dir() else set()


def kill(victim, process):
    """Kill one rank or all; Lightning's first rank starts the second."""
    for pid in members(process.pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            is_second = b"\0LOCAL_RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
            if victim in (int(is_second), "all"):
                os.kill(pid, signal.SIGKILL)


def train_through_kills(folder, kills, seed, *options):
    """Kill a run at random moments, each second one while it saves, and start it again each time.

    Returns:
        How many kills there were, how many within a save, and how long it took all processes to end, in seconds.
    """
    draw = random.Random(seed)
    counts, slowest, step_saved = Counter(), 0.0, 0
    total = STEPS_BETWEEN_KILLS * kills + 20
    options = [*options, "--trainer.max_steps", total]
    for number in range(kills):
        metrics, process = Metrics(folder / "run"), fit(folder, "run", *options)
        target = STEPS_BETWEEN_KILLS * number + draw.randint(1, STEPS_BETWEEN_KILLS)
        assert wait_until(lambda m=metrics, t=target: m.last_step() >= t, process), process.log.read_text()[-3000:]
        if number % 2:
            assert wait_until(lambda: half_written(folder / "run"), process), process.log.read_text()[-3000:]
        time.sleep(draw.uniform(0, 0.003 if number % 2 else 0.05))
        victim, before = draw.choice([0, 1, "all"]), half_written(folder / "run")
        kill(victim, process)
        began = time.monotonic()
        counts["during a save"] += bool(before & half_written(folder / "run"))
        (code,) = wait_for_all([process], ENOUGH)
        assert code != 0
        slowest = max(slowest, time.monotonic() - began)
        counts[f"of {victim}"] += 1
        path = last_checkpoint(folder / "run")  # as the next start finds it
        step = read(path)["global_step"] if path else 0
        assert step >= step_saved, "a checkpoint was lost"
        step_saved = step
    process = fit(folder, "run", *options)
    assert wait_for_all([process], ENOUGH) == [0], process.log.read_text()[-3000:]
    return {"kills": kills, **counts, "slowest end": slowest, "last step saved by a killed run": step_saved}


@pytest.mark.slow
@pytest.mark.parametrize("options", [FILE, FOLDER], ids=["file", "folder"])
def test_a_run_that_is_killed_again_and_again_equals_one_that_is_not(work_dir, options):
    """To the last bit; no checkpoint is lost, and no process is left."""
    figures = train_through_kills(work_dir, KILLS, 0, *options)
    assert figures["last step saved by a killed run"] > 0
    undisturbed = fit(work_dir, "whole", *options, "--trainer.max_steps", STEPS_BETWEEN_KILLS * KILLS + 20)
    assert wait_for_all([undisturbed], ENOUGH) == [0], undisturbed.log.read_text()[-3000:]
    assert not half_written("run")
    assert_same_state(*(read(work_dir / name / "checkpoints/last.ckpt") for name in ("whole", "run")))


SRUN = """#!{python}
import os, subprocess, sys

job = {{"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "train", "SLURM_NODEID": "0"}}
ranks = [{{"SLURM_PROCID": rank, "SLURM_LOCALID": rank}} for rank in "01"]
tasks = [subprocess.Popen(sys.argv[1:], env=os.environ | job | rank) for rank in ranks]
with open("tasks", "w") as file:
    file.write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/sh
echo "$*" >> scontrol.log
"""


@pytest.mark.slow
@pytest.mark.parametrize("whose", [0, 1], ids=["rank zero", "rank one"])
def test_a_job_that_slurm_queues_again(work_dir, whose):
    """The script of the page, with stand-ins for SLURM's programs; one rank gets the signal before the other."""
    page = (ROOT / "docs" / "distributed.md").read_text("utf-8")
    (script,) = re.findall(r"^```bash\n(#!/bin/bash\n.*?)^```", page, re.MULTILINE | re.DOTALL)
    asked = "--config llm/llama2_7b --trainer.num_nodes 2 --run_dir runs/llama2_7b"
    assert asked in script
    options = ["--config", "tiny.yaml", "--run_dir", "run", "--trainer.devices", 2, "--data.batch_size", 2]
    options += [*OFTEN, *FILE, "--trainer.max_steps", 60]
    (work_dir / "job.sh").write_text(script.replace(asked, " ".join(map(str, options))), "utf-8")
    (work_dir / "bin").mkdir()
    for name, program in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (work_dir / "bin" / name).write_text(program)
        (work_dir / "bin" / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = f"{work_dir / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = {"PATH": path, "SLURM_JOB_ID": "1234", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    metrics, process = Metrics(work_dir / "run"), start_in_session(["bash", "job.sh"], work_dir, **job)
    assert wait_until(lambda: metrics.last_step() >= 7, process), process.log.read_text()[-3000:]
    os.kill(int((work_dir / "tasks").read_text().split()[whose]), signal.SIGUSR1)
    wait_for_all([process], ENOUGH)
    assert (work_dir / "scontrol.log").read_text() == "requeue 1234\n", process.log.read_text()[-3000:]
    assert 7 <= read("run/checkpoints/last.ckpt")["global_step"] < 60
    assert not list((work_dir / "run").glob("hpc_ckpt*"))

    process = start_in_session(["bash", "job.sh"], work_dir, **job)
    assert wait_for_all([process], ENOUGH) == [0], process.log.read_text()[-3000:]
    undisturbed = fit(work_dir, "whole", *FILE, "--trainer.max_steps", 60)
    assert wait_for_all([undisturbed], ENOUGH) == [0], undisturbed.log.read_text()[-3000:]
    assert_same_state(*(read(work_dir / name / "checkpoints/last.ckpt") for name in ("whole", "run")))
