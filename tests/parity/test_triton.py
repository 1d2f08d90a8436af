"""The Triton kernels equal the reference: in Triton's interpreter on the CPU, and on a CUDA device.

    TRITON_INTERPRET=1 pytest tests/parity/test_triton.py

Triton chooses between compiler and interpreter when a kernel is defined, so the suite runs this file again in a process
of its own.
"""

import copy
import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_models
from lightning_adam_mini import Blocks
from lightning_adam_mini.blocks import Kind, Segment
from lightning_adam_mini.optim import update
from lightning_adam_mini.optim.kernels import gpu, triton_plan
from lightning_adam_mini.optim.shards import Shard, flat_boxes, grid_boxes
from lightning_adam_mini.optim.state import init_state
from lightning_adam_mini.optim.stochastic_rounding import Rounding
from lightning_adam_mini.optim.update import ParameterView, StepOptions
from random_blocks import block_structures

pytest.importorskip("triton", reason="Triton is not installed")

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="runs in a process with TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(IS_INTERPRETED, reason="runs without TRITON_INTERPRET")
devices = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=[pytest.mark.gpu, compiled])]
)

OPTIONS = StepOptions(lr=1e-2, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.1)
FUSED = (Segment(4, 2), Segment(2, 2), Segment(2, 1))
SPANNING = (Segment(4, 2), Segment(2, 4))  # the second segment is one block over two repeats

BLOCKS = {
    "element": Blocks.element((5, 13)),
    "element, no dimensions": Blocks.element(()),
    "element, empty": Blocks.element((0, 3)),
    "element, several chunks": Blocks.element((9, 1024)),
    "whole": Blocks.whole((5, 13)),
    "whole, no dimensions": Blocks.whole(()),
    "whole, empty": Blocks.whole((0,)),
    "whole, long": Blocks.whole((3, 23000)),
    "whole, experts": Blocks.whole((2, 5, 3), batch_axes=(0,)),
    "rows": Blocks.rows((70, 24)),
    "rows of odd length": Blocks.rows((70, 27)),
    "rows of a vector": Blocks.rows((13,)),
    "rows, empty": Blocks.rows((0, 3)),
    "rows without elements": Blocks.rows((4, 0)),
    "long rows": Blocks.rows((3, 16392)),
    "long rows of odd length": Blocks.rows((3, 8195)),
    "columns": Blocks.rows((270, 136), axis=1),
    "columns of odd number": Blocks.rows((9, 131), axis=1),
    "heads": Blocks.rows((6, 24), block_size=2),
    "heads in columns": Blocks.rows((5, 24), axis=1, block_size=8),
    "experts": Blocks.rows((3, 4, 5), axis=1, batch_axes=(0,)),
    "experts in columns": Blocks.rows((3, 4, 8), axis=2, batch_axes=(0,)),
    "batch on both sides": Blocks.rows((2, 3, 2, 3, 2), axis=4, batch_axes=(0, 2)),
    "convolution": Blocks.rows((4, 3, 2, 2)),
    "transposed convolution": Blocks.rows((4, 6, 2, 2), axis=1),
    "fused": Blocks.segmented((8, 16), FUSED),
    "fused in columns": Blocks.segmented((3, 8), FUSED, axis=1),
    "fused in columns, one block over the repeats": Blocks.segmented((3, 12), SPANNING, axis=1, repeats=2),
    "fused, interleaved": Blocks.segmented((16, 3), FUSED, repeats=2),
    "fused, one block over the repeats": Blocks.segmented((12, 8), SPANNING, repeats=2),
    "fused, one block over the repeats, experts": Blocks.segmented(
        (2, 12, 3), SPANNING, axis=1, repeats=2, batch_axes=(0,)
    ),
    "row and column": Blocks.factored((4, 6)),
}

LEFT = ("batch on both sides", "row and column")
"""Blocks that the reference updates, even in dtypes that the kernels take."""
SMALL = {name: b for name, b in BLOCKS.items() if math.prod(b.shape) < 3000 and name not in LEFT}

DTYPES = [  # of parameters, of gradients, of first moments
    (torch.float32, torch.float32, None),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, None),
    pytest.param(torch.bfloat16, torch.float32, torch.float32, marks=pytest.mark.slow),
    pytest.param(torch.float16, torch.float16, None, marks=pytest.mark.slow),
    (torch.float64, torch.float64, None),
]


