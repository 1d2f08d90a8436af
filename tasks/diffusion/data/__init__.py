"""Images to train diffusion models on."""

from .celeba import CelebA
from .module import ImageData
from .sources import DigitImages, ImageFiles

__all__ = ["CelebA", "DigitImages", "ImageData", "ImageFiles"]
