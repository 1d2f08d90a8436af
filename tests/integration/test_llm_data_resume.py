"""A run that stops after any step and is resumed sees the batches of a run that never stopped."""

import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional

from lightning_adam_mini.tasks.llm.data import TokenFiles

VOCAB_SIZE = 50
TWO_RANKS = {"strategy": "ddp_fork", "devices": 2}


class Recorder(LightningModule):
    """A bigram model that keeps what it is shown."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(VOCAB_SIZE, VOCAB_SIZE)
        self.batches = []

    def loss(self, batch):
        return functional.cross_entropy(self.table(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())

    def training_step(self, batch):
        self.batches.append(batch["input_ids"].clone())
        return self.loss(batch)

    def validation_step(self, batch):
        self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


@pytest.fixture(scope="module")
def token_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, 1000)
    for name, part in {"train.bin": tokens[:900], "val.bin": tokens[900:]}.items():
        part.astype("<u2").tofile(folder / name)
    return folder


def make_data(folder, **settings):
    defaults = {"context_length": 8, "batch_size": 4, "epoch_samples": 23, "val_tokens": 32, "vocab_size": VOCAB_SIZE}
    files = {"train": str(folder / "train.bin"), "val": str(folder / "val.bin")}
    return TokenFiles(**(defaults | files | settings), cache_dir=str(folder / "cache"))


def make_trainer(root, *callbacks, **settings):
    defaults = {"max_epochs": 3, "accelerator": "cpu", "devices": 1, "logger": False, "num_sanity_val_steps": 0}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": bool(callbacks)}
    return Trainer(**(defaults | quiet | settings), default_root_dir=root, callbacks=list(callbacks))


def fit(root, data, ckpt_path=None, callbacks=(), **settings):
    torch.manual_seed(0)
    model = Recorder()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable.*")
        make_trainer(root, *callbacks, **settings).fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model


def every_step(root):
    return ModelCheckpoint(dirpath=root, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def batches_before(checkpoint):
    loops = torch.load(checkpoint, weights_only=True)["loops"]
    return loops["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]


def assert_continues(resumed, whole, num_before):
    assert num_before + len(resumed.batches) == len(whole.batches)
    for seen, expected in zip(resumed.batches, whole.batches[num_before:], strict=True):
        assert torch.equal(seen, expected)
    assert torch.equal(resumed.table.weight, whole.table.weight)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="plain"),
        pytest.param({"accumulate_grad_batches": 2}, id="accumulation"),
        pytest.param({"val_check_interval": 2}, id="validation in the epoch"),
        pytest.param({"limit_train_batches": 3}, id="short epochs"),
        pytest.param({"reload_dataloaders_every_n_epochs": 1}, id="reloaded loaders"),
    ],
)
def test_resumed_after_any_step(token_files, tmp_path, settings):
    whole = fit(tmp_path, make_data(token_files), callbacks=[every_step(tmp_path)], **settings)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) > 5
    starts = {tuple(batch.flatten().tolist()) for batch in whole.batches}
    assert len(starts) == len(whole.batches), "no batch repeats, or the test could not fail"
    for checkpoint in checkpoints:
        num_before = batches_before(checkpoint)
        if num_before < len(whole.batches):
            resumed = fit(tmp_path, make_data(token_files), ckpt_path=checkpoint, **settings)
            assert_continues(resumed, whole, num_before)


def test_resumed_with_workers_that_read_ahead(token_files, tmp_path):
    whole = fit(tmp_path, make_data(token_files), max_steps=8, max_epochs=-1)
    fit(tmp_path, make_data(token_files, num_workers=2), callbacks=[every_step(tmp_path)], max_steps=3, max_epochs=-1)
    data = make_data(token_files, num_workers=2)
    resumed = fit(tmp_path, data, ckpt_path=tmp_path / "step=3.ckpt", max_steps=8, max_epochs=-1)
    assert_continues(resumed, whole, 3)


@pytest.mark.parametrize("max_steps", [3, 5, 7])
def test_saved_after_the_end(token_files, tmp_path, max_steps):
    """`max_steps` in the middle, at the end, and past the end of an epoch of five batches."""
    settings = {"max_epochs": -1}
    whole = fit(tmp_path, make_data(token_files), max_steps=12, **settings)
    torch.manual_seed(0)
    trainer = make_trainer(tmp_path, max_steps=max_steps, **settings)
    trainer.fit(Recorder(), datamodule=make_data(token_files))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    resumed = fit(tmp_path, make_data(token_files), ckpt_path=tmp_path / "end.ckpt", max_steps=12, **settings)
    assert_continues(resumed, whole, max_steps)


def test_another_batch_size_goes_on_with_the_samples_that_follow(token_files, tmp_path):
    settings = {"max_epochs": -1}
    whole = fit(tmp_path, make_data(token_files), max_steps=8, **settings)
    fit(tmp_path, make_data(token_files), callbacks=[every_step(tmp_path)], max_steps=4, **settings)
    data = make_data(token_files, batch_size=2)
    resumed = fit(tmp_path, data, ckpt_path=tmp_path / "step=4.ckpt", max_steps=12, **settings)
    assert torch.equal(torch.cat(resumed.batches), torch.cat(whole.batches[4:]))


class RankRecorder(Recorder):
    """Writes what each rank was shown; the ranks are processes that do not come back."""

    def on_train_end(self):
        torch.save(self.batches, f"{self.trainer.default_root_dir}/rank{self.trainer.global_rank}.pt")


@pytest.mark.parametrize("use_distributed_sampler", [False, True])
def test_another_number_of_ranks_sees_the_same_global_batches(token_files, tmp_path, use_distributed_sampler):
    whole = fit(tmp_path, make_data(token_files))
    fit(tmp_path, make_data(token_files), callbacks=[every_step(tmp_path)], max_steps=7)
    trainer = make_trainer(tmp_path, use_distributed_sampler=use_distributed_sampler, **TWO_RANKS)
    data = make_data(token_files, batch_size=2)
    trainer.fit(RankRecorder(), datamodule=data, ckpt_path=tmp_path / "step=7.ckpt")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert len(ranks[0]) == len(whole.batches) - 7
    for parts, expected in zip(zip(*ranks, strict=True), whole.batches[7:], strict=True):
        assert torch.equal(torch.cat(parts), expected)


def test_second_fit_goes_on_and_a_new_trainer_starts_over(token_files, tmp_path):
    data, model = make_data(token_files), Recorder()
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(model, datamodule=data)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, datamodule=data)
    whole = fit(tmp_path, make_data(token_files), max_epochs=2)
    assert torch.equal(torch.cat(model.batches), torch.cat(whole.batches))
    again = fit(tmp_path, data, max_epochs=2)
    assert torch.equal(torch.cat(again.batches), torch.cat(whole.batches))


def test_overfit_batches_repeats_the_first_samples(token_files, tmp_path):
    with pytest.warns(UserWarning, match="overfit"):
        model = fit(tmp_path, make_data(token_files), overfit_batches=2)
    assert len(model.batches) == 6
    assert torch.equal(torch.cat(model.batches[:2]), torch.cat(model.batches[4:]))
    plain = fit(tmp_path, make_data(token_files), max_epochs=1)
    assert torch.equal(torch.cat(model.batches[:2]), torch.cat(plain.batches[:2]))


def test_reading_data_leaves_the_random_state_alone(token_files):
    data = make_data(token_files)
    data.setup()
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        list(loader)
    assert torch.equal(torch.get_rng_state(), before)
