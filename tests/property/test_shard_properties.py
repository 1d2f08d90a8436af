"""What holds for parts of a tensor, however it is divided among ranks."""

import math
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_adam_mini.blocks import Kind
from lightning_adam_mini.optim.fsdp1 import compress_moments, expand_moments
from lightning_adam_mini.optim.shards import Shard, flat_boxes, grid_boxes
from lightning_adam_mini.optim.state import init_state
from lightning_adam_mini.optim.update import ParameterView, StepOptions, reference_
from random_blocks import block_structures

OPTIONS = StepOptions(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
shared_structures = block_structures(kinds=(Kind.MEAN, Kind.FACTORED))


def random(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def divided(draw):
    """Blocks, and the shards of a tensor: ranges of its elements, or a grid with runs along each dimension."""
    blocks = draw(shared_structures)
    count = math.prod(blocks.shape)
    if draw(st.booleans()):
        marks = sorted(draw(st.lists(st.integers(0, count), max_size=3)))
        bounds = [0, *marks, count]
        parts = [slice(start, stop) for start, stop in pairwise(bounds)]
        shards = [Shard(blocks, flat_boxes(blocks.shape, part.start, part.stop)) for part in parts]
        return blocks, shards, lambda tensor: [tensor.flatten()[part] for part in parts]
    axis = draw(st.integers(0, len(blocks.shape) - 1))
    owner = draw(st.lists(st.integers(0, 2), min_size=blocks.shape[axis], max_size=blocks.shape[axis]))
    rows = [[row for row, rank in enumerate(owner) if rank == number] for number in range(3)]
    shards = []
    for mine in rows:
        runs = [[(0, 0, size)] for size in blocks.shape]
        runs[axis] = [(row, place, 1) for place, row in enumerate(mine)]
        shards.append(Shard(blocks, grid_boxes(runs)))
    return (
        blocks,
        shards,
        lambda tensor: [tensor.index_select(axis, torch.tensor(mine, dtype=torch.int64)) for mine in rows],
    )


@given(divided(), st.integers(0, 100))
def test_boxes_show_each_element_once(case, seed):
    blocks, shards, divide = case
    whole = random(blocks.shape, seed)
    seen = torch.zeros(blocks.shape)
    for shard, part in zip(shards, divide(whole), strict=True):
        for box in shard.boxes:
            place = tuple(slice(start, start + size) for start, size in zip(box.start, box.sizes, strict=True))
            assert torch.equal(box.view(part), whole[place])
            seen[place] += 1
    assert (seen == 1).all()


@given(divided(), st.integers(0, 100), st.booleans())
def test_sums_of_parts_add_up_to_those_of_the_whole(case, seed, exact):
    blocks, shards, divide = case
    whole = random(blocks.shape, seed)
    of_parts = [shard.square_sums(part.clone(), exact=exact) for shard, part in zip(shards, divide(whole), strict=True)]
    for number, expected in enumerate(blocks.square_sums(whole)):
        torch.testing.assert_close(sum(sums[number] for sums in of_parts), expected, rtol=1e-12, atol=1e-12)


@given(divided(), st.integers(0, 100))
def test_parts_are_updated_as_the_whole(case, seed):
    blocks, shards, divide = case
    param, grad = random(blocks.shape, seed), random(blocks.shape, seed + 1)
    state = init_state(param, blocks, exp_avg_dtype=None, capturable=False)
    moments = tuple(state[key] for key in blocks.state_shapes)
    before = param.clone()
    reference_([ParameterView(param, grad, Shard(blocks), state["step"], state["exp_avg"], moments)], OPTIONS)
    sums = blocks.square_sums(grad)
    for shard, part, part_grad, expected in zip(shards, divide(before), divide(grad), divide(param), strict=True):
        part = part.clone()
        tensor = ParameterView(
            part,
            part_grad.clone(),
            shard,
            torch.zeros(()),
            torch.zeros_like(part),
            tuple(torch.zeros_like(moment) for moment in moments),
            square_sums=sums,
        )
        reference_([tensor], OPTIONS)
        torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-12)
        assert all(torch.allclose(own, whole) for own, whole in zip(tensor.moments, moments, strict=True))


@given(divided(), st.integers(0, 100))
def test_what_is_expanded_for_a_checkpoint_comes_back_to_the_last_bit(case, seed):
    blocks, shards, divide = case
    moments = {key: random(shape, seed).abs() for key, shape in blocks.state_shapes.items()}
    everywhere = {key: torch.zeros_like(moment) for key, moment in moments.items()}
    for shard, part in zip(shards, divide(torch.zeros(blocks.shape)), strict=True):
        (back,) = compress_moments([shard], [expand_moments(shard, moments, part)])
        for key, moment in back.items():
            everywhere[key] = torch.maximum(everywhere[key], moment)
    assert all(torch.equal(everywhere[key], moment) for key, moment in moments.items())
