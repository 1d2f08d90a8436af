"""Quadratics of random dense blocks with given eigenvalues, and descent on them with a fixed diagonal scale.

The loss is `w H w / 2`; H has blocks on its diagonal alone, and there is no linear term.

Gradient descent, block-wise gradient descent, Adam with a frozen second moment (beta1 = 0, beta2 = 1) and Adam-mini
with a frozen one are all `w <- w - rate * D H w` with a diagonal D. With S = D^(1/2) H D^(1/2) = U diag(s) U^T the loss
after t iterations is `sum_i s_i (1 - rate s_i)^(2t) c_i^2 / 2`, c = U^T D^(-1/2) w_0, so nothing is iterated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

__all__ = [
    "BlockQuadratic",
    "ScaledDescent",
    "adam_mini_scale",
    "adam_scale",
    "blockwise_scale",
    "check_condition",
    "random_quadratic",
]

MOST_CONDITION = 1e10
"""Up to this, float64 has some digits of the smallest eigenvalue of a dense matrix, also with Adam's diagonal."""


@dataclass(frozen=True)
class BlockQuadratic:
    """A quadratic and its first weights.

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
    """Reject a condition number so large that rounding would decide.

    Raises:
        ValueError: It is above 1e10.
    """
    if condition_number > MOST_CONDITION:
        raise ValueError(
            f"{what}: a condition number of {condition_number:.2g} is too large for float64; give up to 1e10"
        )


class ScaledDescent:
    """Descent on one quadratic with the diagonal scale D.

    Args:
        problem: The quadratic with n weights.
        scale: The diagonal of D, `(n,)`, positive; ones for gradient descent.
    """

    def __init__(self, problem: BlockQuadratic, scale: Tensor | None = None) -> None:
        scale = torch.ones_like(problem.start) if scale is None else scale
        root = scale.sqrt()
        self.eigenvalues, vectors = torch.linalg.eigh(root[:, None] * problem.hessian * root)
        self.coefficients = vectors.T @ (problem.start / root)

    @property
    def condition_number(self) -> float:
        """Largest over smallest eigenvalue of D H."""
        return float(self.eigenvalues[-1] / self.eigenvalues[0])

    @property
    def worst_case_rate(self) -> float:
        """The rate `2 / (L + mu)`, which contracts the worst direction most."""
        return float(2 / (self.eigenvalues[-1] + self.eigenvalues[0]))

    def losses(self, rate: float, iterations: int) -> Tensor:
        """The loss after 0, 1, ... `iterations`, `(iterations + 1,)`."""
        steps = torch.arange(iterations + 1, dtype=torch.float64)
        return torch.stack([self._loss(rate, step) for step in steps.tolist()])

    def best_rate(self, iterations: int, *, tried: int = 40) -> float:
        """Of constant rates in `[1e-3, 1) * 2 / L`, evenly spaced in their logarithm, that of the least final loss."""
        largest = 2 / float(self.eigenvalues[-1])
        rates = [largest * 1e-3 ** (number / tried) for number in range(1, tried + 1)]
        rates.append(self.worst_case_rate)
        return min(rates, key=lambda rate: float(self._loss(rate, iterations)))

    def iterations_to(self, relative: float, rate: float) -> int:
        """Iterations until the loss is `relative` times the first one; the loss falls at any rate up to `2 / L`.

        Raises:
            ValueError: The rate is 2 / L or more, where the loss does not fall to zero.
        """
        if not 0 < rate < 2 / float(self.eigenvalues[-1]):
            raise ValueError(f"rate {rate} must be above 0 and below 2 / L = {2 / float(self.eigenvalues[-1]):.3g}")
        target = relative * float(self._loss(rate, 0))
        low, high = 0, 1
        while float(self._loss(rate, high)) > target:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if float(self._loss(rate, middle)) > target else (low, middle)
        return high

    def _loss(self, rate: float, step: float) -> Tensor:
        shrink = (1 - rate * self.eigenvalues).abs().pow(2 * step)
        return (self.eigenvalues * shrink * self.coefficients.square()).sum() / 2


def adam_scale(problem: BlockQuadratic) -> Tensor:
    """Adam's D with beta2 = 1 and no eps: one over the size of the first gradient, element by element."""
    return 1 / problem.gradient.abs()


def adam_mini_scale(problem: BlockQuadratic) -> Tensor:
    """Adam-mini's D with beta2 = 1 and no eps: one over the root mean square of the first gradient of a block."""
    parts = problem.gradient.split(problem.sizes)
    return torch.cat([torch.full_like(part, math.sqrt(len(part)) / float(part.norm())) for part in parts])


def blockwise_scale(problem: BlockQuadratic) -> Tensor:
    """Block-wise gradient descent's D: each block's own `2 / (L_b + mu_b)`; its rate is 1."""
    rates = [ScaledDescent(block).worst_case_rate for block in problem.blocks()]
    return torch.cat(
        [torch.full((size,), r, dtype=torch.float64) for size, r in zip(problem.sizes, rates, strict=True)]
    )
