"""Images to train diffusion models on."""

from .celeba import CelebA
from .digits import DigitImages
from .image_files import ImageFiles
from .module import ImageData

__all__ = ["CelebA", "DigitImages", "ImageData", "ImageFiles"]
