"""A tiny task with a dense Hessian of the whole model: a perceptron with one hidden layer, on digits or on noise."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.hessian import HessianOperator
from lightning_adam_mini.hessian.block_structure import Score, exact_scores
from lightning_adam_mini.hessian.exact import dense_hessian

from ...tasks.seeds import seed_of
from .image_task import ImageTask

__all__ = ["BUDGET", "HIDDEN", "OUTPUT", "PIXELS", "digits", "loss_of", "noise", "perceptron", "score_neurons"]

SIDE, SMALL = 28, 7
PIXELS = SMALL**2
HIDDEN, OUTPUT = "hidden layer", "output layer"
BUDGET = 2**32
"""Bytes that a dense Hessian may take."""
Batch = tuple[Tensor, Tensor]


def perceptron(inputs: int, hidden: int, classes: int, seed: int) -> nn.Sequential:
    """Two layers without biases, float64; smooth, so that the Hessian has no jumps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "weights"))
        layers = nn.Linear(inputs, hidden, bias=False), nn.Tanh(), nn.Linear(hidden, classes, bias=False)
        return nn.Sequential(*layers).double()


def digits(count: int, seed: int) -> Batch:
    """Digits shrunk to 7 by 7 pixels, `(count, 49)`, drawn with replacement, and their labels."""
    images, labels = ImageTask(count).batch(seed, 0)
    return F.avg_pool2d(images.view(-1, 1, SIDE, SIDE), SIDE // SMALL).flatten(1).double(), labels


def noise(count: int, inputs: int, classes: int, seed: int) -> Batch:
    """Standard normal inputs `(count, inputs)` and random labels."""
    generator = Generator().manual_seed(seed_of(seed, "noise", classes))
    values = torch.randn(count, inputs, generator=generator, dtype=torch.float64)
    return values, torch.randint(classes, (count,), generator=generator)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy."""
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


def score_neurons(
    model: nn.Sequential, batch: Batch, *, hidden_alone: bool = False
) -> tuple[float, dict[str, Score], Tensor]:
    """The loss; by layer, the score of a block for each neuron; and the Hessian.

    Args:
        model: From `perceptron`.
        batch: Inputs and labels.
        hidden_alone: Leave out the output layer, which is by far the larger one with many classes.
    """
    weights = dict(zip((HIDDEN, OUTPUT), model.parameters(), strict=True))
    weights[OUTPUT].requires_grad_(not hidden_alone)
    matrix = dense_hessian(HessianOperator(model, loss_of, [batch]), budget_bytes=BUDGET).matrix
    found, start = {}, 0
    for name, weight in weights.items():
        if weight.requires_grad:
            part = slice(start, start := start + weight.numel())
            cut = {"neuron": Blocks.rows(tuple(weight.shape), block_size=1)}
            found[name] = exact_scores(matrix[part, part], cut)["neuron"]
    weights[OUTPUT].requires_grad_(True)
    with torch.no_grad():
        return float(loss_of(model, batch)), found, matrix
