"""Stochastic rounding: its random bits, its mean and variance, and that a run depends on nothing but its seeds."""

import copy
import pickle
import zlib

import pytest
import torch
from torch import nn

import tiny_models
from lightning_adam_mini import AdamMini
from lightning_adam_mini.optim import shards
from lightning_adam_mini.optim.shards import flat_boxes, split, whole_box
from lightning_adam_mini.optim.stochastic_rounding import Rounding, name_seed, random_bits, round_to_bfloat16

CPU = torch.device("cpu")
NUMBERS = [1.0039, -1.0039, 3.14159, -2.7e-20, 1e38, 1e-40, 0.3, -1234.5]


def mix_of_the_text(x):
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def bits_of_the_text(name, step, index):
    """The formula of the module's docstring, with integers of Python."""
    seed = zlib.crc32(name.encode("utf-8"))
    a = mix_of_the_text(mix_of_the_text((seed + 0x9E3779B9) % 2**32) ^ step)
    b = mix_of_the_text((a + (index >> 32)) % 2**32)
    return mix_of_the_text((mix_of_the_text((index & 0xFFFFFFFF) ^ b) + a) % 2**32)


def unsigned(bits):
    return (bits.long() & 0xFFFFFFFF).tolist()


# Random bits


@pytest.mark.parametrize("step", [1, 2, 70_000])
@pytest.mark.parametrize("name", ["model.weight", "größe"])
def test_bits_follow_the_formula(name, step):
    index = torch.tensor([0, 1, 2, 127, 2**31, 2**32 - 1, 2**32, 2**40 + 5])
    expected = [bits_of_the_text(name, step, number) for number in index.tolist()]
    assert unsigned(random_bits(name_seed(name), step, index)) == expected
    assert unsigned(random_bits(name_seed(name), torch.tensor(step), index)) == expected
    assert unsigned(random_bits(name_seed(name), step, index[:6], is_long=False)) == expected[:6]
    many = torch.arange(1003)  # vectors and what is left of them
    assert unsigned(random_bits(name_seed(name), step, many)) == [
        bits_of_the_text(name, step, number) for number in range(1003)
    ]


def test_bits_are_uniform_and_differ_by_name_step_and_element():
    """Every bit is set in half of the cases, and no two streams agree more often than chance has it."""
    count = 2**16
    streams = [random_bits(name_seed(name), step, torch.arange(count)) for name in "ab" for step in (1, 2)]
    streams.append(streams[0].roll(1))
    shifts = torch.arange(32)
    for number, bits in enumerate(streams):
        share = (bits[:, None] >> shifts & 1).double().mean(0)
        assert (share - 0.5).abs().max() < 4.5 * 0.5 / count**0.5
        for other in streams[:number]:
            agreeing = ((bits ^ other)[:, None] >> shifts & 1).double().mean(0)
            assert (agreeing - 0.5).abs().max() < 4.5 * 0.5 / count**0.5
    halves = torch.stack([streams[0] & 0xFFFF, (streams[0] >> 16) & 0xFFFF]).double()
    assert torch.corrcoef(halves)[0, 1].abs() < 4.5 / count**0.5


def test_every_element_has_bits_of_its_own_number():
    shape = (6, 5, 4)
    whole = Rounding(7, shape).bits(whole_box(shape), 3, CPU)
    assert torch.equal(whole, random_bits(7, 3, torch.arange(120)).view(shape))
    # Shards of two axes, one of them strided, and a flattened range in rectangles.
    rows, columns = torch.tensor([0, 1, 4]), torch.tensor([2, 3])
    part = Rounding(7, shape, (rows, columns, torch.arange(4))).bits(whole_box((3, 2, 4)), 3, CPU)
    assert torch.equal(part, whole[rows][:, columns])
    flat = Rounding(7, (70,), start=33)
    boxes = flat_boxes(shape, 33, 103)
    assert len(boxes) > 2
    for box in boxes:
        assert torch.equal(flat.bits(box, 3, CPU), box.view(whole.flatten()[33:103]))


# Rounding


