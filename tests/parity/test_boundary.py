"""Nothing reaches a kernel that was not checked: exchanged memory gives the reference's result, or a ValueError."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tiny_models
from lightning_adam_mini import AdamMini, Blocks
from lightning_adam_mini.optim import quantized
from lightning_adam_mini.optim.kernels import build, cpu, cpu_plan
from lightning_adam_mini.optim.kernels.layout import Memory, address
from lightning_adam_mini.optim.shards import Shard
from lightning_adam_mini.optim.state import init_state
from lightning_adam_mini.optim.update import ParameterView
from ranks import run_ranks

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

IMPLEMENTATIONS = ["reference", "foreach", "fused"]
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
FORMATS = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "8 bits": (torch.float32, {"exp_avg_dtype": torch.uint8}),
    "rounded": (torch.bfloat16, {"stochastic_rounding": True}),
}
FUZZ = Path(__file__).parents[1] / "helpers/step_fuzz.py"


class Pair(nn.Module):
    """A vector, which is the first to be stepped, and a matrix that is large enough for 8 bits."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first = nn.Parameter(torch.ones(70, dtype=dtype))
        self.weight = nn.Parameter(torch.randn(70, 64).to(dtype))


def trained(implementation, dtype=torch.float32, steps=2, **options):
    """A model after some steps, the last of which were repeated."""
    torch.manual_seed(0)
    module = Pair(dtype)
    optimizer = AdamMini(module, lr=1e-2, partition="default", implementation=implementation, **options)
    for _ in range(steps):
        tiny_models.set_gradients(module)
        optimizer.step()
    tiny_models.set_gradients(module)
    return module, optimizer


def bits(module, optimizer):
    tensors = [t for p in module.parameters() for t in (p, *optimizer.state.get(p, {}).values())]
    return [tensor.detach().clone() for tensor in tensors]


# Another tensor in the place of a parameter, with a gradient that goes with it.


def pruned(weight):
    weight.data = weight.data[:2]
    weight.grad = torch.ones_like(weight)


def pruned_columns(weight):
    weight.data = weight.data[:, :3].contiguous()
    weight.grad = torch.ones_like(weight)


def grown(weight):
    weight.data = torch.cat([weight.data, weight.data])
    weight.grad = torch.ones_like(weight)


def turned(weight):
    weight.data = weight.data.t()
    weight.grad = torch.ones_like(weight)


def flattened(weight):
    weight.data = weight.data.view(-1)
    weight.grad = torch.ones_like(weight)


def expanded(weight):
    weight.data = weight.data[:1].expand(weight.shape)


def overlapping(weight):
    weight.data = weight.data.flatten().as_strided(weight.shape, (1, 1))


def without_storage(weight):
    weight.untyped_storage().resize_(0)


