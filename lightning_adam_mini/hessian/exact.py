"""Dense Hessians of small models and of small blocks, from products with unit vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_adam_mini.hessian.operators import HessianOperator
from lightning_adam_mini.hessian.vectors import ParameterBlock

__all__ = [
    "DEFAULT_DENSE_BUDGET",
    "DenseHessian",
    "block_columns",
    "check_dense",
    "dense_block",
    "dense_bytes",
    "dense_hessian",
]

DEFAULT_DENSE_BUDGET = 2**31
"""Bytes that a dense matrix and its computation may take: 2 GiB, which is 8,000 parameters in float64."""
_CHUNK_BYTES = 2**25
"""Bytes of the vectors that are multiplied at a time."""
_COPIES = 4
"""The matrix, its transpose, and what scores it, each in float64."""


@dataclass(frozen=True, eq=False)
class DenseHessian:
    """A principal block as a matrix.

    Args:
        name: Of the block; empty for the whole model.
        matrix: `(b, b)`, float64 on the CPU: the symmetric part of what was computed.
        asymmetry: Frobenius norm of the antisymmetric part over that of the matrix: rounding, 1e-16 to 1e-14 in float64
            and 1e-7 to 1e-5 in float32. More says that the loss is not twice differentiable as computed.
    """

    name: str
    matrix: Tensor
    asymmetry: float


def dense_bytes(size: int) -> int:
    """Bytes that a dense matrix of `size` rows, its computation and its scores take."""
    return _COPIES * 8 * size * size


def dense_block(
    operator: HessianOperator,
    block: ParameterBlock,
    *,
    budget_bytes: int = DEFAULT_DENSE_BUDGET,
    on_step: Callable[[int, int], None] | None = None,
) -> DenseHessian:
    """The dense matrix of a principal block: a second backward pass for each row.

    Args:
        operator: The Hessian; in float64 the matrix is symmetric to rounding.
        block: A parameter, or elements of one.
        budget_bytes: For the whole computation.
        on_step: Called after some rows with the number of rows so far and in all.

    Raises:
        ValueError: An unknown block, or one that does not fit the budget.
    """
    size = operator.block_size(block)
    _check_budget(block.name, size, budget_bytes, "give a block of it (a head, a row), or use the sketched scores")
    return _dense(block.name, block_columns(operator, block, torch.arange(size)), size, on_step)


def dense_hessian(
    operator: HessianOperator,
    *,
    budget_bytes: int = DEFAULT_DENSE_BUDGET,
    on_step: Callable[[int, int], None] | None = None,
) -> DenseHessian:
    """The dense Hessian of all trainable parameters, in the order of `named_parameters()`; on one process.

    Args:
        operator: The Hessian.
        budget_bytes: For the whole computation.
        on_step: Called after some rows with the number of rows so far and in all.

    Raises:
        ValueError: The model does not fit the budget, or is sharded.
    """
    if operator.local_size != operator.size:
        raise ValueError("a dense Hessian of a sharded model is not supported: take blocks, or an unsharded model")
    _check_budget("the model", operator.size, budget_bytes, "take blocks one by one, or a smaller model")

    units = _units(operator, torch.arange(operator.size), operator.size)
    columns = (torch.stack([operator.product(vector) for vector in some]) for some in units)
    with operator.keep_graphs(budget_bytes - dense_bytes(operator.size)):
        return _dense("", columns, operator.size, on_step)


def block_columns(operator: HessianOperator, block: ParameterBlock, positions: Tensor) -> Iterator[Tensor]:
    """Columns of a principal block, `(k, n)` for as many as are computed at a time.

    Args:
        operator: The Hessian.
        block: A parameter, or elements of one.
        positions: Of the columns, int64 on the CPU, below the n rows of the block.
    """
    for units in _units(operator, positions, operator.block_size(block)):
        yield operator.block_products({block.name: units}, [block])[block.name]


def _units(operator: HessianOperator, positions: Tensor, size: int) -> Iterator[Tensor]:
    """Unit vectors of a size, `(k, size)` at a time."""
    for some in positions.split(max(1, _CHUNK_BYTES // (size * operator.dtype.itemsize))):
        units = torch.zeros(len(some), size, dtype=operator.dtype, device=operator.device)
        units[torch.arange(len(some)), some] = 1
        yield units


def _dense(name: str, columns: Iterable[Tensor], size: int, on_step: Callable[[int, int], None] | None) -> DenseHessian:
    matrix, start = torch.empty(size, size, dtype=torch.float64), 0
    for some in columns:
        matrix[start : start + len(some)] = some.to("cpu", torch.float64)
        start += len(some)
        if on_step:
            on_step(start, size)
    norm = matrix.norm().item()
    transposed = matrix.T.clone()
    asymmetry = (matrix - transposed).norm().item() / 2 / norm if norm else 0.0
    return DenseHessian(name, matrix.add_(transposed).div_(2), asymmetry)


def _check_budget(name: str, size: int, budget_bytes: int, remedy: str) -> None:
    needed = dense_bytes(size)
    if needed > budget_bytes:
        raise ValueError(
            f"a dense Hessian of {name}, which has {size:,} parameters, takes {needed / 1e9:.2f} GB to compute, and "
            f"the budget is {budget_bytes / 1e9:.2f} GB: {remedy}, or raise the budget"
        )


def check_dense(sizes: Mapping[str, int], budget_bytes: int) -> None:
    """Reject blocks that do not fit, before the first is computed.

    Args:
        sizes: Rows by the name of the block; blocks are computed one after another.
        budget_bytes: For the computation of each.

    Raises:
        ValueError: The largest does not fit.
    """
    if sizes:
        name, size = max(sizes.items(), key=lambda item: item[1])
        _check_budget(name, size, budget_bytes, "give a block of it (a head, a row), or leave it out")
