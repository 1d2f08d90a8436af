"""Without the model: what the page of other frameworks says about options alone, whole and sharded."""

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_adam_mini import AdamMini
from ranks import run_ranks
from tiny_models import llama, random_gradient

OPTIONS = {"partition": "default", "partition_overrides": {"other": "factored"}}


def train(rank, optimizer_of, *, shard):
    """Three steps with the same gradients, however the model is sharded; its whole weights."""
    torch.manual_seed(0)
    model = llama(num_hidden_layers=2)
    if shard:
        fully_shard(model)
    optimizer = optimizer_of(model)
    for step in range(3):
        torch.manual_seed(step)
        for parameter in model.parameters():
            gradient = random_gradient(torch.empty(parameter.shape))
            if isinstance(parameter, DTensor):
                gradient = torch.distributed.tensor.distribute_tensor(
                    gradient, parameter.device_mesh, parameter.placements
                )
            parameter.grad = gradient
        optimizer.step()
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [weight.detach().clone() for weight in weights]


def with_model(model):
    return AdamMini(model, 1e-2, partition="factored")


def with_options(model):
    return AdamMini(model.parameters(), 1e-2, **OPTIONS)


def in_a_rank(rank):
    return train(rank, with_options, shard=True)


def test_options_alone_are_the_factored_partition():
    expected = train(0, with_model, shard=False)
    assert all(map(torch.equal, train(0, with_options, shard=False), expected))
    for weights in run_ranks(2, in_a_rank):
        assert max((a - b).abs().max().item() for a, b in zip(weights, expected, strict=True)) < 1e-6


def test_a_fused_matrix_is_factored_as_a_whole():
    (whole,) = (p for p in with_options(nn.MultiheadAttention(8, 4)).partition.values() if p.blocks.shape == (24, 8))
    (parts,) = (p for p in with_model(nn.MultiheadAttention(8, 4)).partition.values() if p.blocks.shape == (24, 8))
    assert (whole.blocks.num_values, parts.blocks.num_values) == (24 + 8, 24 + 3 * 8)
