"""Faults: signals, kills, full disks, and checkpoints that do not fit. Nothing that was saved is lost."""

import os
import resource
import signal
from contextlib import contextmanager
from multiprocessing import get_context

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_adam_mini.tasks.checkpoint_io import AtomicCheckpointIO
from lightning_adam_mini.tasks.metrics_file import read_metrics
from tiny_runs import assert_same_state, checkpoint, error_line, interrupt_in_training, run, start

TO_20 = ["--trainer.max_steps", 20]


@contextmanager
def at_step(number, act):
    """Do something within an optimizer step, counted from 1."""
    steps = iter(range(1, 10**6))
    hook = register_optimizer_step_pre_hook(lambda *_: act() if next(steps) == number else None)
    try:
        yield
    finally:
        hook.remove()


def send(signum, times=1):
    for _ in range(times):
        os.kill(os.getpid(), signum)


@contextmanager
def full_disk(num_bytes):
    """Files cannot grow beyond a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def leftovers(folder):
    return list(folder.rglob("*.tmp"))


@pytest.mark.parametrize(("signum", "accumulate"), [(signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_a_signal_ends_the_run_after_its_step(work_dir, capsys, signum, accumulate):
    options = [*TO_20, "--trainer.accumulate_grad_batches", accumulate]
    handler = signal.getsignal(signum)
    assert run("fit", "--run_dir", "whole", *options) == 0
    with at_step(7, lambda: send(signum)), pytest.raises(SystemExit) as stopped:
        run("fit", "--run_dir", "parts", *options)
    assert stopped.value.code == 128 + signum
    assert signal.getsignal(signum) is handler, "the signal is given back"
    out = capsys.readouterr().out
    assert "Stopped after step 7. Continue with --run_dir parts --ckpt_path last" in out
    assert checkpoint("parts")["global_step"] == 7
    assert not (work_dir / "parts" / "report.md").exists()

    assert run("fit", "--run_dir", "parts", "--ckpt_path", "last", *options) == 0
    assert_same_state(checkpoint("parts"), checkpoint("whole"))
    assert read_metrics("parts")["train_loss"] == read_metrics("whole")["train_loss"]


def test_a_second_signal_ends_the_run_at_once(work_dir):
    with at_step(7, lambda: send(signal.SIGINT, 2)):
        assert run("fit", "--run_dir", "run") == 130
    assert checkpoint("run")["global_step"] == 5, "the last validation's"


def test_ctrl_c_outside_of_training(work_dir, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_adam_mini.tasks.llm.data.TextFiles.prepare_data", interrupted)
    assert run("fit", "--run_dir", "run") == 130
    monkeypatch.setattr("lightning_adam_mini.cli.main.resolve_configs", interrupted)
    assert run("fit", "--run_dir", "run") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_ctrl_c_as_the_user_types_it(work_dir):
    process = start("fit", "--config", "tiny.yaml", "--run_dir", "run", "--trainer.max_steps", 100_000)
    out, err = interrupt_in_training(process, work_dir / "run")
    assert process.returncode == 130, err
    assert "Continue with --run_dir run --ckpt_path last" in out
    assert "Traceback" not in err
    assert checkpoint("run")["global_step"] > 0


def test_a_kill_while_saving_leaves_the_old_checkpoint(work_dir):
    assert run("fit", "--run_dir", "run") == 0
    folder, before = work_dir / "run" / "checkpoints", checkpoint("run")
    killed = get_context("fork").Process(target=_die_while_saving, args=(folder / "last.ckpt",))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert len(leftovers(folder)) == 1, "else it was not killed while saving"
    assert_same_state(checkpoint("run"), before)
    assert run("fit", "--run_dir", "run", "--ckpt_path", "last", *TO_20) == 0
    assert not leftovers(folder), "a half-written file of a large model is large"


def _die_while_saving(path):
    def half(state, file):
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half
    AtomicCheckpointIO().save_checkpoint({}, path)


def test_a_full_disk_while_saving(work_dir, capsys):
    assert run("fit", "--run_dir", "run", "--schedule.horizon", 20) == 0
    before = checkpoint("run")
    options = ["--run_dir", "run", "--schedule.horizon", 20, "--ckpt_path", "last", *TO_20]
    with full_disk(100_000):
        assert run("fit", *options) == 1
    line = error_line(capsys)
    assert "cannot save the checkpoint" in line
    assert "free space or set another --run_dir. Earlier checkpoints are untouched" in line
    assert not leftovers(work_dir / "run")
    assert_same_state(checkpoint("run"), before)
    assert run("fit", *options) == 0
    assert run("fit", "--run_dir", "whole", *TO_20) == 0
    assert_same_state(checkpoint("run"), checkpoint("whole"))


def test_a_full_disk_while_logging(work_dir, capsys):
    """The row that was cut off is lost, and no other."""
    assert run("fit", "--run_dir", "run", "--schedule.horizon", 20) == 0
    size = (work_dir / "run" / "metrics.jsonl").stat().st_size
    options = ["--run_dir", "run", "--schedule.horizon", 20, "--ckpt_path", "last", *TO_20]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with at_step(1, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))):
            assert run("fit", *options) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write the metrics" in error_line(capsys)
    assert run("fit", *options) == 0
    metrics = read_metrics("run")
    assert list(metrics["train_loss"]) == list(metrics["tokens_per_second"]) == list(range(2, 21, 2))


def test_a_file_that_is_no_checkpoint(work_dir, capsys):
    assert run("fit", "--run_dir", "run") == 0
    path = work_dir / "run" / "checkpoints" / "last.ckpt"
    for content in (path.read_bytes()[:-1000], b"", b"no checkpoint", b"PK\x03\x04 half a zip"):
        path.write_bytes(content)
        assert run("fit", "--run_dir", "run", "--ckpt_path", "last", *TO_20) == 1
        line = error_line(capsys)
        assert f"cannot read the checkpoint {path.relative_to(work_dir)}" in line
        assert "was cut off. Use another file of its folder" in line
    for foreign in (checkpoint("run", "best-step=10")["state_dict"], [1]):
        torch.save(foreign, path)
        assert run("fit", "--run_dir", "run", "--ckpt_path", "last", *TO_20) == 1
        assert "checkpoint" in error_line(capsys)
    path.write_bytes(b"\x00\x01e garbage")
    assert run("fit", "--run_dir", "run", "--ckpt_path", "last", *TO_20) == 1
    assert "cannot read the checkpoint" in error_line(capsys)
    assert run("fit", "--run_dir", "run", "--ckpt_path", "run/checkpoints/best-step=10.ckpt", *TO_20) == 0
    assert checkpoint("run")["global_step"] == 20


OTHERS = [
    (["--model.config.hidden_size", 16], "belongs to another model: 'model.transformer.wte.weight' has shape"),
    (["--model.config.num_hidden_layers", 3], "it has no 'model.transformer.h.2"),
    (["--model.config.num_hidden_layers", 1], "this model has no 'model.transformer.h.1"),
    (["--model.architecture", "llama"], "it has no 'model.model.embed_tokens.weight'"),
    (["--optimizer", "AdamW"], "saved with the optimizer AdamMini, but this run uses AdamW; continue with"),
    (["--optimizer.partition", "element"], "partition"),
    (["--optimizer.partition_overrides", '{"value": "whole"}'], "partition"),
    (["--optimizer.weight_decay_policy", "all"], "other parameter groups"),
]


def test_a_checkpoint_of_something_else(work_dir, capsys):
    assert run("fit", "--run_dir", "run") == 0
    before = checkpoint("run")
    for options, told in OTHERS:
        assert run("fit", "--run_dir", "run", "--ckpt_path", "last", *TO_20, *options) == 1, options
        assert told in error_line(capsys)
    assert_same_state(checkpoint("run"), before)
    assert run("fit", "--run_dir", "run", "--ckpt_path", "last", *TO_20) == 0, "the next try is not blocked"


def test_the_best_checkpoint(work_dir, capsys):
    assert run("fit", "--run_dir", "run") == 0
    assert run("test", "--run_dir", "run", "--ckpt_path", "best") == 0
    assert list(read_metrics("run")["test_loss"]) == [10]
    (work_dir / "run" / "checkpoints" / "best-step=10.ckpt").rename(work_dir / "elsewhere.ckpt")
    assert run("test", "--run_dir", "run", "--ckpt_path", "best") == 1
    assert "holds beside the last: none" in error_line(capsys)


def test_a_run_that_died_before_its_first_checkpoint_starts_over(work_dir):
    """As a job that is queued again: the same command, always with `--ckpt_path last`."""
    options = ["--run_dir", "run", "--ckpt_path", "last"]
    with (
        at_step(4, lambda: send(signal.SIGINT, 2)),
        pytest.warns(UserWarning, match="holds no checkpoint yet, so the run starts from its first step"),
    ):
        assert run("fit", *options) == 130
    assert read_metrics("run")["train_loss"]
    assert run("fit", *options) == 0
    assert checkpoint("run")["global_step"] == 10


def test_a_folder_with_a_run_is_not_written_over(work_dir, capsys):
    assert run("fit", "--run_dir", "one") == 0
    assert run("fit", "--run_dir", "other") == 0
    before = checkpoint("other")
    for start_from in ([], ["--ckpt_path", "one/checkpoints/last.ckpt"]):
        assert run("fit", "--run_dir", "other", *start_from, *TO_20) == 1
        assert "other holds a run already; continue it with --ckpt_path last" in error_line(capsys)
    assert_same_state(checkpoint("other"), before)
    assert run("fit", "--ckpt_path", "one/checkpoints/last.ckpt", *TO_20) == 0
    assert checkpoint("runs/tiny")["global_step"] == 20, "a folder of its own"
