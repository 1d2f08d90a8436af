"""The moving average of the weights: its rule, where it is used, and what a checkpoint holds of it."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_adam_mini.factory import SGD
from lightning_adam_mini.schedule import Schedule
from lightning_adam_mini.tasks.base import Task
from lightning_adam_mini.tasks.callbacks import WeightEMA
from lightning_adam_mini.tasks.callbacks.ema import AveragedTensors


class Line(Task):
    """One linear layer with batch norm, whose weights are noted at each step and validation."""

    def __init__(self, decay=0.9, warmup=True):
        super().__init__(SGD(lr=0.1, weight_decay=0.0), Schedule(shape="constant", warmup=0))
        self.ema = (decay, warmup)
        self.trained, self.validated, self.at_epoch_end = [], [], []

    def configure_model(self):
        if self.model is None:
            self.model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))

    def configure_callbacks(self):
        return [WeightEMA(*self.ema)]

    @property
    def weight(self):
        return self.model[0].weight.detach().clone()

    def training_step(self, batch, batch_idx):
        self.trained.append(self.weight)
        return self.model(batch).square().sum()

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.weight)

    def on_validation_epoch_end(self):
        self.at_epoch_end.append(self.weight)

    def batch_units(self, batch):
        return len(batch)


def fit(folder, steps, task=None, ckpt_path=None, **options):
    torch.manual_seed(0)
    loader = DataLoader(torch.randn(4 * 6, 3, generator=torch.Generator().manual_seed(1)), batch_size=4)
    task = task or Line()
    plain = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    options = {"accelerator": "cpu", "num_sanity_val_steps": 0, **plain, **options}
    trainer = Trainer(max_steps=steps, default_root_dir=folder, **options)
    trainer.fit(task, loader, loader, ckpt_path=ckpt_path)
    return task, trainer


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_follows_its_rule(tmp_path, warmup):
    task, _ = fit(tmp_path, 6, Line(0.75, warmup), check_val_every_n_epoch=None, val_check_interval=5)
    average, *later = task.trained[1:6]  # the weights after steps 1 to 5
    for update, weight in enumerate(later, start=1):
        decay = min(0.75, (1 + update) / (10 + update)) if warmup else 0.75
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(task.validated[0], average)
    assert not torch.equal(average, task.trained[5])


def test_validation_and_its_end_see_the_average_and_training_goes_on_from_raw_weights(tmp_path):
    plain, _ = fit(tmp_path, 6, Line(decay=1e-9, warmup=False), check_val_every_n_epoch=None, val_check_interval=2)
    task, _ = fit(tmp_path, 6, Line(decay=0.9), check_val_every_n_epoch=None, val_check_interval=2)
    assert all(torch.equal(one, other) for one, other in zip(plain.trained, task.trained, strict=True))
    assert len(task.at_epoch_end) == 3
    for number, weight in enumerate(task.at_epoch_end):
        assert torch.equal(weight, task.validated[6 * number])
        assert number == 2 or not torch.equal(weight, task.trained[2 * number + 2])


@pytest.mark.parametrize("when", ["within", "after"])
def test_a_checkpoint_holds_both_and_resumes_the_run(tmp_path, when):
    whole, _ = fit(tmp_path, 12)
    part, trainer = fit(tmp_path, 6)
    if when == "after":  # on_train_end has put the average into the module
        trainer.save_checkpoint(tmp_path / "half.ckpt")
    else:
        saver = Line()
        saver.on_train_epoch_end = lambda: saver.trainer.save_checkpoint(tmp_path / "half.ckpt")
        part, _ = fit(tmp_path, 6, saver)
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    torch.testing.assert_close(saved["current_model_state"]["model.0.weight"], whole.trained[6], rtol=0, atol=0)
    assert not torch.equal(saved["state_dict"]["model.0.weight"], whole.trained[6])
    torch.testing.assert_close(saved["state_dict"]["model.0.weight"], part.weight, rtol=0, atol=0)
    resumed, _ = fit(tmp_path, 12, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(resumed.weight, whole.weight)
    assert all(torch.equal(a, b) for a, b in zip(resumed.trained, whole.trained[6:], strict=True))


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0, float("nan")])
def test_the_decay_is_a_fraction(decay):
    with pytest.raises(ValueError, match="decay"):
        WeightEMA(decay)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("resumes", [False, True])
def test_the_average_lies_where_the_weights_do(tmp_path, monkeypatch, resumes):
    """Also after a checkpoint, which is loaded before the module moves to the device; the count stays with the host."""
    seen = []
    update = AveragedTensors.update

    def noting(self, *args):
        seen.extend(copy.device.type for copy in self._copies.values())
        assert isinstance(self.updates, int), "every look at a tensor would wait for the device"
        update(self, *args)

    _, trainer = fit(tmp_path, 3)
    trainer.save_checkpoint(tmp_path / "3.ckpt")
    monkeypatch.setattr(AveragedTensors, "update", noting)
    fit(tmp_path, 6, accelerator="gpu", ckpt_path=tmp_path / "3.ckpt" if resumes else None)
    assert set(seen) == {"cuda"}


def test_a_validation_after_training_sees_the_average(tmp_path):
    """It is in the module already: a second exchange would bring the raw weights back."""
    task, trainer = fit(tmp_path, 6)
    average = task.weight
    loader = DataLoader(torch.randn(4, 3), batch_size=4)
    trainer.validate(task, loader, verbose=False)
    assert torch.equal(task.validated[-1], average)
    assert torch.equal(task.weight, average)


def test_a_run_begins_to_average_with_the_weights_of_its_checkpoint(tmp_path):
    without = Line()
    without.configure_callbacks = list
    plain, trainer = fit(tmp_path, 4, without)
    trainer.save_checkpoint(tmp_path / "raw.ckpt")
    with pytest.warns(UserWarning, match="holds no average of the weights"):
        task, _ = fit(tmp_path, 5, ckpt_path=tmp_path / "raw.ckpt")
    assert torch.equal(task.trained[0], plain.weight)


def test_parameters_that_fsdp_has_flattened_are_refused():
    module = nn.Linear(3, 2)
    module.weight._fsdp_flattened = True
    with pytest.raises(ValueError, match=r"weight: .*fsdp2 or ddp, or set model\.ema_decay to null"):
        AveragedTensors(module)


def test_tied_parameters_are_averaged_once_and_saved_by_both_names():
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    module[1].weight = module[0].weight
    averages = AveragedTensors(module)
    averages.update(module, 0.9)
    before = module[0].weight.detach().clone()
    with torch.no_grad():
        module[0].weight.zero_()
    averages.update(module, 0.75)
    saved = averages.state_dict(module, module.state_dict())
    assert saved.keys() == {"0.weight", "1.weight"}
    for tensor in saved.values():
        torch.testing.assert_close(tensor, 0.75 * before)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_precisions_that_would_lose_the_average_are_refused(tmp_path, precision):
    with pytest.raises(ValueError, match=r"32-true, bf16-mixed or 16-mixed.*ema_decay"):
        fit(tmp_path, 3, precision=precision)


def test_averaged_weights_are_not_taken_for_raw_ones(tmp_path):
    """With the raw weights' optimizer state."""
    _, trainer = fit(tmp_path, 6)
    trainer.save_checkpoint(tmp_path / "averaged.ckpt")
    without = Line()
    without.configure_callbacks = list
    with pytest.raises(ValueError, match=r"averages none.*ema_decay"):
        fit(tmp_path, 12, without, ckpt_path=tmp_path / "averaged.ckpt")


def test_a_save_within_a_step_counts_the_step_once(tmp_path):
    """A callback that saves may have its turn before the average; with accumulation no step follows the next batch."""

    class SavesFirst(Callback):
        def on_train_batch_end(self, trainer, task, *args):
            if trainer.global_step == 2 and not (tmp_path / "early.ckpt").exists():
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    options = {"accumulate_grad_batches": 2, "limit_train_batches": 4}
    whole, _ = fit(tmp_path, 6, callbacks=[SavesFirst()], **options)
    resumed, _ = fit(tmp_path, 6, ckpt_path=tmp_path / "early.ckpt", **options)
    assert torch.equal(resumed.weight, whole.weight)