def parameter_view(
    blocks, *, device, dtype=torch.float32, exp_avg_dtype=None, capturable=False, shard=None, shape=None
):
    param = torch.randn(blocks.shape if shape is None else shape, device=device).to(dtype)
    shard = shard or Shard(blocks)
    state = init_state(param, shard.local_blocks, shard, exp_avg_dtype=exp_avg_dtype, capturable=capturable)
    moments = tuple(state[key] for key in shard.local_blocks.state_shapes)
    return ParameterView(param, None, shard, state["step"], state["exp_avg"], moments)


def with_gradients(tensors, grads):
    return [replace(t, grad=grad.clone()) for t, grad in zip(tensors, grads, strict=True) if grad is not None]


def random_gradients(tensors, step, dtype=None):
    """In every fourth step a tensor has no gradient."""
    return [
        None if (number + step) % 4 == 0 else tiny_models.random_gradient(t.param).to(dtype or t.param.dtype)
        for number, t in enumerate(tensors)
    ]


def assert_same(names, first, second, tolerances):
    for name, a, b in zip(names, first, second, strict=True):
        narrowest = min(a.param.dtype, a.exp_avg.dtype, key=lambda dtype: (dtype.itemsize, dtype is torch.float16))
        for x, y in zip(
            (a.param, a.exp_avg, a.step, *a.moments), (b.param, b.exp_avg, b.step, *b.moments), strict=True
        ):
            torch.testing.assert_close(x, y, **tolerances[narrowest], msg=lambda m, n=name: f"{n}: {m}")


def rounded(tensor, dtype):
    """A tensor in `dtype`, as the kernels store it: Triton's interpreter truncates to bfloat16, devices round."""
    if IS_INTERPRETED and dtype is torch.bfloat16:
        return tensor.contiguous().view(torch.int32).bitwise_right_shift(16).to(torch.int16).view(dtype)
    return tensor.to(dtype)


def reference_step(tensor, options, **more):
    """The reference in float32 or wider, rounded once per step as the kernels do."""
    wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in (tensor.param, tensor.grad, tensor.exp_avg)]
    update.reference_([replace(tensor, param=wide[0], grad=wide[1], exp_avg=wide[2])], options, **more)
    tensor.param.copy_(rounded(wide[0], tensor.param.dtype))
    tensor.exp_avg.copy_(rounded(wide[2], tensor.exp_avg.dtype))


def run_both(tensors, others, *, num_steps=3, grad_dtype=None, options=OPTIONS, **more):
    for step in range(num_steps):
        grads = random_gradients(tensors, step, grad_dtype)
        for tensor in with_gradients(tensors, grads):
            reference_step(tensor, options, **more)
        gpu.update_(with_gradients(others, grads), options, **more)


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("tier", ["not slow", "slow"])
def test_all_of_this_file_in_the_interpreter(tier):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", "-m", tier, __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@devices
@pytest.mark.parametrize(("dtype", "grad_dtype", "exp_avg_dtype"), DTYPES)
def test_kernels_equal_the_reference(dtype, grad_dtype, exp_avg_dtype, device, tolerances):
    is_plain = exp_avg_dtype is None and dtype is torch.float32
    blocks = BLOCKS if is_plain else SMALL
    tensors = [parameter_view(b, device=device, dtype=dtype, exp_avg_dtype=exp_avg_dtype) for b in blocks.values()]
    others = copy.deepcopy(tensors)
    options = replace(OPTIONS, maximize=grad_dtype is not dtype)
    run_both(tensors, others, grad_dtype=grad_dtype, options=options, num_steps=3 if is_plain else 2)
    assert_same(blocks, tensors, others, tolerances)


def kernels_of(names, device):
    tensors = [parameter_view(BLOCKS[name], device=device) for name in names]
    grads = [torch.ones_like(t.param) for t in tensors]
    with_grads = with_gradients(tensors, grads)
    plan = gpu.make_plan(with_grads, torch.device(device))
    return {launch.kernel.__name__ for launch in plan.launches}, [names[number] for number in plan.left]


@devices
def test_every_kernel_is_among_them(device):
    used, left = kernels_of(list(BLOCKS), device)
    assert used == {
        "finish_moments",
        "sum_chunks",
        "sum_columns",
        "update_chunks",
        "update_columns",
        "update_elements",
        "update_long_runs",
        "update_runs",
    }
    assert left == list(LEFT)


@interpreted
@settings(max_examples=12)
@given(st.lists(block_structures(), min_size=4, max_size=8), st.booleans())
def test_random_blocks(tolerances, drawn, capturable):
    tensors = [parameter_view(blocks, device="cpu", capturable=capturable) for blocks in drawn]
    others = copy.deepcopy(tensors)
    run_both(tensors, others, num_steps=2, capturable=capturable)
    assert_same(drawn, tensors, others, tolerances)


