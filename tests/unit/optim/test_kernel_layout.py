"""Blocks in memory: four sizes and one block index per row give the block of every element."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_adam_mini import Blocks
from lightning_adam_mini.blocks import Kind, Segment
from lightning_adam_mini.optim.kernels.layout import Layout, box_layout, is_same_layout, layout
from lightning_adam_mini.optim.shards import flat_boxes
from random_blocks import block_structures


def block_of_elements(found: Layout, numbers=None) -> torch.Tensor:
    """The block of each element in the order of memory, from the layout alone."""
    a, c1, r, c2 = found.sizes
    numbers = torch.arange(a * r) if found.block_of_row is None else found.block_of_row
    return numbers.view(a, 1, r, 1).expand(a, c1, r, c2).flatten()


def in_memory_order(values: torch.Tensor, order) -> torch.Tensor:
    return (values.permute(order) if values.dim() else values).flatten()


@given(block_structures(kinds=(Kind.MEAN, Kind.ELEMENT)))
def test_every_element_has_its_block(blocks):
    found = layout(blocks, torch.zeros(blocks.shape))
    if found is None:  # batch axes on both sides of a reduced one
        assert len(blocks.batch_axes) < blocks.axis if blocks.axis is not None else blocks.batch_axes
        return
    assert torch.equal(block_of_elements(found), in_memory_order(blocks.block_index(), found.order))


@given(block_structures(kinds=(Kind.MEAN,)), st.randoms())
def test_axes_in_any_order_in_memory(blocks, random):
    order = random.sample(range(len(blocks.shape)), len(blocks.shape))
    tensor = torch.zeros([blocks.shape[axis] for axis in order]).permute([order.index(a) for a in range(len(order))])
    assert tensor.shape == blocks.shape
    found = layout(blocks, tensor)
    if found is not None:
        memory = torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.int64).copy_(blocks.block_index())
        assert torch.equal(block_of_elements(found), memory.as_strided((memory.numel(),), (1,)))


@given(block_structures(kinds=(Kind.MEAN,)))
def test_runs_cover_the_rows(blocks):
    found = layout(blocks, torch.zeros(blocks.shape))
    if found is None:
        return
    covered = torch.cat([torch.arange(first, first + count) for first, count, _ in found.runs().tolist()])
    assert torch.equal(covered, torch.arange(found.num_rows))
    for first, count, block in found.runs().tolist():
        assert (found.block_of_row[first : first + count] == block).all()


CASES = {
    "linear": (Blocks.rows((6, 4)), torch.zeros(6, 4), (1, 1, 6, 4)),
    "linear, stored transposed": (Blocks.rows((6, 4)), torch.zeros(4, 6).mT, (1, 4, 6, 1)),
    "columns": (Blocks.rows((4, 6), axis=1), torch.zeros(4, 6), (1, 4, 6, 1)),
    "convolution": (Blocks.rows((6, 4, 3, 2)), torch.zeros(6, 4, 3, 2), (1, 1, 6, 24)),
    "channels last": (
        Blocks.rows((6, 4, 3, 2)),
        torch.zeros(6, 4, 3, 2).to(memory_format=torch.channels_last),
        (1, 1, 6, 24),
    ),
    "experts": (Blocks.rows((3, 6, 4), axis=1, batch_axes=(0,)), torch.zeros(3, 6, 4), (1, 1, 18, 4)),
    "experts in columns": (Blocks.rows((3, 4, 6), axis=2, batch_axes=(0,)), torch.zeros(3, 4, 6), (3, 4, 6, 1)),
    "transposed convolution": (Blocks.rows((4, 6, 2, 2), axis=1), torch.zeros(4, 6, 2, 2), (1, 4, 6, 4)),
    "whole": (Blocks.whole((6, 4)), torch.zeros(6, 4), (1, 1, 1, 24)),
    "whole, no dimensions": (Blocks.whole(()), torch.zeros(()), (1, 1, 1, 1)),
    "element": (Blocks.element((6, 4)), torch.zeros(6, 4), (1, 1, 24, 1)),
    "half of each row": (Blocks.rows((6, 4)), torch.zeros(6, 2), (1, 1, 6, 2)),
    "row and column": (Blocks.factored((6, 4)), torch.zeros(6, 4), (1, 1, 6, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_sizes(name):
    blocks, tensor, sizes = CASES[name]
    assert layout(blocks, tensor).sizes == sizes


def test_what_four_sizes_do_not_express():
    split = Blocks.rows((2, 3, 2, 3, 2), axis=4, batch_axes=(0, 2))
    assert layout(split, torch.zeros(split.shape)) is None
    assert layout(Blocks.rows((6, 4)), torch.zeros(6, 8)[:, ::2]) is None
    assert layout(Blocks.rows((6, 4)), torch.zeros(6, 1).expand(6, 4)) is None
    assert layout(Blocks.element((6, 4)), torch.zeros(4, 6).mT) is None


def test_a_block_with_rows_in_two_places_has_two_runs():
    apart = layout(Blocks.segmented((12, 3), (Segment(4, 8), Segment(2, 1)), repeats=2), torch.zeros(12, 3))
    assert apart.runs().tolist() == [[0, 4, 0], [4, 1, 1], [5, 1, 2], [6, 4, 0], [10, 1, 3], [11, 1, 4]]


def test_boxes_of_a_flat_range():
    blocks = Blocks.rows((6, 4), block_size=2)
    boxes = flat_boxes(blocks.shape, 6, 19)  # half a row, three rows, and three elements
    local = torch.zeros(13)
    found = [box_layout(blocks, box, local) for box in boxes]
    assert torch.equal(torch.cat([block_of_elements(part) for part in found]), blocks.block_index().flatten()[6:19])


def test_empty():
    assert layout(Blocks.rows((0, 4)), torch.zeros(0, 4)).num_rows == 0
    assert layout(Blocks.rows((0, 4)), torch.zeros(0, 4)).runs().shape == (0, 3)


def test_the_same_layout_whatever_the_strides_of_axes_of_size_one():
    assert is_same_layout(torch.zeros(4, 1), torch.zeros(1, 4).mT)
    assert not is_same_layout(torch.zeros(4, 3), torch.zeros(3, 4).mT)
    assert not is_same_layout(torch.zeros(4, 3), torch.zeros(3, 4))
