"""A tiny task with dense Hessians of every matrix: a small GPT-2 on all windows of a random sequence of bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lightning_adam_mini.hessian import ParameterBlock

from ...tasks.data.sampling import seed_of
from .checks import check_least

__all__ = ["KINDS", "BitSizes", "Matrix", "build", "loss_of", "matrices", "windows"]

BITS = 2
KINDS = ("query", "key", "value", "attention output", "MLP in", "MLP out")


@dataclass(frozen=True)
class BitSizes:
    """Sizes of model and data.

    Args:
        layers: Of the model.
        width: Of the model; its MLP has 4 times that.
        heads: Of each attention.
        bits: Length of the sequence.
        context: Bits of a window; the model predicts the next of each.
    """

    layers: int
    width: int
    heads: int
    bits: int
    context: int

    def __post_init__(self) -> None:
        """Check them."""
        check_least(self, 1, "layers", "width", "context")
        check_least(self, 2, "heads")
        if self.width % self.heads or self.width == self.heads:
            raise ValueError(f"width must be twice the heads, {self.heads}, or a larger multiple, not {self.width}")
        if self.bits <= self.context:
            raise ValueError(f"bits must be more than context, {self.context}, not {self.bits}")


@dataclass(frozen=True)
class Matrix:
    """A matrix with its outputs first, as part of a parameter.

    Args:
        layer: From 1.
        kind: One of `KINDS`.
        block: Its elements, in the order of the flattened `(outputs, inputs)`.
        shape: Outputs and inputs.
    """

    layer: int
    kind: str
    block: ParameterBlock
    shape: tuple[int, int]


def build(sizes: BitSizes, seed: int) -> nn.Module:
    """GPT-2 on bits, without dropout, its output head tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=BITS, n_embd=sizes.width, n_layer=sizes.layers, n_head=sizes.heads,
        n_positions=sizes.context, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None,
        eos_token_id=None, use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "weights"))
        return GPT2LMHeadModel(config).double().eval()


def windows(sizes: BitSizes, seed: int) -> Tensor:
    """All windows of a random sequence of bits, `(N, context + 1)`."""
    bits = torch.randint(BITS, (sizes.bits,), generator=Generator().manual_seed(seed_of(seed, "bits")))
    return bits.unfold(0, sizes.context + 1, 1)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross entropy of the next bit at every position, in nats."""
    logits = model(input_ids=batch[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def matrices(model: nn.Module, sizes: BitSizes) -> list[Matrix]:
    """The six matrices of each layer; `c_attn` has queries, keys and values beside each other, inputs first."""
    found = []
    for layer in range(sizes.layers):
        prefix = f"transformer.h.{layer}."
        parts: list[tuple[str, Tensor]] = []
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            parameter = model.get_parameter(f"{prefix}{name}.weight")
            positions = torch.arange(parameter.numel()).view(parameter.shape).T
            split = positions.chunk(3) if name == "attn.c_attn" else (positions,)
            parts += [(f"{prefix}{name}.weight", part) for part in split]
        for kind, (name, part) in zip(KINDS, parts, strict=True):
            block = ParameterBlock(f"{name} ({kind})", name, part.flatten())
            found.append(Matrix(layer + 1, kind, block, (part.shape[0], part.shape[1])))
    return found
