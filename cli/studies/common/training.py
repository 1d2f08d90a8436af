"""A small real task: a small Llama on the bytes of Python's standard library.

Bytes are the tokens, so nothing is trained before and nothing is downloaded.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ....tasks.data.standard_library import library_files
from ....tasks.seeds import seed_of

__all__ = ["NUM_BYTES", "TextSizes", "TextTask"]

NUM_BYTES = 256
VALIDATION_SEED = "validation"


@dataclass(frozen=True)
class TextSizes:
    """Sizes of model and data.

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


class TextTask:
    """The model, its training batches by number, and its validation loss.

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
        """Bytes of the two parts, uint8; a file belongs to validation (10 %) by a hash of its name."""
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
