"""Checkpoints of sharded runs: they load on any number of ranks, and a kill or another model harms none."""

import multiprocessing
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from lightning_adam_mini.factory import AdamMini, AdamW
from lightning_adam_mini.tasks.callbacks import RunCheckpoint
from lightning_adam_mini.tasks.checkpoints.saving import AtomicCheckpointIO
from ranks import run_ranks
from sharded_fits import Hybrid, Sharded, assert_near, fit, fit_ranks
from tiny_runs import start
from two_nodes import members

pytestmark = pytest.mark.filterwarnings("ignore")

PARTS = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers")
FULL, PLAIN, HYBRID = {"full": True}, {"plain": True}, {"task": Hybrid}


def read(path):
    return AtomicCheckpointIO().load_checkpoint(path, weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Twenty steps of one process, and its validations."""
    folder = tmp_path_factory.mktemp("whole")
    (validated,) = fit_ranks(1, folder, 20, None, folder / "20.ckpt", **PLAIN)
    return read(folder / "20.ckpt"), validated


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A folder that two ranks saved after ten steps."""
    folder = tmp_path_factory.mktemp("half")
    fit_ranks(2, folder, 10, None, folder / "10.ckpt")
    return folder / "10.ckpt"


@pytest.fixture
def saved(half, tmp_path):
    return Path(shutil.copytree(half, tmp_path / "10.ckpt"))


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("ranks", "how", "others", "how_then"),
    [
        slow(2, {}, 3, {}),
        (1, PLAIN, 2, FULL),
        slow(3, FULL, 1, PLAIN),
        slow(2, {}, 1, {}),
        slow(1, {}, 2, {}),
        slow(4, {}, 1, {}),
        slow(4, HYBRID, 3, {}),
        slow(2, FULL, 4, HYBRID),
        slow(2, FULL, 3, FULL),
        slow(2, {}, 1, PLAIN),
        slow(2, PLAIN, 2, {}),
        slow(2, {}, 2, PLAIN),
    ],
)
def test_ten_steps_here_and_ten_there_are_twenty(whole, tmp_path, ranks, how, others, how_then):
    fit_ranks(ranks, tmp_path, 10, None, tmp_path / "10.ckpt", **how)
    parts_of_validations = fit_ranks(others, tmp_path, 20, tmp_path / "10.ckpt", tmp_path / "20.ckpt", **how_then)
    assert (tmp_path / "10.ckpt").is_dir() == (how in ({}, HYBRID))
    expected, validated = whole
    found = read(tmp_path / "20.ckpt")
    for part in PARTS:
        assert_near(found[part], expected[part], part)
    assert torch.tensor(parts_of_validations).mean(0).tolist() == pytest.approx(validated[2:], abs=1e-6)


@pytest.mark.slow
def test_a_full_file_is_that_of_one_process(whole, tmp_path):
    """Down to the numbers of parameters, types and the order of keys, so that nothing has to know who saved it."""
    fit_ranks(2, tmp_path, 20, None, tmp_path / "20.ckpt", **FULL)
    found, (expected, _) = read(tmp_path / "20.ckpt"), whole
    for part in PARTS:
        assert_near(found[part], expected[part], part)
    for part in (lambda saved: saved["state_dict"], lambda saved: saved["optimizer_states"][0]["state"]):
        assert list(part(found)) == list(part(expected))


def error_of(rank, world, *arguments, **options):
    try:
        fit(rank, world, *arguments, **options)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


BREAKS = {
    r"__0_0\.distcp: its checksum is not the one": lambda folder: flip(folder / "__0_0.distcp"),
    r"__1_0\.distcp: its checksum is not the one": lambda folder: flip(folder / "__1_0.distcp"),
    r"\.metadata is none of a checkpoint: its checksum": lambda folder: flip(folder / ".metadata"),
    r"meta\.pt: its checksum is not the one": lambda folder: flip(folder / "meta.pt"),
    r"it has no \.metadata": lambda folder: (folder / ".metadata").unlink(),
    r"it has no meta\.pt": lambda folder: (folder / "meta.pt").unlink(),
    r"__1_0\.distcp is missing": lambda folder: (folder / "__1_0.distcp").unlink(),
    r"__0_0\.distcp has \d+ bytes of": lambda folder: os.truncate(folder / "__0_0.distcp", 1000),
    r"cannot read the checkpoint .*: \.metadata is none": lambda folder: os.truncate(folder / ".metadata", 100),
}


@pytest.mark.slow
def test_all_ranks_end_where_the_folder_is_not_whole(half, tmp_path):
    folders = {}
    for message, break_it in BREAKS.items():
        folders[message] = Path(shutil.copytree(half, tmp_path / f"{len(folders)}.ckpt"))
        break_it(folders[message])
    told = run_ranks(2, lambda rank: [error_of(rank, 2, tmp_path, 20, folder) for folder in folders.values()])
    for index, message in enumerate(folders):
        for of_rank in told:
            assert of_rank[index] is not None
            assert re.search(message, of_rank[index]), of_rank[index]


OTHERS = [
    (lambda: Sharded(width=16), "belongs to another model: 'model.tokens.weight' has shape"),
    (lambda: Sharded(optimizer=AdamW(lr=1e-2)), "was saved with the optimizer AdamMini, but this run uses AdamW"),
    (lambda: Sharded(average=None), "averages none"),
    (lambda: Sharded(optimizer=AdamMini(lr=1e-2, partition="element")), "the saved optimizer state has model.head"),
    (lambda: Sharded(optimizer=AdamMini(lr=1e-2)), "the saved optimizer state has model.head.weight.exp_avg_sq_row"),
]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_all_ranks_refuse_the_checkpoint_of_another_run(half, tmp_path, kind):
    path = half
    if kind == "file":
        torch.save(read(half), path := tmp_path / "file.ckpt")
    told = run_ranks(2, lambda rank: [error_of(rank, 2, tmp_path, 20, path, task=task) for task, _ in OTHERS])
    for of_rank in told:
        for (_, message), line in zip(OTHERS, of_rank, strict=True):
            assert line is not None
            assert message in line, line


