"""AdamMini in Lightning Fabric: set up, saved and loaded by it, on one and two ranks."""

import os
from functools import partial

import pytest
import torch

from ranks import run_ranks
from tiny_models import llama

pytest.importorskip("lightning.fabric")

from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch.distributed.fsdp import fully_shard

from framework_runs import SAVED, STEPS, adamw, element, factored, loss_of, whole
from lightning_adam_mini import AdamMini


def shard(model, mesh):
    """A layer each in FSDP2, as a user's function for `ModelParallelStrategy` does it."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])


def single():
    return SingleDeviceStrategy("cpu")


def ddp():
    return DDPStrategy()


def fsdp2(*, folder=False):
    return ModelParallelStrategy(
        shard, data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=folder
    )


def auto(model):
    return AdamMini(model, 1e-2, weight_decay=0.1)


def train(rank, strategy, build, save=None, load=None):
    """A run on this rank: its weights, whole, and the structures."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    if world > 1:  # as torchrun sets them; Fabric takes the process group that is there
        values = (rank, rank, 0, world, world, 0)
        os.environ |= dict(zip(names, map(str, values), strict=True))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}
    fabric = Fabric(accelerator="cpu", devices=world, strategy=strategy())
    fabric.launch()
    torch.manual_seed(0)
    model = llama(num_hidden_layers=2)
    if isinstance(fabric.strategy, ModelParallelStrategy):
        wrapped = fabric.setup_module(model)
        optimizer = build(model)
        fabric_optimizer = fabric.setup_optimizers(optimizer)
    else:
        optimizer = build(model)
        wrapped, fabric_optimizer = fabric.setup(model, optimizer)
    state = {"model": wrapped, "optimizer": fabric_optimizer, "step": 0}
    if load:
        fabric.load(load, state)
    for step in range(state["step"], STEPS):
        fabric.backward(loss_of(wrapped, step, rank, world))
        fabric.clip_gradients(wrapped, fabric_optimizer, max_norm=1.0)
        fabric_optimizer.step()
        fabric_optimizer.zero_grad()
        if save and step + 1 == SAVED:
            fabric.save(save, state | {"step": SAVED})
    structures = {}
    if isinstance(optimizer, AdamMini):
        structures = {name: found.structure for name, found in optimizer.partition.items()}
    return whole(model), structures


def run(strategy, build, **files):
    if strategy is single:
        return train(0, strategy, build, **files)
    return run_ranks(2, partial(train, **files), strategy, build)[0]


def furthest(weights, others):
    assert weights.keys() == others.keys()
    return max((weights[name] - others[name]).abs().max().item() for name in weights)


LAYOUTS = [single, ddp, fsdp2]


@pytest.mark.parametrize("strategy", LAYOUTS, ids=lambda strategy: strategy.__name__)
def test_elements_train_as_adamw(strategy):
    assert furthest(run(strategy, element)[0], run(strategy, adamw)[0]) < 1e-6


@pytest.mark.parametrize("build", [factored, auto], ids=lambda build: build.__name__)
@pytest.mark.parametrize("strategy", [ddp, fsdp2], ids=lambda strategy: strategy.__name__)
def test_two_ranks_train_as_one(strategy, build):
    weights, structures = run(strategy, build)
    others, expected = run(single, build)
    assert (
        structures == expected == {name: p.structure for name, p in build(llama(num_hidden_layers=2)).partition.items()}
    )
    assert furthest(weights, others) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [*LAYOUTS, partial(fsdp2, folder=True)],
    ids=["single", "ddp", "fsdp2", "fsdp2_in_a_folder"],
)
def test_a_resumed_run_is_the_run(strategy, tmp_path):
    file = tmp_path / "saved"
    weights, _ = run(strategy, factored, save=file)
    assert furthest(run(strategy, factored, load=file)[0], weights) == 0


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_in_one_process(tmp_path):
    file = tmp_path / "saved"
    weights, _ = run(fsdp2, factored, save=file)
    assert furthest(run(single, factored, load=file)[0], weights) < 1e-6
