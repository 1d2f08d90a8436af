"""Faces: CelebA, in the layout of torchvision."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from ...data.module import hash_paths
from .module import ImageData, Parts
from .sources import ScaledImages, split_by_name

__all__ = ["CelebA", "find_folder", "list_images", "read_partition"]

IMAGES = "img_align_celeba"
PARTITION = "list_eval_partition.txt"
ATTRIBUTES = "list_attr_celeba.txt"

_log = rank_zero_only(logging.getLogger(__name__).info)


class CelebA(ImageData):
    """The 202,599 aligned faces of CelebA (Liu et al. 2015), or some of them, with the authors' split.

    Reads `celeba/img_align_celeba/*.jpg`, `celeba/list_eval_partition.txt` and, to check that they belong together,
    `celeba/list_attr_celeba.txt`. torchvision's own class checks the md5 sum of every annotation file, so it rejects a
    part of the data set. Without the partition file, hashes of the names select a fixed twentieth for validation, and
    the log says so.

    Args:
        path: The folder that torchvision calls root, which contains `celeba`; or that folder, or the folder of images.
        image_size: Pixels a side.
        crop: Pixels a side of the central crop of the 178 x 218 that is scaled to `image_size`. 178 is the whole width,
            as in denoising-diffusion-pytorch; 140 is the face, as in Song et al. 2021 (score_sde).
        batch_size: Images in a batch of one rank.
        num_workers: Processes that read ahead, for each loader; 0 reads in the training process.
        kwargs: See `ImageData`.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        path: str,
        *,
        image_size: int = 64,
        crop: int = 178,
        batch_size: int = 128,
        num_workers: int = 4,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size=image_size, channels=3, batch_size=batch_size, num_workers=num_workers, **kwargs)
        if crop < 1:
            raise ValueError(f"`crop` must be at least 1, got {crop}.")
        self.path = Path(path).expanduser()
        self.crop = crop

    def open_parts(self) -> Parts:
        """See `ImageData.open_parts`.

        Raises:
            ValueError: A folder or a file is missing or does not belong to the images.
        """
        folder = find_folder(self.path)
        names = list_images(folder)
        parts = read_partition(folder.parent, names)
        if parts is None:
            train, val = split_by_name([folder / name for name in names], 0.05, root=folder)
            _log("no %s: %d images for training, %d for validation, by hash", PARTITION, len(train), len(val))
            return Parts(self._scaled(train), self._scaled(val))
        train, val, test = ([folder / name for name in names if parts[name] == part] for part in range(3))
        if not train or not val:
            raise ValueError(
                f"{folder.parent / PARTITION} has {len(train)} images for training (0) and {len(val)} for validation "
                "(1); each needs at least one"
            )
        return Parts(self._scaled(train), self._scaled(val), self._scaled(test) if test else None)

    def digest(self, images: ScaledImages) -> str:
        """See `ImageData.digest`: of names and sizes of the files."""
        return hash_paths(images.paths, images.paths[0].parent)

    def _scaled(self, paths: list[Path]) -> ScaledImages:
        return ScaledImages(paths, image_size=self.image_size, channels=3, crop=self.crop)


def find_folder(path: Path) -> Path:
    """The folder of aligned images.

    Args:
        path: torchvision's root (which contains `celeba`), that `celeba` folder, or the folder of the images.

    Raises:
        ValueError: It is none of them.
    """
    for folder in (path / "celeba" / IMAGES, path / IMAGES):
        if folder.is_dir():
            return folder
    if path.is_dir() and next(path.glob("*.jpg"), None) is not None:
        return path
    raise ValueError(
        f"there is no {path / 'celeba' / IMAGES}: unpack img_align_celeba.zip there, or set data.path to the folder of "
        "the images"
    )


def list_images(folder: Path) -> list[str]:
    """Names of the images, sorted.

    Raises:
        ValueError: There are fewer than two.
    """
    with os.scandir(folder) as entries:  # without a system call for each of the 202,599 files
        names = sorted(entry.name for entry in entries if entry.name.endswith(".jpg") and entry.name[0] != ".")
    if len(names) < 2:
        raise ValueError(f"{folder} contains {len(names)} images (*.jpg): unpack img_align_celeba.zip there")
    return names


def read_partition(annotations: Path, names: list[str]) -> dict[str, int] | None:
    """The official part of each image: 0 for training, 1 for validation, 2 for test; checks the file of attributes too.

    Args:
        annotations: Folder of the annotation files.
        names: Names of the images.

    Returns:
        Part by name; None without a partition file.

    Raises:
        ValueError: A file does not belong to these images, or is damaged; with its path, line and counts.
    """
    attributes, partition = annotations / ATTRIBUTES, annotations / PARTITION
    if attributes.is_file():
        _check_attributes(attributes, names)
    if not partition.is_file():
        return None
    rows = list(_rows(partition))
    _check_names(partition, [row[0] for _, row in rows], names)
    parts = {}
    for line, row in rows:
        if len(row) != 2 or row[1] not in ("0", "1", "2"):
            raise ValueError(
                f"{partition}, line {line}: {' '.join(row)!r} is not an image and its part 0, 1 or 2; replace the file"
            )
        parts[row[0]] = int(row[1])
    return parts


def _check_attributes(path: Path, names: list[str]) -> None:
    """Check the file of attributes: the number of images, the names of the attributes, and one row per image."""
    rows = list(_rows(path))
    if len(rows) < 2 or len(rows[0][1]) != 1 or not rows[0][1][0].isdigit():
        raise ValueError(f"{path}: it must begin with the number of images and a line of attributes; replace the file")
    (_, (count,)), (_, attributes), *images = rows
    if int(count) != len(images):
        raise ValueError(f"{path}: its first line says {count} images, but {len(images)} follow; replace the file")
    _check_names(path, [row[0] for _, row in images], names)
    for line, row in images:
        if len(row) != 1 + len(attributes):
            raise ValueError(
                f"{path}, line {line}: {len(row) - 1} values for {len(attributes)} attributes; replace the file"
            )


def _check_names(path: Path, listed: list[str], names: list[str]) -> None:
    """Check that a file lists each image once."""
    if len(listed) != len(names):
        raise ValueError(
            f"{path} lists {len(listed)} images, but there are {len(names)} in the folder; it belongs to other images, "
            "or the archive was not unpacked to its end"
        )
    if difference := sorted(set(names).symmetric_difference(listed)):
        where = "the file does not list it" if difference[0] in set(names) else "it is not in the folder"
        raise ValueError(f"{path} does not belong to these images: {difference[0]}: {where}")


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Lines of a file that are not empty: their number from 1, and their words."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if words := line.split():
                yield number, words
