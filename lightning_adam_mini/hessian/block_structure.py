"""How well a block structure fits a parameter: its Hessian should be block-diagonal, its squared gradients even.

Of a symmetric `(n, n)` matrix H and a partition of the n elements into blocks, `share` is the part of the squared
Frobenius norm inside the blocks, and `expected` the part of the entries inside them, which is the share of a matrix
without structure. Coarser structures have more of both. Comparing the two asks how much the structure knows about where
the Hessian's energy is, and the answer is a relative entropy,

    information = share ln(share / expected) + (1 - share) ln((1 - share) / (1 - expected))

in nats. For a block-diagonal matrix with even blocks it is largest at exactly those blocks: coarser ones expect more
than they need, finer ones lose what couples their elements. So the largest information is at "the smallest dense
sub-blocks" that Adam-mini asks for (Zhang et al. 2024, Principle 1).

AdamMini replaces each squared gradient of a block by the block's mean, which costs nothing where they are equal. So the
variance of `ln g^2` within blocks, compared with that over the whole parameter, measures what a structure loses. Pure
noise has a spread of its own: the logarithm of one squared normal number has the variance pi^2 / 2 = 4.93, and that of
the mean of k of them about 2 / k.

Shapes: `n` elements, `B` blocks, `c` columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_adam_mini.blocks import Blocks, Kind
from lightning_adam_mini.hessian.exact import block_columns
from lightning_adam_mini.hessian.lanczos import DEFAULT_BUDGET
from lightning_adam_mini.hessian.operators import HessianOperator
from lightning_adam_mini.hessian.vectors import ParameterBlock, probe, probe_seed

__all__ = [
    "DEFAULT_COLUMNS",
    "LogGradientVariance",
    "Score",
    "ZeroHessianError",
    "best_structure",
    "candidate_structures",
    "exact_scores",
    "expected_share",
    "mean_square_gradients",
    "sketched_scores",
    "spread_from",
    "spread_sums",
    "tau",
]

DEFAULT_COLUMNS = 64
_PROBES = 8
"""Random vectors that estimate the squared norms of columns."""
_EVEN = 0.1
"""Part of the columns that is drawn evenly, for those whose estimate is too small."""


class ZeroHessianError(ValueError):
    """A parameter whose Hessian is zero, so that no block structure fits it better than another."""


@dataclass(frozen=True)
class Score:
    """How block-diagonal a Hessian is for a block structure.

    Args:
        share: Part of the squared Frobenius norm inside the blocks, 0 to 1.
        expected: Part of the entries inside the blocks.
        num_blocks: Number of blocks.
        size: Rows of the Hessian.
        by_norms: The share that would be inside if columns had the norms that they have, and blocks meant nothing: the
            sum of the squares of the blocks' parts of the squared norm.
        absolute_share: Part of the sum of absolute entries inside the blocks; for element blocks it is the tau of the
            papers. None where the Hessian was sketched.
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
        """What the structure knows about where the energy is, in nats; 0 for one block, negative if less is inside."""
        return _signed_entropy(self.share, self.expected)

    @property
    def information_beyond_norms(self) -> float:
        """The same beyond the fact that some blocks have larger entries than others, as parts of fused matrices do."""
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


