"""First moments in 8 bits and stochastic rounding of sharded parameters: one process, to the last bit.

Gradients are small integers, so that sums of squares are exact in any order.
"""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor

from lightning_adam_mini import AdamMini
from lightning_adam_mini.optim.state import first_moment
from ranks import run_ranks
from sharded_models import build, lay_out, whole_parameters

FORMATS = {
    "8 bits": (torch.float32, {"exp_avg_dtype": torch.uint8}),
    "8 bits, rounded": (torch.bfloat16, {"exp_avg_dtype": torch.uint8, "stochastic_rounding": True}),
    "rounded": (torch.bfloat16, {"stochastic_rounding": True}),
    "rounded first moments": (torch.float32, {"exp_avg_dtype": torch.bfloat16, "stochastic_rounding": True}),
}


@pytest.fixture(autouse=True)
def _matrices_are_never_small(monkeypatch):
    monkeypatch.setattr("lightning_adam_mini.optim.quantized.MIN_ELEMENTS", 16)


def optimizer_of(model, options, partition="transformer"):
    return AdamMini(model, lr=1e-2, weight_decay=0.1, partition=partition, implementation="reference", **options)


def train(model, optimizer, start, stop):
    """Steps with whole numbers for gradients, of which each rank gets its part."""
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        for name, cut in sorted(
            optimizer.partition.items(), key=lambda item: item[0].replace("_fsdp_wrapped_module.", "")
        ):
            parameter = dict(model.named_parameters())[name]
            grad = torch.randint(-3, 4, cut.blocks.shape, generator=generator).to(parameter.dtype)
            if isinstance(parameter, DTensor):
                grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements, src_data_rank=None)
            elif (flat := optimizer._table[parameter].flat_range) is not None:
                grad = grad.flatten()[flat.start : flat.stop]
            parameter.grad = grad
        optimizer.step()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run(name, layout, world, format_name, partition="transformer"):
    dtype, options = FORMATS[format_name]
    model = build(name).to(dtype)
    model = lay_out(model, layout, world)[0] if layout else model
    optimizer = optimizer_of(model, options, partition)
    train(model, optimizer, 0, 4)
    states = {
        cut.name: {key: whole(value) for key, value in optimizer.state[p].items()}
        for cut, p in zip(
            optimizer.partition.values(), (p for g in optimizer.param_groups for p in g["params"]), strict=True
        )
    }
    return whole_parameters(model), states


def run_on_rank(rank, *arguments):
    return run(*arguments)


@pytest.mark.parametrize(
    ("name", "layout", "world", "format_name", "partition"),
    [
        ("14 heads", "fsdp2", 2, "8 bits", "transformer"),
        ("14 heads", "fsdp2", 3, "8 bits, rounded", "transformer"),
        ("gpt2", "fsdp2", 3, "8 bits, rounded", "factored"),
        pytest.param("14 heads", "fsdp2", 3, "rounded", "factored", marks=pytest.mark.slow),
        pytest.param("gpt2", "fsdp2", 2, "rounded first moments", "transformer", marks=pytest.mark.slow),
        pytest.param("experts", "fsdp2", 3, "8 bits, rounded", "transformer", marks=pytest.mark.slow),
        ("convolutions", "fsdp2", 2, "8 bits, rounded", "element"),
        ("14 heads", "tp", 2, "rounded", "transformer"),
        pytest.param("14 heads", "hsdp", 4, "8 bits, rounded", "transformer", marks=pytest.mark.slow),
        pytest.param("14 heads", "fsdp2 x tp", 4, "rounded", "transformer", marks=pytest.mark.slow),
        ("14 heads", "fsdp1", 3, "rounded", "transformer"),
        pytest.param("gpt2", "fsdp1", 2, "rounded first moments", "factored", marks=pytest.mark.slow),
    ],
)
def test_sharded_parameters_are_those_of_one_process(name, layout, world, format_name, partition):
    expected, states = run(name, None, 1, format_name, partition)
    for parameters, sharded in run_ranks(world, run_on_rank, name, layout, world, format_name, partition):
        for key, parameter in expected.items():
            assert torch.equal(parameters[key], parameter), key
        if layout != "fsdp1":  # its states are parts
            for key, state in states.items():
                assert state.keys() == sharded[key].keys()
                assert all(torch.equal(sharded[key][one], value) for one, value in state.items()), key


# Columns


