"""The kernel for the CPU on what is coded in 8 bits or rounded stochastically: the same codes and random bits."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

import tiny_models
from lightning_adam_mini import AdamMini, Blocks
from lightning_adam_mini.blocks import Segment
from lightning_adam_mini.optim import update
from lightning_adam_mini.optim.kernels import cpu
from lightning_adam_mini.optim.quantized import decode_tensor
from lightning_adam_mini.optim.shards import Shard
from lightning_adam_mini.optim.state import first_moment, init_state
from lightning_adam_mini.optim.stochastic_rounding import Rounding
from lightning_adam_mini.optim.update import ParameterView, StepOptions

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

OPTIONS = StepOptions(lr=1e-2, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.1)
FORMATS = {
    "8 bits": (torch.float32, torch.uint8, False),
    "8 bits beside bfloat16": (torch.bfloat16, torch.uint8, False),
    "8 bits beside rounded bfloat16": (torch.bfloat16, torch.uint8, True),
    "rounded bfloat16": (torch.bfloat16, torch.bfloat16, True),
    "rounded first moments": (torch.float32, torch.bfloat16, True),
    "rounded parameters": (torch.bfloat16, torch.float32, True),
}
BLOCKS = {
    "element": Blocks.element((50, 90)),
    "long elements": Blocks.element((3, 512 * 200)),
    "whole": Blocks.whole((600, 701)),
    "rows": Blocks.rows((20, 333)),
    "short rows": Blocks.rows((1200, 5)),
    "columns": Blocks.rows((50, 90), axis=1),
    "heads": Blocks.rows((60, 130), block_size=20),
    "heads in columns": Blocks.rows((40, 150), axis=1, block_size=50),
    "long runs apart": Blocks.rows((3, 4, 1152), axis=1),
    "experts": Blocks.rows((3, 40, 128), axis=1, batch_axes=(0,)),
    "convolution": Blocks.rows((40, 20, 3, 3)),
    "transposed convolution": Blocks.rows((40, 30, 3, 3), axis=1),
    "fused in columns": Blocks.segmented((33, 160), (Segment(80, 20), Segment(80, 1)), axis=1),
    "row and column": Blocks.factored((40, 130)),
    "row and column, in columns": Blocks.factored((40, 130), axis=1),
}
# What the kernel leaves to slices of torch operations: groups that its pieces would split.
SPLIT = {
    "experts": Blocks.rows((3, 40, 50), axis=1, batch_axes=(0,)),
    "row and column, fused": Blocks.factored((33, 160), axis=1, segment_lengths=(40, 20, 20), repeats=2),
    "long slices": Blocks.whole((2, 2**16 + 2)),
}


def parameter_view(blocks, formats, *, start=0):
    dtype, exp_avg_dtype, rounds = formats
    param = torch.randn(blocks.shape).to(dtype)
    state = init_state(param, blocks, exp_avg_dtype=exp_avg_dtype, capturable=False)
    return ParameterView(
        param,
        None,
        Shard(blocks),
        state["step"],
        state["exp_avg"],
        tuple(state[key] for key in blocks.state_shapes),
        exact=True,
        exp_avg_scale=state.get("exp_avg_scale"),
        rounding=Rounding(7, tuple(blocks.shape), start=start) if rounds else None,
    )


def copy_of(tensor):
    names = ("param", "step", "exp_avg", *(("exp_avg_scale",) if tensor.exp_avg_scale is not None else ()))
    moments = tuple(moment.clone() for moment in tensor.moments)
    return replace(tensor, **{name: getattr(tensor, name).clone() for name in names}, moments=moments)


def share_of_others(first, second):
    return (first != second).double().mean().item()


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("name", BLOCKS)
def test_one_step_from_the_same_state(name, formats):
    """Sums in another order change last bits, and a few numbers fall to the other side; other noise would move half."""
    # The number of an element passes 2^32 in its midst.
    tensor = parameter_view(BLOCKS[name], FORMATS[formats], start=2**32 - 1000)
    for _ in range(4):
        grad = tiny_models.random_gradient(tensor.param)
        other = replace(copy_of(tensor), grad=grad)
        before = tensor.param.clone()
        assert cpu.supports(other) is None
        cpu.update_([other], OPTIONS)
        update.reference_([replace(tensor, grad=grad)], OPTIONS)
        assert not torch.equal(tensor.param, before)
        assert torch.equal(tensor.step, other.step)
        for moment, expected in zip(other.moments, tensor.moments, strict=True):
            torch.testing.assert_close(moment, expected, rtol=1e-5, atol=1e-7)
        if tensor.param.dtype == torch.float32:
            torch.testing.assert_close(other.param, tensor.param, rtol=1e-5, atol=2e-6)
        else:
            assert share_of_others(other.param, tensor.param) < 2e-3
            torch.testing.assert_close(other.param, tensor.param, rtol=2**-7, atol=1e-6)
        if tensor.exp_avg.dtype == torch.float32:
            torch.testing.assert_close(other.exp_avg, tensor.exp_avg, rtol=1e-5, atol=2e-6)
        else:
            assert share_of_others(other.exp_avg, tensor.exp_avg) < 2e-3
        if tensor.exp_avg_scale is not None:
            torch.testing.assert_close(other.exp_avg_scale, tensor.exp_avg_scale, rtol=1e-6, atol=0)
            assert (other.exp_avg.int() - tensor.exp_avg.int()).abs().max() <= 1


@pytest.mark.parametrize("name", SPLIT)
def test_groups_that_pieces_would_split_go_through_slices(name):
    tensor = parameter_view(SPLIT[name], FORMATS["8 bits"])
    other = copy_of(tensor)
    grad = tiny_models.random_gradient(tensor.param)
    assert "8-bit codes" in cpu.supports(replace(other, grad=grad))
    cpu.update_([replace(other, grad=grad)], OPTIONS)
    update.reference_([replace(tensor, grad=grad)], OPTIONS)
    assert torch.equal(other.param, tensor.param)
    assert torch.equal(other.exp_avg, tensor.exp_avg)


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_gives_the_same_bits(threads):
    tensors = [parameter_view(blocks, FORMATS["8 bits beside rounded bfloat16"]) for blocks in BLOCKS.values()]
    others = [copy_of(tensor) for tensor in tensors]
    before = torch.get_num_threads()
    for _ in range(3):
        grads = [tiny_models.random_gradient(tensor.param) for tensor in tensors]
        cpu.update_([replace(t, grad=g) for t, g in zip(tensors, grads, strict=True)], OPTIONS)
        torch.set_num_threads(threads)
        try:
            cpu.update_([replace(t, grad=g) for t, g in zip(others, grads, strict=True)], OPTIONS)
        finally:
            torch.set_num_threads(before)
    for tensor, other in zip(tensors, others, strict=True):
        assert torch.equal(tensor.param, other.param)
        assert torch.equal(tensor.exp_avg, other.exp_avg)
        assert torch.equal(tensor.exp_avg_scale, other.exp_avg_scale)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_to_be_seen(value):
    tensor = parameter_view(BLOCKS["rows"], FORMATS["8 bits"])
    grad = tiny_models.random_gradient(tensor.param)
    grad[3, 200] = value
    cpu.update_([replace(tensor, grad=grad)], OPTIONS)
    moment = decode_tensor(tensor.exp_avg, tensor.exp_avg_scale)
    is_lost = ~moment.isfinite()
    assert is_lost[3, 128:256].all()
    assert is_lost.sum() == 128


@pytest.mark.parametrize("formats", FORMATS)
def test_the_optimizer_takes_the_kernel(formats):
    """Over steps, through a plan that is made once: as close to the slices as their rounding is fine."""
    dtype, exp_avg_dtype, rounds = FORMATS[formats]
    model = nn.Sequential(nn.Linear(130, 64), nn.LayerNorm(64), nn.Linear(64, 100)).to(dtype)
    models = [model, deepcopy(model)]
    optimizers = [
        AdamMini(m, lr=1e-2, exp_avg_dtype=exp_avg_dtype, stochastic_rounding=rounds, implementation=how)
        for m, how in zip(models, ("reference", "fused"), strict=True)
    ]
    for _ in range(6):
        for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
            first.grad = tiny_models.random_gradient(first)
            second.grad = first.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert optimizers[1]._plan is not None
    for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
        tolerance = 3e-2 if dtype == torch.bfloat16 else 5e-3
        torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)
        moments = [first_moment(o.state[p]).float() for o, p in zip(optimizers, (first, second), strict=True)]
        assert (moments[0] - moments[1]).norm() <= 2e-2 * moments[0].norm()
