"""Files that data modules of several domains read: images, and the sources of Python's standard library."""

from __future__ import annotations

import contextlib
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import error_line

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["IMAGE_SUFFIXES", "find_images", "library_files", "read_image"]


IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""Suffixes of image files, in lower case."""


def find_images(folder: Path) -> list[Path]:
    """Image files in a folder and below, sorted, without hidden ones, which archives and viewers leave behind."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def read_image(path: str | Path, mode: str = "RGB") -> Image:
    """Decode a whole image file, upright.

    - The EXIF orientation is applied; if it cannot be read, it is ignored.
    - Transparency, by an alpha channel, a palette or a colour, is blended over white.
    - Of several frames or pages the first is read.
    - CMYK and other colour spaces are converted by Pillow's formulas, without colour profiles. Colour channels of 16
      bits keep their upper 8; grey images of more than 8 bits are an error, since their range is not known.

    Args:
        path: The file.
        mode: Pillow's mode of the result: `RGB`, or `L` for one channel.

    Raises:
        ValueError: The file is missing, cut off, too large or no image; with its path.
    """
    from PIL import Image, ImageOps

    try:
        # Warnings are about metadata, and about large images, which are read anyway.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"it has more than 8 bits a channel (Pillow's mode {image.mode}); convert it to 8")
            image.load()  # decodes all pixels, so that a truncated file is an error here
            with contextlib.suppress(Exception):  # damaged metadata
                ImageOps.exif_transpose(image, in_place=True)
            return (_over_white(image) if image.has_transparency_data else image).convert(mode)
    except FileNotFoundError as error:
        raise ValueError(f"there is no image {path}: it was removed while the data were in use") from error
    except Exception as error:  # decoders raise struct.error, zlib.error, DecompressionBombError and more
        message = error_line(error)
        if not isinstance(error, OSError | ValueError | SyntaxError):  # others' messages alone may say nothing
            message = f"{type(error).__name__}: {message}".removesuffix(": ")
        raise ValueError(f"cannot read the image {path}: {message}; replace the file, or remove it") from error


def _over_white(image: Image) -> Image:
    from PIL import Image

    coloured = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured)


# Tests and tools that not every installation carries, and other people's packages.
_LEFT_OUT = frozenset(
    {"__pycache__", "_pyrepl", "config", "dist-packages", "ensurepip", "idle_test"}
    | {"idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo"}
)


def library_files() -> tuple[Path, list[Path]]:
    """Folder of the standard library, and its sources in the order of their paths.

    Raises:
        FileNotFoundError: They are not installed.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.rglob("*.py")) if _is_wanted(path.relative_to(root))]
    if not files:
        raise FileNotFoundError(f"there are no sources of the standard library in {root}: give data of your own")
    return root, files


def _is_wanted(path: Path) -> bool:
    """Whether a file, given relative to the library's folder, comes with every installation."""
    if any(part in _LEFT_OUT or part.startswith("config-") for part in path.parts):
        return False
    # Also leaves out `_sysconfigdata*`, which the build generates.
    return path.parts[0].removesuffix(".py") in sys.stdlib_module_names
