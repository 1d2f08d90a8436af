"""Labelled images: folders, torchvision's sets on disk, and sets that come with installed packages."""

from .fashion_mnist import FashionMnist
from .folders import ImageFolders
from .mnist5k import Mnist5k
from .torchvision_data import TorchvisionData
from .transforms import Transforms

__all__ = ["FashionMnist", "ImageFolders", "Mnist5k", "TorchvisionData", "Transforms"]
