"""How far generated images are from real ones, without a network that would have to be downloaded.

Shapes: `N` images, `P` numbers an image, `K` features.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["PrincipalComponents", "frechet_distance"]


class PrincipalComponents:
    """Features of images: their coordinates along the directions in which real images vary most.

    Args:
        images: Real images `(N, ...)` of P numbers each.
        num_features: Directions, K.

    Raises:
        ValueError: More directions than the images span.
    """

    def __init__(self, images: Tensor, num_features: int) -> None:
        rows = images.flatten(1).double().cpu()
        if not 0 < num_features < min(rows.shape[0], rows.shape[1] + 1):
            raise ValueError(
                f"{num_features} principal components need more images than that, of at least as many numbers; here "
                f"are {rows.shape[0]} images of {rows.shape[1]} numbers: lower model.pca_features"
            )
        self.mean = rows.mean(0)
        self.directions = torch.linalg.svd(rows - self.mean, full_matrices=False).Vh[:num_features]

    def __call__(self, images: Tensor) -> Tensor:
        """Features `(N, K)` in float64 of images `(N, ...)`."""
        return (images.flatten(1).double().cpu() - self.mean) @ self.directions.T


def frechet_distance(features: Tensor, others: Tensor) -> float:
    """Squared Frechet distance of two normal distributions with the means and covariances of two sets of features.

    `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))` (Dowson and Landau 1982), the distance that Heusel et al. 2017 take
    between features of Inception; those of `PrincipalComponents` stay in the units of the pixels.

    Args:
        features: `(N, K)`, float64.
        others: `(M, K)`, float64.
    """
    first, second = (torch.atleast_2d(torch.cov(each.T)) for each in (features, others))
    root = _square_root(first)
    # C1 C2 and C1^(1/2) C2 C1^(1/2) have the same eigenvalues; the second is symmetric.
    crossed = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    means = (features.mean(0) - others.mean(0)).square().sum()
    return float(means + first.trace() + second.trace() - 2 * crossed)


def _square_root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T
