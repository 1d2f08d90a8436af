"""First moments in 8 bits: against a model in float64, for every cut, and in states that are saved and loaded."""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tiny_models
from lightning_adam_mini import AdamMini, Blocks, explain, factory
from lightning_adam_mini.blocks import Segment
from lightning_adam_mini.convert import from_adamw, repartition, to_adamw
from lightning_adam_mini.measure import optimizer_state_bytes
from lightning_adam_mini.optim import quantized, shards, update
from lightning_adam_mini.optim.quantized import decode, encode, values
from lightning_adam_mini.optim.shards import Shard
from lightning_adam_mini.optim.state import first_moment, init_state
from lightning_adam_mini.optim.stochastic_rounding import Rounding
from lightning_adam_mini.optim.update import ParameterView, StepOptions

OPTIONS = StepOptions(lr=1e-2, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.1)
FUSED = (Segment(40, 20), Segment(20, 20), Segment(20, 1))

BLOCKS = {
    "element": Blocks.element((50, 90)),
    "whole": Blocks.whole((50, 90)),
    "rows": Blocks.rows((20, 256)),
    "columns": Blocks.rows((50, 90), axis=1),
    "heads": Blocks.rows((60, 130), block_size=20),
    "heads in columns": Blocks.rows((40, 150), axis=1, block_size=50),
    "experts": Blocks.rows((3, 40, 50), axis=1, batch_axes=(0,)),
    "convolution": Blocks.rows((40, 20, 3, 3)),
    "fused in columns": Blocks.segmented((33, 160), FUSED, axis=1, repeats=2),
    "row and column": Blocks.factored((40, 130)),
    "row and column, fused in columns": Blocks.factored((33, 160), axis=1, segment_lengths=(40, 20, 20), repeats=2),
}


def map_of_the_paper():
    """A sign, zeros that tell the power of ten, a bit that ends them, and the rest as the middle of an equal part."""
    found = [0.0, 1.0]
    for pattern in range(1, 128):
        zeros = 7 - pattern.bit_length()
        rest, bits = pattern - 2 ** (pattern.bit_length() - 1), pattern.bit_length() - 1
        fraction = 0.1 + 0.9 * (rest + 0.5) / 2**bits
        found += [fraction * 10.0**-zeros, -fraction * 10.0**-zeros]
    return torch.tensor(sorted(found), dtype=torch.float64)


def quantised(numbers):
    """Numbers in float64 as 8 bits leave them: groups of 128 behind the first axis, the nearest value by search."""
    table, rows = map_of_the_paper(), numbers.reshape(len(numbers), -1)
    groups = []
    for group in rows.split(128, dim=1):
        scale = group.abs().amax(1, keepdim=True)
        nearest = (group / scale.clamp_min(1e-300))[..., None].sub(table).abs().argmin(-1)
        groups.append(table[nearest] * scale)
    return torch.cat(groups, 1).view(numbers.shape)


def assert_quantised(found, exact, name=None):
    """Numbers are what 8 bits leave; beside a middle, float32 and float64 may take different neighbours."""
    expected = quantised(exact.double())
    differs = ~torch.isclose(found.double(), expected, rtol=1e-5, atol=1e-12)
    assert differs.double().mean() < 2e-3, name
    assert ((found.double() - exact).abs() < 1.0001 * (expected - exact).abs() + 1e-12)[differs].all(), name


# Codes


def test_the_values_are_those_of_the_paper():
    assert len(values()) == 256
    torch.testing.assert_close(values().double(), map_of_the_paper(), rtol=1e-7, atol=0)
    assert values()[quantized.ZERO_CODE] == 0


