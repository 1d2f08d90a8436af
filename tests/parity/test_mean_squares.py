"""Second moments are right to 1e-6 at any size of block and finite wherever they can be, in every implementation."""

from dataclasses import replace

import pytest
import torch

from lightning_adam_mini import Blocks
from lightning_adam_mini.blocks import Kind
from lightning_adam_mini.optim import update
from lightning_adam_mini.optim.distributed import share_square_sums
from lightning_adam_mini.optim.kernels import cpu
from lightning_adam_mini.optim.shards import Shard, flat_boxes, grid_boxes
from lightning_adam_mini.optim.state import init_state
from lightning_adam_mini.optim.stochastic_rounding import Rounding
from lightning_adam_mini.optim.update import ParameterView, StepOptions
from ranks import run_ranks

OPTIONS = StepOptions(lr=1e-3, beta1=0.9, beta2=0.5, eps=1e-8, weight_decay=0.0)
STEPS = {
    "reference": lambda tensor: update.reference_([replace(tensor, exact=True)], OPTIONS),
    "foreach": lambda tensor: update.foreach_([tensor], OPTIONS),
    "fused": lambda tensor: cpu.update_([tensor], OPTIONS),
}
implementations = pytest.mark.parametrize("implementation", STEPS)
LARGEST = torch.finfo(torch.float32).max


def moments_after(implementation, blocks, grad, **options):
    """The second moments after one step, as mean squares."""
    param = torch.zeros(grad.shape, dtype=grad.dtype)
    state = init_state(param, blocks, exp_avg_dtype=None, capturable=False)
    moments = tuple(state[key] for key in blocks.state_shapes)
    shard = options.pop("shard", Shard(blocks))
    STEPS[implementation](ParameterView(param, grad, shard, state["step"], state["exp_avg"], moments, **options))
    return [moment.double() / (1 - OPTIONS.beta2) for moment in moments]


def mean_squares(blocks, grad):
    """In float64, part by part where the tensor is large."""
    if blocks.kind == "mean" and blocks.axis is None:
        total = sum(part.double().square().sum() for part in grad.view(-1).split(2**22))
        return [(total / grad.numel()).view([1] * grad.dim())]
    squares = grad.double().square()
    if blocks.kind == "mean":
        rows = squares.sum(blocks._reduced_axes, keepdim=True)
        return [blocks.block_sums(rows) / (grad.numel() // blocks.num_values)]
    return [squares.mean(1 - blocks.axis, keepdim=True), squares.mean(blocks.axis, keepdim=True)]


def assert_right(implementation, blocks, grad, **options):
    found = moments_after(implementation, blocks, grad, **options)
    for moment, expected in zip(found, mean_squares(blocks, grad), strict=True):
        torch.testing.assert_close(moment, expected, rtol=1e-6, atol=0)


SIZES = {
    "a million": Blocks.whole((1024, 1024)),
    "a million, odd": Blocks.whole((1021, 1031)),
    "long rows": Blocks.rows((2, 2**20)),
    "long columns": Blocks.rows((2**19, 3), axis=1),
    "rows": Blocks.rows((300, 4095)),
    "short rows": Blocks.rows((3000, 5)),
    "heads": Blocks.rows((128, 1000), block_size=64),
    "heads in columns": Blocks.rows((10000, 64), axis=1, block_size=8),
    "row and column": Blocks.factored((1000, 700)),
    "row and column, transposed": Blocks.factored((700, 1000), axis=1),
    "row and long column": Blocks.factored((2**17, 3)),
}
KINDS = {
    "normal": torch.randn,
    "all alike": lambda shape: torch.full(shape, 0.1),  # whose roundings all go the same way
    "mostly zeros": lambda shape: torch.randn(shape) * (torch.rand(shape) < 0.01),
}


@implementations
@pytest.mark.parametrize(
    "kind", ["all alike", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("normal", "mostly zeros"))]
)
@pytest.mark.parametrize("name", SIZES)
def test_any_size_of_block(name, kind, implementation):
    assert_right(implementation, SIZES[name], KINDS[kind](SIZES[name].shape))


@pytest.mark.slow
@implementations
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "blocks",
    [
        Blocks.whole((7000, 7000)),
        Blocks.rows((3, 2**22)),
        Blocks.rows((2**22, 3), axis=1),
        Blocks.whole((410, 1000, 1000)),
    ],
    ids=["49M", "rows of 4M", "columns of 4M", "410M"],
)
def test_large_blocks(blocks, threads, implementation):
    try:
        torch.set_num_threads(threads)
        assert_right(implementation, blocks, torch.randn(blocks.shape))
    finally:
        torch.set_num_threads(1)


@implementations
@pytest.mark.parametrize("value", [2e16, 1e18, 1.8e19])
@pytest.mark.parametrize("name", [name for name in SIZES if "long" not in name])
def test_finite_wherever_the_mean_is(name, value, implementation):
    assert value**2 < LARGEST
    assert_right(implementation, SIZES[name], torch.full(SIZES[name].shape, value))