def with_half_a_storage(weight):
    weight.untyped_storage().resize_(weight.untyped_storage().nbytes() // 2)


def storage_twice_resized(weight):
    weight.untyped_storage().resize_(0)
    weight.untyped_storage().resize_(16)


def gradient_of_another_shape(weight):
    weight.grad.data = weight.grad.data[:2]


def gradient_that_would_broadcast(weight):
    weight.grad.data = weight.grad.data[:1]


def integer_gradient(weight):
    weight.grad.data = weight.grad.data.int()


def gradient_without_storage(weight):
    weight.grad.untyped_storage().resize_(0)


def gradient_with_half_a_storage(weight):
    weight.grad.untyped_storage().resize_(weight.grad.untyped_storage().nbytes() // 2)


MISFITS = [pruned, pruned_columns, grown, turned, flattened, expanded, overlapping, without_storage]
MISFITS += [with_half_a_storage, storage_twice_resized, gradient_of_another_shape, gradient_that_would_broadcast]
MISFITS += [integer_gradient, gradient_without_storage, gradient_with_half_a_storage]


@implementations
@pytest.mark.parametrize("change", MISFITS, ids=lambda change: change.__name__)
def test_what_does_not_fit_is_named_before_anything_moves(change, implementation):
    module, optimizer = trained(implementation)
    change(module.weight)
    has_memory = module.weight.untyped_storage().nbytes() >= module.weight.nbytes
    tensors = [
        t for p in module.parameters() if p is module.first or has_memory for t in (p, *optimizer.state[p].values())
    ]
    before = [tensor.detach().clone() for tensor in tensors]
    with pytest.raises(ValueError, match=r"\bweight\b"):
        optimizer.step()
    for old, new in zip(before, tensors, strict=True):
        assert torch.equal(old, new)
    assert optimizer.state[module.first]["step"] == optimizer.state[module.weight]["step"] == 2


def test_a_gradient_on_another_device():
    """Torch itself lets none be set; a parameter that was moved leaves the moments where they were."""
    param, blocks = torch.ones(3, 4), Blocks.rows((3, 4))
    state = init_state(param, blocks, exp_avg_dtype=None, capturable=False)
    tensors = {"param": param, "grad": param.clone(), "exp_avg": state["exp_avg"]}
    for moved, told in (("grad", "its gradient .* on meta"), ("exp_avg", "exp_avg of its state is on meta")):
        others = {**tensors, moved: tensors[moved].to("meta")}
        with pytest.raises(ValueError, match=f"it: .*{told}"):
            ParameterView(shard=Shard(blocks), step=state["step"], moments=(state["exp_avg_sq"],), name="it", **others)


@pytest.mark.parametrize("layout", ["to_sparse_csr", "to_mkldnn", "bool"])
def test_a_gradient_that_is_not_dense(layout):
    param, blocks = torch.ones(3, 4), Blocks.rows((3, 4))
    state = init_state(param, blocks, exp_avg_dtype=None, capturable=False)
    grad = getattr(torch.ones(3, 4), layout)()
    with pytest.raises(ValueError, match=r"it: its gradient has the (layout|dtype)"):
        ParameterView(param, grad, Shard(blocks), state["step"], state["exp_avg"], (state["exp_avg_sq"],), name="it")


@pytest.mark.parametrize("change", [pruned, grown, turned, storage_twice_resized, gradient_of_another_shape])
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "float32"])
def test_the_same_in_every_format(change, name):
    dtype, options = FORMATS[name]
    module, optimizer = trained("fused", dtype, **options)
    first = module.first.detach().clone()
    change(module.weight)
    with pytest.raises(ValueError, match=r"\bweight\b"):
        optimizer.step()
    assert torch.equal(first, module.first)


@implementations
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step", "exp_avg_scale"])
def test_a_state_of_another_shape(key, implementation):
    module, optimizer = trained(implementation, exp_avg_dtype=torch.uint8)
    first = module.first.detach().clone()
    state = optimizer.state[module.weight]
    state[key] = torch.zeros((3, 3), dtype=state[key].dtype)
    with pytest.raises(ValueError, match=rf"weight: {key} of its state"):
        optimizer.step()
    assert torch.equal(first, module.first)


# A parameter that is followed first, beside another that is refused after it.


def in_another_dtype(module, optimizer, parameter):
    parameter.data = parameter.data.double()
    parameter.grad = torch.ones_like(parameter)


def without_a_state(module, optimizer, parameter):
    optimizer.state.pop(parameter)


def replaced(module, optimizer, parameter):
    name = next(name for name, own in module.named_parameters() if own is parameter)
    new = nn.Parameter(parameter.detach().clone())
    new.grad = parameter.grad
    setattr(module, name, new)
    for group in optimizer.param_groups:
        group["params"] = [new if own is parameter else own for own in group["params"]]


def insides(optimizer):
    """All that an optimizer knows, and which tensors its states are."""
    kept = dict(optimizer._table.known), copy.copy(optimizer._table.names)
    states = {parameter: {key: id(value) for key, value in own.items()} for parameter, own in optimizer.state.items()}
    return kept, states, [dict(group) for group in optimizer.param_groups]


