"""Scores of cuts by a sketch: no dense Hessian, so that parameters of any size can be asked.

Let v be random signs, and D a diagonal matrix of random signs that are equal within a block. The entry (i, j) of D H D
is that of H times the signs of two blocks, whose mean is 1 inside a block and 0 outside: the mean of D H D is H_blocks,
the matrix inside the blocks. So for independent D and D' the mean of `<D H D v, D' H D' v>` is `|H_blocks v|^2`, whose
mean over v is the squared Frobenius norm of H_blocks (Hutchinson 1990). With the identity for D it is
`<H v, H_blocks v>`, of the same mean over v. The squared norms `|H D v|^2` themselves have the mean |H|_F^2.

Shapes: `n` elements, `p` patterns D of a cut, the identity among them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.hessian.block_diagonality import Score, block_numbers, expected_share
from lightning_adam_mini.hessian.blocks_of import ParameterBlock
from lightning_adam_mini.hessian.operators import HessianOperator
from lightning_adam_mini.hessian.probes import probe

__all__ = ["DEFAULT_PATTERNS", "DEFAULT_SKETCH_PROBES", "sketched_scores"]

DEFAULT_SKETCH_PROBES, DEFAULT_PATTERNS = 8, 4
_BUDGET = 2**28
"""Bytes of vectors that are multiplied at a time."""


def sketched_scores(
    operator: HessianOperator,
    parameter: str,
    cuts: Mapping[str, Blocks],
    *,
    probes: int = DEFAULT_SKETCH_PROBES,
    patterns: int = DEFAULT_PATTERNS,
    seed: int = 0,
    budget_bytes: int = _BUDGET,
) -> dict[str, Score]:
    """Estimated scores of cuts of a parameter, by `probes * (1 + patterns * len(cuts))` products.

    Args:
        operator: The Hessian.
        parameter: Name of the parameter.
        cuts: By name.
        probes: Random vectors v; the standard errors come from their spread.
        patterns: Random patterns D of each cut and vector.
        seed: Of all signs.
        budget_bytes: For vectors that are multiplied at a time.

    Returns:
        Scores without `absolute_share`; a share is kept within 0 and 1.

    Raises:
        ValueError: Less than two probes, no pattern, an unknown parameter, or a Hessian that is zero.
    """
    if probes < 2 or patterns < 1:
        raise ValueError(f"a sketch needs two probes and one pattern at least, not {probes} and {patterns}")
    block = ParameterBlock(parameter, parameter)
    size = operator.block_size(block)
    numbers = {name: block_numbers(blocks, size) for name, blocks in cuts.items()}
    inside: dict[str, list[float]] = {name: [] for name in cuts}
    totals: list[float] = []
    for number in range(probes):
        draw = _Draws(operator, size, seed, parameter, number)
        vector = draw("")
        plain = _multiply(operator, block, vector.unsqueeze(0), budget_bytes)[0]
        squares = [plain.square().sum().item()]
        for name, index in numbers.items():
            drawn = torch.stack([draw(f"{name}/{k}", int(index.max()) + 1) for k in range(patterns)])
            signs = drawn[:, index.to(drawn.device)]
            moved = _multiply(operator, block, signs * vector, budget_bytes) * signs
            norms = moved.square().sum(1)
            every = moved.sum(0) + plain
            pairs = (every.square().sum() - norms.sum() - plain.square().sum()).item()
            inside[name].append(pairs / (patterns * (patterns + 1)))
            squares += norms.tolist()
        totals.append(sum(squares) / len(squares))
    return {name: _score(inside[name], totals, index, size) for name, index in numbers.items()}


class _Draws:
    """Random signs by name, the same whatever other cuts there are."""

    def __init__(self, operator: HessianOperator, size: int, seed: int, parameter: str, number: int) -> None:
        self._operator, self._size = operator, size
        self._seed, self._parameter, self._number = seed, parameter, number

    def __call__(self, name: str, size: int | None = None) -> Tensor:
        return probe(
            size or self._size,
            self._seed,
            f"{self._parameter}/{name}",
            self._number,
            dtype=self._operator.dtype,
            device=self._operator.device,
            rademacher=True,
        )


def _multiply(operator: HessianOperator, block: ParameterBlock, vectors: Tensor, budget_bytes: int) -> Tensor:
    """Products of rows, in float64, some at a time."""
    length = max(1, budget_bytes // (vectors.shape[1] * vectors.element_size()))
    parts = [operator.block_products({block.name: some}, [block])[block.name] for some in vectors.split(length)]
    return torch.cat(parts).double()


def _score(inside: list[float], totals: list[float], index: Tensor, size: int) -> Score:
    """The ratio of two means, and its standard error to first order."""
    energies, norms = torch.tensor([inside, totals], dtype=torch.float64)
    if not norms.mean() > 0:
        raise ValueError("the Hessian of this parameter is zero: the loss does not depend on it, or is linear in it")
    if not index.any():  # one block holds everything
        return Score(1.0, 1.0, 1, size)
    ratio = energies.mean() / norms.mean()
    error = (energies - ratio * norms).std() / len(inside) ** 0.5 / norms.mean()
    share = ratio.clamp(0, 1).item()
    return Score(share, expected_share(index), int(index.max()) + 1, size, standard_error=error.item())
