"""How far samples of a model are from real images, beside how far real images are from each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from .frechet import PrincipalComponents, frechet_distance

if TYPE_CHECKING:
    from .data import ImageData

__all__ = ["check_images", "compare_with_real"]

# Real images whose principal components are features: their decomposition takes a minute at 64 x 64 pixels in colour.
_REAL_IMAGES = 2000


def check_images(data: ImageData, num_features: int) -> None:
    """Check before training that there are images enough to compare with.

    Raises:
        ValueError: There are more principal components than pixels or training images, or one image for validation.
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
        part: Whose images the others are compared with.
        sample: Makes so many new images.
        num_features: Principal components.
        num_images: New images, and as many training images.

    Returns:
        The distances of new images and of training images: the second is what a perfect model would come to.
    """
    features = PrincipalComponents(data.real_images("train", _REAL_IMAGES), num_features)
    real = features(data.real_images(part, _REAL_IMAGES))
    made, seen = sample(num_images), data.real_images("train", num_images)
    return frechet_distance(features(made), real), frechet_distance(features(seen), real)
