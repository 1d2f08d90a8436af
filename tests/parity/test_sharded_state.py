"""Checkpoints through torch.distributed.checkpoint: saved on some ranks, they go on exactly on any other number."""

import itertools
from unittest import mock

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
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer

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


@pytest.mark.slow
@pytest.mark.parametrize("partition", ["transformer", "factored", "slimadam"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("fsdp2", 4), ("fsdp2", 1)),
        (("fsdp2", 1), ("fsdp2", 2)),
        (("fsdp2", 2), ("fsdp2", 3)),
        (("hsdp", 4), ("fsdp2", 3)),
        ((None, 1), ("fsdp2", 2)),
        (("fsdp2", 3), (None, 1)),
        (("fsdp2 x tp", 4), ("fsdp2", 2)),
        (("fsdp2", 2), ("tp", 2)),
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
    optimizer = optimizer_of(model, "factored")
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


def goes_on_from_a_whole_state_of_the_first_fsdp(rank, world):
    """Torch gathers each key of the states from all parameters of a wrapper, whether matrices or vectors."""

    def trained(steps, saved=None):
        model, parts, part = lay_out(build("14 heads"), "fsdp1", world)
        optimizer = optimizer_of(model, "factored", steps.start)
        if saved:
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(model, optimizer, saved[1]))
        train(model, optimizer, len(steps), parts=parts, part=part, start=steps.start)
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        with mock.patch.object(torch.Tensor, "cpu", torch.Tensor.clone):  # torch copies from the buffer of each key
            return weights, FullyShardedDataParallel.optim_state_dict(model, optimizer)

    (whole, _), (resumed, _) = trained(range(4)), trained(range(2, 4), trained(range(2)))
    return all(torch.equal(resumed[name], weight) for name, weight in whole.items())


def test_a_whole_state_of_the_first_fsdp_goes_on_exactly():
    assert all(run_ranks(2, goes_on_from_a_whole_state_of_the_first_fsdp, 2))


def swap_for_shards(model, optimizer, world):
    """Shard a model whose optimizer is there already, as accelerate does it, and put the shards in its places."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    places = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"][:] = [torch.empty(1) for _ in group["params"]]
    model, parts, part = lay_out(model, "fsdp2", world)
    now = dict(model.named_parameters())
    for group, members in zip(optimizer.param_groups, places, strict=True):
        group["params"] = [now[name] for name in members]
    return model, parts, part


def train_with_shards_that_come_later(rank, world, partition, steps_before):
    model = build("14 heads")
    optimizer = optimizer_of(model, partition)
    train(model, optimizer, steps_before)
    model, parts, part = swap_for_shards(model, optimizer, world)
    train(model, optimizer, 4 - steps_before, parts=parts, part=part, start=steps_before)
    assert set(optimizer.state) == set(model.parameters())
    assert optimizer.partition.keys() == dict(model.named_parameters()).keys()
    return whole_parameters(model)


@pytest.mark.parametrize(
    ("partition", "steps_before"),
    [("transformer", 0), ("transformer", 2), pytest.param("factored", 2, marks=pytest.mark.slow)],
)
def test_parameters_that_are_swapped_for_shards_train_as_on_one_process(partition, steps_before):
    weights, *_ = run_ranks(2, train_with_shards_that_come_later, 2, partition, steps_before)
    alone = build("14 heads")
    train(alone, optimizer_of(alone, partition), 4)
    for name, weight in alone.named_parameters():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=WITHIN)


def thaw(model, layout, *, frozen):
    """Freeze or unfreeze the second layer and the table; FSDP1 wants a wrapped unit to be of one kind."""
    for name, parameter in model.named_parameters():
        if "layers.1" in name or ("embed_tokens" in name and layout != "fsdp1"):
            parameter.requires_grad_(not frozen)


def train_frozen_first(rank, layout, world, dcp, like):
    """Frozen; saved and loaded; unfrozen; saved and loaded; frozen again."""
    first = build("14 heads")
    thaw(first, like, frozen=True)
    model, parts, part = lay_out(first, layout, world) if layout else (first, 1, 0)
    optimizer = optimizer_of(model, "transformer")
    assert len(optimizer.state) == sum(p.requires_grad for p in model.parameters())
    for number, frozen in enumerate((True, False, True)):
        thaw(model, like, frozen=frozen)
        train(model, optimizer, 2, parts=parts, part=part, start=2 * number)
        for _ in range(2):
            state = get_optimizer_state_dict(model, optimizer) if dcp else optimizer.state_dict()
            optimizer = optimizer_of(model, "transformer", 2 * (number + 1))
            if dcp:
                set_optimizer_state_dict(model, optimizer, state)
            else:
                optimizer.load_state_dict(state)
    return whole_parameters(model)


@pytest.mark.slow
@pytest.mark.parametrize("dcp", [False, True])
@pytest.mark.parametrize("layout", ["fsdp2", "fsdp1"])
def test_frozen_parameters_that_train_later_under(layout, dcp):
    weights, *_ = run_ranks(2, train_frozen_first, layout, 2, dcp, layout)
    alone = train_frozen_first(0, None, 1, dcp, layout)
    moved = build("14 heads")
    for name, weight in moved.named_parameters():
        torch.testing.assert_close(weights[name], alone[name], rtol=0, atol=WITHIN)
        assert not torch.equal(weights[name], weight), name


def train_with_zero(rank):
    model = build("llama")
    options = {"lr": 3e-3, "weight_decay": 0.1, "partition": "transformer"}
    train(model, ZeroRedundancyOptimizer(model.parameters(), AdamMini, module=model, **options), 2)
    norms = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    others = [parameter for name, parameter in model.named_parameters() if "norm" not in name]
    groups = [{"params": others}, {"params": norms, "weight_decay": 0.0}]
    train(model, ZeroRedundancyOptimizer(groups, AdamMini, module=model, **options), 2, start=2)
    return dict(model.named_parameters())


def test_groups_of_zero_decay_as_they_say():
    """Norms too, unlike those of `AdamMini(model)`, unless a group of their own spares them."""
    weights, *_ = run_ranks(2, train_with_zero)
    alone = build("llama")
    options = {"lr": 3e-3, "weight_decay": 0.1, "partition": "transformer"}
    train(alone, AdamMini(alone, weight_decay_policy="all", **options), 2)
    train(alone, AdamMini(alone, **options), 2, start=2)
    for name, weight in alone.named_parameters():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=WITHIN)