@pytest.mark.parametrize("number", NUMBERS)
def test_the_mean_over_all_noise_is_the_number(number):
    """Each of the 2^16 values of the noise once: exact, and to both neighbours alone."""
    exact = torch.tensor(number, dtype=torch.float32)
    rounded = round_to_bfloat16(exact.repeat(2**16), torch.arange(2**16, dtype=torch.int32))
    assert rounded.dtype == torch.bfloat16
    neighbours = rounded.double().unique()
    assert len(neighbours) == 2
    assert neighbours[0] <= exact <= neighbours[1]
    mean, variance = rounded.double().mean(), rounded.double().var(correction=0)
    torch.testing.assert_close(mean, exact.double(), rtol=1e-12, atol=0)
    low, high = neighbours
    torch.testing.assert_close(variance, (exact - low) * (high - exact), rtol=1e-9, atol=0)


def test_the_mean_over_elements_and_steps_is_the_number():
    """With the noise of the hash: within four standard errors."""
    exact, count = torch.tensor(NUMBERS), 20_000
    for step in (1, 2):
        for shift in (0, 16):
            noise = random_bits(5, step, torch.arange(count * len(exact))).view(-1, len(exact)) >> shift & 0xFFFF
            rounded = round_to_bfloat16(exact.repeat(count, 1), noise).double()
            error = (rounded.mean(0) - exact).abs()
            assert (error < 4 * rounded.std(0) / count**0.5).all()


def test_what_bfloat16_has_stays():
    kept = torch.tensor([0.0, -0.0, 1.0, -2.5, float("inf"), -float("inf"), 2.0**-133])
    for noise in (0, 1, 2**16 - 1):
        rounded = round_to_bfloat16(kept.clone(), torch.full(kept.shape, noise))
        assert torch.equal(rounded.view(torch.int16), kept.bfloat16().view(torch.int16))
        signed_nan = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
        assert round_to_bfloat16(signed_nan, torch.full((3,), noise)).isnan().all()


# Training


class Weights(nn.Module):
    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        self.matrix = nn.Parameter(torch.full((40, 30), 2.0, dtype=dtype))
        self.vector = nn.Parameter(torch.full((50,), -2.0, dtype=dtype))


def test_weights_follow_steps_below_half_of_their_spacing():
    """2 has the spacing 2^-7: a hundred steps of 2^-10 move it by 12.8 spacings, or not at all."""
    moved = {}
    for stochastic in (False, True):
        module = Weights()
        optimizer = AdamMini(module, lr=2.0**-10, weight_decay=0.0, partition="default", stochastic_rounding=stochastic)
        for _ in range(100):
            for parameter in module.parameters():
                parameter.grad = torch.full_like(parameter, 1.0)
            optimizer.step()
        moved[stochastic] = (module.matrix.float() - 2).mean(), (module.vector.float() + 2).mean()
    assert moved[False][0] == 0
    for mean, numbers in zip(moved[True], (1200, 50), strict=True):
        assert abs(mean + 100 * 2.0**-10) < 4 * (100 * 2.0**-10 * 2.0**-7 / numbers) ** 0.5


def test_weight_decay_below_half_of_the_spacing():
    ends = {}
    for stochastic in (False, True):
        module = Weights()
        optimizer = AdamMini(module, lr=1e-3, weight_decay=1.0, partition="default", stochastic_rounding=stochastic)
        for _ in range(50):
            module.matrix.grad = torch.zeros_like(module.matrix)
            optimizer.step()
        ends[stochastic] = module.matrix.double().mean().item()
    assert ends[False] == 2
    assert ends[True] == pytest.approx(2 * (1 - 1e-3) ** 50, abs=4 * (0.1 * 2.0**-7 / 1200) ** 0.5)


def test_a_first_moment_that_rounding_to_nearest_stops():
    """With beta1 = 0.999 a step of a thousandth is below half of the spacing of bfloat16, 2^-8."""
    for stochastic, expected in ((False, 0), (True, 1)):
        module = nn.Linear(64, 64, bias=False)
        optimizer = AdamMini(
            module,
            betas=(0.999, 0.999),
            partition="default",
            exp_avg_dtype=torch.bfloat16,
            stochastic_rounding=stochastic,
        )
        exp_avg = optimizer.state[module.weight]["exp_avg"].fill_(1.0)
        for _ in range(20):
            module.weight.grad = torch.zeros_like(module.weight)
            optimizer.step()
        decayed = (1 - exp_avg.double().mean()) / (1 - 0.999**20)
        assert decayed == pytest.approx(expected, abs=0.05)


