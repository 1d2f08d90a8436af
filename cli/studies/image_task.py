"""A small real task: a multilayer perceptron on 5,000 handwritten digits, its layers scaled as one likes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ...tasks.data.sampling import seed_of

__all__ = ["CLASSES", "ImageTask", "ScaledPerceptron"]

PIXELS, CLASSES = 784, 10


class ScaledPerceptron(nn.Module):
    """A perceptron whose layers keep weights `factor` times as large as those that they multiply with.

    The function at the start is the same for all factors; the Hessian of layer l is `factor_l^-2` times as large. So
    factors make the blocks of the Hessian as unlike as one likes, and nothing else.

    Args:
        width: Of the hidden layers.
        factors: One for each layer.
        generator: Draws the weights.
    """

    def __init__(self, width: int, factors: Sequence[float], generator: Generator) -> None:
        super().__init__()
        sizes = [PIXELS, *[width] * (len(factors) - 1), CLASSES]
        self.factors = list(factors)
        self.weights = nn.ParameterList(
            factor * (2 / rows) ** 0.5 * torch.randn(columns, rows, generator=generator)
            for factor, rows, columns in zip(factors, sizes, sizes[1:], strict=False)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, 10)` of images `(N, 784)`."""
        for number, (weight, factor) in enumerate(zip(self.weights, self.factors, strict=True)):
            images = F.linear(images if number == 0 else images.relu(), weight / factor)
        return images


class ImageTask:
    """The digits, in training batches by number, and the accuracy on 1,000 others.

    Args:
        batch_size: Images in a batch.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def loss(self, model: nn.Module, seed: int, step: int) -> Tensor:
        """Cross entropy of the batch of a step."""
        images, labels = self.batch(seed, step)
        return F.cross_entropy(model(images), labels)

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Images `(batch_size, 784)` and labels of a step; they depend on seed and step alone."""
        images, labels = self._data["train"]
        generator = Generator().manual_seed(seed_of(seed, "batch", step))
        picked = torch.randint(len(labels), (self.batch_size,), generator=generator)
        return images[picked], labels[picked]

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Share of validation images whose digit is right."""
        images, labels = self._data["val"]
        return float((model(images).argmax(1) == labels).float().mean())

    @cached_property
    def _data(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Normalised pixels `(N, 784)` and labels."""
        from ...tasks.vision.data import Mnist5k

        sets = Mnist5k().open_images()
        pixels = {part: torch.stack([images[n] for n in range(len(images))]) for part, images in sets.items()}
        return {part: ((p.flatten(1) / 255 - 0.1307) / 0.3081, sets[part].labels) for part, p in pixels.items()}
