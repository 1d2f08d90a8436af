"""Blocks: shapes, numbering, means, and invalid arguments."""

import dataclasses
import pickle

import pytest
import torch

from lightning_adam_mini import Blocks
from lightning_adam_mini import blocks as blocks_module
from lightning_adam_mini.blocks import Kind, Segment, sum_square

QKV = (Segment(4, 2), Segment(2, 2), Segment(2, 1))

# Blocks, the shapes of their second moments, and the number of values.
SHAPES = [
    (Blocks.element((4, 3)), {"exp_avg_sq": (4, 3)}, 12),
    (Blocks.element(()), {"exp_avg_sq": ()}, 1),
    (Blocks.whole((4, 3)), {"exp_avg_sq": (1, 1)}, 1),
    (Blocks.whole(()), {"exp_avg_sq": ()}, 1),
    (Blocks.whole((2, 4, 3), batch_axes=(0,)), {"exp_avg_sq": (2, 1, 1)}, 2),
    (Blocks.rows((4, 3)), {"exp_avg_sq": (4, 1)}, 4),
    (Blocks.rows((4,)), {"exp_avg_sq": (4,)}, 4),
    (Blocks.rows((4, 3), axis=1), {"exp_avg_sq": (1, 3)}, 3),
    (Blocks.rows((4, 3), block_size=2), {"exp_avg_sq": (2, 1)}, 2),
    (Blocks.rows((4, 3), block_size=4), {"exp_avg_sq": (1, 1)}, 1),
    (Blocks.rows((5, 4, 3), axis=1, batch_axes=(0,)), {"exp_avg_sq": (5, 4, 1)}, 20),
    (Blocks.rows((5, 4, 3), axis=2, batch_axes=(0,)), {"exp_avg_sq": (5, 1, 3)}, 15),
    (Blocks.rows((4, 3, 2, 2)), {"exp_avg_sq": (4, 1, 1, 1)}, 4),
    (Blocks.segmented((8, 3), QKV), {"exp_avg_sq": (5, 1)}, 5),
    (Blocks.segmented((16, 3), QKV, repeats=2), {"exp_avg_sq": (10, 1)}, 10),
    (Blocks.segmented((12, 3), (Segment(4, 2), Segment(2, 4)), repeats=2), {"exp_avg_sq": (5, 1)}, 5),
    (Blocks.factored((4, 6)), {"exp_avg_sq_row": (4, 1), "exp_avg_sq_col": (1, 6)}, 10),
    (Blocks.factored((4, 6), axis=1), {"exp_avg_sq_row": (1, 6), "exp_avg_sq_col": (4, 1)}, 10),
    (
        Blocks.factored((2, 4, 6), axis=1, batch_axes=(0,)),
        {"exp_avg_sq_row": (2, 4, 1), "exp_avg_sq_col": (2, 1, 6)},
        20,
    ),
    (
        Blocks.factored((8, 6), segment_lengths=(4, 2, 2)),
        {"exp_avg_sq_row": (8, 1), "exp_avg_sq_col": (3, 6)},
        26,
    ),
]
ALL = [blocks for blocks, _, _ in SHAPES]
EMPTY = [
    Blocks.whole((0, 3)),
    Blocks.rows((0, 3)),
    Blocks.rows((3, 0)),
    Blocks.rows((0, 3), block_size=2),
    Blocks.segmented((0, 3), (Segment(0, 2), Segment(0, 1)), repeats=2),
    Blocks.factored((0, 3)),
    Blocks.factored((3, 0)),
    Blocks.factored((0, 3), segment_lengths=(0, 0), repeats=2),
]


@pytest.mark.parametrize(("blocks", "shapes", "num_values"), SHAPES)
def test_state_shapes(blocks, shapes, num_values):
    assert blocks.state_shapes == shapes
    assert blocks.num_values == num_values
    assert blocks.num_bytes() == 4 * num_values
    assert blocks.num_bytes(torch.float64) == 8 * num_values