# A run depends on names, steps and elements alone


def steps(module, optimizer, count, *, start=0):
    for step in range(start, start + count):
        torch.manual_seed(step)
        tiny_models.set_gradients(module)
        optimizer.step()


def model():
    torch.manual_seed(1)
    return tiny_models.encoder_layer().bfloat16()


def assert_same(first, second):
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


FORMATS = {
    "bfloat16": {},
    "float32 first moments": {"exp_avg_dtype": torch.float32},
    "8-bit first moments": {"exp_avg_dtype": torch.uint8},
}


@pytest.fixture(params=FORMATS)
def options(request, monkeypatch):
    monkeypatch.setattr("lightning_adam_mini.optim.quantized.MIN_ELEMENTS", 16)
    return {"partition": "transformer", "lr": 1e-2, "stochastic_rounding": True, **FORMATS[request.param]}


def test_a_resumed_run_is_the_same_run(options):
    whole = model()
    half = copy.deepcopy(whole)
    optimizer = AdamMini(whole, **options)
    steps(whole, optimizer, 6)
    first = AdamMini(half, **options)
    steps(half, first, 3)
    resumed = AdamMini(half, **options)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(half, resumed, 3, start=3)
    assert_same(whole, half)
    for a, b in zip(optimizer.state.values(), resumed.state.values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_copies_and_pickles_go_on_alike(options):
    module = model()
    optimizer = AdamMini(module, **options)
    steps(module, optimizer, 2)
    for other, twin in (copy.deepcopy((module, optimizer)), pickle.loads(pickle.dumps((module, optimizer)))):
        assert twin.stochastic_rounding
        third = copy.deepcopy(module)
        steps(third, (again := AdamMini(third, **options)), 0)
        again.load_state_dict(optimizer.state_dict())
        steps(third, again, 2, start=2)
        steps(other, twin, 2, start=2)
        assert_same(other, third)


@pytest.mark.parametrize(
    "changed", [{"implementation": "reference"}, {"implementation": "foreach"}, {"capturable": True}]
)
def test_implementations_agree(options, changed):
    first, second = model(), model()
    steps(first, AdamMini(first, **options), 3)
    steps(second, AdamMini(second, **options, **changed), 3)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        # A learning rate on the device is rounded to float32 first.
        assert (a != b).float().mean() <= (0.02 if "capturable" in changed else 0)


def test_slices_make_no_difference(options, monkeypatch):
    first, second = model(), model()
    steps(first, AdamMini(first, **options), 3)
    monkeypatch.setattr(shards, "SLICE_ELEMENTS", 128)
    assert max(len(list(split(whole_box(p.shape)))) for p in second.parameters()) > 1
    steps(second, AdamMini(second, **options), 3)
    assert_same(first, second)


def test_wrappers_make_no_difference(options):
    first, second = model(), model()
    wrapped = nn.DataParallel(torch.compile(second, backend="eager"))
    steps(first, AdamMini(first, **options), 3)
    steps(second, AdamMini(wrapped, **options), 3)
    assert_same(first, second)


@pytest.mark.parametrize("implementation", [None, "reference", "foreach"])
def test_steps_that_float32_cannot_count_are_rounded_apart(implementation):
    """From step 2^24 on, where float32 stays: 200 steps of 1e-5 spread weights as independent ones do."""
    spreads = []
    for step in (10**6, 2**24 - 100, 2**24):
        module = nn.Linear(64, 64, bias=False).bfloat16()
        module.weight.data.fill_(1.5)
        optimizer = AdamMini(
            module,
            lr=1e-5,
            weight_decay=0.0,
            partition="default",
            stochastic_rounding=True,
            implementation=implementation,
        )
        optimizer.state[module.weight]["step"].fill_(step)
        optimizer.state[module.weight]["exp_avg"].fill_(1.0)
        optimizer.state[module.weight]["exp_avg_sq"].fill_(1.0)
        for _ in range(200):
            module.weight.grad = torch.ones_like(module.weight)
            optimizer.step()
        assert optimizer.state[module.weight]["step"] == min(step + 200, 2**24)  # as torch's
        spreads.append(module.weight.float().std().item())
    assert spreads[1] == pytest.approx(spreads[0], rel=0.15)
    assert spreads[2] == pytest.approx(spreads[0], rel=0.15)


def test_a_run_past_2_to_the_24th_step_resumes_and_is_copied():
    runs = []
    for is_interrupted in (False, True):
        module = model()
        optimizer = AdamMini(module, partition="transformer", lr=1e-2, stochastic_rounding=True)
        for state in optimizer.state.values():
            state["step"].fill_(2**24 - 2)
        steps(module, optimizer, 4)
        if is_interrupted:
            saved = copy.deepcopy(optimizer.state_dict())
            module = copy.deepcopy(module)
            optimizer = AdamMini(module, partition="transformer", stochastic_rounding=True)
            optimizer.load_state_dict(saved)
            steps(module, optimizer, 1, start=4)
            module, optimizer = copy.deepcopy((module, optimizer))
            steps(module, optimizer, 1, start=5)
        else:
            steps(module, optimizer, 2, start=4)
        runs.append(module)
    assert_same(*runs)


def test_bias_corrections_past_counting_are_those_of_adamw():
    """Both keep the step as float32, which stays at 2^24; so do the corrections, at 1 to seven digits."""
    ours, theirs = (nn.Linear(4, 4) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    options = {"lr": 1e-2, "betas": (0.9, 1 - 1e-7), "weight_decay": 0.0}
    optimizers = AdamMini(ours, partition="element", **options), torch.optim.AdamW(theirs.parameters(), **options)
    for _ in range(2):
        tiny_models.set_gradients(ours, theirs)
        for optimizer in optimizers:
            optimizer.step()
            for state in optimizer.state.values():
                state["step"].fill_(2**24)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_names_make_a_difference():
    """Equal parameters with equal gradients are not rounded alike."""
    module = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(2)).bfloat16()
    module[1].load_state_dict(module[0].state_dict())
    optimizer = AdamMini(module, partition="default", stochastic_rounding=True)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert not torch.equal(module[0].weight, module[1].weight)


def test_the_global_random_state_stays():
    module = model()
    optimizer = AdamMini(module, stochastic_rounding=True)
    tiny_models.set_gradients(module)
    before = torch.get_rng_state()
    optimizer.step()
    assert torch.equal(before, torch.get_rng_state())


# What is refused


@pytest.mark.parametrize(
    ("dtype", "options", "message"),
    [
        (torch.float32, {}, "no parameter or first moment is: train with bfloat16 parameters"),
        (torch.float32, {"exp_avg_dtype": torch.uint8}, "no parameter or first moment is"),
        (torch.float16, {}, "matrix: stochastic_rounding takes parameters in float32 or bfloat16, not torch.float16"),
        (torch.float64, {"exp_avg_dtype": torch.bfloat16}, "in float32 or bfloat16, not torch.float64; train with"),
        (
            torch.bfloat16,
            {"exp_avg_dtype": torch.float16},
            "first moments in float32, bfloat16 or uint8, not torch.float1",
        ),
        (
            torch.bfloat16,
            {"exp_avg_dtype": torch.float64},
            "first moments in float32, bfloat16 or uint8, not torch.float6",
        ),
    ],
)
def test_what_is_not_rounded_is_refused(dtype, options, message):
    with pytest.raises(ValueError, match=message):
        AdamMini(Weights(dtype), stochastic_rounding=True, **options)


def test_a_model_that_changes_its_dtype_is_refused_at_the_step():
    module = Weights()
    optimizer = AdamMini(module, stochastic_rounding=True)
    module.half()
    tiny_models.set_gradients(module)
    with pytest.raises(ValueError, match=r"matrix: stochastic_rounding takes parameters in float32 or bfloat16"):
        optimizer.step()


def test_a_model_of_two_dtypes():
    """What is stored in float32 is exact; what is in bfloat16, beside it, is rounded."""
    module = nn.Sequential(nn.Linear(8, 8).bfloat16(), nn.Linear(8, 8))
    plain = copy.deepcopy(module)
    steps(module, AdamMini(module, stochastic_rounding=True), 3)
    steps(plain, AdamMini(plain), 3)
    assert torch.equal(module[1].weight, plain[1].weight)
    assert not torch.equal(module[0].weight, plain[0].weight)
