"""How near a parameter's Hessian is to block-diagonal for a cut, so that cuts of different sizes can be compared.

Of a symmetric `(n, n)` matrix H and a cut of the n elements into blocks, `share` is the part of the squared Frobenius
norm that lies inside the blocks, and `expected` the part of the entries that does: what a matrix without any structure
would have. A coarser cut has more of both. Comparing them is the question of how much the cut tells about where the
Hessian's energy lies, and the answer is a relative entropy,

    information = share ln(share / expected) + (1 - share) ln((1 - share) / (1 - expected))

in nats. For a block-diagonal matrix with even blocks it is largest at exactly those blocks: coarser ones expect more
than they need, finer ones lose what couples their elements. So the largest information is at "the smallest dense
sub-blocks" that Adam-mini asks for (Zhang et al. 2024, Principle 1).

Shapes: `n` elements, `B` blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_adam_mini.blocks import Blocks, Kind

__all__ = ["Score", "ZeroHessianError", "best_cut", "candidate_cuts", "exact_scores", "tau"]


class ZeroHessianError(ValueError):
    """A parameter whose Hessian is zero, so that no cut holds more of it than another."""


@dataclass(frozen=True)
class Score:
    """How block-diagonal a Hessian is for a cut.

    Args:
        share: Part of the squared Frobenius norm inside the blocks, 0 to 1.
        expected: Part of the entries inside the blocks.
        num_blocks: Number of blocks.
        size: Rows of the Hessian.
        by_norms: The share that would lie inside if columns had the norms that they have, and blocks meant nothing: the
            sum of the squares of the blocks' parts of the squared norm.
        absolute_share: Part of the sum of absolute entries inside the blocks; for the cut into elements it is the tau
            of the papers. None where the Hessian was sketched.
        standard_error: Of `share`; 0 for an exact one.
    """

    share: float
    expected: float
    num_blocks: int
    size: int
    by_norms: float
    absolute_share: float | None = None
    standard_error: float = 0.0

    @property
    def contrast(self) -> float:
        """How many times more energy an entry inside has than the mean entry."""
        return self.share / self.expected

    @property
    def information(self) -> float:
        """What the cut tells about where the energy lies, in nats; 0 for one block. Negative where less lies inside."""
        return _signed_entropy(self.share, self.expected)

    @property
    def information_beyond_norms(self) -> float:
        """The same beyond that some blocks have larger entries than others, as the parts of a fused matrix do."""
        return _signed_entropy(self.share, self.by_norms)

    @property
    def noise(self) -> float:
        """The information of a symmetric matrix of independent entries with twice the variance on the diagonal."""
        share = (self.expected * self.size + 1) / (self.size + 1)
        return 0.0 if self.expected >= 1 else _relative_entropy(share, self.expected)

    @property
    def information_error(self) -> float:
        """Standard error of the information, from that of the share."""
        inside, outside = min(max(self.share, 1e-12), 1 - 1e-12), self.expected
        if outside >= 1:
            return 0.0
        return abs(math.log(inside * (1 - outside) / (outside * (1 - inside)))) * self.standard_error


def candidate_cuts(shape: torch.Size | tuple[int, ...]) -> dict[str, Blocks]:
    """Cuts that may be tried without knowing what a parameter does, by name.

    `whole`, `element`, and along each of the first two dimensions runs of k for every k that divides it: `rows x 1` is
    a block for each output neuron of a linear layer, `rows x 16` heads of 16 rows, `columns x 1` a block for each
    input.

    Args:
        shape: Of the parameter.
    """
    found = {"whole": Blocks.whole(shape)}
    for axis, name in enumerate(("rows", "columns")[: len(shape)]):
        for size in range(1, shape[axis]):
            if shape[axis] % size == 0:
                found[f"{name} x {size}"] = Blocks.rows(shape, axis=axis, block_size=size)
    found["element"] = Blocks.element(shape)
    return found


def exact_scores(matrix: Tensor, cuts: Mapping[str, Blocks]) -> dict[str, Score]:
    """Scores of cuts from the dense Hessian of a parameter.

    Args:
        matrix: `(n, n)`, symmetric.
        cuts: By name; those without blocks (`factored`) are left out by the caller.

    Raises:
        ValueError: The matrix is not of the parameter that is cut, or is zero (`ZeroHessianError`).
    """
    size = len(matrix)
    norms = matrix.square().sum(0)
    total = norms.sum().item()
    absolute = matrix.abs().sum().item()
    check_not_zero(total)
    found = {}
    for name, blocks in cuts.items():
        check_cut(blocks, size)
        energy, sums = (_inside(part, blocks) for part in (matrix.square(), matrix.abs()))
        share = min(energy / total, 1.0)
        found[name] = Score(
            share,
            expected_share(blocks),
            blocks.num_values,
            size,
            share_by_norms(blocks, norms),
            min(sums / absolute, 1.0),
        )
    return found


def best_cut(scores: Mapping[str, Score]) -> str | None:
    """Name of the cut with the most information; None where no cut tells more than it would about noise."""
    told = {name: score.information for name, score in scores.items() if score.information > score.noise}
    return max(told, key=told.__getitem__, default=None)


def tau(matrix: Tensor) -> float:
    """Share of the diagonal in the sum of absolute entries; 1 for a diagonal matrix (Zhang et al. 2024)."""
    return (matrix.diagonal().abs().sum() / matrix.abs().sum()).item()


def check_not_zero(total: float) -> None:
    """Refuse a Hessian without any energy.

    Raises:
        ZeroHessianError: `total`, a sum of squares, is zero.
    """
    if not total > 0:
        raise ZeroHessianError(
            "the Hessian of this parameter is zero: the loss does not depend on it, or is linear in it"
        )


def check_cut(blocks: Blocks, size: int) -> None:
    """Refuse a cut of another number of elements.

    Raises:
        ValueError: The cut does not have `size` elements.
    """
    if (numel := math.prod(blocks.shape)) != size:
        raise ValueError(f"a cut of shape {blocks.shape} has {numel} elements, and the Hessian {size} rows")


def expected_share(blocks: Blocks) -> float:
    """Part of the entries of a matrix that lies inside the blocks."""
    size = math.prod(blocks.shape)
    if blocks.kind is Kind.ELEMENT:
        return 1 / size
    width = size / math.prod(blocks.row_shape)
    sizes = blocks.block_sums(torch.full(blocks.row_shape, width, dtype=torch.float64))
    return sizes.square().sum().item() / size**2


def share_by_norms(blocks: Blocks, norms: Tensor) -> float:
    """The sum of the squares of the blocks' parts of the squared norm.

    Args:
        blocks: The cut.
        norms: Squared norms of the Hessian's columns, `(n,)`, float64.
    """
    parts = norms.view(blocks.shape) / norms.sum()
    if blocks.kind is not Kind.ELEMENT:
        parts = blocks.block_sums(blocks.row_sums(parts, dtype=torch.float64))
    return parts.square().sum().item()


def _inside(values: Tensor, blocks: Blocks) -> float:
    """Sum of the entries inside the blocks."""
    if blocks.kind is Kind.ELEMENT:
        return values.diagonal().sum().item()
    index = blocks.block_index().flatten()
    rows = values.new_zeros(blocks.num_values, len(values)).index_add_(0, index, values)
    return rows.gather(0, index.unsqueeze(0)).sum().item()


def _signed_entropy(share: float, expected: float) -> float:
    """The relative entropy, negative where less lies inside than expected; 0 where all is expected there."""
    if expected >= 1:
        return 0.0
    found = _relative_entropy(share, expected)
    return found if share >= expected else -found


def _relative_entropy(share: float, expected: float) -> float:
    """Of a binary distribution from another one, in nats."""
    return _term(share, expected) + _term(1 - share, 1 - expected)


def _term(share: float, expected: float) -> float:
    return share * math.log(share / expected) if share > 0 and expected > 0 else 0.0