@pytest.fixture
def small_limits(monkeypatch):
    """Let small tensors take the paths of large ones."""
    limits = {"CHUNK": 16, "IN_CACHE": 32, "IN_REGISTERS": 16, "LONG_STEP": 16, "TILE_ROWS": 4, "TILE_COLUMNS": 16}
    limits |= {"TILE_STEP": 2, "FEW_SUMS": 2, "MANY_SUMS": 4}
    for name, value in limits.items():
        monkeypatch.setattr(triton_plan, name, value)
    gpu._PREPARED.clear()
    yield
    gpu._PREPARED.clear()


@interpreted
def test_blocks_in_many_parts(small_limits, tolerances):
    blocks = {name: b for name, b in SMALL.items() if math.prod(b.shape) < 500}
    tensors = [parameter_view(b, device="cpu") for b in blocks.values()]
    others = copy.deepcopy(tensors)
    run_both(tensors, others, num_steps=2)
    assert_same(blocks, tensors, others, tolerances)


@devices
def test_axes_in_another_memory_order(device, tolerances):
    blocks = {
        "convolution": Blocks.rows((6, 8, 3, 3)),
        "matrix": Blocks.rows((6, 8)),
        "element": Blocks.element((6, 8)),
    }
    orders = {"convolution": (0, 2, 3, 1), "matrix": (1, 0), "element": (1, 0)}
    tensors = []
    for name, b in blocks.items():
        tensor = parameter_view(b, device=device)
        order = orders[name]
        back = [order.index(axis) for axis in range(len(order))]
        param = tensor.param.permute(order).contiguous().permute(back)
        tensors.append(replace(tensor, param=param, exp_avg=torch.zeros_like(param)))
    others = copy.deepcopy(tensors)
    run_both(tensors, others)
    assert_same(blocks, tensors, others, tolerances)
    assert not others[0].param.is_contiguous()


@devices
def test_gradients_in_another_memory_order(device, tolerances):
    tensors = [parameter_view(BLOCKS[name], device=device) for name in ("rows", "element")]
    others = copy.deepcopy(tensors)
    for _ in range(2):
        grads = [torch.randn_like(t.param).mT.contiguous().mT for t in tensors]
        for tensor in with_gradients(tensors, grads):
            update.reference_([tensor], OPTIONS)
        gpu.update_(with_gradients(others, grads), OPTIONS)
    assert_same(("rows", "element"), tensors, others, tolerances)


@devices
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_memory_that_is_not_aligned(dtype, device, tolerances):
    names = [name for name in SMALL if BLOCKS[name].num_values]
    tensors = [parameter_view(BLOCKS[name], device=device, dtype=dtype) for name in names]
    others = []
    for number, tensor in enumerate(copy.deepcopy(tensors)):
        shifted = []
        for part, value in enumerate((tensor.param, tensor.exp_avg)):
            storage = torch.empty(value.numel() + 1, dtype=dtype, device=device)
            shift = int(part != number % 2)  # one of them, so that each is checked
            shifted.append(storage[shift : value.numel() + shift].view(value.shape).copy_(value))
        others.append(replace(tensor, param=shifted[0], exp_avg=shifted[1]))
    run_both(tensors, others, num_steps=2)
    assert_same(names, tensors, others, tolerances)


def promised(launch):
    """Numbers of tensors, first elements, and lengths that a launch promises to be multiples of 8 elements."""
    tables = launch.arguments
    if "bands" in tables:
        return tables["bands"][:, 0], tables["bands"][:, 1], tables["bands"][:, 3:4]
    if "chunks" in tables:
        return tables["chunks"][:, 0], tables["chunks"][:, 1], tables["chunks"][:, 2:3]
    return tables["tiles"][:, 0], tables["tiles"][:, 1], tables["tiles"][:, [2, 4]]


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches_promise_alignment_only_if_it_holds(dtype):
    """A false promise is an illegal access on a device, and nothing in the interpreter."""
    tensors = []
    for name, shift in itertools.product((n for n in BLOCKS if n not in LEFT), (0, 1)):
        blocks = BLOCKS[name]
        param = torch.zeros(math.prod(blocks.shape) + shift, dtype=dtype)[shift:].view(blocks.shape)
        tensor = parameter_view(blocks, device="cpu", dtype=dtype)
        tensors.append(replace(tensor, param=param, grad=torch.zeros_like(param)))
    plan = gpu.make_plan(tensors, torch.device("cpu"))
    taken = [tensors[number] for number in plan.taken]
    seen = []
    for launch in plan.launches:
        seen.append(launch.arguments.get("is_aligned"))
        if not seen[-1]:
            continue
        numbers, starts, lengths = promised(launch)
        assert not (lengths % 8).any()
        for number, start in zip(numbers.tolist(), starts.tolist(), strict=True):
            t = taken[number]
            assert not any((x.data_ptr() + start * x.element_size()) % 16 for x in (t.param, t.grad, t.exp_avg))
    assert {True, False} <= set(seen)


