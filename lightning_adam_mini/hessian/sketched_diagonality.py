"""Scores of cuts from some columns of the Hessian: no dense one, so that parameters of any size can be asked.

The share of a cut is a mean over columns: of column j, the part of its squared norm that lies in the rows of j's block,
weighted with the squared norm. A column is one product, with a unit vector, and serves all cuts. Columns are drawn in
proportion to their squared norms (Drineas, Kannan and Mahoney 2006, Sec. 3), so that each weighs about the same in the
mean. What the squared norms are is estimated first: of `(H v)_j^2` for random signs v they are the mean.

Shapes: `n` elements, `c` columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor

from lightning_adam_mini.blocks import Blocks, Kind
from lightning_adam_mini.hessian.block_structure import (
    Score,
    check_cut,
    check_not_zero,
    expected_share,
    share_by_norms,
)
from lightning_adam_mini.hessian.blocks_of import ParameterBlock
from lightning_adam_mini.hessian.exact import block_columns
from lightning_adam_mini.hessian.lanczos import DEFAULT_BUDGET
from lightning_adam_mini.hessian.operators import HessianOperator
from lightning_adam_mini.hessian.probes import probe, seed_of

__all__ = ["DEFAULT_COLUMNS", "sketched_scores", "squared_norms"]

DEFAULT_COLUMNS = 64
_PROBES = 8
"""Random vectors that the squared norms of columns are estimated with."""
_EVEN = 0.1
"""Part of the columns that is drawn evenly, for those whose estimate is too small."""


def sketched_scores(
    operator: HessianOperator,
    block: ParameterBlock,
    cuts: Mapping[str, Blocks],
    *,
    columns: int = DEFAULT_COLUMNS,
    seed: int = 0,
    budget_bytes: int = DEFAULT_BUDGET,
) -> dict[str, Score]:
    """Estimated scores of cuts of a parameter or a part of it; exact ones where all its columns are taken.

    They take a product for each column, and eight more.

    Args:
        operator: The Hessian.
        block: A parameter, or elements of one.
        cuts: By name; all of one shape with as many elements as the block.
        columns: Columns of the Hessian that are drawn; their spread gives the standard errors.
        seed: Of the draws.
        budget_bytes: For kept graphs of gradients; see `HessianOperator.keep_graphs`.

    Returns:
        Scores without `absolute_share`.

    Raises:
        ValueError: Less than two columns, an unknown block, a cut of another shape, or a Hessian that is zero
            (`ZeroHessianError`).
    """
    if columns < 2:
        raise ValueError(f"a sketch needs two columns at least, not {columns}")
    size = operator.block_size(block)
    for blocks in cuts.values():
        check_cut(blocks, size)
    shape = next(iter(cuts.values())).shape
    with operator.keep_graphs(budget_bytes):
        if columns < size:
            norms = squared_norms(operator, block, seed=seed)
            chances = norms * ((1 - _EVEN) / norms.sum()) + _EVEN / size
            drawn = _draw(chances, columns, seed_of(seed, block.name, _PROBES))
            weights = 1 / chances[drawn]
        else:
            drawn, weights = torch.arange(size), torch.ones(size, dtype=torch.float64)
        totals = torch.empty(len(drawn), dtype=torch.float64)
        inside = {name: torch.empty_like(totals) for name in cuts}
        for number, column in enumerate(chain.from_iterable(block_columns(operator, block, drawn))):
            squares = _SquareSums(column.view(shape))
            totals[number] = squares.total
            for name, blocks in cuts.items():
                inside[name][number] = squares.inside(blocks, int(drawn[number]))
    check_not_zero(totals.sum().item())
    is_sample = len(drawn) < size
    if not is_sample:
        norms = totals
    return {name: _score(inside[name], totals, weights, cuts[name], norms, is_sample=is_sample) for name in cuts}


class _SquareSums:
    """Sums of the squares of a column.

    Args:
        column: In the shape of the parameter.
    """

    def __init__(self, column: Tensor) -> None:
        self._column = column
        self._rows: dict[tuple[int, ...], Tensor] = {}
        self.total = torch.linalg.vector_norm(column, dtype=torch.float64).square().item()

    def inside(self, blocks: Blocks, index: int) -> float:
        """The sum over the block that an element belongs to."""
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), blocks.shape))
        if blocks.kind is Kind.ELEMENT:
            return self._column[place].double().square().item()
        shape = blocks.row_shape
        if shape not in self._rows:
            self._rows[shape] = blocks.row_square_sums(self._column, exact=True)
        sums = blocks.block_sums(self._rows[shape]).flatten()
        return sums[blocks.block_index()[place]].item()


def squared_norms(operator: HessianOperator, block: ParameterBlock, *, seed: int = 0) -> Tensor:
    """Estimates of the squared norms of a principal block's columns, `(n,)`, float64 on the CPU, by eight products.

    Args:
        operator: The Hessian.
        block: A parameter, or elements of one.
        seed: Of the random signs.

    Raises:
        ZeroHessianError: All are zero.
    """
    size = operator.block_size(block)
    norms = torch.zeros(size, dtype=torch.float64)
    for number in range(_PROBES):
        signs = probe(size, seed, block.name, number, dtype=operator.dtype, device=operator.device, rademacher=True)
        norms += operator.block_products({block.name: signs}, [block])[block.name].to("cpu", torch.float64).square_()
    check_not_zero(norms.sum().item())
    return norms.div_(_PROBES)


def _draw(chances: Tensor, count: int, seed: int) -> Tensor:
    """Positions by their chances, one from each of `count` equal parts of the whole chance."""
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ends = chances.cumsum(0)
    places = (torch.arange(count) + uniform) / count * ends[-1]
    return torch.searchsorted(ends, places, right=True).clamp_(max=len(chances) - 1)


def _score(inside: Tensor, totals: Tensor, weights: Tensor, blocks: Blocks, norms: Tensor, *, is_sample: bool) -> Score:
    """The ratio of two weighted means, and its standard error to first order."""
    mean = (weights * totals).mean()
    share = min(((weights * inside).mean() / mean).item(), 1.0)
    error = (weights * (inside - share * totals)).std() / len(totals) ** 0.5 / mean if is_sample else 0.0
    return Score(
        share,
        expected_share(blocks),
        blocks.num_values,
        math.prod(blocks.shape),
        share_by_norms(blocks, norms),
        standard_error=float(error),
    )
