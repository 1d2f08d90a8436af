"""The Lanczos recurrence for a symmetric operator: a small tridiagonal matrix with the same extreme eigenvalues."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_adam_mini.hessian.vectors import dots as plain_dots

__all__ = ["DEFAULT_BUDGET", "Recurrence", "Tridiagonal", "check_steps", "lanczos", "vector_bytes"]

DEFAULT_BUDGET = 2**31
"""Bytes that kept vectors and graphs of gradients may take by default: 2 GiB."""
_BREAKDOWN = 100
"""The next off-diagonal entry counts as zero below this many rounding units of the largest entry so far."""
_WATCH_EVERY = 10
"""Steps between two measurements of lost orthogonality."""


@dataclass(frozen=True, eq=False)
class Tridiagonal:
    """The result of `lanczos`: `A V = V T + residual * v_next e_m^T`.

    Args:
        alphas: Diagonal of T, `(m,)`, float64 on the CPU.
        betas: Off-diagonal entries, `(m - 1,)`.
        residual: Norm of the remainder of the last step; 0 after a breakdown, where the eigenvalues of T are exact.
        orthogonality: Largest measured |V^T V - I|: over all pairs where vectors were kept, else between the first
            vector and later ones, every 10 steps.
        vectors: `(m, n)`, the rows of V^T; None without reorthogonalisation.
    """

    alphas: Tensor
    betas: Tensor
    residual: float
    orthogonality: float
    vectors: Tensor | None = None

    @property
    def steps(self) -> int:
        """Number of steps that were taken."""
        return self.alphas.numel()

    def matrix(self) -> Tensor:
        """T as a dense matrix `(m, m)`."""
        return torch.diag(self.alphas) + torch.diag(self.betas, 1) + torch.diag(self.betas, -1)

    @cached_property
    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues of T, ascending, and the first and last components of its eigenvectors, `(m,)` each."""
        values, vectors = torch.linalg.eigh(self.matrix())
        return values, vectors[0].clone(), vectors[-1].clone()


def vector_bytes(steps: int, size: int, dtype: torch.dtype) -> int:
    """Bytes of the vectors that reorthogonalisation keeps for one start."""
    return steps * size * dtype.itemsize


def check_steps(steps: int, sizes: Mapping[str, int]) -> None:
    """Reject more Lanczos steps than a matrix has rows.

    Args:
        steps: Lanczos steps.
        sizes: Rows by the name of the block.

    Raises:
        ValueError: Less than one step, or a block with fewer rows.
    """
    if steps < 1:
        raise ValueError(f"Lanczos needs at least one step, not {steps}")
    small = {name: size for name, size in sizes.items() if size < steps}
    if small:
        name, size = min(small.items(), key=lambda item: item[1])
        more = f" (and {len(small) - 1} more blocks)" if len(small) > 1 else ""
        raise ValueError(f"{steps} Lanczos steps for {name}, which has {size} parameters{more}: use at most {size}")


