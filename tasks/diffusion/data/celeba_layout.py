"""The files of CelebA as its authors publish them and torchvision unpacks them, with clear errors.

torchvision's own class checks the md5 sum of every annotation file, so it refuses a part of the data set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["find_folder", "list_images", "read_partition"]

IMAGES = "img_align_celeba"
PARTITION = "list_eval_partition.txt"
ATTRIBUTES = "list_attr_celeba.txt"


def find_folder(path: Path) -> Path:
    """The folder of aligned images that a path means.

    Args:
        path: torchvision's root (which has `celeba` in it), that `celeba` folder, or the folder of the images.

    Raises:
        ValueError: None of them.
    """
    for folder in (path / "celeba" / IMAGES, path / IMAGES):
        if folder.is_dir():
            return folder
    if path.is_dir() and next(path.glob("*.jpg"), None) is not None:
        return path
    raise ValueError(
        f"there is no {path / 'celeba' / IMAGES}: unpack img_align_celeba.zip there, or give data.path the folder of "
        "the images"
    )


def list_images(folder: Path) -> list[str]:
    """Names of the images, sorted.

    Raises:
        ValueError: There are fewer than two.
    """
    with os.scandir(folder) as entries:  # 202,599 of them: nothing is asked of each
        names = sorted(entry.name for entry in entries if entry.name.endswith(".jpg") and entry.name[0] != ".")
    if len(names) < 2:
        raise ValueError(f"{folder} holds {len(names)} images (*.jpg): unpack img_align_celeba.zip there")
    return names


def read_partition(annotations: Path, names: list[str]) -> dict[str, int] | None:
    """The official part of each image, 0 for training, 1 for validation and 2 for test; the other files are checked.

    Args:
        annotations: Folder of the annotation files.
        names: Names of the images.

    Returns:
        Part by name; None where there is no partition file.

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
    """Check the file of attributes: the number of images, the names of the attributes, and a row an image."""
    rows = list(_rows(path))
    if len(rows) < 2 or len(rows[0][1]) != 1 or not rows[0][1][0].isdigit():
        raise ValueError(f"{path}: it must begin with the number of images and a line of attributes; replace the file")
    (_, (told,)), (_, attributes), *images = rows
    if int(told) != len(images):
        raise ValueError(f"{path}: its first line tells {told} images, but {len(images)} follow; replace the file")
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
