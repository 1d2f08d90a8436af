"""Faults: signals, kills, full disks, and checkpoints that do not fit. Nothing that was saved is lost."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_adam_mini.cli.main import main
from lightning_adam_mini.tasks.checkpoints.saving import AtomicCheckpointIO
from lightning_adam_mini.tasks.metrics import read_metrics
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "accumulate"),
    [
        (signal.SIGINT, 1),
        (signal.SIGINT, 2),
        (signal.SIGTERM, 1),
    ],
)
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


@pytest.mark.slow
def test_ctrl_c_as_the_user_types_it(work_dir):
    process = start("fit", "--config", "tiny.yaml", "--run_dir", "run", "--trainer.max_steps", 100_000)
    out, err = interrupt_in_training(process, work_dir / "run")
    assert process.returncode == 130, err
    assert "Continue with --run_dir run --ckpt_path last" in out
    assert "Traceback" not in err
    assert checkpoint("run")["global_step"] > 0


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_full_disk_while_saving(work_dir, capsys):
    assert run("fit", "--run_dir", "run", "--schedule.horizon", 20) == 0
    before = checkpoint("run")
    options = ["--run_dir", "run", "--schedule.horizon", 20, "--ckpt_path", "last", *TO_20]
    with full_disk(100_000):
        assert run("fit", *options) == 1
    line = error_line(capsys)
    assert "cannot write the checkpoint" in line
    assert "File too large; free space or set another --run_dir. Earlier checkpoints are untouched" in line
    assert not leftovers(work_dir / "run")
    assert_same_state(checkpoint("run"), before)
    assert run("fit", *options) == 0
    assert run("fit", "--run_dir", "whole", *TO_20) == 0
    assert_same_state(checkpoint("run"), checkpoint("whole"))


@pytest.mark.slow
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


@pytest.mark.slow
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


def assert_all_refuse(path, told, capsys):
    """Every command that reads a checkpoint says what it is about this one, and which."""
    for command, *options in (
        ("fit", "--ckpt_path", path, *TO_20),
        ("validate", "--ckpt_path", path),
        ("test", "--ckpt_path", path),
        ("predict", "--ckpt_path", path),
    ):
        assert run(command, "--run_dir", path.parts[0], *options) == 1, command
        line = error_line(capsys)
        assert told in line, command
        assert str(path) in line
    for arguments in (
        ["export", path.parts[0], "--ckpt_path", path],
        ["convert", path, "--out", "new.ckpt"],
        ["hessian", "js", "tiny.yaml", "--ckpt_path", path],
    ):
        assert main(list(map(str, arguments))) == 1, arguments
        line = error_line(capsys)
        assert told in line, arguments
        assert str(path) in line


@pytest.mark.slow
def test_no_command_takes_a_damaged_checkpoint(work_dir, capsys):
    assert run("fit", "--run_dir", "run") == 0
    path = Path("run/checkpoints/last.ckpt")
    data = bytearray(path.read_bytes())
    data[data.index(checkpoint("run")["state_dict"]["model.lm_head.weight"].numpy().tobytes()) + 2] ^= 1
    path.write_bytes(data)
    assert_all_refuse(path, "its checksum is not the one that it was saved with", capsys)


@pytest.mark.slow
def test_no_command_runs_what_a_checkpoint_holds(work_dir, capsys):
    assert run("fit", "--run_dir", "run") == 0
    path = Path("run/checkpoints/last.ckpt")
    torch.save({**checkpoint("run"), "loops": Payload()}, path)
    assert_all_refuse(path, "to load what no checkpoint needs could run code", capsys)
    assert not Path("harmed").exists()


class Payload:
    def __reduce__(self):
        return os.system, ("touch harmed",)


HOLDER = """
import sys
from pathlib import Path
from lightning_adam_mini.cli.run_folder import lock_run
lock_run(Path("run"))
print(flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_a_second_fit_in_a_run_folder_is_refused_and_others_are_not(work_dir, capsys):
    assert run("fit", "--run_dir", "run") == 0
    before = (work_dir / "run" / "metrics.jsonl").read_text()
    other = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with other:
        other.stdout.readline()
        for options in (["--ckpt_path", "last", *TO_20], []):
            assert run("fit", "--run_dir", "run", *options) == 1
            line = error_line(capsys)
            assert f"run: another process still trains there (process {other.pid} on " in line
            assert "wait for it, end it, or choose another --run_dir" in line
        assert (work_dir / "run" / "metrics.jsonl").read_text() == before
        assert run("validate", "--run_dir", "run", "--ckpt_path", "last") == 0
        other.kill()
    assert run("fit", "--run_dir", "run", "--ckpt_path", "last", *TO_20) == 0


@pytest.mark.slow
def test_of_two_fits_that_start_together_one_trains(work_dir):
    assert run("fit", "--run_dir", "run") == 0
    options = ["fit", "--config", "tiny.yaml", "--run_dir", "run", "--ckpt_path", "last", "--trainer.max_steps", 300]
    processes = [start(*options) for _ in range(3)]
    ends = [process.communicate(timeout=300)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 1, 1], ends
    assert sum("another process still trains there" in err for err in ends) == 2
    steps = [json.loads(row)["step"] for row in (work_dir / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert len(list((work_dir / "run" / "checkpoints").glob("best*"))) == 1


@pytest.mark.slow
def test_a_run_that_was_killed_blocks_no_other(work_dir):
    """Nor do the processes that read for it."""
    options = ["--run_dir", "run", "--data.num_workers", 1]
    process = start("fit", "--config", "tiny.yaml", *options, "--trainer.max_steps", 100_000)
    while not Path("run/checkpoints/last.ckpt").exists() and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=60)
    step = checkpoint("run")["global_step"]
    assert run("fit", *options, "--ckpt_path", "last", "--trainer.max_steps", step + 5) == 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts a small disk")
def test_a_small_disk_is_told_wherever_it_is_full(work_dir, capsys):
    """No space left on device, with the folder; what was saved before is whole."""
    assert run("fit", "--run_dir", "whole") == 0
    num_bytes = sum(path.stat().st_size for path in Path("whole").rglob("*") if path.is_file())
    Path("disk").mkdir()
    for part in (0.01, 0.03, 0.1, 0.4, 0.6, 0.8, 0.95):
        size = int(part * num_bytes)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "disk"], check=True)
        try:
            capsys.readouterr()
            assert run("fit", "--run_dir", "disk/run") == 1
            line = error_line(capsys)
            assert "No space left on device" in line, (part, line)
            assert "disk/run" in line, (part, line)
            for path in Path("disk/run").rglob("*.ckpt"):
                AtomicCheckpointIO().load_checkpoint(path)
        finally:
            subprocess.run(["umount", "--lazy", "disk"], check=True)