def sharded(device):
    """Local tensors of several kinds of shards."""
    rows, matrix = Blocks.rows((6, 8), block_size=3), Blocks.rows((6, 8))
    whole = Blocks.whole((6, 8))
    boxes = grid_boxes([[(1, 0, 2), (5, 2, 1)], [(0, 0, 8)]])
    return {
        "split heads": parameter_view(rows, device=device, shard=Shard(rows, boxes), shape=(3, 8)),
        "a range of a flat vector": parameter_view(
            rows, device=device, shard=Shard(rows, flat_boxes(rows.shape, 5, 37)), shape=(32,)
        ),
        "rectangles with gaps": parameter_view(
            rows, device=device, shard=Shard(rows, grid_boxes([[(0, 0, 6)], [(0, 0, 2), (6, 2, 2)]])), shape=(6, 4)
        ),
        "half of each row": parameter_view(matrix, device=device, shard=Shard(matrix), shape=(6, 4)),
        "half of the columns": parameter_view(
            Blocks.rows((6, 8), axis=1), device=device, shard=Shard(Blocks.rows((6, 8), axis=1)), shape=(3, 8)
        ),
        "a part of one block": parameter_view(whole, device=device, shard=Shard(whole), shape=(2, 8)),
        "nothing": parameter_view(whole, device=device, shard=Shard(whole, ()), shape=(0, 8)),
    }


@devices
def test_sharded_tensors(device, tolerances):
    tensors = sharded(device)
    others = copy.deepcopy(tensors)
    for _ in range(3):
        for name, tensor in tensors.items():
            grad = torch.randn_like(tensor.param)
            sums = tuple(torch.rand_like(moment) * 10 for moment in tensor.moments)
            tensors[name], others[name] = (
                replace(t, grad=grad.clone(), square_sums=sums) for t in (tensor, others[name])
            )
            update.reference_([tensors[name]], OPTIONS)
        gpu.update_(list(others.values()), OPTIONS)
    assert_same(tensors, tensors.values(), others.values(), tolerances)
    plan = gpu.make_plan(list(others.values()), torch.device(device))
    assert [list(others)[number] for number in plan.left] == ["rectangles with gaps"]


@devices
@pytest.mark.parametrize("capturable", [False, True])
def test_learning_rates_that_are_tensors(capturable, device, tolerances):
    names = ("rows", "element", "heads in columns")
    tensors = [parameter_view(BLOCKS[name], device=device, capturable=capturable) for name in names]
    others = copy.deepcopy(tensors)
    options = replace(OPTIONS, lr=torch.tensor(1e-2, device=device), weight_decay=0.0)
    run_both(tensors, others, options=options, capturable=capturable)
    assert_same(names, tensors, others, tolerances)
    assert all(tensor.step.device.type == (device if capturable else "cpu") for tensor in others)


@pytest.mark.gpu
@compiled
def test_a_step_is_the_same_each_time():
    """The interpreter runs one program after the other; only on a device could the order of sums vary."""
    tensors = [parameter_view(BLOCKS[name], device="cuda") for name in ("rows", "whole, long", "columns")]
    others = copy.deepcopy(tensors)
    grads = [torch.randn_like(t.param) for t in tensors]
    for copies in (tensors, others):
        gpu.update_(with_gradients(copies, grads), OPTIONS)
    for a, b in zip(tensors, others, strict=True):
        assert torch.equal(a.param, b.param)
        assert torch.equal(a.moments[0], b.moments[0])


@devices
def test_a_plan_is_made_once(device, monkeypatch):
    tensors = [parameter_view(BLOCKS[name], device=device) for name in ("rows", "heads")]
    made = []
    monkeypatch.setattr(gpu, "make_plan", lambda *args, make=gpu.make_plan: made.append(1) or make(*args))
    for _ in range(3):
        gpu.update_(with_gradients(tensors, [torch.randn_like(t.param) for t in tensors]), OPTIONS)
    assert len(made) == 1
    gpu.update_(with_gradients(tensors[:1], [torch.randn_like(tensors[0].param)]), OPTIONS)
    assert len(made) == 2


@devices
def test_nothing_to_update(device):
    gpu.update_([], OPTIONS)
    empty = parameter_view(Blocks.rows((0, 3)), device=device)
    gpu.update_([replace(empty, grad=torch.zeros_like(empty.param))], OPTIONS)
    assert empty.step == 1


