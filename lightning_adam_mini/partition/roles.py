"""Roles: what a parameter does in its model, which decides its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["ParameterRole", "Part", "Role"]


class Role(StrEnum):
    """What a parameter, or one part of a fused parameter, does."""

    TOKEN_EMBEDDING = "token_embedding"
    POSITION_EMBEDDING = "position_embedding"
    OUTPUT_HEAD = "output_head"
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    ATTENTION_OUTPUT = "attention_output"
    MLP = "mlp"
    LINEAR = "linear"
    EXPERT = "expert"
    CONV = "conv"
    NORM = "norm"
    """Scales: of norms, of residual branches (LayerScale), of adapters (DoRA's magnitudes)."""
    BIAS = "bias"
    """Whatever is added to activations or attention scores, tables of relative positions among it."""
    LORA = "lora"
    FUSED_QKV = "fused_qkv"
    """A fused query, key and value of unknown order; strategies with head blocks refuse it."""
    OTHER = "other"


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a parameter that play one role.

    Args:
        role: Their role.
        length: Number of rows in one repeat.
        head_dim: Rows of one head, for parts that have heads.
    """

    role: Role
    length: int
    head_dim: int | None = None


@dataclass(frozen=True)
class ParameterRole:
    """The role of a parameter, and the dimension of its output neurons.

    Args:
        parts: One part, or several along `axis` for a fused parameter (query, key and value).
        why: The rule that gave the role, for reports.
        axis: Dimension of the output neurons or tokens; None for tensors without such a dimension.
        batch_axes: Dimensions that count independent matrices (experts).
        repeats: How often the sequence of parts repeats along `axis`.
        problem: Why the heads are unknown; empty if they are known or not needed.
        known: Whether a rule gave the role.
        doubt: Why a matrix in a module that attends may have another role; empty if there is no doubt.
    """

    parts: tuple[Part, ...]
    why: str
    axis: int | None = 0
    batch_axes: tuple[int, ...] = ()
    repeats: int = 1
    problem: str = ""
    known: bool = True
    doubt: str = ""

    @property
    def roles(self) -> tuple[Role, ...]:
        """Roles of the parts, in order."""
        return tuple(part.role for part in self.parts)

    @property
    def name(self) -> str:
        """The role; for a fused parameter its different roles in order, joined by `+`."""
        return "+".join(dict.fromkeys(self.roles))
