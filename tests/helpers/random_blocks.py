"""Blocks of every shape, drawn by Hypothesis."""

from hypothesis import strategies as st

from lightning_adam_mini import Blocks
from lightning_adam_mini.blocks import Kind, Segment

sizes = st.integers(1, 3)


@st.composite
def segments(draw, repeats):
    block_size, num_blocks = draw(sizes), draw(sizes)
    length = block_size * num_blocks
    return Segment(length, draw(st.sampled_from([block_size, length * repeats])))


@st.composite
def block_structures(draw, kinds=tuple(Kind)):
    """Blocks of any kind, with up to two batch axes before the cut axis and two reduced axes around it."""
    before, after = draw(st.lists(sizes, max_size=2)), draw(st.lists(sizes, max_size=2))
    batch_axes = tuple(axis for axis in range(len(before)) if draw(st.booleans()))
    kind, repeats = draw(st.sampled_from(kinds)), draw(sizes)
    parts = tuple(draw(st.lists(segments(repeats), min_size=1, max_size=3)))
    shape = (*before, repeats * sum(part.length for part in parts), *after)
    if kind is Kind.ELEMENT:
        return Blocks.element(shape)
    options = {"axis": len(before), "batch_axes": batch_axes}
    if kind is Kind.FACTORED:
        lengths = tuple(part.length for part in parts)
        return Blocks.factored(shape, segment_lengths=lengths, repeats=repeats, **options)
    if draw(st.booleans()):
        return Blocks.segmented(shape, parts, repeats=repeats, **options)
    return Blocks.whole(shape, batch_axes=batch_axes)