@devices
def test_other_blocks_of_the_same_tensor_show(device, tolerances):
    """The comparison can fail."""
    tensor = parameter_view(BLOCKS["heads"], device=device)
    other = replace(
        copy.deepcopy(tensor), shard=Shard(Blocks.rows((6, 24))), moments=(torch.zeros(6, 1, device=device),)
    )
    grad = torch.randn_like(tensor.param)
    update.reference_([replace(tensor, grad=grad)], OPTIONS)
    gpu.update_([replace(other, grad=grad)], OPTIONS)
    assert not torch.allclose(tensor.param, other.param, **tolerances[torch.float32])


@compiled
def test_the_reason_on_the_cpu():
    tensor = parameter_view(BLOCKS["rows"], device="cpu")
    if torch.cuda.is_available():
        assert "no CUDA device" in gpu.supports(tensor)
    else:
        assert gpu.supports(tensor) == gpu.unavailable(tensor.param.device) == "cpu is no CUDA device"


@compiled
def test_the_reference_updates_tensors_on_the_cpu(tolerances):
    tensors = [parameter_view(BLOCKS[name], device="cpu") for name in ("rows", "element")]
    others = copy.deepcopy(tensors)
    run_both(tensors, others)
    assert_same(("rows", "element"), tensors, others, tolerances)


@interpreted
def test_the_interpreter_takes_tensors_on_the_cpu():
    assert gpu.unavailable(torch.device("cpu")) is None
    assert gpu.supports(parameter_view(BLOCKS["rows"], device="cpu")) is None


@devices
def test_the_reason_for_each_tensor_that_the_reference_updates(device):
    rows = parameter_view(BLOCKS["rows"], device=device)
    other_order = torch.zeros_like(rows.param).mT.contiguous().mT
    refused = {
        "factored": parameter_view(BLOCKS["row and column"], device=device),
        "dtypes other": parameter_view(BLOCKS["rows"], device=device, dtype=torch.float64),
        "not contiguous float32": replace(rows, moments=(rows.moments[0].double(),)),
        "another memory order": replace(rows, grad=other_order),
        "four sizes": parameter_view(BLOCKS["batch on both sides"], device=device),
        "8-bit": replace(rows, rounding=Rounding(7, tuple(rows.param.shape))),
        "negated": replace(rows, grad=torch.zeros_like(rows.param, dtype=torch.complex64).conj().imag),
    }
    for reason, tensor in refused.items():
        assert reason in gpu.supports(tensor)


@pytest.mark.gpu
@compiled
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_captured_step(tensor_lr, tolerances):
    """Replays read the captured gradients, even if steps outside the graph have read others in between."""
    names = [name for name in BLOCKS if BLOCKS[name].kind is not Kind.FACTORED]
    tensors = [parameter_view(BLOCKS[name], device="cuda", capturable=True) for name in names]
    others = copy.deepcopy(tensors)
    options = replace(OPTIONS, lr=torch.tensor(1e-2, device="cuda") if tensor_lr else 1e-2)
    first, second = ([torch.randn_like(t.param) for t in tensors] for _ in range(2))
    captured = with_gradients(others, first)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gpu.update_(captured, options, capturable=True)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gpu.update_(captured, options, capturable=True)
    graph.replay()
    gpu.update_(with_gradients(others, second), options, capturable=True)
    graph.replay()

    for grads in (first, first, second, first):
        for tensor in with_gradients(tensors, grads):
            update.reference_([tensor], options, capturable=True)
    assert_same(names, tensors, others, tolerances)


@pytest.mark.gpu
@compiled
def test_capturing_the_first_step_says_what_to_do():
    tensor = parameter_view(BLOCKS["rows"], device="cuda", capturable=True)
    tensor = replace(tensor, grad=torch.ones_like(tensor.param))
    with pytest.raises(RuntimeError, match="take one step"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        gpu.update_([tensor], OPTIONS, capturable=True)


@pytest.mark.gpu
@compiled
def test_no_step_waits_for_the_device():
    tensors = [parameter_view(BLOCKS[name], device="cuda") for name in BLOCKS if BLOCKS[name].kind is not Kind.FACTORED]
    tensors = [t for t in tensors if t.param.dim() != 5]  # the reference is no part of this
    gpu.update_(with_gradients(tensors, [torch.randn_like(t.param) for t in tensors]), OPTIONS)
    grads = [torch.randn_like(t.param) for t in tensors]
    torch.cuda.set_sync_debug_mode("error")
    try:
        gpu.update_(with_gradients(tensors, grads), OPTIONS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
