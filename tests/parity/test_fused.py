"""The kernel for the CPU equals the reference: every cut, dtype and place in memory, and any number of threads."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny_models
from lightning_adam_mini import Blocks
from lightning_adam_mini.blocks import Segment
from lightning_adam_mini.optim import update
from lightning_adam_mini.optim.kernels import cpu
from lightning_adam_mini.optim.shards import Shard, flat_boxes
from lightning_adam_mini.optim.state import init_state
from lightning_adam_mini.optim.update import ParameterView, StepOptions
from random_blocks import block_structures

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

OPTIONS = StepOptions(lr=1e-2, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.1)
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]
# Large enough for every way through the kernel: packs of short runs, runs, columns, blocks that several threads share.
LARGE = {
    "short rows": Blocks.rows((999, 5)),
    "rows": Blocks.rows((401, 333)),
    "heads": Blocks.rows((96, 129), block_size=32),
    "columns": Blocks.rows((333, 401), axis=1),
    "heads in columns": Blocks.rows((70, 96), axis=1, block_size=32),
    "experts in columns": Blocks.rows((3, 70, 50), axis=2, batch_axes=(0,)),
    "fused in columns": Blocks.segmented((70, 96), (Segment(32, 8), Segment(32, 16), Segment(32, 1)), axis=1),
    "transposed convolution": Blocks.rows((40, 30, 3, 3), axis=1),
    "long runs apart": Blocks.rows((3, 4, 1100), axis=1),
    "long runs apart, experts": Blocks.rows((2, 3, 4, 1100), axis=2, batch_axes=(0,)),
    "whole": Blocks.whole((600, 701)),
    "one block over the repeats": Blocks.segmented((96, 40), (Segment(16, 2), Segment(16, 48)), repeats=3),
    "the same in columns": Blocks.segmented((40, 96), (Segment(16, 2), Segment(16, 48)), repeats=3, axis=1),
    "elements": Blocks.element((500, 333)),
    "row and column": Blocks.factored((400, 333)),
    "row and column, transposed": Blocks.factored((400, 333), axis=1),
    "row and column, fused": Blocks.factored((3, 96, 70), axis=1, batch_axes=(0,), segment_lengths=(8, 24), repeats=3),
    "row and column, fused in columns": Blocks.factored((70, 96), axis=1, segment_lengths=(8, 24), repeats=3),
}
# A few thousand elements that are summed in another order.
LARGE_TOLERANCES = {"rtol": 1e-5, "atol": 2e-6}


def parameter_view(blocks, dtype=torch.float32, exp_avg_dtype=None, *, param=None):
    param = torch.randn(blocks.shape).to(dtype) if param is None else param
    state = init_state(param, blocks, exp_avg_dtype=exp_avg_dtype, capturable=False)
    moments = tuple(state[key] for key in blocks.state_shapes)
    return ParameterView(param, None, Shard(blocks), state["step"], state["exp_avg"], moments, exact=True)


def copy_of(tensor):
    """Every tensor in memory of its own, with the same strides."""
    return replace(
        tensor,
        **{name: getattr(tensor, name).clone() for name in ("param", "step", "exp_avg")},
        moments=tuple(moment.clone() for moment in tensor.moments),
    )


def steps(tensors, others, count, *, step=cpu.update_, **options):
    """The reference on one list, `step` on the other, by the same gradients."""
    for _ in range(count):
        grads = [tiny_models.random_gradient(t.param) for t in tensors]
        for tensor, grad in zip(tensors, grads, strict=True):
            update.reference_([replace(tensor, grad=grad)], replace(OPTIONS, **options))
        step([replace(t, grad=grad) for t, grad in zip(others, grads, strict=True)], replace(OPTIONS, **options))


def parts(tensor):
    return {
        "param": tensor.param,
        "exp_avg": tensor.exp_avg,
        "step": tensor.step,
        **{f"moment {number}": moment for number, moment in enumerate(tensor.moments)},
    }


def assert_same(tensor, other, *, tolerances):
    for (name, x), y in zip(parts(tensor).items(), parts(other).values(), strict=True):
        torch.testing.assert_close(x, y, **tolerances, msg=lambda m, n=name: f"{n}: {m}")


def in_float32(tensor, grad):
    tensors = {"param": tensor.param, "exp_avg": tensor.exp_avg, "grad": grad}
    return {name: value.to(torch.float32, copy=True) for name, value in tensors.items()}


@pytest.mark.parametrize("name", LARGE)
def test_every_way_through_the_kernel(name):
    tensor = parameter_view(LARGE[name])
    other = copy_of(tensor)
    start = tensor.param.clone()
    assert cpu.supports(replace(tensor, grad=start)) is None
    steps([tensor], [other], 10)
    assert_same(tensor, other, tolerances=LARGE_TOLERANCES)
    assert not torch.equal(start, other.param)


@pytest.mark.parametrize(("dtype", "exp_avg_dtype"), DTYPES[1:])
@pytest.mark.parametrize("name", LARGE)
def test_bfloat16_is_the_float32_step_rounded_once(name, dtype, exp_avg_dtype):
    """The reference rounds after each of its operations, the kernel what it stores: each step against float32."""
    tensor = parameter_view(LARGE[name], dtype, exp_avg_dtype)
    for _ in range(3):
        grad = tiny_models.random_gradient(tensor.param)
        exact = replace(copy_of(tensor), **in_float32(tensor, grad))
        before = exact.param.clone()
        update.reference_([exact], OPTIONS)
        cpu.update_([replace(tensor, grad=grad)], OPTIONS)
        rounding = {torch.bfloat16: 2**-8, torch.float32: 1e-5}
        torch.testing.assert_close(tensor.exp_avg.float(), exact.exp_avg, rtol=rounding[exp_avg_dtype], atol=1e-6)
        # The update of the parameter may be that of the first moment as it is stored.
        error = (tensor.param.float() - exact.param).abs()
        update_size = (exact.param - before).abs() + 0.01 * before.abs()
        assert (error <= rounding[dtype] * exact.param.abs() + rounding[exp_avg_dtype] * update_size + 1e-6).all()
        for moment, expected in zip(tensor.moments, exact.moments, strict=True):
            torch.testing.assert_close(moment, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("maximize", [False, True])
def test_moments_of_elements_have_the_bits_of_the_reference(maximize):
    """Which are those of torch's AdamW. Parameters have not: the last bit of torch's roots is not always right."""
    tensor = parameter_view(Blocks.element((50, 33)))
    other = copy_of(tensor)
    steps([tensor], [other], 20, maximize=maximize)
    assert torch.equal(tensor.exp_avg, other.exp_avg)
    assert torch.equal(tensor.moments[0], other.moments[0])
    torch.testing.assert_close(tensor.param, other.param, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@given(st.lists(block_structures(), min_size=1, max_size=4), st.booleans())
def test_random_cuts_over_fifty_steps(blocks, maximize):
    torch.manual_seed(0)
    tensors = [parameter_view(b) for b in blocks]
    others = [copy_of(t) for t in tensors]
    steps(tensors, others, 50, maximize=maximize)
    for tensor, other in zip(tensors, others, strict=True):
        assert_same(tensor, other, tolerances={"rtol": 1e-5, "atol": 1e-5})


# Places in memory.


def permuted(shape, order):
    """A dense tensor whose axes lie in memory in the order given."""
    return torch.randn([shape[axis] for axis in order]).permute([order.index(axis) for axis in range(len(order))])


PLACES = {
    "channels last": (Blocks.rows((6, 4, 3, 2)), torch.randn(6, 4, 3, 2).to(memory_format=torch.channels_last)),
    "transposed": (Blocks.rows((70, 50)), permuted((70, 50), [1, 0])),
    "transposed heads": (Blocks.rows((70, 50), block_size=7), permuted((70, 50), [1, 0])),
    "any order": (Blocks.rows((5, 6, 7), axis=1), permuted((5, 6, 7), [2, 1, 0])),
    "between two elements": (Blocks.rows((5, 7)), torch.zeros(36)[1:].view(5, 7).normal_()),
    "empty": (Blocks.rows((0, 3)), torch.empty(0, 3)),
    "empty, whole": (Blocks.whole((0,)), torch.empty(0)),
    "empty elements": (Blocks.element((0, 3)), torch.empty(0, 3)),
    "rows without elements": (Blocks.rows((4, 0)), torch.empty(4, 0)),
    "no dimensions": (Blocks.whole(()), torch.randn(())),
    "no dimensions, element": (Blocks.element(()), torch.randn(())),
    "one row": (Blocks.rows((1, 9)), torch.randn(1, 9)),
    "experts as rows": (Blocks.whole((5, 3, 4), batch_axes=(0,)), torch.randn(5, 3, 4)),
}
LEFT_TO_THE_REFERENCE = {
    "with gaps": (Blocks.rows((5, 4)), torch.randn(5, 8)[:, ::2]),
    "elements, channels last": (
        Blocks.element((6, 4, 3, 2)),
        torch.randn(6, 4, 3, 2).to(memory_format=torch.channels_last),
    ),
    "factored, transposed in memory": (Blocks.factored((7, 5)), permuted((7, 5), [1, 0])),
    "float64": (Blocks.rows((5, 4)), torch.randn(5, 4, dtype=torch.float64)),
    "float16": (Blocks.rows((5, 4)), torch.ones(5, 4, dtype=torch.float16)),
}


@pytest.mark.parametrize("name", PLACES)
def test_places_in_memory(name):
    blocks, param = PLACES[name]
    tensor = parameter_view(blocks, param=param.clone(memory_format=torch.preserve_format))
    other = parameter_view(blocks, param=param)
    assert cpu.supports(replace(other, grad=param)) is None
    steps([tensor], [other], 5)
    assert_same(tensor, other, tolerances={"rtol": 1e-5, "atol": 1e-6})


@pytest.mark.parametrize("name", LEFT_TO_THE_REFERENCE)
def test_what_the_kernel_leaves_to_the_reference(name, tolerances):
    blocks, param = LEFT_TO_THE_REFERENCE[name]
    tensor, other = parameter_view(blocks, param=param.clone()), parameter_view(blocks, param=param)
    assert cpu.supports(replace(other, grad=param)) is not None
    steps([tensor], [other], 3)
    assert_same(tensor, other, tolerances=tolerances[param.dtype])


@pytest.mark.parametrize("axis", [0, 1])
def test_gradients_in_another_order(axis):
    tensor = parameter_view(Blocks.rows((40, 30), axis=axis))
    other = copy_of(tensor)
    grad = torch.randn(30, 40).mT
    update.reference_([replace(tensor, grad=grad)], OPTIONS)
    cpu.update_([replace(other, grad=grad)], OPTIONS)
    assert_same(tensor, other, tolerances={"rtol": 1e-5, "atol": 1e-6})


def test_parameters_that_have_taken_other_numbers_of_steps():
    tensors = [parameter_view(Blocks.rows((4, 5))) for _ in range(3)]
    others = [copy_of(t) for t in tensors]
    steps(tensors[:1], others[:1], 3)
    steps(tensors[1:2], others[1:2], 1)
    steps(tensors, others, 2)
    for tensor, other, count in zip(tensors, others, (5, 3, 2), strict=True):
        assert other.step.item() == count
        assert_same(tensor, other, tolerances={"rtol": 1e-5, "atol": 1e-6})


@pytest.mark.parametrize("beta1", [0.0, 0.3, 0.9])
def test_rates_of_the_first_moment(beta1):
    tensor = parameter_view(Blocks.rows((4, 50)))
    other = copy_of(tensor)
    steps([tensor], [other], 3, beta1=beta1, weight_decay=0.0)
    assert_same(tensor, other, tolerances={"rtol": 1e-5, "atol": 1e-6})


def test_autograd_sees_that_parameters_change():
    tensor = parameter_view(Blocks.rows((4, 5)))
    version = tensor.param._version
    cpu.update_([replace(tensor, grad=torch.randn(4, 5))], OPTIONS)
    assert tensor.param._version > version


# Sums.


# Many sums and many updates, so that a thread that does not wait for a sum is seen.
LARGER = {"whole": Blocks.whole((2000, 2000)), "columns": Blocks.rows((2000, 2000), axis=1)}


@pytest.mark.parametrize("blocks", [*LARGE.values(), *LARGER.values()], ids=lambda blocks: f"{blocks.signature}")
def test_the_number_of_threads_changes_no_bit(blocks):
    tensors = [parameter_view(blocks)]
    others = [copy_of(t) for t in tensors]
    try:
        for _ in range(3):
            grads = [tiny_models.random_gradient(t.param) for t in tensors]
            for threads, own in ((1, tensors), (3, others)):
                torch.set_num_threads(threads)
                cpu.update_([replace(t, grad=grad) for t, grad in zip(own, grads, strict=True)], OPTIONS)
    finally:
        torch.set_num_threads(1)
    for tensor, other in zip(tensors, others, strict=True):
        assert_same(tensor, other, tolerances={"rtol": 0, "atol": 0})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LARGE)
def test_a_gradient_that_is_not_a_number_reaches_its_block_alone(name, dtype):
    blocks = LARGE[name]
    tensor = parameter_view(blocks, dtype, torch.bfloat16)
    grad = torch.randn(blocks.shape).to(dtype)
    place = tuple(size // 2 for size in blocks.shape)
    grad[place] = float("nan")
    cpu.update_([replace(tensor, grad=grad)], OPTIONS)
    exact = parameter_view(blocks)
    update.reference_([replace(exact, grad=grad.float())], OPTIONS)
    assert torch.equal(tensor.param.isnan(), exact.param.isnan())
    assert torch.equal(tensor.exp_avg.isnan(), exact.exp_avg.isnan())


def test_small_squares_are_not_lost_beside_large_ones():
    """A million ones after one large square: float32 alone would stop counting at 2^24."""
    grad = torch.ones(1, 2**20)
    grad[0, 0] = 2.0**13
    tensor = parameter_view(Blocks.rows(grad.shape))
    cpu.update_([replace(tensor, grad=grad)], OPTIONS)
    mean = (2.0**26 + 2**20 - 1) / 2**20
    assert tensor.moments[0].item() == pytest.approx((1 - OPTIONS.beta2) * mean, rel=1e-5)


# Shards.


@pytest.mark.slow
@given(block_structures(kinds=("mean",)), st.data())
def test_rectangles_of_a_flattened_parameter(blocks, data):
    """As a rank of FSDP1 has them; the sums of squares come from elsewhere."""
    size = torch.Size(blocks.shape).numel()
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    shard = Shard(blocks, flat_boxes(blocks.shape, start, stop))
    torch.manual_seed(0)
    part = {"param": torch.randn(stop - start), "exp_avg": torch.zeros(stop - start)}
    tensor = replace(parameter_view(blocks), shard=shard, **part)
    other = copy_of(tensor)
    for _ in range(3):
        grad = torch.randn(stop - start)
        sums = tuple(torch.rand(moment.shape) + 1 for moment in tensor.moments)
        found = cpu.square_sums(replace(other, grad=grad))
        if found is not None:
            for x, y in zip(found, replace(tensor, grad=grad).local_square_sums(), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
        update.reference_([replace(tensor, grad=grad, square_sums=sums)], OPTIONS)
        cpu.update_([replace(other, grad=grad, square_sums=sums)], OPTIONS)
    assert_same(tensor, other, tolerances={"rtol": 1e-5, "atol": 1e-6})


@pytest.mark.parametrize("name", [name for name, blocks in LARGE.items() if blocks.kind == "mean"])
def test_sums_of_all_ranks_are_taken_as_they_are(name):
    tensor = parameter_view(LARGE[name])
    other = copy_of(tensor)
    grad = tiny_models.random_gradient(tensor.param)
    (sums,) = replace(tensor, grad=grad).local_square_sums()
    (found,) = cpu.square_sums(replace(other, grad=grad))
    torch.testing.assert_close(found, sums, rtol=1e-5, atol=1e-6)
    update.reference_([replace(tensor, grad=grad, square_sums=(3 * sums,))], OPTIONS)
    cpu.update_([replace(other, grad=grad, square_sums=(3 * sums,))], OPTIONS)
    assert_same(tensor, other, tolerances=LARGE_TOLERANCES)