def candidate_structures(shape: torch.Size | tuple[int, ...]) -> dict[str, Blocks]:
    """Block structures to try without knowing what a parameter does, by name.

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


def best_structure(scores: Mapping[str, Score]) -> str | None:
    """Name of the structure with the most information; None where no structure has more than it would about noise."""
    informative = {name: score.information for name, score in scores.items() if score.information > score.noise}
    return max(informative, key=informative.__getitem__, default=None)


def exact_scores(matrix: Tensor, structures: Mapping[str, Blocks]) -> dict[str, Score]:
    """Scores of block structures from the dense Hessian of a parameter.

    Args:
        matrix: `(n, n)`, symmetric.
        structures: By name; not factored ones, which have no blocks.

    Raises:
        ValueError: A structure has another number of elements than the matrix has rows, or the matrix is zero
            (`ZeroHessianError`).
    """
    size = len(matrix)
    norms = matrix.square().sum(0)
    total = norms.sum().item()
    absolute = matrix.abs().sum().item()
    _check_not_zero(total)
    found = {}
    for name, blocks in structures.items():
        _check_size(blocks, size)
        energy, sums = (_inside(part, blocks) for part in (matrix.square(), matrix.abs()))
        share, absolute_share = min(energy / total, 1.0), min(sums / absolute, 1.0)
        found[name] = _score(share, blocks, norms, absolute_share=absolute_share)
    return found


def tau(matrix: Tensor) -> float:
    """Share of the diagonal in the sum of absolute entries; 1 for a diagonal matrix (Zhang et al. 2024)."""
    return (matrix.diagonal().abs().sum() / matrix.abs().sum()).item()


def sketched_scores(
    operator: HessianOperator,
    block: ParameterBlock,
    structures: Mapping[str, Blocks],
    *,
    columns: int = DEFAULT_COLUMNS,
    seed: int = 0,
    budget_bytes: int = DEFAULT_BUDGET,
) -> dict[str, Score]:
    """Estimated scores of block structures of a parameter or a part of it, without a dense Hessian.

    A share is a mean over columns: of column j, the part of its squared norm in the rows of j's block, weighted with
    the squared norm. A column is one product, with a unit vector, and serves all structures. Columns are drawn in
    proportion to their squared norms (Drineas, Kannan and Mahoney 2006, Sec. 3), so that each has about the same weight
    in the mean. Eight more products estimate the squared norms: they are the mean of `(H v)_j^2` over random signs v.
    With all columns the scores are exact.

    Args:
        operator: The Hessian.
        block: A parameter, or elements of one.
        structures: By name; all of one shape with as many elements as the block.
        columns: Columns of the Hessian that are drawn; their spread gives the standard errors.
        seed: Of the draws.
        budget_bytes: For kept graphs of gradients; see `HessianOperator.keep_graphs`.

    Returns:
        Scores without `absolute_share`.

    Raises:
        ValueError: Fewer than two columns, an unknown block, a structure of another size, or a Hessian that is zero
            (`ZeroHessianError`).
    """
    if columns < 2:
        raise ValueError(f"a sketch needs two columns at least, not {columns}")
    size = operator.block_size(block)
    for blocks in structures.values():
        _check_size(blocks, size)
    shape = next(iter(structures.values())).shape
    with operator.keep_graphs(budget_bytes):
        if columns < size:
            norms = _squared_norms(operator, block, seed=seed)
            chances = norms * ((1 - _EVEN) / norms.sum()) + _EVEN / size
            drawn = _draw_positions(chances, columns, probe_seed(seed, block.name, _PROBES))
            weights = 1 / chances[drawn]
        else:
            drawn, weights = torch.arange(size), torch.ones(size, dtype=torch.float64)
        totals = torch.empty(len(drawn), dtype=torch.float64)
        inside = {name: torch.empty_like(totals) for name in structures}
        for number, column in enumerate(chain.from_iterable(block_columns(operator, block, drawn))):
            squares = _SquareSums(column.view(shape))
            totals[number] = squares.total
            for name, blocks in structures.items():
                inside[name][number] = squares.inside(blocks, int(drawn[number]))
    _check_not_zero(totals.sum().item())
    is_sample = len(drawn) < size
    if not is_sample:
        norms = totals
    mean, found = (weights * totals).mean(), {}
    for name, blocks in structures.items():
        share = min(((weights * inside[name]).mean() / mean).item(), 1.0)
        # The standard error of a ratio of two means, to first order.
        error = (weights * (inside[name] - share * totals)).std() / len(totals) ** 0.5 / mean if is_sample else 0.0
        found[name] = _score(share, blocks, norms, standard_error=float(error))
    return found


class _SquareSums:
    """Sums of the squares of a column, in the shape of the parameter."""

    def __init__(self, column: Tensor) -> None:
        self._column = column
        self._rows: dict[tuple[int, ...], Tensor] = {}
        self.total = torch.linalg.vector_norm(column, dtype=torch.float64).square().item()

    def inside(self, blocks: Blocks, index: int) -> float:
        """The sum over the block of an element."""
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), blocks.shape))
        if blocks.kind is Kind.ELEMENT:
            return self._column[place].double().square().item()
        shape = blocks.row_shape
        if shape not in self._rows:
            self._rows[shape] = blocks.row_square_sums(self._column, exact=True)
        sums = blocks.block_sums(self._rows[shape]).flatten()
        return sums[blocks.block_index()[place]].item()


def _squared_norms(operator: HessianOperator, block: ParameterBlock, *, seed: int) -> Tensor:
    """Estimates of the squared norms of a principal block's columns, `(n,)`, float64 on the CPU."""
    size = operator.block_size(block)
    norms = torch.zeros(size, dtype=torch.float64)
    for number in range(_PROBES):
        signs = probe(size, seed, block.name, number, dtype=operator.dtype, device=operator.device, rademacher=True)
        norms += operator.block_products({block.name: signs}, [block])[block.name].to("cpu", torch.float64).square_()
    _check_not_zero(norms.sum().item())
    return norms.div_(_PROBES)


def _draw_positions(chances: Tensor, count: int, seed: int) -> Tensor:
    """Positions by their chances, one from each of `count` equal parts of the total chance."""
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ends = chances.cumsum(0)
    places = (torch.arange(count) + uniform) / count * ends[-1]
    return torch.searchsorted(ends, places, right=True).clamp_(max=len(chances) - 1)


def _score(share: float, blocks: Blocks, norms: Tensor, **options: float) -> Score:
    size, by_norms = math.prod(blocks.shape), _share_by_norms(blocks, norms)
    return Score(share, expected_share(blocks), blocks.num_values, size, by_norms, **options)


