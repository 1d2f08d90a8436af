"""Labelled images: folders, torchvision's sets on disk, and sets that come with installed packages."""

from .folders import ImageFolders
from .in_memory import FashionMnist, Mnist5k, TorchvisionData
from .transforms import Transforms

__all__ = ["FashionMnist", "ImageFolders", "Mnist5k", "TorchvisionData", "Transforms"]
