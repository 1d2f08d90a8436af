"""Images from files, upright and opaque, with one clear error where a file is none."""

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
    """Decode a whole image file, upright.

    - The orientation that a camera notes in EXIF is applied, and dropped where it cannot be read.
    - What is transparent, by an alpha channel, a palette or a colour, is laid over white.
    - Of several frames or pages the first counts.
    - CMYK and other colour spaces are converted by Pillow's formulas, without colour profiles. Of 16 bits a colour
      channel the upper 8 count; grey images of more than 8 bits are refused, since their range is not known.

    Args:
        path: The file.
        mode: Pillow's mode of the result: `RGB`, or `L` for one channel.

    Raises:
        ValueError: The file is missing, cut off, too large or no image; with its path.
    """
    from PIL import Image, ImageOps

    try:
        # Warnings are of notes beside good pixels, and of large images that are read all the same.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"it has more than 8 bits a channel (Pillow's mode {image.mode}); convert it to 8")
            image.load()  # decodes all of it, so that a file that was cut off shows here
            with contextlib.suppress(Exception):  # of notes that are damaged
                ImageOps.exif_transpose(image, in_place=True)
            return (_over_white(image) if image.has_transparency_data else image).convert(mode)
    except FileNotFoundError as error:
        raise ValueError(f"there is no image {path}: it was removed while the data were in use") from error
    except Exception as error:  # decoders raise of all kinds: struct.error, zlib.error, DecompressionBombError
        told = error_line(error)
        if not isinstance(error, OSError | ValueError | SyntaxError):  # of whose words only some are a sentence
            told = f"{type(error).__name__}: {told}".removesuffix(": ")
        raise ValueError(f"cannot read the image {path}: {told}; replace the file, or remove it") from error


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
