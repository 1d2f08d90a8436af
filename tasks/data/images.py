"""Images from files, with one clear error where a file is none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["IMAGE_SUFFIXES", "read_image"]

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""Endings of the files that count as images, in lower case."""


def read_image(path: str | Path, mode: str = "RGB") -> Image:
    """Decode a whole image file.

    Args:
        path: The file.
        mode: Pillow's mode of the result: `RGB`, or `L` for one channel.

    Raises:
        ValueError: The file is missing, cut off or no image; with its path.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert(mode)  # decodes all of it, so that a file that was cut off shows here
    except FileNotFoundError as error:
        raise ValueError(f"there is no image {path}: it was removed while the data were in use") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        told = " ".join(str(error).split())[:200]
        raise ValueError(f"cannot read the image {path}: {told}; replace the file, or remove it") from error