def _check_not_zero(total: float) -> None:
    if not total > 0:
        raise ZeroHessianError(
            "the Hessian of this parameter is zero: the loss does not depend on it, or is linear in it"
        )


def _check_size(blocks: Blocks, size: int) -> None:
    if (numel := math.prod(blocks.shape)) != size:
        raise ValueError(f"blocks of the shape {blocks.shape} have {numel} elements, and the Hessian has {size} rows")


def expected_share(blocks: Blocks) -> float:
    """Part of the entries of a matrix that is inside the blocks."""
    size = math.prod(blocks.shape)
    if blocks.kind is Kind.ELEMENT:
        return 1 / size
    width = size / math.prod(blocks.row_shape)
    sizes = blocks.block_sums(torch.full(blocks.row_shape, width, dtype=torch.float64))
    return sizes.square().sum().item() / size**2


def _share_by_norms(blocks: Blocks, norms: Tensor) -> float:
    """`Score.by_norms`, from the squared norms of the Hessian's columns, `(n,)`, float64."""
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
    """The relative entropy, negative where less is inside than expected; 0 where everything is expected inside."""
    if expected >= 1:
        return 0.0
    found = _relative_entropy(share, expected)
    return found if share >= expected else -found


def _relative_entropy(share: float, expected: float) -> float:
    """Of one binary distribution with respect to another, in nats."""
    terms = (share, expected), (1 - share, 1 - expected)
    return sum((p * math.log(p / q) for p, q in terms if p > 0 and q > 0), 0.0)


@dataclass(frozen=True)
class LogGradientVariance:
    """Variances of `ln g^2`, over elements whose gradient is not zero.

    Args:
        within: Variance within blocks: their squared deviations over elements less blocks. NaN where all blocks have
            one element.
        total: Variance over the parameter.
        zeros: Part of the elements whose gradient is zero, which have no logarithm.
    """

    within: float
    total: float
    zeros: float

    @property
    def explained(self) -> float:
        """Part of the variance that blocks explain; 0 on average where blocks mean nothing, and 1 at most."""
        return 1 - self.within / self.total if self.total > 0 else math.nan


def spread_sums(blocks: Blocks, squares: Tensor) -> Tensor:
    """The sums that `spread_from` needs, `(6,)` in float64 on the gradient's device, without a synchronisation.

    Sums of several parameters add up to the spread within the blocks of all, each around its own mean.

    Args:
        blocks: Block structure of the parameter.
        squares: Squared gradients in the parameter's shape, or means of them over batches.

    Raises:
        ValueError: A factored second moment, which has no blocks.
    """
    if blocks.kind is Kind.FACTORED:
        raise ValueError("a factored second moment has no blocks whose squared gradients share a mean: leave it out")
    values = squares.detach()
    counted = values > 0
    logs = torch.where(counted, values, 1).to(torch.float32).log_()
    num = counted.sum(dtype=torch.float64)
    centred = torch.where(counted, logs - logs.sum(dtype=torch.float64).div(num.clamp(min=1)).to(logs.dtype), 0)
    over_all = centred.square().sum(dtype=torch.float64)
    if blocks.kind is Kind.ELEMENT:
        used, within = num, torch.zeros_like(num)
    else:
        sums, counts = (blocks.block_sums(blocks.row_sums(part, dtype=torch.float64)) for part in (centred, counted))
        used = (counts > 0).sum(dtype=torch.float64)
        within = over_all - (sums.square() / counts.clamp(min=1)).sum()
    elements = torch.full_like(num, values.numel())
    return torch.stack([within, num - used, over_all, (num - 1).clamp(min=0), elements - num, elements])


def spread_from(sums: Tensor) -> LogGradientVariance:
    """The spread from `spread_sums` of one parameter, or from the sum over several; it synchronises with the device."""
    within, within_freedom, total, total_freedom, zeros, elements = sums.tolist()
    return LogGradientVariance(_ratio(within, within_freedom), _ratio(total, total_freedom), _ratio(zeros, elements))


def mean_square_gradients(
    model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batches: Iterable[Any]
) -> dict[str, Tensor]:
    """Means over batches of the squared gradients, by parameter; the model keeps its own gradients.

    Args:
        model: In eval mode.
        loss_fn: Takes the model and a batch, returns a scalar.
        batches: At least one.

    Raises:
        ValueError: No batch.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {name: torch.zeros_like(p, dtype=torch.float64, requires_grad=False) for name, p in parameters.items()}
    count = 0
    for batch in batches:
        count += 1
        with torch.enable_grad():
            loss = loss_fn(model, batch)
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        for name, grad in zip(found, grads, strict=True):
            found[name].addcmul_(grad.double(), grad.double())
    if not count:
        raise ValueError("batches is empty: give at least one batch")
    return {name: total.div_(count) for name, total in found.items()}


def _ratio(value: float, freedom: float) -> float:
    return value / freedom if freedom > 0 else math.nan
