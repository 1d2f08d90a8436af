"""Sources of images that most machines have: a folder of files, and the digits of scikit-learn."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import Dataset

from lightning_adam_mini.hints import require_package

from ...data.cache import default_cache_dir, remember
from ...data.module import hash_paths
from ...data.sources import IMAGE_SUFFIXES, find_images, read_image
from ...data.splits import check_val_fraction, choose_parts, named_parts
from .module import ImageData, Parts

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["DigitImages", "ImageFiles", "ScaledImages", "split_by_name"]

_REMEDY = "name all of them, or set `named_splits` to false to split them by hash"

_log = rank_zero_only(logging.getLogger(__name__).info)


class ScaledImages(Dataset[Tensor]):
    """Images of files, cropped and scaled to `(C, H, W)` in [-1, 1].

    Args:
        paths: The files.
        image_size: Pixels a side. The shorter side is scaled to it, and the longer one cropped in the centre.
        channels: 3 or 1.
        crop: Pixels a side of a central crop before scaling; None for the whole image.

    Raises:
        ValueError: torchvision is missing.
    """

    def __init__(self, paths: Sequence[Path], *, image_size: int, channels: int, crop: int | None = None) -> None:
        require_package("torchvision", "a folder of images", extra="diffusion")
        self.paths = paths
        self.image_size = image_size
        self.mode = "RGB" if channels == 3 else "L"
        self.crop = crop

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """One image; see `read`."""
        from torchvision.transforms import functional

        image = self.read(self.paths[index])
        if self.crop is not None:
            image = functional.center_crop(image, [self.crop])
        image = functional.center_crop(functional.resize(image, [self.image_size]), [self.image_size])
        return functional.pil_to_tensor(image).float() / 127.5 - 1

    def read(self, path: Path) -> Image:
        """Decode a file.

        Raises:
            ValueError: The file is not an image, or the image is smaller than `crop`; with its path.
        """
        image = read_image(path, self.mode)
        width, height = image.size
        if self.crop is not None and min(width, height) < self.crop:  # torchvision would pad it with black
            raise ValueError(f"{path} has {width} x {height} pixels, fewer than the crop of {self.crop}: lower `crop`")
        return image


class ImageFiles(ImageData):
    """All images in a folder and its subfolders.

    Names of folders and files say which images are held out, as `datasets` reads them: `train/`, `validation/` (or
    `val`, `valid`, `dev`) and `test/`. Without such names, a hash of the files' names selects the validation images,
    which are the same on every machine.

    Args:
        path: The folder.
        image_size: Pixels a side; see `ScaledImages`.
        crop: Pixels a side of a central crop before scaling; the whole image by default.
        channels: 3 for colour, 1 for grey; images are converted.
        val_fraction: Fraction of the images for validation, if names do not say it.
        named_splits: Read parts from names of folders and files; false splits all images by hash.
        check_files: Decode every file before training starts, once for files that do not change. Without it, a damaged
            file stops the run when it is read.
        kwargs: See `ImageData`.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        path: str,
        *,
        image_size: int = 64,
        crop: int | None = None,
        channels: Literal[1, 3] = 3,
        val_fraction: float = 0.05,
        named_splits: bool = True,
        check_files: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size=image_size, channels=channels, **kwargs)
        check_val_fraction(val_fraction)
        if crop is not None and crop < 1:
            raise ValueError(f"`crop` must be at least 1, got {crop}.")
        self.path = Path(path).expanduser()
        self.crop = crop
        self.val_fraction = val_fraction
        self.named_splits = named_splits
        self.check_files = check_files
        self._found: list[Path] = []

    def setup(self, stage: str | None = None) -> None:
        """See `ImageData.setup`; with `check_files`, all images are decoded before training.

        Raises:
            ValueError: One of them cannot be read.
        """
        super().setup(stage)
        if self.check_files and stage in (None, "fit") and (self.trainer is None or self.trainer.is_global_zero):
            images = self._scaled(self._found)
            name = f"readable-{images.mode}-{images.crop or 'whole'}"
            remember(default_cache_dir(), name, images.paths, partial(_read_all, images, self.path))

    def open_parts(self) -> Parts:
        """See `ImageData.open_parts`.

        Raises:
            ValueError: There is no such folder, or it has fewer than two images.
        """
        if not self.path.is_dir():
            raise ValueError(f"there is no folder {self.path}: give data.path a folder of images")
        self._found = find_images(self.path)
        if (number := len(self._found)) < 2:
            kinds = " ".join(sorted(IMAGE_SUFFIXES))
            raise ValueError(
                f"{self.path} contains {number} images ({kinds}); at least 2 are needed, one for validation"
            )
        parts = named_parts(self._found, self.path, "images", remedy=_REMEDY) if self.named_splits else {}
        train, val, test = self._found, [], []
        if parts:
            chosen = choose_parts(list(parts), self.path)
            train, val, test = ([file for name in names for file in parts[name]] for names in chosen.values())
        if not val:
            train, val = split_by_name(train, self.val_fraction, root=self.path)
        _log("%s: %d images for training, %d for validation", self.path, len(train), len(val))
        return Parts(self._scaled(train), self._scaled(val), self._scaled(test) if test else None)

    def digest(self, images: ScaledImages) -> str:
        """See `ImageData.digest`: of names and sizes of the files."""
        return hash_paths(images.paths, self.path)

    def _scaled(self, paths: Sequence[Path]) -> ScaledImages:
        return ScaledImages(paths, image_size=self.image_size, channels=self.channels, crop=self.crop)


def _read_all(images: ScaledImages, folder: Path) -> bool:
    """Read every file, which raises for a damaged one; return True."""
    _log("%s: reading all %d images, to find damaged ones before training", folder, len(images))
    for path in images.paths:
        images.read(path)
    return True


def split_by_name(paths: Sequence[Path], val_fraction: float, *, root: Path) -> tuple[list[Path], list[Path]]:
    """Training and validation files; the files whose names below `root` have the smallest hashes are held out.

    Both parts have at least one file, and few files change sides when files are added.
    """
    ordered = sorted(paths, key=lambda path: blake2b(path.relative_to(root).as_posix().encode()).digest())
    number = min(max(1, round(val_fraction * len(paths))), len(paths) - 1)
    held_out = set(ordered[:number])
    return [path for path in paths if path not in held_out], sorted(held_out)


class DigitImages(ImageData):
    """The 1,797 grey digits of 8 x 8 pixels in scikit-learn (UCI, Alpaydin and Kaynak 1998).

    The split is fixed: 1,527 images for training and 270 for validation. Digits are never flipped.

    Args:
        kwargs: See `ImageData`.

    Raises:
        ValueError: scikit-learn is missing.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(image_size=8, channels=1, flip=False, **kwargs)

    def open_parts(self) -> Parts:
        """See `ImageData.open_parts`."""
        require_package("sklearn", type(self).__name__, extra="diffusion", package="scikit-learn")
        from sklearn.datasets import load_digits

        images = torch.tensor(load_digits().images / 8 - 1, dtype=torch.float32)[:, None]
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        held_out = len(images) * 15 // 100 + 1
        return Parts(list(images[order[held_out:]]), list(images[order[:held_out]]))
