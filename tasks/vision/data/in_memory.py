"""Small sets that are read into memory at once: what they share."""

from __future__ import annotations

import warnings

import torch

from .image_sets import ImageTensors
from .module import ImageDataModule

__all__ = ["InMemoryImages"]

# What scikit-learn fits in seconds, and copies several times as float64.
_MOST_IMAGES, _MOST_NUMBERS = 10_000, 32_000_000


class InMemoryImages(ImageDataModule):
    """Base of sets in memory. Subclasses set `_classes` and open `ImageTensors`."""

    def baseline(self) -> tuple[str, float]:
        """Logistic regression on the pixels, where these are few; else the share of the largest class."""
        train, val = self.part("train"), self.part("val")
        assert isinstance(train, ImageTensors)
        assert isinstance(val, ImageTensors)
        if len(train) > _MOST_IMAGES or max(train.images.numel(), val.images.numel()) > _MOST_NUMBERS:
            return super().baseline()
        try:
            from sklearn.exceptions import ConvergenceWarning
            from sklearn.linear_model import LogisticRegression
        except ModuleNotFoundError:
            return super().baseline()
        pixels = [images.flatten(1).to(torch.float32).div_(255).numpy() for images in (train.images, val.images)]
        mean, std = pixels[0].mean(), pixels[0].std()
        model = LogisticRegression(max_iter=50, C=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the accuracy settles long before the weights
            model.fit((pixels[0] - mean) / std, train.labels.numpy())
        return "logistic regression on the pixels", float(model.score((pixels[1] - mean) / std, val.labels.numpy()))