@implementations
@pytest.mark.parametrize("name", ["first", "weight"])
@pytest.mark.parametrize("change", [in_another_dtype, without_a_state, replaced], ids=lambda change: change.__name__)
def test_a_refused_step_leaves_what_it_had_followed(change, name, implementation):
    module, optimizer = trained(None if implementation == "fused" else implementation)
    other = module.first if name == "weight" else module.weight
    change(module, optimizer, getattr(module, name))
    old = other.data
    other.data = other.data[:1].expand(other.shape)
    before, numbers = insides(optimizer), bits(module, optimizer)
    with pytest.raises(ValueError, match=r"\b(first|weight)\b"):
        optimizer.step()
    assert insides(optimizer) == before
    for x, y in zip(bits(module, optimizer), numbers, strict=True):
        assert torch.equal(x, y)
    other.data = old
    optimizer.step()
    assert optimizer.state[getattr(module, name)]["step"] == (1 if change is without_a_state else 3)


def test_a_refused_step_of_one_parameter_leaves_its_state():
    module, optimizer = trained("reference")
    in_another_dtype(module, optimizer, module.first)
    optimizer.state[module.first]["step"] = torch.zeros(3)
    before = insides(optimizer)
    with pytest.raises((ValueError, RuntimeError)):
        optimizer.step_parameter(module.first)
    assert insides(optimizer) == before


def test_a_refused_load_leaves_the_moments():
    module, optimizer = trained("reference")
    saved, whole = copy.deepcopy(optimizer.state_dict()), module.weight.data
    module.weight.data = whole[:2]
    before = insides(optimizer)
    with pytest.raises(ValueError, match="weight"):
        optimizer.load_state_dict(saved)
    assert insides(optimizer) == before
    module.weight.data = whole
    assert optimizer.state[module.weight]["exp_avg"].any()


# What goes on, with the result of the reference.


def view_of_a_buffer(module):
    buffer = torch.randn(5000)
    for parameter, start in ((module.first, 11), (module.weight, 100)):
        parameter.data = buffer[start : start + parameter.numel()].view(parameter.shape).copy_(parameter.data)


def overlapping_parameters(module):
    buffer = torch.linspace(-1, 1, 5000)
    for parameter, start in ((module.first, 60), (module.weight, 100)):
        parameter.data = buffer[start : start + parameter.numel()].view(parameter.shape)


def other_strides(module):
    module.weight.data = module.weight.data.t().contiguous().t()


def gaps(module):
    module.weight.data = torch.stack([module.weight.data, module.weight.data], -1)[..., 0]


def expanded_gradient(module):
    module.weight.grad = torch.tensor(0.5).expand(module.weight.shape)


def gradient_with_gaps(module):
    module.weight.grad = torch.stack([module.weight.grad, module.weight.grad], -1)[..., 0]


def gradient_of_another_dtype(module):
    module.weight.grad.data = module.weight.grad.data.double()


def gradient_between_two_elements(module):
    memory = bytearray(module.weight.numel() * 4 + 1)
    odd = torch.frombuffer(memory, dtype=torch.uint8)[1:]
    module.weight.grad = torch.frombuffer(odd.numpy(), dtype=torch.float32).view(70, 64).fill_(0.5)


def negative_gradient(module):
    pairs = torch.view_as_complex(torch.stack([module.weight.grad, module.weight.grad], -1))
    module.weight.grad = pairs.conj().imag
    assert module.weight.grad.is_neg()


def gradient_is_the_parameter(module):
    module.weight.grad = module.weight.detach()


def one_gradient_for_two(module):
    buffer = torch.linspace(-1, 1, 70 * 64)
    module.weight.grad = buffer.view(70, 64)
    module.first.grad = buffer[:70]


def no_gradient(module):
    module.first.grad = None


def float64(module):
    module.double()