@pytest.mark.parametrize("width", [1, 100, 128, 129, 256, 300])
def test_codes_are_the_nearest_values(width):
    rows = torch.randn(50, width) * torch.logspace(-8, 2, 50)[:, None]
    rows[1] = 0
    rows[2, width // 2] = 0
    codes, scale = encode(rows)
    assert (codes.dtype, codes.shape, scale.shape) == (torch.uint8, rows.shape, (50, -(-width // 128)))
    torch.testing.assert_close(decode(codes, scale).double(), quantised(rows.double()), rtol=1e-6, atol=0)
    assert (decode(codes, scale)[rows == 0] == 0).all()


def test_every_code_comes_back_also_from_beside_a_middle():
    table = values()
    rows = torch.stack([table, torch.ones(256)], 1).repeat(1, 1)
    assert torch.equal(encode(rows)[0][:, 0], torch.arange(256, dtype=torch.uint8))
    middles = (table[:-1].double() + table[1:].double()).div(2).float()
    for numbers, codes in ((middles, torch.arange(255)), (middles.nextafter(torch.tensor(2.0)), torch.arange(1, 256))):
        found = encode(torch.stack([numbers, torch.ones(255)], 1))[0][:, 0]
        assert torch.equal(found.long(), codes)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen(number):
    rows = torch.randn(4, 256)
    rows[1, 3] = number
    decoded = decode(*encode(rows))
    assert not decoded[1, :128].isfinite().all()
    assert decoded[[0, 2, 3]].isfinite().all()
    assert decoded[1, 128:].isfinite().all()


# The update


def parameter_views(dtype=torch.float32):
    """One tensor for each kind of blocks, every second one in another order in memory."""
    tensors = []
    for number, blocks in enumerate(BLOCKS.values()):
        param = torch.randn(blocks.shape).to(dtype)
        param = param.mT.contiguous().mT if number % 2 else param
        state = init_state(param, blocks, exp_avg_dtype=torch.uint8, capturable=False)
        assert state["exp_avg"].stride() == param.stride()
        moments = tuple(state[key] for key in blocks.state_shapes)
        step, exp_avg, scale = state["step"], state["exp_avg"], state["exp_avg_scale"]
        tensors.append(ParameterView(param, None, Shard(blocks), step, exp_avg, moments, True, None, scale))
    return tensors


def with_gradients(tensors, step):
    torch.manual_seed(step)
    for tensor in tensors:
        tensor.grad = torch.randn(tensor.param.shape).mul_(0.1 + torch.rand(tensor.param.shape[-1])).to(tensor.param)


def naive_step(tensor, exp_avg, moments):
    """A step in float64, of a first moment as it was decoded; the moment that is stored, and the parameter."""
    grad, step = tensor.grad.double(), tensor.step.item() + 1
    exp_avg = 0.8 * exp_avg + 0.2 * grad
    means = tensor.blocks.mean_square(grad, dtype=torch.float64)
    moments = [0.9 * moment.double() + 0.1 * mean for moment, mean in zip(moments, means, strict=True)]
    root = (tensor.blocks.second_moment(*moments) / (1 - 0.9**step)).sqrt()
    param = tensor.param.double() * (1 - 1e-2 * 0.1)
    return exp_avg, param - 1e-2 * exp_avg / (1 - 0.8**step) / (root + 1e-6)


@pytest.mark.parametrize("updated", [update.reference_, update.foreach_])
def test_steps_are_those_of_a_model_in_float64(updated, tolerances):
    tensors = parameter_views()
    for step in range(4):
        with_gradients(tensors, step)
        for name, tensor in zip(BLOCKS, tensors, strict=True):
            decoded = quantized.decode_tensor(tensor.exp_avg, tensor.exp_avg_scale).double()
            exp_avg, param = naive_step(tensor, decoded, tensor.moments)
            updated([tensor], OPTIONS)
            torch.testing.assert_close(tensor.param.double(), param, **tolerances[torch.float32], msg=name)
            stored = quantized.decode_tensor(tensor.exp_avg, tensor.exp_avg_scale).double()
            assert_quantised(stored, exp_avg, name)


def test_slices_make_no_difference(monkeypatch):
    tensors = parameter_views()
    others = copy.deepcopy(tensors)
    for step in range(3):
        with_gradients(tensors, step)
        with_gradients(others, step)
        for tensor in tensors:
            update.reference_([tensor], replace(OPTIONS, maximize=True))
        with monkeypatch.context() as patch:
            patch.setattr(shards, "SLICE_ELEMENTS", 100)
            for tensor in others:
                update.reference_([tensor], replace(OPTIONS, maximize=True))
    for name, a, b in zip(BLOCKS, tensors, others, strict=True):
        assert torch.equal(a.exp_avg, b.exp_avg), name
        assert torch.equal(a.exp_avg_scale, b.exp_avg_scale), name
        assert torch.equal(a.param, b.param), name


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if is_tensor(tensor)}
        for tensor in tree_leaves(output):
            if is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, tensor.numel())
        return output


def is_tensor(value):
    return isinstance(value, torch.Tensor)


@pytest.mark.parametrize("is_rounded", [False, True])
def test_no_temporary_has_the_size_of_the_parameter(is_rounded, monkeypatch):
    monkeypatch.setattr(shards, "SLICE_ELEMENTS", 1024)
    monkeypatch.setattr(update, "accumulate_", lambda tensor, beta2: None)  # it is the same for every format
    tensors = parameter_views(torch.bfloat16 if is_rounded else torch.float32)
    for step in range(2):  # the first makes the tables
        with_gradients(tensors, step)
        for name, tensor in zip(BLOCKS, tensors, strict=True):
            tensor.rounding = Rounding(1, tensor.blocks.shape) if is_rounded else None
            with Largest() as largest:
                update.reference_([tensor], OPTIONS)
            assert step == 0 or 0 < largest.elements < tensor.param.numel() / 2, name


def test_training_follows_wide_first_moments():
    """After fifty steps, 8 bits are where float32 is, within a thirtieth of the way."""
    first = wide_model()
    second, start = copy.deepcopy(first), copy.deepcopy(first)
    train(first, AdamMini(first, lr=1e-2), 50)
    train(second, AdamMini(second, lr=1e-2, exp_avg_dtype=torch.uint8), 50)
    for a, b, c in zip(first.parameters(), second.parameters(), start.parameters(), strict=True):
        assert (a - b).norm() < (a - c).norm() / 30


# The state


def wide_model(dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(70, 130), nn.LayerNorm(130), nn.Linear(130, 40), nn.Linear(40, 3)).to(dtype)


def train(module, optimizer, count=3, *, start=0):
    for step in range(start, start + count):
        torch.manual_seed(step)
        tiny_models.set_gradients(module)
        optimizer.step()


def saved_and_read(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_state(first, second):
    for a, b in zip(first.state.values(), second.state.values(), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_kept(dtype):
    module = wide_model(dtype)
    optimizer = AdamMini(module, exp_avg_dtype=torch.uint8)
    train(module, optimizer)
    for parameter in module.parameters():
        state = optimizer.state[parameter]
        if parameter.numel() >= 4096 and parameter.dim() >= 2:
            rows, width = parameter.shape
            assert (state["exp_avg"].dtype, state["exp_avg"].shape) == (torch.uint8, parameter.shape)
            assert state["exp_avg_scale"].dtype == torch.float32
            assert state["exp_avg_scale"].shape == (rows, -(-width // 128))
        else:
            assert state["exp_avg"].dtype == dtype
            assert "exp_avg_scale" not in state
        assert first_moment(state).dtype == torch.float32
        assert first_moment(state).shape == parameter.shape


def test_a_fresh_state_is_zero():
    module = wide_model()
    optimizer = AdamMini(module, exp_avg_dtype=torch.uint8)
    assert all((first_moment(state) == 0).all() for state in optimizer.state.values())
    with torch.device("meta"):
        module = wide_model()
    assert AdamMini(module, exp_avg_dtype=torch.uint8).state[module[0].weight]["exp_avg_scale"].is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_same_run(dtype):
    """Codes come through torch's loading, which casts what it loads to the parameter's dtype."""
    whole = wide_model(dtype)
    half = copy.deepcopy(whole)
    optimizer = AdamMini(whole, exp_avg_dtype=torch.uint8)
    train(whole, optimizer, 6)
    first = AdamMini(half, exp_avg_dtype=torch.uint8)
    train(half, first, 3)
    resumed = AdamMini(half, exp_avg_dtype=torch.uint8)
    resumed.load_state_dict(saved_and_read(first.state_dict()))
    assert_same_state(first, resumed)
    for module, twin in (
        (half, resumed),
        copy.deepcopy((half, resumed)),
        pickle.loads(pickle.dumps((half, resumed))),
    ):
        train(module, twin, 3, start=3)
        assert_same_state(optimizer, twin)
        for a, b in zip(whole.parameters(), module.parameters(), strict=True):
            assert torch.equal(a, b)


FORMATS = [None, torch.bfloat16, torch.uint8]


@pytest.mark.parametrize("after", FORMATS)
@pytest.mark.parametrize("before", FORMATS)
def test_a_first_moment_that_is_loaded_changes_its_format(before, after):
    module = wide_model()
    optimizer = AdamMini(module, exp_avg_dtype=before)
    train(module, optimizer)
    other = AdamMini(copy.deepcopy(module), exp_avg_dtype=after)
    other.load_state_dict(optimizer.state_dict())
    for (parameter, state), loaded in zip(optimizer.state.items(), other.state.values(), strict=True):
        fresh = init_state(parameter, Blocks.whole(parameter.shape), exp_avg_dtype=after, capturable=False)
        assert (loaded["exp_avg"].dtype, "exp_avg_scale" in loaded) == (
            fresh["exp_avg"].dtype,
            "exp_avg_scale" in fresh,
        )
        exact, found = first_moment(state), first_moment(loaded)
        if "exp_avg_scale" in loaded and before is not torch.uint8:
            assert_quantised(found, exact)
        else:
            torch.testing.assert_close(found, exact.to(found.dtype), rtol=2**-8, atol=0)


def test_a_model_that_changes_its_dtype_keeps_its_codes():
    module = wide_model()
    optimizer = AdamMini(module, exp_avg_dtype=torch.uint8)
    train(module, optimizer)
    codes = optimizer.state[module[0].weight]["exp_avg"].clone()
    module.bfloat16()
    module[0].weight.grad = torch.zeros_like(module[0].weight)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = optimizer.state[module[0].weight]
    assert state["exp_avg"].dtype == torch.uint8
    assert (state["exp_avg"].int() - codes.int()).abs().max() <= 1
    assert optimizer.state[module[1].weight]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("exp_avg_scale"), "first moment of '0.weight' has 8-bit codes and no scales"),
        (
            lambda state: state.update(exp_avg=state["exp_avg"].float()),
            "first moment of '0.weight' has scales and no 8-bit codes",
        ),
        (
            lambda state: state.update(exp_avg_scale=torch.zeros(130, 2)),
            r"exp_avg_scale of '0.weight' has shape \(130, 2\), but here it has \(130, 1\)",
        ),
    ],
)
@pytest.mark.parametrize("exp_avg_dtype", [None, torch.uint8])
def test_states_that_are_not_complete_are_refused(change, message, exp_avg_dtype):
    module = wide_model()
    saved = AdamMini(module, exp_avg_dtype=torch.uint8).state_dict()
    saved["state"] = {number: dict(state) for number, state in saved["state"].items()}
    change(saved["state"][0])
    optimizer = AdamMini(module, exp_avg_dtype=exp_avg_dtype)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    for number, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[key], before["state"][number][key]) for key in state)


# Conversion


def test_adamw_and_back():
    module = wide_model()
    adamw = torch.optim.AdamW(module.parameters(), lr=1e-2)
    train(module, adamw)
    optimizer = AdamMini(module, exp_avg_dtype=torch.uint8)
    state = from_adamw(adamw.state_dict(), optimizer)
    assert state["state"][0]["exp_avg"].dtype == torch.uint8
    optimizer.load_state_dict(state)
    exact = adamw.state[module[0].weight]["exp_avg"].double()
    found = first_moment(optimizer.state[module[0].weight])
    assert_quantised(found, exact)
    back = to_adamw(optimizer.state_dict(), adamw)
    assert all(set(one) == {"step", "exp_avg", "exp_avg_sq"} for one in back["state"].values())
    assert {one["exp_avg"].dtype for one in back["state"].values()} == {torch.float32}
    adamw.load_state_dict(back)
    assert torch.equal(adamw.state[module[0].weight]["exp_avg"], found)
    train(module, adamw)


@pytest.mark.parametrize("after", FORMATS)
@pytest.mark.parametrize("before", FORMATS)
def test_another_partition(before, after):
    """Codes stay to the last bit; what changes its format is what a load would make of it."""
    module = wide_model()
    optimizer = AdamMini(module, partition="default", exp_avg_dtype=before)
    train(module, optimizer)
    other = AdamMini(module, partition="element", exp_avg_dtype=after)
    converted = repartition(optimizer.state_dict(), other)
    same = AdamMini(module, partition="default", exp_avg_dtype=after)
    same.load_state_dict(optimizer.state_dict())
    other.load_state_dict(converted)
    assert (converted["state"][0]["exp_avg"].dtype is torch.uint8) is (after is torch.uint8)
    for a, b in zip(same.state.values(), other.state.values(), strict=True):
        assert torch.equal(first_moment(a), first_moment(b))


def test_parameters_without_a_gradient_get_a_fresh_state():
    module = wide_model()
    adamw = torch.optim.AdamW(module.parameters())
    module[1].weight.grad = torch.ones_like(module[1].weight)
    adamw.step()
    optimizer = AdamMini(module, exp_avg_dtype=torch.uint8)
    optimizer.load_state_dict(from_adamw(adamw.state_dict(), optimizer))
    assert (first_moment(optimizer.state[module[0].weight]) == 0).all()
    assert optimizer.state[module[0].weight]["exp_avg"].dtype == torch.uint8


# Bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exp_avg_dtype", [None, "bfloat16", "uint8"])
def test_bytes_are_predicted_and_explained(dtype, exp_avg_dtype):
    module = wide_model(dtype)
    own = factory.AdamMini(exp_avg_dtype=exp_avg_dtype)
    optimizer = own.build(module)
    train(module, optimizer)
    kept = optimizer_state_bytes(optimizer)
    with torch.device("meta"):
        assert own.predict_state_bytes(wide_model(dtype)) == kept
    assert explain(module, exp_avg_dtype=exp_avg_dtype and getattr(torch, exp_avg_dtype)).totals.state_bytes == kept


def test_a_large_matrix_keeps_one_byte_and_a_thirtieth():
    module = nn.Linear(1024, 512, bias=False)
    state = AdamMini(module, exp_avg_dtype=torch.uint8).state[module.weight]
    assert state["exp_avg"].nbytes + state["exp_avg_scale"].nbytes == 1024 * 512 * (1 + 4 / 128)


def test_the_factory_builds_it():
    module = wide_model(torch.bfloat16)
    optimizer = factory.AdamMini(exp_avg_dtype="uint8", stochastic_rounding=True).build(module)
    assert (optimizer.exp_avg_dtype, optimizer.stochastic_rounding) == (torch.uint8, True)
