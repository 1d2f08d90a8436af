"""A run that stops and is resumed ends where the run that never stopped ends, to the last bit."""

import json
import shutil
import warnings

import pytest
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_adam_mini.schedule import Schedule
from lightning_adam_mini.tasks.callbacks import RunCheckpoint
from lightning_adam_mini.tasks.metrics import read_metrics
from tiny_runs import assert_same_state, checkpoint, run

EVERY_STEP = ["--checkpoint.every_n_train_steps", 1, "--checkpoint.save_top_k", -1, "--checkpoint.monitor", "null"]
EVERY_STEP += ["--checkpoint.filename", "{step}"]
TO_20 = ["--trainer.max_steps", 20]


def rows(run_dir):
    return (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        pytest.param([], [1, 8], id="plain"),
        pytest.param(["--trainer.accumulate_grad_batches", 2], [3], id="accumulation", marks=pytest.mark.slow),
        pytest.param(
            ["--data.epoch_samples", 28, "--trainer.val_check_interval", 4],
            [4, 7, 13],
            id="short epochs",
            marks=pytest.mark.slow,
        ),
        pytest.param(["--data.num_workers", 1], [6], id="worker", marks=pytest.mark.slow),
    ],
)
def test_resumed_after_a_step(work_dir, options, steps):
    """With dropout, which GPT-2 has by default, so that the random numbers of every step count."""
    assert run("fit", "--run_dir", "whole", *TO_20, *EVERY_STEP, *options) == 0
    whole, metrics = checkpoint("whole"), read_metrics("whole")
    for step in steps:
        start = f"whole/checkpoints/step={step}.ckpt"
        assert run("fit", "--run_dir", f"from-{step}", "--ckpt_path", start, *TO_20, *options) == 0
        assert_same_state(checkpoint(f"from-{step}"), whole)
        resumed = read_metrics(f"from-{step}")
        for name in ("train_loss", "val_loss"):
            expected = {at: value for at, value in metrics[name].items() if at > step}
            assert {at: resumed[name][at] for at in expected} == expected
            assert set(resumed[name]) - set(expected) <= {step}, "a validation may come again"


@pytest.mark.slow
@pytest.mark.parametrize("validated", [True, False], ids=["after validation", "between validations"])
def test_resumed_at_the_end_of_a_run(work_dir, validated):
    options = ["--schedule.horizon", 20, "--trainer.val_check_interval", 5 if validated else 7]
    assert run("fit", "--run_dir", "whole", *TO_20, *options) == 0
    assert run("fit", "--run_dir", "parts", *options) == 0
    before = rows(work_dir / "parts")
    assert run("fit", "--run_dir", "parts", "--ckpt_path", "last", *TO_20, *options) == 0
    assert_same_state(checkpoint("parts"), checkpoint("whole"))
    assert rows(work_dir / "parts")[: len(before)] == before, "rows are appended"
    for name in ("train_loss", "val_loss"):
        assert read_metrics("parts")[name].items() >= read_metrics("whole")[name].items()


@pytest.mark.slow
@pytest.mark.parametrize("save_at_epoch_end", ["true", "false"])
def test_resumed_at_the_end_of_an_epoch(work_dir, save_at_epoch_end):
    """Runs that epochs end, as in vision: validation comes with the end of each."""
    options = ["--trainer.max_steps", -1, "--trainer.val_check_interval", 1.0, "--trainer.check_val_every_n_epoch", 1]
    options += ["--data.epoch_samples", 20, "--schedule.horizon", 15, "--trainer.log_every_n_steps", 1]
    options += ["--checkpoint.save_on_train_epoch_end", save_at_epoch_end]
    assert run("fit", "--run_dir", "whole", "--trainer.max_epochs", 3, *options) == 0
    assert list(read_metrics("whole")["val_loss"]) == [5, 10, 15]
    assert run("fit", "--run_dir", "parts", "--trainer.max_epochs", 1, *options) == 0
    assert run("fit", "--run_dir", "parts", "--ckpt_path", "last", "--trainer.max_epochs", 3, *options) == 0
    assert_same_state(checkpoint("parts"), checkpoint("whole"))
    for name in ("train_loss", "val_loss"):
        assert read_metrics("parts")[name] == read_metrics("whole")[name]


@pytest.mark.slow
def test_the_newest_numbered_folder_is_continued(work_dir):
    for _ in range(2):
        assert run("fit", "--schedule.horizon", 20) == 0
    assert run("fit", "--schedule.horizon", 20, "--ckpt_path", "last", *TO_20) == 0
    assert [checkpoint(f"runs/{name}")["global_step"] for name in ("tiny", "tiny-2")] == [10, 20]
    assert not (work_dir / "runs" / "tiny-3").exists()


@pytest.mark.slow
def test_a_longer_schedule_is_followed_from_the_step_on(work_dir):
    rates = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    try:
        assert run("fit", "--run_dir", "run") == 0
        assert run("fit", "--run_dir", "run", "--ckpt_path", "last", *TO_20) == 0
    finally:
        hook.remove()
    expected = [Schedule().scale(step, 10 if step < 10 else 20) for step in range(20)]
    assert rates == pytest.approx([1e-2 * scale for scale in expected])
    assert rates[10] > 2 * rates[9], "the first step of the longer schedule has its rate already"


@pytest.mark.slow
def test_the_configuration_of_each_start_is_kept(work_dir):
    assert run("fit", "--run_dir", "run") == 0
    assert run("fit", "--run_dir", "run", "--ckpt_path", "last", *TO_20) == 0
    first, second = (work_dir / "run" / name for name in ("config.1.yaml", "config.yaml"))
    assert "max_steps: 10" in first.read_text("utf-8")
    assert "max_steps: 20" in second.read_text("utf-8")


