"""Properties of blocks of any shape."""

import itertools
import math
from contextlib import nullcontext
from unittest import mock

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_adam_mini import blocks as blocks_module
from lightning_adam_mini.blocks import Kind
from random_blocks import block_structures

slices = st.sampled_from([None, 1, 4])


def segment_of(blocks, row):
    """The segment of a row: its number, itself, the repeat, and the row within the segment."""
    repeat, start = divmod(row, blocks.shape[blocks.axis] // blocks.repeats)
    for number, segment in enumerate(blocks.segments):
        if start < segment.length:
            return number, segment, repeat, start
        start -= segment.length
    raise AssertionError("the segments do not cover the row")


def block_of(blocks, position):
    """A name for the block of one element, found without tensors."""
    if blocks.kind is Kind.ELEMENT:
        return position
    batch = tuple(position[axis] for axis in blocks.batch_axes)
    if blocks.axis is None:
        return batch
    number, segment, repeat, row = segment_of(blocks, position[blocks.axis])
    if segment.block_size == segment.length * blocks.repeats:
        return batch, number
    return batch, number, repeat, row // segment.block_size


def positions_by_block(blocks):
    groups = {}
    for position in itertools.product(*map(range, blocks.shape)):
        groups.setdefault(block_of(blocks, position), []).append(position)
    return groups


def mean_square(blocks, tensor, slice_elements=None):
    """The means in float64; with `slice_elements`, the tensor is squared in slices of so many elements."""
    limits = {"SMALL_ELEMENTS": 0, "SLICE_ELEMENTS": slice_elements} if slice_elements else {}
    with mock.patch.multiple(blocks_module, **limits) if limits else nullcontext():
        return blocks.mean_square(tensor, dtype=torch.float64)


def random_tensor(blocks):
    return torch.randn(blocks.shape, dtype=torch.float64) * torch.randn(blocks.shape, dtype=torch.float64).exp()


@given(block_structures(kinds=(Kind.MEAN, Kind.ELEMENT)))
def test_every_element_lies_in_one_block(blocks):
    index = blocks.block_index()
    assert index.shape == blocks.shape
    groups = positions_by_block(blocks)
    numbers = [{int(index[position]) for position in positions} for positions in groups.values()]
    assert all(len(number) == 1 for number in numbers), "a block has several numbers"
    assert set().union(*numbers) == set(range(blocks.num_values))
    assert len(groups) == blocks.num_values


@given(block_structures(kinds=(Kind.MEAN, Kind.ELEMENT)), slices)
def test_means_equal_brute_force(blocks, slice_elements):
    tensor = random_tensor(blocks)
    (means,) = mean_square(blocks, tensor, slice_elements)
    expanded = blocks.second_moment(means).expand(blocks.shape)
    for positions in positions_by_block(blocks).values():
        mean = sum(float(tensor[p]) ** 2 for p in positions) / len(positions)
        for position in positions:
            assert math.isclose(float(expanded[position]), mean, rel_tol=1e-12)
    numbers = blocks.block_index()
    torch.testing.assert_close(means.flatten()[numbers], expanded, rtol=0, atol=0)


@given(block_structures(kinds=(Kind.FACTORED,)), slices)
def test_factored_means_equal_brute_force(blocks, slice_elements):
    tensor = random_tensor(blocks)
    rows, columns = mean_square(blocks, tensor, slice_elements)
    by_row, by_column = {}, {}
    for position in itertools.product(*map(range, blocks.shape)):
        square = float(tensor[position]) ** 2
        kept = tuple(p if a == blocks.axis or a in blocks.batch_axes else 0 for a, p in enumerate(position))
        by_row.setdefault(kept, []).append(square)
        number = segment_of(blocks, position[blocks.axis])[0]
        column = tuple(number if a == blocks.axis else p for a, p in enumerate(position))
        by_column.setdefault(column, []).append(square)
    for means, brute_force in ((rows, by_row), (columns, by_column)):
        assert means.numel() == len(brute_force)
        for position, squares in brute_force.items():
            assert math.isclose(float(means[position]), sum(squares) / len(squares), rel_tol=1e-12)


@given(block_structures(kinds=(Kind.FACTORED,)))
def test_a_square_that_is_factored_is_reconstructed(blocks):
    """Where every segment of every expert is an outer product of rows and columns, the estimate is exact."""
    assert blocks.axis is not None
    row_shape = [size if a == blocks.axis or a in blocks.batch_axes else 1 for a, size in enumerate(blocks.shape)]
    rows = torch.rand(row_shape, dtype=torch.float64) + 0.1
    numbers = torch.tensor([segment_of(blocks, row)[0] for row in range(blocks.shape[blocks.axis])])
    _, columns_shape = blocks.state_shapes.values()
    columns = (torch.rand(columns_shape, dtype=torch.float64) + 0.1).index_select(blocks.axis, numbers)
    tensor = rows * columns
    tensor = tensor * torch.randn_like(tensor).sign()
    estimate = blocks.second_moment(*blocks.mean_square(tensor, dtype=torch.float64))
    torch.testing.assert_close(estimate, tensor.square(), rtol=1e-12, atol=0)


@given(block_structures())
def test_second_moments_broadcast_and_keep_the_mean(blocks):
    tensor = random_tensor(blocks)
    expanded = blocks.second_moment(*blocks.mean_square(tensor, dtype=torch.float64)).expand(blocks.shape)
    torch.testing.assert_close(expanded.mean(), tensor.square().mean(), rtol=1e-12, atol=0)


@given(block_structures())
def test_roots_are_taken_of_the_second_moment(blocks):
    means = mean_square(blocks, random_tensor(blocks))
    before = [mean.clone() for mean in means]
    roots = blocks.root_second_moment(*means)
    expected = blocks.second_moment(*means)
    if blocks.kind is Kind.FACTORED:
        rows, columns = means
        numbers = torch.tensor([segment_of(blocks, row)[0] for row in range(blocks.shape[blocks.axis])])
        expected = expected.maximum(0.3 * torch.minimum(rows, columns.index_select(blocks.axis, numbers)))
    torch.testing.assert_close(roots.square(), expected, rtol=1e-12, atol=0)
    roots.zero_()  # a new tensor, which the update may overwrite
    assert all(torch.equal(a, b) for a, b in zip(before, means, strict=True))


@given(block_structures(), st.sampled_from([torch.float32, torch.float64]))
def test_bytes(blocks, dtype):
    kept = blocks.mean_square(torch.ones(blocks.shape), dtype=dtype)
    assert blocks.num_bytes(dtype) == sum(mean.nbytes for mean in kept)
    if blocks.kind is Kind.MEAN:
        assert blocks.num_values <= math.prod(blocks.shape)


@given(block_structures(kinds=(Kind.MEAN,)), st.data())
def test_the_brute_force_can_fail(blocks, data):
    """One element less in a block changes its mean."""
    groups = [positions for positions in positions_by_block(blocks).values() if len(positions) > 1]
    assume(groups)
    tensor = random_tensor(blocks)
    (means,) = blocks.mean_square(tensor, dtype=torch.float64)
    positions = data.draw(st.sampled_from(groups))
    mean = sum(float(tensor[p]) ** 2 for p in positions[1:]) / len(positions[1:])
    number = int(blocks.block_index()[positions[0]])
    assert not math.isclose(float(means.flatten()[number]), mean, rel_tol=1e-12)