EVENTS = [view_of_a_buffer, overlapping_parameters, other_strides, gaps, expanded_gradient, gradient_with_gaps]
EVENTS += [gradient_of_another_dtype, gradient_between_two_elements, negative_gradient, gradient_is_the_parameter]
EVENTS += [one_gradient_for_two, no_gradient, float64]


@pytest.mark.parametrize("implementation", [None, "foreach"])
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
def test_other_memory_gives_the_result_of_the_reference(event, implementation):
    found = []
    for how in ("reference", implementation):
        module, optimizer = trained(how)
        for _ in range(3):  # at once, anew, and repeated
            event(module)
            optimizer.step()
        found.append(bits(module, optimizer))
    for expected, other in zip(*found, strict=True):
        torch.testing.assert_close(other, expected, rtol=1e-5, atol=1e-6)


# Defaults of torch.


@pytest.fixture
def _fresh():
    """What is made once in a process is made anew."""
    caches = [quantized.values, quantized.bins, cpu_plan._codebook, cpu._whole_piece, cpu._box_pieces]
    for cache in caches:
        cache.cache_clear()
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16, "meta"], ids=str)
@pytest.mark.parametrize("name", FORMATS)
@implementations
def test_defaults_of_torch_change_no_bit(name, implementation, default):
    dtype, options = FORMATS[name]

    def run():
        optimizer = AdamMini(module, lr=1e-2, partition="default", implementation=implementation, **options)
        for grads in all_grads:
            for parameter, grad in zip(module.parameters(), grads, strict=True):
                parameter.grad = grad.clone()
            optimizer.step()
        return bits(module, optimizer)

    runs = []
    for is_set in (False, True):
        torch.manual_seed(0)
        module = Pair(dtype)
        all_grads = [[torch.randn_like(p) for p in module.parameters()] for _ in range(4)]
        if is_set:
            torch.set_default_device(default) if default == "meta" else torch.set_default_dtype(default)
        runs.append(run())
    for expected, found in zip(*runs, strict=True):
        assert torch.equal(expected, found)