@implementations
@pytest.mark.parametrize("name", [name for name in SIZES if name not in ("short rows", "row and long column")])
def test_a_square_that_overflows_in_a_mean_that_does_not(name, implementation):
    grad = torch.full(SIZES[name].shape, 1e-3)
    grad.view(-1)[grad.numel() // 2] = 4e19
    assert_right(implementation, SIZES[name], grad)


@implementations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, implementation):
    grad = torch.full((64, 4096), 1e18).to(dtype)
    for blocks in (Blocks.whole(grad.shape), Blocks.rows(grad.shape, axis=1), Blocks.factored(grad.shape)):
        assert_right(implementation, blocks, grad)


def test_in_slices():
    """What is rounded stochastically, and rectangles of a tensor."""
    grad = torch.full((64, 4096), 2e18)
    for blocks in (Blocks.whole(grad.shape), Blocks.factored(grad.shape)):
        assert_right("foreach", blocks, grad, rounding=Rounding(7, tuple(grad.shape)))
        boxes = grid_boxes([[(0, 0, 20), (20, 20, 44)], [(0, 0, 4096)]])
        assert_right("foreach", blocks, grad, shard=Shard(blocks, boxes))
    blocks = Blocks.whole(grad.shape)
    shard = Shard(blocks, flat_boxes(grad.shape, 0, grad.numel()))
    param = torch.zeros(grad.numel())
    for implementation, step in STEPS.items():
        moment = torch.zeros(1, 1)
        step(ParameterView(param, grad.flatten(), shard, torch.zeros(()), torch.zeros_like(param), (moment,)))
        assert moment.item() == pytest.approx((1 - OPTIONS.beta2) * 4e36, rel=1e-6), implementation


@implementations
def test_roots_of_a_factored_moment_are_finite(implementation):
    """The mean of the rows' moments is, though their sum is not."""
    grad = torch.full((1024, 1024), 1e19)
    param = torch.ones_like(grad)
    blocks = Blocks.factored(grad.shape)
    state = init_state(param, blocks, exp_avg_dtype=None, capturable=False)
    moments = tuple(state[key] for key in blocks.state_shapes)
    STEPS[implementation](ParameterView(param, grad, Shard(blocks), state["step"], state["exp_avg"], moments))
    torch.testing.assert_close(param, torch.full_like(param, 1 - OPTIONS.lr), rtol=1e-6, atol=0)


@implementations
@pytest.mark.parametrize("scale", [1e-15, 1e-18, 1e-20])
@pytest.mark.parametrize("name", ["a million", "rows", "short rows", "heads in columns", "row and column"])
def test_tiny_squares_are_as_those_of_elements(name, scale, implementation):
    """Float32 has no finer numbers: each square is off by half of the least of them at most, as in AdamW."""
    blocks = SIZES[name]
    grad = torch.randn(blocks.shape) * scale
    for moment, expected in zip(moments_after(implementation, blocks, grad), mean_squares(blocks, grad), strict=True):
        torch.testing.assert_close(moment, expected, rtol=1e-6, atol=2.0**-147)


@implementations
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", SIZES)
def test_what_is_not_finite_shows(name, value, implementation):
    """Infinity does not in a factored second moment, where it would become NaN in a row, but in the first moment."""
    blocks = SIZES[name]
    grad = torch.ones(blocks.shape)
    grad.view(-1)[grad.numel() // 2] = value
    found, expected = moments_after(implementation, blocks, grad), mean_squares(blocks, grad)
    for moment, mean in zip(found, expected, strict=True):
        assert torch.equal(moment.isnan(), mean.isnan())
        is_largest = moment == LARGEST / (1 - OPTIONS.beta2) if blocks.kind is Kind.FACTORED else moment.isinf()
        assert torch.equal(is_largest, mean.isinf())


def shared_mean(rank, grad, implementation):
    """The mean of a block that two ranks share, each with a half of its rows."""
    blocks = Blocks.whole((2 * grad.shape[0], grad.shape[1]))
    half = Shard(blocks, None, (torch.distributed.group.WORLD,), "cpu")
    param, moment = torch.zeros_like(grad), torch.zeros(1, 1)
    tensor = ParameterView(param, grad, half, torch.zeros(()), torch.zeros_like(param), (moment,))
    sums = {"fused": lambda t: cpu.square_sums(t) or t.local_square_sums()}
    share_square_sums([tensor], sums.get(implementation, ParameterView.local_square_sums))
    STEPS[implementation](tensor)
    return moment.item() / (1 - OPTIONS.beta2)


@implementations
@pytest.mark.parametrize("value", [0.1, 1e19])
def test_sums_of_all_ranks(value, implementation):
    grad = torch.full((512, 1024), value)
    expected = grad[0, 0].double().square().item()
    for found in run_ranks(2, shared_mean, grad, implementation):
        assert found == pytest.approx(expected, rel=1e-6)
