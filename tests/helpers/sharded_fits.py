"""Fits of a small Transformer on some ranks of this machine, each of which gets its part of the same batches."""

import os
from pathlib import Path
from unittest import mock

import torch
import torch.distributed.checkpoint.state_dict  # before ranks are forked, so that none imports it again
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from lightning_adam_mini.factory import AdamMini
from lightning_adam_mini.schedule import Schedule
from lightning_adam_mini.tasks.base import Task
from lightning_adam_mini.tasks.callbacks import WeightEMA
from lightning_adam_mini.tasks.checkpoints.saving import AtomicCheckpointIO, AtomicFolderCheckpoint
from ranks import run_ranks

BATCH = 12  # divides by one to four ranks


class Network(nn.Module):
    """Heads of three rows, of which uneven shards cut some in two; tokens and outputs of an odd number.

    Keys have no bias: its gradient is zero but for rounding, which Adam divides by its own size.
    """

    def __init__(self, width=12):
        super().__init__()
        self.tokens = nn.Embedding(17, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 20, dropout=0.0, batch_first=True, bias=False) for _ in range(2)
        )
        self.register_buffer("batches", torch.zeros(()))
        self.head = nn.Linear(width, 5)

    def forward(self, tokens):
        hidden = self.tokens(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.mean(1))


class Sharded(Task):
    """Classifies random tokens; the batch follows from the step alone, so a resumed run sees what one run would."""

    def __init__(self, average=0.9, width=12, optimizer=None):
        optimizer = optimizer or AdamMini(lr=1e-2, partition="transformer", partition_overrides={"linear": "factored"})
        super().__init__(optimizer, Schedule(shape="cosine", warmup=3, horizon=20))
        self.average, self.width = average, width
        self.validated = []

    def configure_model(self):
        if self.model is not None:
            return
        torch.manual_seed(0)
        self.model = Network(self.width)
        if self.device_mesh is not None:
            mesh = self.mesh(self.device_mesh["data_parallel"])
            for block in self.model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def mesh(self, mesh):
        return mesh

    def configure_callbacks(self):
        return [WeightEMA(self.average)] if self.average else []

    def part(self, step):
        draw = torch.Generator().manual_seed(step)
        tokens, labels = torch.randint(17, (BATCH, 6), generator=draw), torch.randint(5, (BATCH,), generator=draw)
        size = BATCH // self.trainer.world_size
        here = slice(size * self.trainer.global_rank, size * (self.trainer.global_rank + 1))
        return nn.functional.cross_entropy(self.model(tokens[here]), labels[here])

    def training_step(self, batch, batch_idx):
        self.model.batches += 1
        return self.part(self.trainer.global_step)

    def validation_step(self, batch, batch_idx):
        loss = self.part(1000)
        self.validated.append(float(loss))
        self.log("val_loss", loss, sync_dist=True, batch_size=BATCH)

    def batch_units(self, batch):
        return BATCH


class Hybrid(Sharded):
    """Two replicas of two shards each."""

    def mesh(self, mesh):
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


class FSDP1(FSDPStrategy):
    """Lightning's strategy, which it refuses on the CPU because torch would look for a GPU there."""

    def _setup_model(self, model):
        init = FullyShardedDataParallel.__init__

        def on_cpu(*args, **options):
            init(*args, **options | {"device_id": torch.device("cpu")})

        with mock.patch.object(FullyShardedDataParallel, "__init__", on_cpu):
            return super()._setup_model(model)

    def optimizer_state(self, optimizer):
        # torch gathers all moments in one buffer, and copies each from there to the CPU.
        with mock.patch.object(torch.Tensor, "cpu", torch.Tensor.clone):
            return super().optimizer_state(optimizer)


def bare_trainer(world, strategy, folder, **options):
    """A trainer on the CPU that saves, logs and shows nothing by itself."""
    return Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        plugins=[AtomicCheckpointIO()],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        **options,
    )


def fit(rank, world, folder, steps, load=None, save=None, *, full=False, plain=False, task=None, **options):
    """Train to `steps`, from the checkpoint `load`, and save to `save`.

    Returns:
        What each validation of this rank measured.
    """
    if world > 1 or not plain:
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}
    if plain:
        strategy = "auto" if world == 1 else "ddp"
    else:
        strategy = AtomicFolderCheckpoint(world, 1, save_distributed_checkpoint=not full)
    trainer = bare_trainer(
        world,
        strategy,
        folder,
        **{"max_steps": steps, "val_check_interval": 5, "enable_checkpointing": False, **options},
    )
    task = task() if task else Sharded()
    trainer.fit(task, [0] * 100, [0], ckpt_path=load)
    if save is not None:
        trainer.save_checkpoint(save)
    return task.validated


def fit_ranks(world, folder, steps, *arguments, **options):
    """`fit` on some ranks: what each of them measured."""
    return run_ranks(world, _fit, world, Path(folder), steps, arguments, options)


def _fit(rank, world, folder, steps, arguments, options):
    return fit(rank, world, folder, steps, *arguments, **options)


def assert_near(found, expected, where=""):
    """Tensors agree to rounding, and all else, types and keys included, exactly."""
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, msg=lambda text: f"{where}: {text}")
        return
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_near(found[key], expected[key], f"{where}.{key}")
        return
    assert type(found) is type(expected), where
    if isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_near(one, other, f"{where}[{index}]")
    else:
        assert found == expected, where
