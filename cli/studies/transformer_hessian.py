"""Dense Hessians of the matrices of a small GPT-2, and which block structure fits each (Adam-mini, Fig. 4).

A random sequence of bits is the text, and all of its windows are the batch (Zhang et al. 2024). Queries and keys,
values, outputs of attention and both matrices of the MLP are scored under every block structure that the paper
compares: by head, by output neuron, by input.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.hessian import HessianOperator, ParameterBlock, dense_block, exact_scores
from lightning_adam_mini.hessian.exact import check_dense

from ...tasks.data.sampling import seed_of
from ..hessian.pictures import show_matrix, shrunk
from .common.outcome import Claim, Outcome, Row, medians
from .common.study import check_above, check_least
from .common.training import train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Settings", "run"]

log = logging.getLogger(__name__)

PAPER = "Adam-mini paper, exact Hessians of a Transformer"
KINDS = ("query", "key", "value", "attention output", "MLP in", "MLP out")
BY_HEAD = ("query", "key")
STRUCTURES = ("head", "neuron", "input")
BITS = 2
BUDGET = 2**32


@dataclass(frozen=True)
class Settings:
    """Sizes of the study.

    Args:
        seeds: Of weights and bits.
        layers: Of the model.
        width: Of the model; its MLP has 4 times that.
        heads: Of each attention.
        bits: Length of the sequence.
        context: Bits of a window; the model predicts the next of each.
        moments: Steps of AdamW before the Hessian is taken, ascending; 0 is the start.
        rate: Peak learning rate.
    """

    seeds: list[int]
    layers: int
    width: int
    heads: int
    bits: int
    context: int
    moments: list[int]
    rate: float

    def __post_init__(self) -> None:
        """Check what can be before the work."""
        check_least(self, 1, "layers", "width", "context")
        check_least(self, 2, "heads")
        if self.width % self.heads or self.width == self.heads:
            raise ValueError(f"width must be twice the heads, {self.heads}, or a larger multiple, not {self.width}")
        if self.bits <= self.context:
            raise ValueError(f"bits must be more than context, {self.context}, not {self.bits}")
        check_above(self, 0, "rate")
        if min(self.moments) < 0 or self.moments != sorted(self.moments):
            raise ValueError(f"moments must be ascending numbers of steps from 0 on, not {self.moments}")
        check_dense({"the MLP's matrix": 4 * self.width**2}, BUDGET)


def run(settings: Settings) -> Outcome:
    """Scores of block structures of every matrix, at each moment and for each seed."""
    rows: list[Row] = []
    pictures: dict[tuple[int, str], Tensor] = {}
    for seed in settings.seeds:
        rows += _measured(settings, seed, pictures if seed == settings.seeds[0] else {})
    summary = medians(rows, ("steps", "kind", "structure"), ("share", "expected", "contrast", "information"))
    claims = [claim for steps in settings.moments for kind in KINDS for claim in _claims(rows, steps, kind)]
    draw = partial(_draw, pictures, _middle(settings))
    return Outcome(rows, claims, draw, size=(13, 2.6 * len(settings.moments)), summary=summary)


def _measured(settings: Settings, seed: int, pictures: dict[tuple[int, str], Tensor]) -> list[Row]:
    """Scores at each moment of one training; pictures are of the middle layer."""
    model, batch = build(settings, seed), _windows(settings, seed)
    rows: list[Row] = []

    def measure(steps: int) -> None:
        if steps not in settings.moments:
            return
        with torch.no_grad():
            log.info("seed %d, %d steps: loss %.3f nats a bit", seed, steps, float(_loss_of(model, batch)))
        operator = HessianOperator(model, _loss_of, [batch], dtype=torch.float64)
        for matrix in matrices(model, settings):
            dense = dense_block(operator, matrix.block, budget_bytes=BUDGET).matrix
            rows.extend(_rows(matrix, dense, settings, seed, steps))
            if matrix.layer == _middle(settings):
                pictures[steps, matrix.kind] = shrunk(dense)

    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, betas=(0.9, 0.95), weight_decay=0.1)
    train(model, [optimizer], lambda _: _loss_of(model, batch), steps=max(settings.moments), observe=measure)
    return rows


def build(settings: Settings, seed: int) -> nn.Module:
    """GPT-2 on bits, without dropout, its output head tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=BITS, n_embd=settings.width, n_layer=settings.layers, n_head=settings.heads,
        n_positions=settings.context, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None,
        eos_token_id=None, use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "weights"))
        return GPT2LMHeadModel(config).double().eval()