@pytest.mark.parametrize("blocks", ALL + EMPTY)
def test_means_have_the_shapes_of_the_state_and_expand_to_the_tensor(blocks):
    means = blocks.mean_square(torch.randn(blocks.shape))
    assert [tuple(mean.shape) for mean in means] == list(blocks.state_shapes.values())
    assert all(mean.dtype == torch.float32 for mean in means)
    expanded = blocks.second_moment(*means)
    assert torch.broadcast_shapes(expanded.shape, blocks.shape) == blocks.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_squares_of_narrow_numbers_are_summed_in_the_wide_dtype(dtype):
    """In bfloat16 a sum of 1 stops growing at 256; in float16 the square of 300 is infinite."""
    tensor = torch.full((2, 1000), 300.0, dtype=dtype)
    for blocks in (Blocks.rows((2, 1000)), Blocks.whole((2, 1000)), Blocks.element((2, 1000))):
        (mean,) = blocks.mean_square(tensor, dtype=torch.float64)
        value = float(tensor[0, 0])
        torch.testing.assert_close(mean, torch.full_like(mean, value**2), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1), (0, 2), (0, 1, 2)])
def test_sums_of_squares_of_many_slices(axes, exact, dtype, monkeypatch):
    """The last slice is shorter."""
    monkeypatch.setattr(blocks_module, "SMALL_ELEMENTS", 0)
    monkeypatch.setattr(blocks_module, "SLICE_ELEMENTS", 60)
    tensor = torch.randn(11, 7, 3).to(dtype)
    found = sum_square(tensor, axes, exact=exact)
    torch.testing.assert_close(found.double(), tensor.double().square().sum(axes, keepdim=True), rtol=1e-6, atol=0)


def test_numbers_of_the_blocks():
    blocks = Blocks.segmented((10, 2), (Segment(2, 2), Segment(2, 1), Segment(1, 2)), repeats=2)
    # Heads of two rows, then single rows, then one row of each repeat: the last block spans the repeats.
    expected = torch.tensor([0, 0, 2, 3, 6, 1, 1, 4, 5, 6])
    torch.testing.assert_close(blocks.block_index(), expected[:, None].expand(10, 2))


def test_numbers_keep_experts_apart():
    blocks = Blocks.rows((2, 3, 2), axis=1, batch_axes=(0,))
    expected = torch.tensor([[0, 1, 2], [3, 4, 5]])
    torch.testing.assert_close(blocks.block_index(), expected[:, :, None].expand(2, 3, 2))


def test_a_factored_second_moment_has_no_block_numbers():
    with pytest.raises(ValueError, match="no blocks to number"):
        Blocks.factored((2, 3)).block_index()


def test_the_factored_estimate_is_adafactors():
    square = torch.tensor([[1.0, 2.0], [3.0, 6.0], [0.0, 0.0]])
    rows, columns = square.mean(1, keepdim=True), square.mean(0, keepdim=True)
    estimate = Blocks.factored((3, 2)).second_moment(rows, columns)
    torch.testing.assert_close(estimate, rows * columns / rows.mean())
    torch.testing.assert_close(estimate, square)


def test_the_factored_estimate_of_zeros_is_zero():
    blocks = Blocks.factored((3, 2))
    assert torch.equal(blocks.second_moment(*blocks.mean_square(torch.zeros(3, 2))), torch.zeros(3, 2))


def test_blocks_are_values():
    blocks = Blocks.segmented((16, 3), QKV, repeats=2)
    assert blocks == Blocks.segmented(torch.Size((16, 3)), QKV, repeats=2) != Blocks.rows((16, 3))
    assert len({blocks, pickle.loads(pickle.dumps(blocks))}) == 1
    assert blocks.kind == Kind.MEAN == "mean"
    with pytest.raises(dataclasses.FrozenInstanceError):
        blocks.axis = 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Blocks.rows((6, 3), block_size=4), "blocks of 4 rows do not divide the 6 rows"),
        (lambda: Blocks.segmented((6, 3), (Segment(4, 2),)), "segments cover 4 rows, but dimension 0"),
        (lambda: Blocks.segmented((6, 3), (Segment(3, 1),), repeats=3), "segments cover 9 rows, but dimension 0"),
        (lambda: Blocks.segmented((6, 3), (Segment(3, 2),), repeats=2), "blocks of 2 rows do not divide the 3 rows"),
        (lambda: Blocks.segmented((6, 3), (Segment(6, 1),), axis=2), "axis 2 .* does not fit the shape"),
        (lambda: Blocks.segmented((6, 3), (Segment(6, 1),), batch_axes=(0,)), r"batch axes \(0,\) does not fit"),
        (lambda: Blocks.factored((6, 3), segment_lengths=(2, 2)), "segments cover 4 rows, but dimension 0"),
    ],
)
def test_segments_that_do_not_tile_the_block_axis(build, message):
    with pytest.raises(ValueError, match=message):
        build()
