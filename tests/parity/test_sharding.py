"""The same update on every layout: twenty steps on several ranks end where those of one process end."""

import contextlib
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightning_adam_mini import AdamMini
from ranks import run_ranks
from sharded_models import build, lay_out, train, whole_parameters

STEPS = 20
WITHIN = 1e-6
# The gradient of a key's bias is zero but for rounding, which Adam divides by its own size: these need float64.
IN_DOUBLE = {"gpt2"}

LAYOUTS = [
    *(("llama", "fsdp2", world) for world in (1, 2, 3, 4)),
    ("llama", "hsdp", 4),
    ("llama", "tp", 2),
    ("llama", "fsdp2 x tp", 4),
    *(("llama", "fsdp1", world) for world in (1, 2, 3)),
    *(("3 heads", layout, 2) for layout in ("fsdp2", "fsdp1")),
    *(("14 heads", layout, 4) for layout in ("fsdp2", "fsdp1", "fsdp2 x tp")),
    *(("gpt2", layout, 3) for layout in ("fsdp2", "fsdp1")),
    *(("experts", layout, 2) for layout in ("fsdp2", "fsdp1")),
    *(("convolutions", layout, 3) for layout in ("fsdp2", "fsdp1")),
]


def optimizer_of(model, **options):
    return AdamMini(model, lr=3e-3, **options)


def train_on_ranks(rank, name, layout, world, options):
    model, parts, part = lay_out(build_for_training(name), layout, world)
    train(model, optimizer_of(model, **options), STEPS, parts=parts, part=part)
    return whole_parameters(model)


def build_for_training(name):
    return build(name).double() if name in IN_DOUBLE else build(name)


def train_alone(name, **options):
    model = build_for_training(name)
    train(model, optimizer_of(model, **options), STEPS)
    return whole_parameters(model)


def largest_difference(name, layout, world, **options):
    alone = train_alone(name, **options)
    (first, *others) = run_ranks(world, train_on_ranks, name, layout, world, options)
    assert first.keys() == alone.keys()
    for other in others:
        assert all(torch.equal(other[name], weight) for name, weight in first.items()), "ranks disagree"
    start = dict(build_for_training(name).named_parameters())
    assert all(not torch.equal(alone[name], start[name]) for name in alone), "a parameter was not trained"
    return max((first[name] - weight).abs().max().item() for name, weight in alone.items())


def slow_but(cases, *fast):
    return [case if case in fast else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(
    ("name", "layout", "world"),
    slow_but(
        LAYOUTS,
        ("3 heads", "fsdp2", 2),
        ("3 heads", "fsdp1", 2),
        ("llama", "hsdp", 4),
    ),
)
def test_ranks_train_as_one_process(name, layout, world):
    assert largest_difference(name, layout, world) < WITHIN


OTHER_PARTITIONS = [
    (partition, *case)
    for partition in ("transformer_early", "factored", "slimadam", "default", "element")
    for case in (("14 heads", "fsdp2", 3), ("gpt2", "fsdp1", 3), ("llama", "fsdp2 x tp", 4))
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("partition", "name", "layout", "world"),
    OTHER_PARTITIONS,
)
def test_every_partition_trains_as_on_one_process(partition, name, layout, world):
    assert largest_difference(name, layout, world, partition=partition) < WITHIN


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp2", "fsdp1"])
@pytest.mark.parametrize("partition", ["transformer", "factored"])
def test_the_reference_trains_as_on_one_process(partition, layout):
    assert largest_difference("3 heads", layout, 2, partition=partition, implementation="reference") < WITHIN


def without_reduction(rank, *arguments):
    """Ranks that keep their sums of squares to themselves."""
    with mock.patch("lightning_adam_mini.optim.distributed.dist.all_reduce"):
        return train_on_ranks(rank, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout", "world"),
    slow_but([case for case in LAYOUTS if case[2] > 1], ("3 heads", "fsdp2", 2)),
)
def test_the_comparison_fails_without_the_reduction(name, layout, world):
    alone = train_alone(name)
    ranks = run_ranks(world, without_reduction, name, layout, world, {})
    assert max((ranks[0][name] - weight).abs().max().item() for name, weight in alone.items()) > 100 * WITHIN


# Gradients of whole numbers: their sums of squares have no rounding, so that nothing may differ at all.


def whole_numbers(parameters, step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(-8, 9, p.shape, generator=generator).float() for p in parameters]


def step_with_gradients(model, steps=5, **options):
    optimizer = optimizer_of(model, **options)
    parameters = list(model.parameters())
    for step in range(steps):
        for parameter, grad in zip(parameters, whole_numbers(parameters, step), strict=True):
            if isinstance(parameter, DTensor):
                grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.grad = grad
        optimizer.step()
    return whole_parameters(model)


def step_on_ranks(rank, name, layout, world, options):
    return step_with_gradients(lay_out(build(name), layout, world)[0], **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout", "world"),
    [
        ("3 heads", "fsdp2", 2),
        ("14 heads", "fsdp2", 4),
        ("llama", "hsdp", 4),
        ("llama", "tp", 2),
        ("14 heads", "fsdp2 x tp", 4),
        ("experts", "fsdp2", 2),
        ("convolutions", "fsdp2", 3),
    ],
)
def test_gradients_of_whole_numbers_give_the_same_bits(name, layout, world):
    """By the reference, which sums squares: the root of a norm would round."""
    options = {"implementation": "reference"}
    alone = step_with_gradients(build(name), **options)
    for weights in run_ranks(world, step_on_ranks, name, layout, world, options):
        assert all(torch.equal(weights[name], weight) for name, weight in alone.items())


# Collectives of a step.


COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "all_to_all")