def sharded_steps(rank, default, implementation):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 12))
    grads = [torch.randn_like(p) for p in module.parameters()]
    if default is not None:
        torch.set_default_dtype(default)
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    optimizer = AdamMini(module, lr=1e-2, partition="default", implementation=implementation)
    for _ in range(3):
        for parameter, grad in zip(module.parameters(), grads, strict=True):
            start = grad.shape[0] // 2 * rank
            local = grad[start : start + grad.shape[0] // 2].clone()
            parameter.grad = type(parameter.data).from_local(local, parameter.device_mesh, parameter.placements)
        optimizer.step()
    return [parameter.full_tensor().detach() for parameter in module.parameters()]


@pytest.mark.parametrize("implementation", [None, pytest.param("foreach", marks=pytest.mark.slow)])
@pytest.mark.parametrize("default", [torch.float64, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_defaults_of_torch_on_two_ranks(default, implementation):
    expected, _ = run_ranks(2, sharded_steps, None, implementation)
    for found in run_ranks(2, sharded_steps, default, implementation):
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


# The boundary itself.


def test_an_address_is_given_for_what_the_kernel_takes_it_for_alone():
    takes = {"dtypes": (torch.float32,), "numel": 12}
    good = torch.zeros(3, 4)
    assert address("it", good, **takes) == good.data_ptr()
    assert address("it", good.t(), **takes) == good.data_ptr()
    small = torch.zeros(12)
    small.untyped_storage().resize_(40)
    negative = torch.zeros(12, dtype=torch.complex64).conj().imag
    for bad in (
        good.double(),
        good.to("meta"),
        good[:2],
        torch.zeros(3, 8)[:, ::2],
        torch.zeros(1).expand(12),
        torch.zeros(20).as_strided((3, 4), (1, 1)),
        good.to_sparse(),
        small,
        negative,
    ):
        with pytest.raises(ValueError, match="it is a"):
            address("it", bad, **takes)


def test_memory_notices_what_changes():
    tensor, own, other = torch.zeros(3, 4), torch.zeros(5), torch.zeros(9)
    memory, of_other = Memory([tensor], [own]), Memory([other])
    assert memory.is_in_place([tensor], [own])
    assert of_other.addresses([other], apart_from=memory) == [other.data_ptr()]
    moved = torch.zeros(9)
    assert of_other.addresses([moved], apart_from=memory) == [moved.data_ptr()]
    for bad in (torch.zeros(8), torch.zeros(9).double(), torch.zeros(18)[::2], torch.zeros(10)[1:], torch.zeros(9, 1)):
        assert of_other.addresses([bad], apart_from=memory) is None
    assert Memory([tensor[0]]).addresses([tensor[0]], apart_from=memory) is None
    assert not memory.is_in_place([tensor.clone()], [own])
    own.untyped_storage().resize_(4)
    assert not memory.is_in_place([tensor], [own])


def test_an_entry_whose_spans_are_of_other_rows():
    blocks = Blocks.rows((6, 4))
    param = torch.randn(6, 4)
    state = init_state(param, blocks, exp_avg_dtype=None, capturable=False)
    tensor = ParameterView(param, param.clone(), Shard(blocks), state["step"], state["exp_avg"], (state["exp_avg_sq"],))
    entry = cpu.whole_entry(tensor)
    assert entry.words()
    entry.sizes = (1, 1, 12, 2)
    with pytest.raises(AssertionError):
        entry.words()
    entry.sizes = (1, 1, 6, 5)
    with pytest.raises(ValueError, match=r"20|30"):
        entry.words()


def test_a_plan_keeps_no_gradient_alive():
    import weakref

    module, optimizer = trained("fused", steps=3)
    gone = weakref.ref(module.weight.grad.untyped_storage())
    optimizer.step()
    module.weight.grad = None
    assert gone() is None


# Fuzz.


def fuzz(tmp_path, seed, count):
    file = tmp_path / f"held-{seed}"
    command = [sys.executable, "-W", "ignore", str(FUZZ), str(seed), str(count), str(file)]
    environment = os.environ | {"PYTHONPATH": str(FUZZ.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stdout[-3000:]}{done.stderr[-6000:]}"
    assert len(file.read_text().splitlines()) == count


def test_random_exchanges(tmp_path):
    fuzz(tmp_path, 7, 15)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_many_random_exchanges(seed, tmp_path):
    fuzz(tmp_path, 100 + seed, 500)


# Sanitizers.

SANITIZED = ["test_fused.py", "test_fused_formats.py", "test_fused_qkv.py", "test_repeated_steps.py"]


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path):
    """The C code under AddressSanitizer and UBSan, over the tests of the kernel."""
    compiler = build._compiler()
    preloaded = []
    for name in ("libasan.so", "libstdc++.so.6"):  # the second, since torch throws and Python is not linked with it
        found = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=False)
        preloaded.append(Path(found.stdout.strip()))
    if not all(path.is_absolute() and path.exists() for path in preloaded):
        pytest.skip("the compiler has no AddressSanitizer")
    environment = os.environ | {
        "CC": " ".join([*compiler, "-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"]),
        "LIGHTNING_ADAM_MINI_CACHE": str(tmp_path / "cache"),
        "LD_PRELOAD": ":".join(map(str, preloaded)),
        "ASAN_OPTIONS": f"detect_leaks=0:halt_on_error=1:log_path={tmp_path / 'asan'}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={tmp_path / 'ubsan'}",
        "OMP_NUM_THREADS": "1",
    }
    options = ["-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=0"]
    files = [str(Path(__file__).with_name(name)) for name in SANITIZED]
    command = [sys.executable, "-m", "pytest", *options, *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    reports = [path.read_text() for pattern in ("asan*", "ubsan*") for path in tmp_path.glob(pattern)]
    assert not reports, reports[0][:6000]
    assert "runtime error" not in done.stdout + done.stderr
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert list((tmp_path / "cache").glob("*/adam_mini.so")), "the kernel was built for this"