def columns(width, placements, world, **options):
    torch.manual_seed(0)
    layer = nn.Linear(width, 6, bias=False)
    mesh = init_device_mesh("cpu", (world,))

    def shard(name, module, mesh):
        module.weight = nn.Parameter(distribute_tensor(module.weight, mesh, placements, src_data_rank=None))

    return distribute_module(layer, mesh, shard), optimizer_of(layer, options, "default")


def columns_on_rank(rank, world):
    layer, optimizer = columns(768, [Shard(1)], world, exp_avg_dtype=torch.uint8)
    train(layer, optimizer, 0, 3)
    state = optimizer.state[layer.weight]
    assert state["exp_avg_scale"].shape == (6, 6)
    assert state["exp_avg_scale"].to_local().shape == (6, 6 // world)
    return whole(layer.weight).detach(), {key: whole(value) for key, value in state.items()}


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_columns_of_whole_groups(world):
    torch.manual_seed(0)
    layer = nn.Linear(768, 6, bias=False)
    optimizer = optimizer_of(layer, {"exp_avg_dtype": torch.uint8}, "default")
    train(layer, optimizer, 0, 3)
    for weight, state in run_ranks(world, columns_on_rank, world):
        assert torch.equal(weight, layer.weight)
        assert all(torch.equal(state[key], value) for key, value in optimizer.state[layer.weight].items())


def refused_on_rank(rank):
    message = (
        r"weight: the placements .* of a parameter of shape .* split the groups of 128 .*exp_avg_dtype=torch.bfloat16"
    )
    for width in (384, 300):
        with pytest.raises(ValueError, match=message):
            columns(width, [Shard(1)], 2, exp_avg_dtype=torch.uint8)
    columns(300, [Shard(0)], 2, exp_avg_dtype=torch.uint8)
    columns(300, [Replicate()], 2, exp_avg_dtype=torch.uint8)
    columns(300, [Shard(1)], 2, exp_avg_dtype=torch.bfloat16)
    model = lay_out(build("gpt2"), "fsdp1", 2)[0]
    with pytest.raises(ValueError, match=r"FSDP1 flattens this parameter.*take exp_avg_dtype=torch.bfloat16"):
        optimizer_of(model, {"exp_avg_dtype": torch.uint8})
    return True


def test_placements_that_split_groups_are_refused():
    assert all(run_ranks(2, refused_on_rank))


# Checkpoints


def part_of_a_run(rank, folder, world, format_name, start, stop):
    dtype, options = FORMATS[format_name]
    model = build("14 heads").to(dtype)
    model = lay_out(model, "fsdp2", world)[0] if world > 1 else model
    optimizer = optimizer_of(model, options)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    if start:
        dcp.load(state, checkpoint_id=folder / str(start))
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    train(model, optimizer, start, stop)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder / str(stop))
    return whole_parameters(model)


@pytest.mark.slow
@pytest.mark.parametrize("format_name", ["8 bits", "8 bits, rounded"])
def test_a_checkpoint_goes_on_exactly_on_other_ranks(tmp_path, format_name):
    for world, start, stop in ((1, 0, 2), (2, 2, 4), (3, 4, 6)):
        parameters, *_ = run_ranks(world, part_of_a_run, tmp_path, world, format_name, start, stop)
    dtype, options = FORMATS[format_name]
    model = build("14 heads").to(dtype)
    train(model, optimizer_of(model, options), 0, 6)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameters[name], parameter), name


def other_formats_on_rank(rank, world, saved):
    """A state of one process in float32 into sharded codes, these into sharded bfloat16, and back."""
    results = []
    for exp_avg_dtype in (torch.uint8, torch.bfloat16, torch.uint8):
        model = lay_out(build("14 heads"), "fsdp2", world)[0]
        optimizer = optimizer_of(model, {"exp_avg_dtype": exp_avg_dtype})
        optimizer.load_state_dict(saved)
        saved = optimizer.state_dict()
        results.append([whole(first_moment(state)) for state in optimizer.state.values()])
    return results


@pytest.mark.slow
def test_states_change_their_format_on_the_ranks():
    model = build("14 heads")
    optimizer = optimizer_of(model, {})
    train(model, optimizer, 0, 3)
    expected, saved = [], optimizer.state_dict()
    for exp_avg_dtype in (torch.uint8, torch.bfloat16, torch.uint8):
        other = optimizer_of(build("14 heads"), {"exp_avg_dtype": exp_avg_dtype})
        other.load_state_dict(saved)
        saved = other.state_dict()
        expected.append([first_moment(state) for state in other.state.values()])
    for results in run_ranks(3, other_formats_on_rank, 3, optimizer.state_dict()):
        for one, other in zip(expected, results, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