def fail_to_write(monkeypatch_rank, error):
    """Have a rank fail, or die, when it writes its part."""

    def patch(rank):
        from torch.distributed.checkpoint import FileSystemWriter

        if rank == monkeypatch_rank:

            def write_data(*_):
                error()

            FileSystemWriter.write_data = write_data

    return patch


def full_disk():
    raise OSError(28, "No space left on device")


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def resume_and_save(rank, folder, patch):
    patch(rank)
    return error_of(rank, 2, folder, 12, folder / "10.ckpt", folder / "10.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [slow(0), 1])
def test_a_full_disk_on_one_rank_is_told_by_all_and_spoils_nothing(saved, rank):
    told = run_ranks(2, resume_and_save, saved.parent, fail_to_write(rank, full_disk))
    for line in told:
        assert line is not None
        assert f"cannot write the checkpoint {saved}" in line
        assert "No space left on device" in line
    assert [path.name for path in saved.parent.iterdir()] == ["10.ckpt"]
    assert read(saved)["global_step"] == 10


@pytest.mark.slow
@pytest.mark.parametrize("rank", [slow(0), 1])
def test_a_rank_killed_while_it_saves(saved, whole, rank):
    """The others end at once, the old checkpoint continues exactly, and what is half written goes."""
    folder = saved.parent
    with pytest.raises(AssertionError, match=f"rank {1 - rank} of 2"):
        run_ranks(2, resume_and_save, folder, fail_to_write(rank, killed))
    assert not multiprocessing.active_children()
    assert read(saved)["global_step"] == 10
    checkpoints = RunCheckpoint(dirpath=folder, save_last=True, monitor="val_loss", save_top_k=0)
    left = [path for path in folder.iterdir() if path.suffix == ".tmp"]
    assert len(left) == (rank == 0), "rank zero sweeps behind itself, where it still can"
    fit_ranks(2, folder, 20, saved, folder / "20.ckpt", callbacks=[checkpoints], enable_checkpointing=True)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    found = read(folder / "20.ckpt")
    for part in PARTS:
        assert_near(found[part], whole[0][part], part)


@pytest.mark.slow
@pytest.mark.parametrize("save_last", [slow(True), "link"])
def test_the_best_and_the_last_of_a_run(tmp_path, save_last):
    def callback():
        return RunCheckpoint(
            dirpath=tmp_path,
            save_last=save_last,
            monitor="val_loss",
            filename="best-{step}",
            enable_version_counter=False,
        )

    def names():
        return sorted(path.name for path in tmp_path.iterdir())

    def work(rank):
        return fit(rank, 2, tmp_path, 10, callbacks=[callback()], enable_checkpointing=True)

    losses = torch.tensor(run_ranks(2, work)).mean(0).tolist()
    best = 5 * (1 + losses.index(min(losses)))
    assert names() == [f"best-step={best}.ckpt", "last.ckpt"]
    assert all((tmp_path / name / ".metadata").is_file() for name in names())
    assert read(tmp_path / "last.ckpt")["global_step"] == 10
    assert read(tmp_path / f"best-step={best}.ckpt")["global_step"] == best

    def go_on(rank):
        options = {"callbacks": [callback()], "enable_checkpointing": True}
        return fit(rank, 2, tmp_path, 15, tmp_path / "last.ckpt", **options)

    losses += torch.tensor(run_ranks(2, go_on)).mean(0).tolist()
    best = 5 * (1 + losses.index(min(losses)))
    assert names() == [f"best-step={best}.ckpt", "last.ckpt"]
    assert read(tmp_path / "last.ckpt")["global_step"] == 15
    assert (tmp_path / "last.ckpt").is_symlink() == (save_last == "link" and best == 15)


DYING = """
import os, signal
from lightning.pytorch import Callback
from torch.distributed.checkpoint import FileSystemWriter


class DiesWhileSaving(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 8 and trainer.global_rank == int(os.environ["DYING_RANK"]):
            FileSystemWriter.write_data = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""

SHARDED = ["--trainer.strategy", "lightning_adam_mini.tasks.parallel.FSDP2"]
SHARDED += ["--trainer.strategy.save_distributed_checkpoint", "true"]
SHARDED += ["--trainer.devices", 2, "--data.batch_size", 2, "--schedule.horizon", 15]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_of_the_command_whose_rank_is_killed_while_it_saves(work_dir, rank):
    """Every process ends, and `last` continues as if nothing had happened."""
    (work_dir / "dying.py").write_text(DYING)
    environment = os.environ | {"PYTHONPATH": str(work_dir), "DYING_RANK": str(rank)}
    options = ["fit", "--config", "tiny.yaml", *SHARDED]
    dying = ["--trainer.callbacks+", "dying.DiesWhileSaving", "--run_dir", "run"]
    process = start(*options, *dying, env=environment, start_new_session=True)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0, err
    deadline = time.monotonic() + 60
    while members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not members(process.pid), "processes are left"
    assert read("run/checkpoints/last.ckpt")["global_step"] == 5

    for arguments in (["--run_dir", "run", "--ckpt_path", "last"], ["--run_dir", "whole"]):
        process = start(*options, *arguments, "--trainer.max_steps", 15)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert not [path for path in (work_dir / "run" / "checkpoints").iterdir() if path.name.startswith(".")]
    found, expected = (read(f"{name}/checkpoints/last.ckpt") for name in ("run", "whole"))
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_near(found[part], expected[part], part)
