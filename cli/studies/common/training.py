"""Small real tasks that train in seconds on a CPU: a Llama on the bytes of Python's standard library, and digits.

Bytes are the tokens, so no tokenizer is trained and nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_adam_mini.factory import AdamW
from lightning_adam_mini.schedule import Schedule

from ....tasks.data.sampling import seed_of
from ....tasks.data.sources import library_files
from .study import check_least

__all__ = [
    "CLASSES",
    "NUM_BYTES",
    "PIXELS",
    "DivergedError",
    "ImageTask",
    "TextSettings",
    "TextSizes",
    "TextTask",
    "best_rate",
    "final_loss",
    "gradient_sizes",
    "train",
]

NUM_BYTES = 256
CHANCE = math.log(NUM_BYTES)
"""Loss of a model that knows nothing, in nats a byte."""
VALIDATION_SEED = "validation"
PIXELS, CLASSES = 784, 10
SCHEDULE = Schedule(shape="cosine", warmup=0.05, floor=0.0)


class DivergedError(ValueError):
    """Training that ended because the loss or a weight is not finite."""


def train(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    loss_of: Callable[[int], Tensor],
    *,
    steps: int,
    clip: float | None = None,
    observe: Callable[[int], None] | None = None,
) -> None:
    """Train in place; the learning rate falls to 0 along a cosine after 5 % of warm-up.

    Args:
        model: The network.
        optimizers: At their peak learning rates; each has its own parameters.
        loss_of: The loss of the batch of a step.
        steps: Optimizer steps.
        clip: Largest norm of a gradient; None for no clipping.
        observe: Called with the number of steps taken, at first 0.

    Raises:
        DivergedError: The loss of a step, or a weight after the last one, is not finite.
    """
    schedulers = [SCHEDULE.build(optimizer, steps) for optimizer in optimizers]
    for step in range(steps):
        if observe is not None:
            observe(step)
        model.zero_grad(set_to_none=True)
        loss = loss_of(step)
        if not math.isfinite(value := float(loss.detach())):
            raise DivergedError(f"training diverges: the loss after {step} steps is {value}; set a smaller rate")
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise DivergedError(f"training diverges: a weight after {steps} steps is not finite; set a smaller rate")
    if observe is not None:
        observe(steps)


def best_rate(values: dict[float, float], *, larger_is_better: bool = False) -> tuple[float, bool]:
    """The learning rate of the best value, and whether it is inside the range of rates tried, not at its end.

    Args:
        values: A finite value for each rate, that of chance where training diverged.
        larger_is_better: As of an accuracy.
    """
    best = (max if larger_is_better else min)(values, key=values.__getitem__)
    return best, min(values) < best < max(values)


@dataclass(frozen=True)
class TextSizes:
    """Sizes of the small Llama and its data.

    Args:
        width: Of the model; the MLP has about 8/3 of it.
        layers: Of the model.
        heads: Of each attention, with as many key heads.
        context: Bytes in a window.
        batch_size: Windows in a batch.
        validation_windows: Windows of the validation loss; they are the same in every run.
    """

    width: int
    layers: int
    heads: int
    context: int
    batch_size: int
    validation_windows: int


@dataclass(frozen=True)
class TextSettings(TextSizes):
    """The settings that all studies on text have in common.

    Args:
        seeds: Of weights and batches.
        steps: Of a run; the learning rate falls to 0 along a cosine.
    """

    seeds: list[int]
    steps: int

    def __post_init__(self) -> None:
        """Check what is common to all."""
        check_least(self, 1, "steps", *(field.name for field in fields(TextSizes)))
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width {self.width} must be a multiple of {2 * self.heads}, twice the heads, so that a head is even"
            )


class TextTask:
    """The small Llama, its training batches by number, and its validation loss.

    Args:
        sizes: Of model and data.
    """

    def __init__(self, sizes: TextSizes) -> None:
        self.sizes = sizes

    def build(self, seed: int) -> nn.Module:
        """A model with random weights that depend on the seed alone."""
        from ....tasks.llm.model import build_config, build_model

        options = {
            "vocab_size": NUM_BYTES,
            "hidden_size": self.sizes.width,
            "intermediate_size": -(-8 * self.sizes.width // 3 // 8) * 8,
            "num_hidden_layers": self.sizes.layers,
            "num_attention_heads": self.sizes.heads,
            "max_position_embeddings": self.sizes.context,
            "tie_word_embeddings": False,
            "use_cache": False,
        }
        config = build_config("llama", options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, "weights"))
            return build_model(config, None, "sdpa")

    def batch(self, seed: int, step: int) -> Tensor:
        """Windows of the training text, `(batch_size, context + 1)`; they depend on seed and step alone."""
        return self._windows("train", self.sizes.batch_size, seed_of(seed, "batch", step))

    def loss(self, model: nn.Module, seed: int, step: int) -> Tensor:
        """Mean cross entropy of the batch of a step, in nats a byte."""
        return _cross_entropy(model, self.batch(seed, step))

    @torch.no_grad()
    def validation_loss(self, model: nn.Module) -> float:
        """Mean cross entropy of the validation windows in nats a byte."""
        batch = self._windows("val", self.sizes.validation_windows, seed_of(VALIDATION_SEED))
        return float(_cross_entropy(model, batch))

    def _windows(self, part: str, count: int, seed: int) -> Tensor:
        text = self._text[part]
        if len(text) <= self.sizes.context:
            raise ValueError(f"context {self.sizes.context} is longer than the text: give up to {len(text) - 1}")
        starts = torch.randint(len(text) - self.sizes.context, (count, 1), generator=Generator().manual_seed(seed))
        return text[starts + torch.arange(self.sizes.context + 1)].long()

    @cached_property
    def _text(self) -> dict[str, Tensor]:
        """Bytes of the two parts, uint8; a hash of its name puts a file into validation (10 %)."""
        root, paths = library_files()
        parts: dict[str, list[bytes]] = {"train": [], "val": []}
        for path in paths:
            parts["val" if _is_validation(path.relative_to(root)) else "train"].append(path.read_bytes())
        return {
            part: torch.from_numpy(np.frombuffer(b"".join(texts), np.uint8).copy()) for part, texts in parts.items()
        }


def _cross_entropy(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(input_ids=batch[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def _is_validation(path: Path) -> bool:
    return hashlib.sha256(path.as_posix().encode()).digest()[0] < NUM_BYTES // 10


def final_loss(
    task: TextTask, settings: TextSettings, seed: int, optimizers: Callable[[nn.Module], Sequence[Optimizer]]
) -> float:
    """Validation loss in nats a byte after a run without clipping; that of chance where it diverged or ended above.

    Args:
        task: The task of the settings.
        settings: Length and sizes.
        seed: Of weights and batches.
        optimizers: Makes the optimizers of a fresh model.
    """
    model = task.build(seed)
    try:
        train(model, optimizers(model), partial(task.loss, model, seed), steps=settings.steps)
    except DivergedError:
        return CHANCE
    loss = task.validation_loss(model)
    return min(loss, CHANCE) if math.isfinite(loss) else CHANCE


def gradient_sizes(task: TextTask, settings: TextSettings, seed: int, rate: float) -> dict[str, float]:
    """Root mean square of each parameter's gradient over a run of AdamW, which is discarded.

    With these, one factor sets a rate for every block. The first gradient alone would not do: those of query and key
    are next to nothing before values are learned.

    Args:
        task: The task of the settings.
        settings: Length and sizes.
        seed: Of weights and batches.
        rate: Learning rate of AdamW.

    Raises:
        DivergedError: The run diverges.
    """
    model = task.build(seed)
    squares = {name: torch.zeros(()) for name, _ in model.named_parameters()}

    def add(steps: int) -> None:
        for name, parameter in model.named_parameters() if steps else ():
            assert parameter.grad is not None
            squares[name] += parameter.grad.square().mean()

    optimizer, loss_of = AdamW(lr=rate, weight_decay=0.0).build(model), partial(task.loss, model, seed)
    train(model, [optimizer], loss_of, steps=settings.steps, observe=add)
    return {name: float((total / settings.steps).sqrt()) for name, total in squares.items()}


class ImageTask:
    """5,000 handwritten digits, in training batches by number, and the accuracy on 1,000 others.

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
        from ....tasks.vision.data import Mnist5k

        sets = Mnist5k().open_images()
        pixels = {part: torch.stack([images[n] for n in range(len(images))]) for part, images in sets.items()}
        return {part: ((p.flatten(1) / 255 - 0.1307) / 0.3081, sets[part].labels) for part, p in pixels.items()}
