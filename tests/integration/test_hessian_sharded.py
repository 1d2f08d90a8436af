"""Products, spectra and traces on several ranks equal those of one device."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from hessian_models import build, classify, relative_error, token_batches
from lightning_adam_mini.hessian import (
    HessianOperator,
    ParameterBlock,
    block_tridiagonals,
    model_tridiagonals,
    trace,
)
from ranks import run_ranks

EXACT = 1e-10
BATCHES = 5  # ranks get unequal numbers


def model_and_batches(name):
    model, _ = build(name)
    return model, token_batches(5 if name == "gpt2" else 7, count=BATCHES)


def lay_out(model, layout, world):
    if layout == "ddp":
        return DistributedDataParallel(model)
    if layout == "group":
        return model
    if layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (world,))
    for child in model.modules():
        if isinstance(child, nn.ModuleList):
            for layer in child:
                fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(operator, vector):
    return torch.cat([part.flatten() for part in operator.layout.gather(vector).values()])


def compared(operator, seed):
    """The values that must agree; vectors are whole."""
    vector = operator.layout.random(seed)
    block = ParameterBlock("block", next(iter(operator.layout.shapes)), torch.arange(3, 17))
    rows = torch.linspace(-1, 1, 14, dtype=operator.dtype)
    (block_found,) = block_tridiagonals(operator, [block], steps=3, probes=1)["block"]
    found = {
        "vector": whole(operator, vector),
        "product": whole(operator, operator.product(vector)),
        "block": operator.block_products({"block": rows}, [block])["block"],
        "block steps": block_found.alphas,
        "trace": trace(operator, probes=2).samples,
    }
    for keeps, budget in (("kept", 2**30), ("recurrence", 0)):
        (tridiagonal,) = model_tridiagonals(operator, steps=6, probes=1, budget_bytes=budget)
        found[keeps] = torch.cat([tridiagonal.alphas, tridiagonal.betas])
    return found


def on_one(name, reduction):
    model, batches = model_and_batches(name)
    return compared(HessianOperator(model, classify, batches, dtype=torch.float64, reduction=reduction), 4)


def on_ranks(rank, world, name, layout, reduction, forward_first):
    model, batches = model_and_batches(name)
    model = lay_out(model, layout, world)
    own = batches[rank::world] if world <= BATCHES else batches
    if forward_first:  # FSDP2 leaves the root's parameters gathered
        with torch.no_grad():
            classify(model, batches[0])
    group = dist.group.WORLD if layout == "group" else None
    operator = HessianOperator(model, classify, own, dtype=torch.float64, reduction=reduction, group=group)
    found = compared(operator, 4)
    if layout in ("fsdp2", "hsdp"):
        assert operator.local_size < operator.size
        assert operator.product(operator.layout.random(0)).shape == (operator.local_size,)
    classify(model, batches[0]).backward()  # the model still trains
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout", "world", "reduction", "forward_first"),
    [
        ("tied", "ddp", 2, "mean", False),
        ("tied", "group", 3, "sum", False),
        pytest.param("gpt2", "ddp", 3, "sum", False, marks=pytest.mark.slow),
        ("tied", "fsdp2", 2, "mean", True),
        ("gpt2", "fsdp2", 3, "mean", False),
        pytest.param("gpt2", "fsdp2", 2, "sum", True, marks=pytest.mark.slow),
        ("tied", "hsdp", 4, "mean", False),
    ],
)
def test_ranks_find_what_one_device_finds(name, layout, world, reduction, forward_first):
    expected = on_one(name, reduction)
    for found in run_ranks(world, on_ranks, world, name, layout, reduction, forward_first):
        for key, value in expected.items():
            assert relative_error(found[key], value) < EXACT, key


def on_a_rank_without_batches(rank):
    model, batches = model_and_batches("tied")
    operator = HessianOperator(model, classify, batches if rank else [], group=dist.group.WORLD, dtype=torch.float64)
    return operator.product(operator.layout.random(4))


def test_a_rank_without_batches_takes_part():
    expected = on_one("tied", "mean")["product"]
    for found in run_ranks(2, on_a_rank_without_batches):
        assert relative_error(found, expected) < EXACT


def messages(rank):
    found = []
    mesh = init_device_mesh("cpu", (2,))
    split = parallelize_module(nn.Sequential(nn.Linear(4, 4)), mesh, {"0": ColwiseParallel()})
    sharded, batches = model_and_batches("tied")
    sharded = fully_shard(sharded, mesh=mesh)
    for call in (
        lambda: HessianOperator(split, classify, []),
        lambda: HessianOperator(sharded, classify, batches, group=dist.group.WORLD),
    ):
        try:
            call()
        except ValueError as error:
            found.append(str(error))
    return found


def test_what_is_not_supported_is_refused():
    for first, second in run_ranks(2, messages):
        assert "tensor parallelism" in first
        assert "leave it out" in second
