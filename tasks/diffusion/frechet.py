"""Distance of generated images from real ones, without a network that would have to be downloaded.

Shapes: `N` images, `P` numbers an image, `K` features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .data import ImageData

__all__ = ["PrincipalComponents", "check_images", "compare_with_real", "frechet_distance"]


class PrincipalComponents:
    """Features of images: their coordinates in the first principal components of real images.

    Args:
        images: Real images `(N, ...)` of P numbers each.
        num_features: Principal components, K.

    Raises:
        ValueError: There are more components than the images span.
    """

    def __init__(self, images: Tensor, num_features: int) -> None:
        rows = images.flatten(1).double().cpu()
        if not 0 < num_features < min(rows.shape[0], rows.shape[1] + 1):
            raise ValueError(
                f"{num_features} principal components need more than {num_features} images of at least as many numbers;"
                f" there are {rows.shape[0]} images of {rows.shape[1]} numbers: lower model.pca_features"
            )
        self.mean = rows.mean(0)
        self.directions = torch.linalg.svd(rows - self.mean, full_matrices=False).Vh[:num_features]

    def __call__(self, images: Tensor) -> Tensor:
        """Features `(N, K)` in float64 of images `(N, ...)`."""
        return (images.flatten(1).double().cpu() - self.mean) @ self.directions.T


def frechet_distance(features: Tensor, others: Tensor) -> float:
    """Squared Frechet distance of two normal distributions with the means and covariances of two sets of features.

    `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))` (Dowson and Landau 1982), which Heusel et al. 2017 compute from
    Inception's features. Those of `PrincipalComponents` keep the units of the pixels.

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


# Real images that define the principal components; the decomposition takes a minute for 64 x 64 pixels in colour.
_REAL_IMAGES = 2000


def check_images(data: ImageData, num_features: int) -> None:
    """Check before training that there are enough real images for a comparison.

    Raises:
        ValueError: There are more principal components than pixels or training images, or only one validation image.
    """
    PrincipalComponents(data.real_images("train", num_features + 1), num_features)
    if len(data.real_images("val", 2)) < 2:
        raise ValueError("a comparison with real images needs at least 2 for validation; set model.pca_features to 0")


def compare_with_real(
    data: ImageData,
    part: Literal["val", "test"],
    sample: Callable[[int], Tensor],
    *,
    num_features: int,
    num_images: int,
) -> tuple[float, float]:
    """Frechet distances in principal components of the training images.

    Args:
        data: The real images.
        part: The part whose images are the reference.
        sample: Generates a given number of images.
        num_features: Principal components.
        num_images: Number of generated images, and of training images.

    Returns:
        The distances of generated images and of training images; the second is what a perfect model would reach.
    """
    features = PrincipalComponents(data.real_images("train", _REAL_IMAGES), num_features)
    real = features(data.real_images(part, _REAL_IMAGES))
    generated, training = sample(num_images), data.real_images("train", num_images)
    return frechet_distance(features(generated), real), frechet_distance(features(training), real)