@pytest.mark.slow
def test_a_start_that_failed_leaves_no_configuration(work_dir):
    assert run("fit", "--run_dir", "run", "--model.config.vocab_size", 10) == 1
    assert run("fit", "--run_dir", "run") == 0
    assert sorted(path.name for path in (work_dir / "run").glob("config*")) == ["config.yaml"]


@pytest.mark.slow
def test_another_learning_rate_warns_and_is_not_used(work_dir):
    horizon = ["--schedule.horizon", 20]
    assert run("fit", "--run_dir", "whole", *TO_20) == 0
    assert run("fit", "--run_dir", "run", *horizon) == 0
    with pytest.warns(UserWarning, match=r"checkpoint's lr = 0\.01 continues; 0\.5 from this command is not used"):
        assert run("fit", "--run_dir", "run", "--ckpt_path", "last", "--trainer.max_steps", 15, *horizon,
                   "--optimizer.lr", 0.5) == 0  # fmt: skip
    # The first rate is in force, and the second checkpoint says so: the command of the first start warns no more.
    assert checkpoint("run")["optimizer_factory"]["lr"] == 0.01
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is not used")
        assert run("fit", "--run_dir", "run", "--ckpt_path", "last", *TO_20) == 0
    assert_same_state(checkpoint("run"), checkpoint("whole"))


@pytest.mark.slow
def test_evaluation_loses_no_metrics(work_dir):
    assert run("fit", "--run_dir", "run") == 0
    before, report = rows(work_dir / "run"), (work_dir / "run" / "report.md").read_bytes()
    for command in ("validate", "test"):
        assert run(command, "--run_dir", "run", "--ckpt_path", "last") == 0
    assert rows(work_dir / "run")[: len(before)] == before
    assert (work_dir / "run" / "report.md").read_bytes() == report
    assert sorted(path.name for path in (work_dir / "run").glob("config*")) == ["config.yaml"]
    metrics = read_metrics("run")
    assert list(metrics["val_loss"]) == [5, 10], "the evaluation stands under the step of its checkpoint"
    assert list(metrics["test_loss"]) == [10]


def test_evaluation_without_a_checkpoint_is_told(work_dir):
    with pytest.warns(UserWarning, match="without --ckpt_path"):
        assert run("validate", "--run_dir", "run") == 0
    assert list(read_metrics("run")["val_loss"]) == [0]


def test_last_is_the_newest_even_where_validation_gets_worse(work_dir, monkeypatch):
    monkeypatch.setattr(RunCheckpoint, "on_train_end", lambda *_: None)  # as if the run was killed in its last steps
    options = ["--optimizer.lr", 3.0, "--schedule.shape", "constant", "--schedule.warmup", 20]  # it rises
    assert run("fit", "--run_dir", "run", "--trainer.max_steps", 10, *options) == 0
    losses = read_metrics("run")["val_loss"]
    assert losses[10] > losses[5], "else this test shows nothing"
    assert checkpoint("run")["global_step"] == 10
    assert checkpoint("run", "best-step=5")["global_step"] == 5


@pytest.mark.slow
def test_a_moved_folder_is_continued_in_place(work_dir):
    assert run("fit", "--run_dir", "old", "--schedule.horizon", 20) == 0
    shutil.move("old", "new")
    assert run("fit", "--run_dir", "new", "--schedule.horizon", 20, "--ckpt_path", "last", *TO_20) == 0
    assert checkpoint("new")["global_step"] == 20
    assert not (work_dir / "old").exists()
    assert not list((work_dir / "new" / "checkpoints").glob("last-v*"))


@pytest.mark.slow
def test_a_saved_configuration_starts_a_run_of_its_own(work_dir):
    assert run("fit", "--run_dir", "old") == 0
    before = (work_dir / "old" / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    assert run("fit", "--run_dir", "new", "--optimizer.lr", 1e-3, config="old/config.yaml") == 0
    assert (work_dir / "old" / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before
    assert checkpoint("new")["optimizer_factory"]["lr"] == 1e-3


@pytest.mark.slow
def test_no_step_left_is_told_and_spoils_no_report(work_dir):
    assert run("fit", "--run_dir", "run", *TO_20) == 0
    report = (work_dir / "run" / "report.md").read_bytes()
    with pytest.warns(UserWarning, match="no step was left to train: the checkpoint is at step 20"):
        assert run("fit", "--run_dir", "run", "--ckpt_path", "last") == 0
    assert (work_dir / "run" / "report.md").read_bytes() == report


@pytest.mark.slow
def test_a_report_that_a_kill_prevented_is_written_at_the_next_start(work_dir):
    assert run("fit", "--run_dir", "run") == 0
    written = json.loads((work_dir / "run" / "result.json").read_text())
    (work_dir / "run" / "result.json").unlink()
    with pytest.warns(UserWarning, match="no step was left"):
        assert run("fit", "--run_dir", "run", "--ckpt_path", "last") == 0
    again = json.loads((work_dir / "run" / "result.json").read_text())
    assert (again["steps"], again["primary_metric"]) == (written["steps"], written["primary_metric"])


@pytest.mark.slow
def test_reading_metrics_counts_repeated_steps_once(work_dir):
    """A kill between two checkpoints: the resumed run takes the steps since the first one again."""
    assert run("fit", "--run_dir", "run", "--schedule.horizon", 20, *EVERY_STEP) == 0
    whole = read_metrics("run")["train_loss"]
    shutil.copy("run/checkpoints/step=5.ckpt", "run/checkpoints/last.ckpt")
    assert run("fit", "--run_dir", "run", "--schedule.horizon", 20, "--ckpt_path", "last") == 0
    assert read_metrics("run")["train_loss"] == whole
    assert list(whole) == [2, 4, 6, 8, 10]
