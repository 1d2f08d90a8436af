"""Blocks of one element are torch's AdamW."""

from typing import get_args

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import tiny_models
from lightning_adam_mini import AdamMini
from lightning_adam_mini.optim.dispatch import Implementation
from lightning_adam_mini.optim.kernels import cpu

IMPLEMENTATIONS = get_args(Implementation)
SAME_OPERATIONS = ("reference", "foreach")
# Closer than the common table: the same operations in the same order.
RTOL = {torch.float32: 1e-7, torch.float64: 1e-12}

SCHEDULERS = {
    "constant": None,
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / (1 + step**2 / 50)),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 50),
    # Cycles beta1 too.
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=3e-2, total_steps=51),
}


def model(dtype=torch.float32):
    return nn.Sequential(
        nn.Embedding(7, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2)
    ).to(dtype)


def twins(dtype=torch.float32):
    first, second = model(dtype), model(dtype)
    second.load_state_dict(tiny_models.randomize(first).state_dict())
    return first, second


def loss_of(module):
    tokens = torch.tensor([[0, 1, 2], [3, 3, 6]])
    return module(tokens).square().mean()


def train(module, optimizer, *, steps=50, scheduler=None, sign=1):
    scheduler = scheduler(optimizer) if scheduler else None
    for _ in range(steps):
        optimizer.zero_grad()
        (sign * loss_of(module)).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()


def assert_same(first, second, **tolerance):
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        options = tolerance or {"rtol": RTOL[a.dtype], "atol": 0}
        torch.testing.assert_close(a, b, **options, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_the_kernels_equal_adamw_to_the_common_table(schedule, tolerances):
    ours, torchs = twins()
    options = {"lr": 1e-2, "weight_decay": 0.1}
    optimizer = AdamMini(ours, partition="element", weight_decay_policy="all", **options)
    assert optimizer.implementation == "fused"
    train(ours, optimizer, scheduler=SCHEDULERS[schedule])
    train(torchs, torch.optim.AdamW(torchs.parameters(), **options), scheduler=SCHEDULERS[schedule])
    assert_same(ours, torchs, **tolerances[torch.float32])


@pytest.mark.parametrize("implementation", SAME_OPERATIONS)
@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_element_blocks_equal_adamw(schedule, dtype, implementation):
    ours, torchs = twins(dtype)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    optimizer = AdamMini(ours, partition="element", weight_decay_policy="all", implementation=implementation, **options)
    train(ours, optimizer, scheduler=SCHEDULERS[schedule])
    train(torchs, torch.optim.AdamW(torchs.parameters(), **options), scheduler=SCHEDULERS[schedule])
    assert_same(ours, torchs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_maximize(implementation, tolerances):
    ours, torchs = twins()
    loss = loss_of(ours)
    optimizer = AdamMini(ours, partition="element", maximize=True, implementation=implementation)
    torchs_optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in torchs.parameters() if p.dim() >= 2]},
            {"params": [p for p in torchs.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        maximize=True,
    )
    train(ours, optimizer, sign=-1)
    train(torchs, torchs_optimizer, sign=-1)
    assert_same(ours, torchs, **({} if implementation in SAME_OPERATIONS else tolerances[torch.float32]))
    assert loss_of(ours) < loss


def test_reduce_on_plateau():
    ours, torchs = twins()
    optimizers = [
        AdamMini(ours, lr=0.5, weight_decay=0, partition="element", implementation="reference"),
        torch.optim.AdamW(torchs.parameters(), lr=0.5, weight_decay=0),
    ]
    rates = []
    for module, optimizer in zip((ours, torchs), optimizers, strict=True):
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=0)
        for _ in range(30):
            train(module, optimizer, steps=1)
            scheduler.step(loss_of(module).item())
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert {*rates[0]} == {*rates[1]} != {0.5}
    assert_same(ours, torchs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_follows_float32(implementation, tolerances):
    """The second moment is float32, so one step differs from the float32 step by the rounding of the weights."""
    wide, narrow = model(), model(torch.bfloat16)
    narrow.load_state_dict(tiny_models.randomize(wide).state_dict())
    wide.load_state_dict(narrow.state_dict())
    optimizers = [AdamMini(m, lr=1e-2, partition="element", implementation=implementation) for m in (wide, narrow)]
    for _ in range(5):
        tiny_models.set_gradients(narrow, wide)
        for optimizer in optimizers:
            optimizer.step()
    for expected, parameter in zip(wide.parameters(), narrow.parameters(), strict=True):
        # An update of 0.01 a step; each step rounds the weight to 8 bits.
        torch.testing.assert_close(parameter.float(), expected, rtol=5 * 2**-8, atol=5e-3)
        assert parameter.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "mistake", [{"betas": (0.9, 0.99)}, {"eps": 1e-6}, {"weight_decay": 0.02}, {"partition": "default"}]
)
def test_a_mistake_shows(mistake):
    ours, torchs = twins()
    optimizer = AdamMini(ours, **{"partition": "element", "weight_decay_policy": "all", **mistake})
    train(ours, optimizer)
    train(torchs, torch.optim.AdamW(torchs.parameters()))
    with pytest.raises(AssertionError):
        assert_same(ours, torchs)
