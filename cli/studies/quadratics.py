"""Quadratics of random dense blocks with given eigenvalues.

The loss is `w H w / 2`; H has no linear term, and blocks on its diagonal alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

__all__ = ["BlockQuadratic", "check_condition", "random_quadratic"]

MOST_CONDITION = 1e10
"""Up to it, float64 tells the smallest eigenvalue of a dense matrix, also with Adam's diagonal, to some digits."""


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
        # QR of normal numbers with the signs of R put right, which is Haar's measure (Mezzadri 2007, Sec. 5).
        size = len(eigenvalues)
        rotation = nn.init.orthogonal_(torch.empty(size, size, dtype=torch.float64), generator=generator)
        block = rotation * torch.tensor(eigenvalues, dtype=torch.float64) @ rotation.T
        blocks.append((block + block.T) / 2)
    hessian = torch.block_diag(*blocks)
    start = torch.randn(len(hessian), generator=generator, dtype=torch.float64)
    return BlockQuadratic(hessian, start, tuple(map(len, blocks)))


def check_condition(what: str, condition_number: float) -> None:
    """Refuse a condition number that rounding would decide.

    Raises:
        ValueError: It is above 1e10.
    """
    if condition_number > MOST_CONDITION:
        raise ValueError(
            f"{what}: a condition number of {condition_number:.2g} is too large for float64; give up to 1e10"
        )
