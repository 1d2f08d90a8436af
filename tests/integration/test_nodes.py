"""Training on two nodes: as one process, also after one of them has died or the network has gone."""

import time

import pytest
import torch

from tiny_runs import assert_same_state, checkpoint, run
from two_nodes import two_nodes, wait_for_all

# As in test_ddp: each rank has dropout of its own, and the gradient of a key's bias is rounding that Adam enlarges.
SAME = [f"--model.config.{name}=0.0" for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")]
SAME += ["--trainer.precision", "64-true"]
ENOUGH = 150  # seconds, on a machine with other work

FAULTY = """
import os, signal, time
from pathlib import Path
from lightning.pytorch import Callback


class Dies(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 8 and trainer.global_rank == int(os.environ["FAULTY_RANK"]):
            Path("died").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)


class Waits(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 8:
            Path(f"waits-{trainer.global_rank}").touch()
            while not Path("cut").exists():
                time.sleep(0.02)
"""


@pytest.fixture
def nodes(work_dir):
    with two_nodes(work_dir) as nodes:
        yield nodes


def fit_on(nodes, *options, launcher="lightning", devices=1, **environment):
    batch = ["--data.batch_size", 4 // devices]
    arguments = ["fit", "--config", "tiny.yaml", "--run_dir", "two", *SAME, *batch, *options]
    return nodes.start(*arguments, launcher=launcher, devices=devices, **environment)


def assert_trained_as_one(*options):
    """Sums of gradients come in another order: measured 3e-14."""
    assert run("fit", "--run_dir", "one", *SAME, "--data.batch_size", 8, *options) == 0
    one, two = checkpoint("one"), checkpoint("two")
    assert one["global_step"] == two["global_step"]
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], weight, rtol=1e-11, atol=1e-11)
    assert two["optimizer_states"][0]["param_groups"] == one["optimizer_states"][0]["param_groups"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "strategy", "devices"),
    [
        ("lightning", "fsdp2", 1),
        pytest.param("torchrun", "fsdp2", 1, marks=pytest.mark.slow),
        pytest.param("lightning", "hsdp", 2, marks=pytest.mark.slow),
        pytest.param("torchrun", "ddp", 1, marks=pytest.mark.slow),
    ],
)
def test_two_nodes_train_as_one(nodes, launcher, strategy, devices):
    processes = fit_on(nodes, "--trainer.strategy", strategy, launcher=launcher, devices=devices)
    codes = wait_for_all(processes, ENOUGH)
    assert codes == [0, 0], [process.log.read_text()[-3000:] for process in processes]
    reports = [process.log.read_text().count("optimizer state") for process in processes]
    assert reports == [1, 0], "one report"
    assert_trained_as_one()


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "rank"), [("lightning", 0), ("lightning", 1), ("torchrun", 1)], ids=str)
def test_a_node_that_dies_ends_the_other_and_a_second_start_goes_on(nodes, work_dir, launcher, rank):
    (work_dir / "faulty.py").write_text(FAULTY)
    environment = {"PYTHONPATH": str(work_dir), "FAULTY_RANK": str(rank)}
    sharded = ["--trainer.strategy", "fsdp2"]
    dying = [*sharded, "--trainer.callbacks+", "faulty.Dies"]
    processes = fit_on(nodes, *dying, launcher=launcher, **environment)
    codes = wait_for_all(processes, ENOUGH)
    assert (work_dir / "died").exists(), processes[0].log.read_text()[-3000:]
    assert 0 not in codes
    assert checkpoint("two")["global_step"] == 5

    processes = fit_on(nodes, *sharded, "--ckpt_path", "last", launcher=launcher)
    assert wait_for_all(processes, ENOUGH) == [0, 0], [process.log.read_text()[-3000:] for process in processes]
    assert_trained_as_one()


@pytest.mark.slow
def test_a_cable_that_is_pulled_ends_both_after_the_timeout(nodes, work_dir):
    """Neither node is told that the other is out of reach. In float32, as Lightning allows it, so to the last bit."""
    (work_dir / "faulty.py").write_text(FAULTY)
    fit = ["fit", "--config", "tiny.yaml", "--trainer.strategy", "lightning_adam_mini.tasks.parallel.FSDP2"]
    fit += ["--trainer.strategy.timeout_minutes", 0.2]
    waiting = ["--run_dir", "two", "--trainer.callbacks+", "faulty.Waits"]
    processes = nodes.start(*fit, *waiting, PYTHONPATH=str(work_dir))
    deadline = time.monotonic() + ENOUGH
    while not all((work_dir / f"waits-{rank}").exists() for rank in range(2)) and time.monotonic() < deadline:
        assert processes[0].poll() is None, processes[0].log.read_text()[-3000:]
        time.sleep(0.05)
    nodes.cut()
    (work_dir / "cut").touch()
    codes = wait_for_all(processes, ENOUGH)
    assert 0 not in codes
    assert checkpoint("two")["global_step"] == 5

    nodes.mend()
    for run_dir in ("two", "whole"):
        processes = nodes.start(*fit, "--run_dir", run_dir, "--ckpt_path", "last")
        assert wait_for_all(processes, ENOUGH) == [0, 0], [process.log.read_text()[-3000:] for process in processes]
    assert_same_state(checkpoint("whole"), checkpoint("two"))
