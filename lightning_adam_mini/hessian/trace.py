"""Single figures of a Hessian: its trace by Hutchinson's estimate, and its top eigenvalues from Lanczos."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_adam_mini.hessian.blocks_of import ParameterBlock
from lightning_adam_mini.hessian.lanczos import DEFAULT_BUDGET, Tridiagonal
from lightning_adam_mini.hessian.operators import HessianOperator
from lightning_adam_mini.hessian.probes import probe, seed_of

__all__ = ["Estimate", "RitzValues", "block_traces", "top_eigenvalues", "trace"]


@dataclass(frozen=True, eq=False)
class Estimate:
    """A mean over random vectors.

    Args:
        value: The mean.
        standard_error: Of the mean; NaN for one vector.
        samples: `(k,)`, one for each vector, float64.
    """

    value: float
    standard_error: float
    samples: Tensor

    @classmethod
    def of(cls, samples: Sequence[float]) -> Estimate:
        """The mean of samples and its standard error."""
        values = torch.tensor(samples, dtype=torch.float64)
        error = (values.std() / len(samples) ** 0.5).item() if len(samples) > 1 else math.nan
        return cls(values.mean().item(), error, values)


@dataclass(frozen=True, eq=False)
class RitzValues:
    """Approximate eigenvalues of an operator.

    Args:
        values: `(k,)`, float64.
        residuals: `(k,)`: norms |A x - value x| of the Ritz vectors x; an eigenvalue lies within each of them.
    """

    values: Tensor
    residuals: Tensor


def trace(
    operator: HessianOperator, *, probes: int = 100, seed: int = 0, budget_bytes: int = DEFAULT_BUDGET
) -> Estimate:
    """The trace of the whole Hessian: the mean of `v^T H v` for random signs v (Hutchinson 1990).

    Args:
        operator: The Hessian.
        probes: Number of vectors, each of which takes a product.
        seed: Of the vectors.
        budget_bytes: For kept graphs of gradients; see `HessianOperator.keep_graphs`.

    Raises:
        ValueError: No vector.
    """
    _check_probes(probes)
    samples = []
    with operator.keep_graphs(budget_bytes):
        for number in range(probes):
            vector = operator.layout.random(seed_of(seed, "", number), rademacher=True)
            samples.append(operator.layout.dots(vector.unsqueeze(0), operator.product(vector)).item())
    return Estimate.of(samples)


def block_traces(
    operator: HessianOperator,
    blocks: Sequence[ParameterBlock],
    *,
    probes: int = 100,
    seed: int = 0,
    budget_bytes: int = DEFAULT_BUDGET,
) -> dict[str, Estimate]:
    """Traces of principal blocks, by name; all blocks share the passes over the batches.

    Args:
        operator: The Hessian.
        blocks: Blocks with names of their own.
        probes: Number of vectors for each block.
        seed: Of the vectors.
        budget_bytes: For kept graphs of gradients.

    Raises:
        ValueError: No vector, or an unknown block.
    """
    _check_probes(probes)
    samples: dict[str, list[float]] = {block.name: [] for block in blocks}
    sizes = {block.name: operator.block_size(block) for block in blocks}
    with operator.keep_graphs(budget_bytes):
        for number in range(probes):
            vectors = {
                name: probe(size, seed, name, number, dtype=operator.dtype, device=operator.device, rademacher=True)
                for name, size in sizes.items()
            }
            for name, product in operator.block_products(vectors, blocks).items():
                samples[name].append(torch.dot(vectors[name].double(), product.double()).item())
    return {name: Estimate.of(some) for name, some in samples.items()}


def top_eigenvalues(tridiagonal: Tridiagonal, k: int, *, by_magnitude: bool = False) -> RitzValues:
    """The largest eigenvalues that Lanczos found, with the residuals of their Ritz vectors.

    The residual of the i-th is `|beta_m s_mi|`, s_i being the eigenvector of T (Parlett, Sec. 13.2). The three-term
    recurrence finds converged eigenvalues more than once, and its residuals hold up to the orthogonality it lost.

    Args:
        tridiagonal: From `lanczos`.
        k: Number of eigenvalues.
        by_magnitude: Take those of the largest absolute value instead.

    Raises:
        ValueError: Less than one, or more than there were steps.
    """
    if not 1 <= k <= tridiagonal.steps:
        raise ValueError(f"{k} eigenvalues from {tridiagonal.steps} Lanczos steps: ask for 1 to {tridiagonal.steps}")
    nodes, _, lasts = tridiagonal.ritz
    order = (nodes.abs() if by_magnitude else nodes).argsort(descending=True)[:k]
    return RitzValues(nodes[order], (tridiagonal.residual * lasts).abs()[order])


def _check_probes(probes: int) -> None:
    if probes < 1:
        raise ValueError(f"an estimate needs one random vector at least, not {probes}")