class Recurrence:
    """One start of Lanczos, advanced by products that the caller computes, so that several starts can share a pass.

    Operations are in the order of Paige (1972). With reorthogonalisation, each new vector is made orthogonal twice to
    all before it ("twice is enough", Parlett, The Symmetric Eigenvalue Problem, Sec. 6.9). Otherwise two vectors are
    kept in addition to the product.

    Args:
        start: A vector `(n,)`, or a function that returns the same one each time. A function saves memory: without
            reorthogonalisation the start is needed again to measure the loss of orthogonality.
        steps: Steps to take.
        reorthogonalize: Keep all vectors and make each new one orthogonal to them.
        dots: Inner products of rows with a vector, in float64; `VectorLayout.dots` sums them over ranks.

    Raises:
        ValueError: The start is zero or not finite.
    """

    def __init__(
        self,
        start: Tensor | Callable[[], Tensor],
        steps: int,
        *,
        reorthogonalize: bool,
        dots: Callable[[Tensor, Tensor], Tensor] = plain_dots,
    ) -> None:
        self._start, self._steps, self._dots = start, steps, dots
        first = start.clone() if isinstance(start, Tensor) else start()
        self._start_norm = self._norm(first)
        if not 0 < self._start_norm < float("inf"):
            raise ValueError(f"the start vector has the norm {self._start_norm}: give a finite one that is not zero")
        self.vector: Tensor = first.div_(self._start_norm)
        """The next vector to multiply; unit length."""
        self._before: Tensor | None = None
        self._kept = first.new_empty((steps, first.numel())) if reorthogonalize else None
        if self._kept is not None:
            self._kept[0] = first
            self.vector = self._kept[0]
        self._alphas: list[float] = []
        self._betas: list[float] = []
        self._orthogonality = 0.0
        self.is_done = False

    @property
    def steps(self) -> int:
        """Number of steps that were taken."""
        return len(self._alphas)

    def advance(self, product: Tensor) -> Tensor | None:
        """Take a step.

        Args:
            product: The operator times `vector`; it is overwritten.

        Returns:
            A vector that is no longer needed, whose memory the next product may reuse; None where there is none.
        """
        unused: Tensor | None = None
        if self._before is not None:
            product.sub_(self._before, alpha=self._betas[-1])
        alpha = self._dot(self.vector, product)
        product.sub_(self.vector, alpha=alpha)
        self._alphas.append(alpha)
        if self._kept is not None:
            self._orthogonalize_(product, self._kept[: len(self._alphas)])
        beta = self._norm(product)
        self._betas.append(beta)
        scale = max(map(abs, self._alphas + self._betas))
        if beta <= _BREAKDOWN * torch.finfo(product.dtype).eps * scale:
            self._betas[-1], self.is_done = 0.0, True
        elif len(self._alphas) == self._steps:
            self.is_done = True
        elif self._kept is not None:
            self._before = self.vector
            self.vector = torch.div(product, beta, out=self._kept[len(self._alphas)])
            unused = product
        else:
            unused, self._before, self.vector = self._before, self.vector, product.div_(beta)
            self._watch()
        return unused

    def result(self) -> Tridiagonal:
        """The tridiagonal matrix of the steps so far.

        Raises:
            ValueError: No step was taken.
        """
        if not self._alphas:
            raise ValueError("no step was taken: call advance first")
        alphas, betas = torch.tensor([self._alphas, self._betas], dtype=torch.float64)
        kept = None if self._kept is None else self._kept[: len(self._alphas)]
        if kept is not None:
            gram = torch.stack([self._dots(kept, vector) for vector in kept])
            self._orthogonality = (gram - torch.eye(len(kept)).to(gram)).abs().max().item()
        return Tridiagonal(alphas, betas[:-1], self._betas[-1], self._orthogonality, kept)

    def _orthogonalize_(self, product: Tensor, kept: Tensor) -> None:
        for _ in range(2):
            product.addmv_(kept.T, self._dots(kept, product).to(product.dtype), alpha=-1)

    def _watch(self) -> None:
        """Measure the new vector against the first one."""
        number = len(self._alphas)
        if number % _WATCH_EVERY and number + 1 != self._steps:
            return
        first = self._start if isinstance(self._start, Tensor) else self._start()
        self._orthogonality = max(self._orthogonality, abs(self._dot(first, self.vector)) / self._start_norm)

    def _dot(self, first: Tensor, second: Tensor) -> float:
        return self._dots(first.unsqueeze(0), second).item()

    def _norm(self, vector: Tensor) -> float:
        return self._dot(vector, vector) ** 0.5


def lanczos(
    matvec: Callable[[Tensor], Tensor],
    start: Tensor | Callable[[], Tensor],
    steps: int,
    *,
    reorthogonalize: bool | None = None,
    budget_bytes: int = DEFAULT_BUDGET,
    dots: Callable[[Tensor, Tensor], Tensor] = plain_dots,
) -> Tridiagonal:
    """Run Lanczos with an operator.

    Args:
        matvec: Takes a vector `(n,)` and returns a new one, which is overwritten.
        start: The first vector, of any norm; or a function that returns it, which saves memory (see `Recurrence`).
        steps: Steps to take; an invariant subspace ends them earlier.
        reorthogonalize: Keep all vectors, `steps * n`, and make each new one orthogonal to them. None does so where
            they fit the budget; else the three-term recurrence runs, which keeps two vectors in addition to the
            product, finds converged eigenvalues more than once, and reports how much orthogonality it lost.
        budget_bytes: For kept vectors, where `reorthogonalize` is None.
        dots: Inner products; `VectorLayout.dots` for sharded vectors.

    Raises:
        ValueError: Less than one step or more steps than rows, or a start that is zero or not finite.
    """
    if isinstance(start, Tensor):
        check_steps(steps, {"an operator": start.numel()})
        if reorthogonalize is None:
            reorthogonalize = vector_bytes(steps, start.numel(), start.dtype) <= budget_bytes
    elif reorthogonalize is None:
        raise ValueError("give reorthogonalize=True or False where start is a function")
    recurrence = Recurrence(start, steps, reorthogonalize=reorthogonalize, dots=dots)
    while not recurrence.is_done:
        recurrence.advance(matvec(recurrence.vector))
    return recurrence.result()
