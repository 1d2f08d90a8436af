"""Images from files, with one clear error where a file is none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["IMAGE_SUFFIXES", "find_images", "read_image"]

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""Endings of the files that count as images, in lower case."""


def find_images(folder: Path) -> list[Path]:
    """Image files in a folder and below, sorted; hidden ones, which archives and viewers leave behind, are none."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


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
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"it has more than 8 bits a channel (Pillow's mode {image.mode}); convert it to 8")
            return image.convert(mode)  # decodes all of it, so that a file that was cut off shows here
    except FileNotFoundError as error:
        raise ValueError(f"there is no image {path}: it was removed while the data were in use") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        told = " ".join(str(error).split())[:200]
        raise ValueError(f"cannot read the image {path}: {told}; replace the file, or remove it") from error