def collectives(rank, name, layout, world, options):
    """How many collectives the optimizer's part of each of two steps takes."""
    model, parts, part = lay_out(build(name), layout, world)
    optimizer = optimizer_of(model, **options)
    counts = []
    step_of_optimizer = optimizer.step

    def counted_step():
        with contextlib.ExitStack() as patches:
            calls = [patches.enter_context(mock.patch.object(dist, f, wraps=getattr(dist, f))) for f in COLLECTIVES]
            step_of_optimizer()
        counts.append(sum(call.call_count for call in calls))

    optimizer.step = counted_step
    train(model, optimizer, 2, parts=parts, part=part)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "world", "partition", "expected"),
    [
        ("fsdp2", 2, "transformer", 1),
        ("fsdp2", 3, "factored", 1),
        ("hsdp", 4, "transformer", 1),
        ("tp", 2, "transformer", 1),
        ("fsdp2 x tp", 4, "transformer", 2),
        ("fsdp1", 2, "transformer", 1),
        ("fsdp2", 1, "transformer", 0),
        ("fsdp2", 2, "element", 0),
    ],
)
def test_a_step_takes_one_collective_for_each_mesh_dimension(layout, world, partition, expected):
    for counts in run_ranks(world, collectives, "llama", layout, world, {"partition": partition}):
        assert counts == [expected, expected]


def test_blocks_that_lie_whole_on_a_rank_take_no_collective():
    overrides = {"query": "row", "key": "row", "norm": "element"}
    counts = run_ranks(2, collectives, "llama", "fsdp2", 2, {"partition_overrides": overrides})
    assert counts == [[0, 0], [0, 0]]


# Gradients that are missing.


def step_with_a_gradient_on_some_ranks(rank, ranks_with_gradient, placement):
    """A matrix that is one block; the other ranks have no gradient for their part of it."""
    mesh = init_device_mesh("cpu", (2,))
    weight = torch.arange(12.0).view(4, 3)
    model = torch.nn.Linear(3, 4, bias=False)
    model.weight = torch.nn.Parameter(distribute_tensor(weight, mesh, [placement]))
    optimizer = AdamMini(model, lr=0.1, weight_decay=0.0, partition="default")
    if rank in ranks_with_gradient:
        model.weight.grad = distribute_tensor(torch.ones(4, 3), mesh, [placement], src_data_rank=None)
    optimizer.step()
    state = optimizer.state[model.weight]
    return model.weight.full_tensor().detach(), state["exp_avg_sq"].full_tensor(), state["step"].item()


@pytest.mark.parametrize("placement", [Shard(0), Shard(1)])
def test_a_rank_without_a_gradient_takes_part_in_the_sums(placement):
    for weight, moment, step in run_ranks(2, step_with_a_gradient_on_some_ranks, [1], placement):
        here = distribute_rank(placement)
        assert step == 1
        share = here.float().mean()
        torch.testing.assert_close(moment, (0.001 * share).view(1, 1))
        moved = torch.arange(12.0).view(4, 3) - weight
        assert (moved[here] > 0).all()
        assert (moved[~here] == 0).all()


def distribute_rank(placement):
    """Which elements lie on the second of two ranks."""
    here = torch.zeros(4, 3, dtype=torch.bool)
    here.chunk(2, placement.dim)[1].fill_(True)
    return here


def steps_without_a_gradient_on_one_rank(rank, with_bias):
    """Three steps, in which the first rank has no gradient of the matrix, and perhaps a bias of its own."""
    mesh = init_device_mesh("cpu", (2,))
    model = torch.nn.Linear(3, 4, bias=with_bias)
    model.weight = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    optimizer = AdamMini(model, lr=0.1, partition="default", weight_decay_policy="all")
    for _ in range(3):
        if rank == 1:
            model.weight.grad = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)], src_data_rank=None)
        if with_bias:
            model.bias.grad = torch.ones(4)
        optimizer.step()
    return optimizer.state[model.weight]["step"].item()


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_rank_that_never_has_a_gradient_takes_part_in_every_step(with_bias):
    """It keeps no plan of a step without communication, for which the other rank would wait in vain."""
    assert run_ranks(2, steps_without_a_gradient_on_one_rank, with_bias) == [3, 3]


def test_a_parameter_without_a_gradient_anywhere_is_left_alone():
    for weight, moment, step in run_ranks(2, step_with_a_gradient_on_some_ranks, [], Shard(0)):
        assert torch.equal(weight, torch.arange(12.0).view(4, 3))
        assert moment.item() == step == 0


# State.


def shapes_of_state(rank, name, world):
    model, parts, part = lay_out(build(name), "fsdp2", world)
    optimizer = optimizer_of(model)
    train(model, optimizer, 1, parts=parts, part=part)
    state = {n: optimizer.state[p] for n, p in model.named_parameters()}
    return {n: {k: (type(v).__name__, tuple(v.shape), v.dtype) for k, v in s.items()} for n, s in state.items()}


def test_the_state_has_the_shapes_of_one_process():
    alone = build("14 heads")
    optimizer = optimizer_of(alone)
    for state in run_ranks(3, shapes_of_state, "14 heads", 3):
        for name, parameter in alone.named_parameters():
            for key, (kind, shape, dtype) in state[name].items():
                expected = optimizer.state[parameter][key]
                assert (shape, dtype) == (tuple(expected.shape), expected.dtype)
                assert kind == ("Tensor" if key == "step" else "DTensor")