@pytest.mark.slow
def test_the_bar_of_a_resumed_run_ends_with_it(work_dir, capsys):
    """Lightning would set the batches so far against the steps that are left."""
    bar = ["--trainer.enable_progress_bar", True, "--trainer.accumulate_grad_batches", 2]
    for number, options in ((20, []), (24, ["--trainer.max_steps", 12, "--ckpt_path", "last"])):
        assert run("fit", "--run_dir", "run", *bar, *options) == 0
        assert f" {number}/{number} " in capsys.readouterr().out


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


@pytest.mark.slow
def test_a_checkpoint_of_something_else(work_dir, capsys):
    assert run("fit", "--run_dir", "run") == 0
    before = checkpoint("run")
    for options, told in OTHERS:
        assert run("fit", "--run_dir", "run", "--ckpt_path", "last", *TO_20, *options) == 1, options
        assert told in error_line(capsys)
    assert_same_state(checkpoint("run"), before)
    assert run("fit", "--run_dir", "run", "--ckpt_path", "last", *TO_20) == 0, "the next try is not blocked"


@pytest.mark.slow
def test_the_best_checkpoint(work_dir, capsys):
    assert run("fit", "--run_dir", "run") == 0
    assert run("test", "--run_dir", "run", "--ckpt_path", "best") == 0
    assert list(read_metrics("run")["test_loss"]) == [10]
    (work_dir / "run" / "checkpoints" / "best-step=10.ckpt").rename(work_dir / "elsewhere.ckpt")
    assert run("test", "--run_dir", "run", "--ckpt_path", "best") == 1
    assert "besides the last one run/checkpoints holds: none" in error_line(capsys)


@pytest.mark.slow
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


@pytest.mark.slow
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
