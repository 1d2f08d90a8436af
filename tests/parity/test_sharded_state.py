"""Checkpoints through torch.distributed.checkpoint: saved on some ranks, they go on exactly on any other number."""

import itertools

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from lightning_adam_mini import AdamMini
from ranks import run_ranks
from sharded_models import build, lay_out, train, whole_parameters

WITHIN = 1e-6


def optimizer_of(model, partition, start=0):
    optimizer = AdamMini(model, lr=3e-3, partition=partition)
    steps = itertools.count(start)

    def set_rate(optimizer, *_):
        rate = 3e-3 / (1 + next(steps) / 10)
        for group in optimizer.param_groups:
            group["lr"] = rate

    optimizer.register_step_pre_hook(set_rate)
    return optimizer


def run(rank, folder, layout, world, partition, *, start, stop, load, save):
    """Train from a checkpoint, or from the start, and save another."""
    model, parts, part = lay_out(build("14 heads"), layout, world) if layout else (build("14 heads"), 1, 0)
    optimizer = optimizer_of(model, partition, start)
    if load:
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=folder / load)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    train(model, optimizer, stop - start, parts=parts, part=part, start=start)
    if save:
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=folder / save)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return whole_parameters(model), get_optimizer_state_dict(model, optimizer, options=options)


def run_on_ranks(rank, folder, layout, world, partition, options):
    return run(rank, folder, layout, world, partition, **options)


@pytest.mark.parametrize("partition", ["transformer", pytest.param("transformer_rank_one", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("fsdp2", 4), ("fsdp2", 1)),
        (("fsdp2", 1), ("fsdp2", 2)),
        (("fsdp2", 2), ("fsdp2", 3)),
        pytest.param(("hsdp", 4), ("fsdp2", 3), marks=pytest.mark.slow),
        ((None, 1), ("fsdp2", 2)),
        (("fsdp2", 3), (None, 1)),
        pytest.param(("fsdp2 x tp", 4), ("fsdp2", 2), marks=pytest.mark.slow),
        pytest.param(("fsdp2", 2), ("tp", 2), marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_goes_on_exactly_on_other_ranks(tmp_path, before, after, partition):
    (layout, world), (other, others) = before, after
    run_ranks(
        world, run_on_ranks, tmp_path, layout, world, partition, {"start": 0, "stop": 5, "load": None, "save": "half"}
    )
    (weights, state), *_ = run_ranks(
        others, run_on_ranks, tmp_path, other, others, partition, {"start": 5, "stop": 10, "load": "half", "save": None}
    )
    alone = build("14 heads")
    optimizer = optimizer_of(alone, partition)
    train(alone, optimizer, 10)
    for name, weight in alone.named_parameters():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=WITHIN)
        for key, value in optimizer.state[weight].items():
            torch.testing.assert_close(state["state"][name][key], value, rtol=1e-4, atol=1e-7)
    assert [group["partition"] for group in state["param_groups"]] == [g["partition"] for g in optimizer.param_groups]


def loads_states_of_the_first_fsdp(rank, world):
    """Its own state to the last bit, and another optimizer's with a message."""
    model, parts, part = lay_out(build("14 heads"), "fsdp1", world)
    optimizer = optimizer_of(model, "transformer_rank_one")
    train(model, optimizer, 2, parts=parts, part=part)
    before = [{key: value.clone() for key, value in state.items()} for state in optimizer.state.values()]
    optimizer.load_state_dict(optimizer.state_dict())
    for saved, state in zip(before, optimizer.state.values(), strict=True):
        assert all(torch.equal(saved[key], value) for key, value in state.items())
    foreign = optimizer.state_dict()
    for state in foreign["state"].values():
        state.pop("exp_avg_sq_row", None)
    with pytest.raises(ValueError, match=r"has the keys .* it comes from another optimizer or partition"):
        optimizer.load_state_dict(foreign)
    return True


def test_a_state_of_the_first_fsdp_comes_back_to_the_last_bit():
    assert all(run_ranks(3, loads_states_of_the_first_fsdp, 3))
