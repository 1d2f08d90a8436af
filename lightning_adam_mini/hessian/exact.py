"""Dense Hessians of small models and of small blocks, column by column from products with unit vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_adam_mini.hessian.blocks_of import ParameterBlock
from lightning_adam_mini.hessian.operators import HessianOperator

__all__ = ["DEFAULT_DENSE_BUDGET", "DenseHessian", "check_dense", "dense_block", "dense_bytes", "dense_hessian"]

DEFAULT_DENSE_BUDGET = 2**31
"""Bytes that a dense matrix with what computes it may take: 2 GiB, which is 8,000 parameters in float64."""
_CHUNK_BYTES = 2**25
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
    """Bytes that a dense matrix of `size` rows takes with what computes and scores it."""
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
        budget_bytes: That the work may take.
        on_step: Called after some rows with their number and the number of all.

    Raises:
        ValueError: An unknown block, or one that does not fit the budget.
    """
    size = operator.block_size(block)
    _check_budget(block.name, size, budget_bytes, "give a block of it (a head, a row), or use the sketched scores")

    def multiply(vectors: Tensor) -> Tensor:
        return operator.block_products({block.name: vectors}, [block])[block.name]

    return _dense(block.name, multiply, operator, size, on_step)


def dense_hessian(
    operator: HessianOperator,
    *,
    budget_bytes: int = DEFAULT_DENSE_BUDGET,
    on_step: Callable[[int, int], None] | None = None,
) -> DenseHessian:
    """The dense Hessian of all trainable parameters, in the order of `named_parameters()`; on one process.

    Its principal blocks are those of `dense_block`, and what lies between them is the Hessian of several parameters.

    Args:
        operator: The Hessian.
        budget_bytes: That the work may take.
        on_step: Called after some rows with their number and the number of all.

    Raises:
        ValueError: The model does not fit the budget, or is sharded.
    """
    if operator.local_size != operator.size:
        raise ValueError("a dense Hessian of a sharded model is not supported: take blocks, or an unsharded model")
    _check_budget("the model", operator.size, budget_bytes, "take blocks one by one, or a smaller model")

    def multiply(vectors: Tensor) -> Tensor:
        return torch.stack([operator.product(vector) for vector in vectors])

    with operator.keep_graphs(budget_bytes - dense_bytes(operator.size)):
        return _dense("", multiply, operator, operator.size, on_step)


def _dense(
    name: str,
    multiply: Callable[[Tensor], Tensor],
    operator: HessianOperator,
    size: int,
    on_step: Callable[[int, int], None] | None,
) -> DenseHessian:
    matrix = torch.empty(size, size, dtype=torch.float64)
    length = max(1, min(size, _CHUNK_BYTES // (size * operator.dtype.itemsize)))
    for start in range(0, size, length):
        count = min(length, size - start)
        units = torch.zeros(count, size, dtype=operator.dtype, device=operator.device)
        units[torch.arange(count), torch.arange(start, start + count)] = 1
        matrix[start : start + count] = multiply(units).to("cpu", torch.float64)
        if on_step:
            on_step(start + count, size)
    norm = matrix.norm().item()
    transposed = matrix.T.clone()
    asymmetry = (matrix - transposed).norm().item() / 2 / norm if norm else 0.0
    return DenseHessian(name, matrix.add_(transposed).div_(2), asymmetry)


def _check_budget(name: str, size: int, budget_bytes: int, remedy: str) -> None:
    needed = dense_bytes(size)
    if needed > budget_bytes:
        raise ValueError(
            f"a dense Hessian of {name}, which has {size:,} parameters, takes {needed / 1e9:.2f} GB with what computes "
            f"it, and the budget is {budget_bytes / 1e9:.2f} GB: {remedy}, or raise the budget"
        )


def check_dense(sizes: Sequence[tuple[str, int]], budget_bytes: int) -> None:
    """Refuse blocks that do not fit, before the first is computed.

    Args:
        sizes: Names and rows of blocks that are computed one after another.
        budget_bytes: That each may take.

    Raises:
        ValueError: The largest does not fit.
    """
    if sizes:
        name, size = max(sizes, key=lambda item: item[1])
        _check_budget(name, size, budget_bytes, "give a block of it (a head, a row), or leave it out")