def _windows(settings: Settings, seed: int) -> Tensor:
    """All windows of a random sequence of bits, `(N, context + 1)`."""
    bits = torch.randint(BITS, (settings.bits,), generator=Generator().manual_seed(seed_of(seed, "bits")))
    return bits.unfold(0, settings.context + 1, 1)


def _loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross entropy of the next bit at every position, in nats."""
    logits = model(input_ids=batch[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


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


def matrices(model: nn.Module, settings: Settings) -> list[Matrix]:
    """The six matrices of each layer; `c_attn` has queries, keys and values side by side, inputs first."""
    found = []
    for layer in range(settings.layers):
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


def _middle(settings: Settings) -> int:
    return (settings.layers + 1) // 2


def _rows(matrix: Matrix, dense: Tensor, settings: Settings, seed: int, steps: int) -> list[Row]:
    structures = {
        "head": Blocks.rows(matrix.shape, block_size=settings.width // settings.heads),
        "neuron": Blocks.rows(matrix.shape, block_size=1),
        "input": Blocks.rows(matrix.shape, axis=1, block_size=1),
    }
    return [
        {
            "seed": seed, "steps": steps, "layer": matrix.layer, "kind": matrix.kind, "structure": structure,
            "share": score.share, "expected": score.expected, "contrast": score.contrast,
            "information": score.information,
        }
        for structure, score in exact_scores(dense, structures).items()
    ]  # fmt: skip


def _claims(rows: Sequence[Row], steps: int, kind: str) -> list[Claim]:
    """Queries and keys by head, all others by neuron: these blocks have the most information, in most matrices."""
    own = [row for row in rows if (row["steps"], row["kind"]) == (steps, kind)]
    information = {
        key: {row["structure"]: row["information"] for row in own if (row["seed"], row["layer"]) == key}
        for key in dict.fromkeys((row["seed"], row["layer"]) for row in own)
    }
    structure = "head" if kind in BY_HEAD else "neuron"
    wins = sum(max(values, key=values.__getitem__) == structure for values in information.values())
    shares = {name: [row["share"] for row in own if row["structure"] == name] for name in STRUCTURES}
    expected = {row["structure"]: row["expected"] for row in own}
    measured = f"{wins} of {len(information)} matrices; median share of the squared norm " + ", ".join(
        f"{name} {statistics.median(shares[name]):.2f} (by chance {expected[name]:.2f})" for name in STRUCTURES
    )
    text = f"{steps} steps, {kind}: blocks by {structure} have the most information in over half of the matrices"
    claims = [Claim(text, wins > len(information) / 2, measured, PAPER)]
    if kind in BY_HEAD:
        least = min(shares["head"])
        claims.append(
            Claim(
                f"{steps} steps, {kind}: heads hold over half of what chance would leave out, in every layer",
                least > (1 + expected["head"]) / 2,
                f"least share {least:.2f}, by chance {expected['head']:.2f}",
                PAPER,
            )
        )
    return claims


def _draw(pictures: Mapping[tuple[int, str], Tensor], layer: int, figure: Figure) -> None:
    moments = list(dict.fromkeys(steps for steps, _ in pictures))
    panels = figure.subplots(len(moments), len(KINDS), squeeze=False)
    for number, steps in enumerate(moments):
        for axes, kind in zip(panels[number], KINDS, strict=True):
            show_matrix(axes, pictures[steps, kind], f"{kind}, layer {layer}, {steps} steps")
