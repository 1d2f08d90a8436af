"""The fast forms of the update equal the reference on tensors of every kind."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import tiny_models
from lightning_adam_mini import AdamMini, Blocks
from lightning_adam_mini.blocks import Segment
from lightning_adam_mini.optim import update
from lightning_adam_mini.optim.shards import Shard
from lightning_adam_mini.optim.state import init_state
from lightning_adam_mini.optim.update import ParameterView, StepOptions

OPTIONS = StepOptions(lr=1e-2, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.1)
FUSED = (Segment(4, 2), Segment(2, 2), Segment(2, 1))

BLOCKS = {
    "element": Blocks.element((4, 3)),
    "element, no dimensions": Blocks.element(()),
    "element, empty": Blocks.element((0, 3)),
    "whole": Blocks.whole((4, 3)),
    "whole, no dimensions": Blocks.whole(()),
    "whole, empty": Blocks.whole((0,)),
    "whole, experts": Blocks.whole((2, 4, 3), batch_axes=(0,)),
    "rows": Blocks.rows((4, 3)),
    "rows of a vector": Blocks.rows((4,)),
    "rows, empty": Blocks.rows((0, 3)),
    "rows without elements": Blocks.rows((4, 0)),
    "columns": Blocks.rows((4, 6), axis=1),
    "heads": Blocks.rows((6, 3), block_size=2),
    "heads in columns": Blocks.rows((4, 6), axis=1, block_size=3),
    "heads, empty": Blocks.rows((0, 3), block_size=2),
    "experts": Blocks.rows((3, 4, 5), axis=1, batch_axes=(0,)),
    "experts in columns": Blocks.rows((3, 4, 5), axis=2, batch_axes=(0,)),
    "convolution": Blocks.rows((4, 3, 2, 2)),
    "fused": Blocks.segmented((8, 3), FUSED),
    "fused in columns": Blocks.segmented((3, 8), FUSED, axis=1),
    "fused, interleaved": Blocks.segmented((16, 3), FUSED, repeats=2),
    "fused, one block over the repeats": Blocks.segmented((12, 3), (Segment(4, 2), Segment(2, 4)), repeats=2),
    "fused, experts": Blocks.segmented((2, 16, 3), FUSED, axis=1, repeats=2, batch_axes=(0,)),
    "row and column": Blocks.factored((4, 6)),
    "row and column, transposed": Blocks.factored((4, 6), axis=1),
    "row and column, experts": Blocks.factored((2, 4, 6), axis=1, batch_axes=(0,)),
    "row and column, fused": Blocks.factored((16, 3), segment_lengths=(4, 2, 2), repeats=2),
    "row and column, empty": Blocks.factored((0, 6)),
}


def parameter_views(dtype, exp_avg_dtype=None):
    """One tensor for each kind of blocks."""
    tensors = []
    for blocks in BLOCKS.values():
        param = torch.randn(blocks.shape).to(dtype)
        state = init_state(param, blocks, exp_avg_dtype=exp_avg_dtype, capturable=False)
        moments = tuple(state[key] for key in blocks.state_shapes)
        tensors.append(
            ParameterView(param, torch.empty_like(param), Shard(blocks), state["step"], state["exp_avg"], moments)
        )
    return tensors


def gradients(tensors, step):
    """Gradients of one step: in every third a tensor has none, and half of them lie in memory the other way round."""
    for number, tensor in enumerate(tensors):
        if (number + step) % 3 == 0:
            yield None
            continue
        grad = tiny_models.random_gradient(tensor.param)
        yield grad.mT.contiguous().mT if grad.dim() >= 2 and (number + step) % 2 else grad


def with_gradients(tensors, grads):
    return [replace(t, grad=grad.clone()) for t, grad in zip(tensors, grads, strict=True) if grad is not None]


def assert_same(first, second, tolerances):
    for name, a, b in zip(BLOCKS, first, second, strict=True):
        for x, y in zip(
            (a.param, a.exp_avg, a.step, *a.moments), (b.param, b.exp_avg, b.step, *b.moments), strict=True
        ):
            torch.testing.assert_close(x, y, **tolerances[a.param.dtype], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("slice_elements", [update.SLICE_ELEMENTS, 5])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("dtype", "exp_avg_dtype"),
    [
        (torch.float64, None),
        (torch.float32, None),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
    ],
)
def test_foreach_equals_the_reference(dtype, exp_avg_dtype, maximize, slice_elements, tolerances, monkeypatch):
    monkeypatch.setattr(update, "SLICE_ELEMENTS", slice_elements)
    tensors = parameter_views(dtype, exp_avg_dtype)
    others = copy.deepcopy(tensors)
    start = [tensor.param.clone() for tensor in tensors]
    for step in range(10):
        grads = list(gradients(tensors, step))
        for tensor in with_gradients(tensors, grads):
            update.reference_([tensor], replace(OPTIONS, maximize=maximize))
        update.foreach_(with_gradients(others, grads), replace(OPTIONS, maximize=maximize))
    assert_same(tensors, others, tolerances)
    for before, tensor in zip(start, tensors, strict=True):
        assert tensor.param.isfinite().all()
        assert not tensor.param.numel() or not torch.equal(before, tensor.param)


def test_gradients_lie_in_memory_both_ways():
    tensors = parameter_views(torch.float32)
    grads = [grad for step in range(6) for grad in gradients(tensors, step)]
    assert None in grads
    assert {grad.is_contiguous() for grad in grads if grad is not None} == {True, False}


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float64])
def test_gradients_of_another_dtype(grad_dtype, tolerances):
    """Only some updates meet them, as when a hook leaves gradients in the dtype of a reduction."""
    tensors = [t for t in parameter_views(torch.float64) if t.param.numel()]
    others = copy.deepcopy(tensors)
    for _ in range(3):
        grads = [torch.randn_like(t.param).to(grad_dtype) for t in tensors]
        for tensor in with_gradients(tensors, grads):
            update.reference_([tensor], OPTIONS)
        update.foreach_(with_gradients(others, grads), OPTIONS)
    for a, b in zip(tensors, others, strict=True):
        torch.testing.assert_close(a.param, b.param, **tolerances[torch.float64])


def test_no_weight_decay(tolerances):
    tensors = parameter_views(torch.float32)
    others = copy.deepcopy(tensors)
    options = replace(OPTIONS, weight_decay=0.0)
    grads = list(gradients(tensors, 1))
    for tensor in with_gradients(tensors, grads):
        update.reference_([tensor], options)
    update.foreach_(with_gradients(others, grads), options)
    assert_same(tensors, others, tolerances)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e25, 1e200, float("inf"), float("nan")])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_small_blocks_whose_numbers_leave_their_range(value, eps, dtype, tolerances):
    """Numbers of the host raise where tensors become infinite or not a number."""
    found = []
    for step in (update.reference_, update.foreach_):
        param, blocks = torch.ones(3, 2, dtype=dtype), Blocks.whole((3, 2))
        state = init_state(param, blocks, exp_avg_dtype=None, capturable=False)
        moments = (state["exp_avg_sq"],)
        grad = torch.full((3, 2), value, dtype=torch.float64).to(dtype)
        view = ParameterView(param, grad, Shard(blocks), state["step"], state["exp_avg"], moments)
        for _ in range(2):
            step([view], replace(OPTIONS, eps=eps))
        found.append((param, state["exp_avg"], *moments))
    for expected, other in zip(*found, strict=True):
        torch.testing.assert_close(other, expected, **tolerances[dtype], equal_nan=True)


def test_nothing_to_update():
    update.foreach_([], OPTIONS)


class Mixed(nn.Module):
    """Layers in three dtypes, as a model with a float32 norm or head has."""

    def __init__(self):
        super().__init__()
        self.attention = tiny_models.SeparateAttention().to(torch.bfloat16)
        self.mlp = nn.Linear(8, 6)
        self.head = nn.Linear(6, 3).double()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.empty = nn.Parameter(torch.empty(0, 4))


@pytest.mark.parametrize("partition", ["transformer", "transformer_early", "factored", "default", "element"])
def test_a_model_of_mixed_dtypes(partition, tolerances):
    reference = tiny_models.randomize(Mixed())
    other = copy.deepcopy(reference)
    optimizers = [
        AdamMini(reference, lr=1e-2, weight_decay=0.1, partition=partition, implementation="reference"),
        AdamMini(other, lr=1e-2, weight_decay=0.1, partition=partition, implementation="foreach"),
    ]
    for step in range(10):
        tiny_models.set_gradients(reference, other)
        if step % 2:
            reference.mlp.zero_grad()
            other.mlp.zero_grad()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(reference.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerances[a.dtype])


def test_a_step_with_another_order_of_the_blocks_shows(tolerances):
    """The comparison can fail: blocks of the other axis give another update."""
    tensors = parameter_views(torch.float32)
    others = copy.deepcopy(tensors)
    number = list(BLOCKS).index("heads")
    others[number] = replace(
        others[number], shard=Shard(Blocks.rows((6, 3), block_size=1)), moments=(torch.zeros(6, 1),)
    )
    grads = list(gradients(tensors, 1 if (number + 1) % 3 else 2))
    for tensor in with_gradients(tensors, grads):
        update.reference_([tensor], OPTIONS)
    update.foreach_(with_gradients(others, grads), OPTIONS)
    assert not torch.allclose(tensors[number].param, others[number].param, **tolerances[torch.float32])
