"""Quadratics of random dense blocks with given eigenvalues.

The loss is `w H w / 2`; H has no linear term, and blocks on its diagonal alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

__all__ = ["BlockQuadratic", "random_orthogonal", "random_quadratic"]


@dataclass(frozen=True)
class BlockQuadratic:
    """A quadratic and where it is started.

    Args:
        hessian: H, `(n, n)`, float64, symmetric and positive definite.
        start: First weights, `(n,)`.
        sizes: Lengths of the diagonal blocks; they sum to n.
    """

    hessian: Tensor
    start: Tensor
    sizes: tuple[int, ...]

    @property
    def gradient(self) -> Tensor:
        """The gradient at the start, `(n,)`."""
        return self.hessian @ self.start

    @property
    def condition_number(self) -> float:
        """Largest over smallest eigenvalue."""
        eigenvalues = torch.linalg.eigvalsh(self.hessian)
        return float(eigenvalues[-1] / eigenvalues[0])

    def blocks(self) -> list[BlockQuadratic]:
        """Each diagonal block as a problem of its own."""
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        parts = [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]
        return [BlockQuadratic(self.hessian[p, p], self.start[p], (len(self.start[p]),)) for p in parts]


def random_quadratic(spectra: Sequence[Sequence[float]], generator: Generator) -> BlockQuadratic:
    """Blocks `Q diag(eigenvalues) Q^T` with Haar-distributed Q, started at standard normal weights.

    Args:
        spectra: Eigenvalues of each block.
        generator: Draws Q and the start.
    """
    blocks = []
    for eigenvalues in spectra:
        rotation = random_orthogonal(len(eigenvalues), generator)
        block = rotation * torch.tensor(eigenvalues, dtype=torch.float64) @ rotation.T
        blocks.append((block + block.T) / 2)
    hessian = torch.block_diag(*blocks)
    start = torch.randn(len(hessian), generator=generator, dtype=torch.float64)
    return BlockQuadratic(hessian, start, tuple(map(len, blocks)))


def random_orthogonal(size: int, generator: Generator) -> Tensor:
    """A Haar-distributed orthogonal matrix (Mezzadri 2007, Sec. 5): QR of normal numbers, signs of R put right."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()
