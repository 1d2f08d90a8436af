"""A run that diverges stops, says where, and keeps what was good."""

import json

import pytest
import torch

from lightning_adam_mini.tasks.callbacks import StopOnDivergence
from lightning_adam_mini.tasks.llm import LanguageModel
from tiny_runs import checkpoint, error_line, run


@pytest.fixture
def poisoned(monkeypatch):
    """Makes the training loss of a batch number not finite."""

    def poison(batch_number, value=float("nan")):
        original = LanguageModel.training_step

        def training_step(self, batch, batch_idx):
            loss = original(self, batch, batch_idx)
            return loss * value if self.trainer.global_step + 1 == batch_number else loss

        monkeypatch.setattr(LanguageModel, "training_step", training_step)

    return poison


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_step_is_told_and_the_last_good_checkpoint_kept(work_dir, poisoned, capsys, value):
    poisoned(7, value)
    assert run("fit", "--run_dir", "run", "--trainer.log_every_n_steps", 3) == 3
    told = error_line(capsys)
    assert "diverged: the training loss is not finite at step 7" in told
    assert "--optimizer.lr" in told
    assert told.endswith("the last good checkpoint is " + str(work_dir / "run" / "checkpoints" / "last.ckpt"))
    saved = checkpoint("run")
    assert saved["global_step"] == 5
    assert all(weight.isfinite().all() for weight in saved["state_dict"].values())
    assert not (work_dir / "run" / "result.json").exists()


def test_a_bad_last_step_is_not_saved(work_dir, poisoned, capsys):
    poisoned(10)
    assert run("fit", "--run_dir", "run", "--trainer.log_every_n_steps", 100) == 3
    assert "at step 10" in error_line(capsys)
    assert checkpoint("run")["global_step"] == 5


def test_gradients_that_are_not_finite_show_in_the_validation(work_dir, monkeypatch, capsys):
    """The loss of the step itself is finite."""

    def spoil(self, optimizer):
        if self.trainer.global_step + 1 == 5:
            next(self.parameters()).grad.fill_(torch.nan)

    monkeypatch.setattr(LanguageModel, "on_before_optimizer_step", spoil)
    assert run("fit", "--run_dir", "run", "--trainer.gradient_clip_val", "null") == 3
    assert "after step 5" in error_line(capsys)
    assert not (work_dir / "run" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_from_the_good_checkpoint(work_dir, poisoned, monkeypatch):
    with monkeypatch.context() as patch:
        poison = LanguageModel.training_step
        patch.setattr(LanguageModel, "training_step", lambda self, *args: poison(self, *args) * float("nan"))
        patch.setattr(StopOnDivergence, "on_save_checkpoint", lambda *args: None)
        assert run("fit", "--run_dir", "run") == 3
    assert run("fit", "--run_dir", "run", "--ckpt_path", "last") == 0
    assert json.loads((work_dir / "run" / "result.json").read_text())["steps"] == 10
