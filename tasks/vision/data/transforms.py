"""Crops, augmentation and normalisation of images: one frozen value that builds transforms of torchvision.

Items stay `uint8` until their batch is on the device, so that workers send a quarter of the bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Transforms"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Options that only one crop or policy reads.
_OWNERS = {
    "scale": ("crop", "resized"),
    "padding": ("crop", "padded"),
    "operations": ("policy", "randaugment"),
    "magnitude": ("policy", "randaugment"),
}


@dataclass(frozen=True, kw_only=True)
class Transforms:
    """Crops, augmentation and normalisation. None means the data set's own.

    Args:
        size: Height and width of the model's input, in pixels.
        crop: In training: `resized` resizes a random part of the image (as for ImageNet), `padded` pads the image and
            takes a random window (as for CIFAR), `center` crops as validation does.
        scale: For `resized`: smallest and largest fraction of the area; 0.08 and 1 by default.
        padding: For `padded`: black pixels on each side; 4 by default, unless the data set has its own value.
        flip: Probability of a horizontal flip in training.
        policy: torchvision's name of an augmentation policy, or `none`.
        operations: For `randaugment`: operations per image; 2 by default.
        magnitude: For `randaugment`: their strength, 0 to 30; 9 by default.
        erasing: Probability that a rectangle is replaced by the mean in training.
        resize: In validation: length of the shorter side before the central crop of `size`; None for `size` itself.
        eval_size: Height and width of the model's input in validation; None for `size`.
        interpolation: Interpolation of all resizing.
        mean: Of each channel, in [0, 1].
        std: Of each channel, in [0, 1].

    Raises:
        ValueError: A value is out of range, or belongs to another crop or policy.
    """

    size: int | None = None
    crop: Literal["resized", "padded", "center"] = "padded"
    scale: tuple[float, float] | None = None
    padding: int | None = None
    flip: float | None = None
    policy: Literal["none", "randaugment", "autoaugment", "trivialaugment"] = "none"
    operations: int | None = None
    magnitude: int | None = None
    erasing: float = 0.0
    resize: int | None = None
    eval_size: int | None = None
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        for name in ("size", "resize", "eval_size", "operations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"transforms.{name} must be at least 1, not {value}")
        for name in ("flip", "erasing"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"transforms.{name} is a probability in [0, 1], not {value}")
        if self.padding is not None and self.padding < 0:
            raise ValueError(f"transforms.padding must not be negative, not {self.padding}")
        if self.magnitude is not None and not 0 <= self.magnitude <= 30:
            raise ValueError(f"transforms.magnitude must be in 0 to 30, not {self.magnitude}")
        if self.scale is not None and not 0.0 < self.scale[0] <= self.scale[1] <= 1.0:
            raise ValueError(
                f"transforms.scale is two fractions of the area in (0, 1], the smaller first, not {self.scale}"
            )
        if self.mean is not None and not all(0.0 <= value <= 1.0 for value in self.mean):
            raise ValueError(f"transforms.mean is of pixels in [0, 1], not {self.mean}; divide values of bytes by 255")
        if self.std is not None and not all(0.0 < value <= 1.0 for value in self.std):
            raise ValueError(f"transforms.std is of pixels in [0, 1], not {self.std}; divide values of bytes by 255")
        if self.resize is not None and self.resize < (self.eval_size or self.size or 1):
            raise ValueError(
                f"transforms.resize = {self.resize} is below the crop of {self.eval_size or self.size}; raise resize"
            )
        for name, (option, owner) in _OWNERS.items():
            chosen = getattr(self, option)
            if getattr(self, name) is not None and chosen != owner:
                raise ValueError(
                    f"transforms.{name} is for {option} {owner}, but {option} is {chosen}: leave it out, or set "
                    f"transforms.{option} {owner}"
                )

    def training(self) -> Callable[[Any], Any]:
        """From a PIL image or a `uint8` tensor `(C, H, W)` to a `uint8` tensor; draws from torch's global generator."""
        from torchvision.transforms import v2

        assert self.size is not None
        assert self.flip is not None
        assert self.mean is not None
        steps: list[Callable[[Any], Any]] = []
        mode = v2.InterpolationMode(self.interpolation)
        if self.crop == "resized":
            scale = self.scale or (0.08, 1.0)
            steps.append(v2.RandomResizedCrop(self.size, scale=scale, interpolation=mode, antialias=True))
        elif self.crop == "padded":
            steps.append(_Sized(self.size, mode))
            if padding := 4 if self.padding is None else self.padding:
                steps.append(v2.RandomCrop(self.size, padding=padding))
        else:
            steps += self._central(self.size, mode)
        if self.flip:
            steps.append(v2.RandomHorizontalFlip(self.flip))
        if self.policy == "randaugment":
            magnitude = 9 if self.magnitude is None else self.magnitude
            steps.append(v2.RandAugment(self.operations or 2, magnitude, interpolation=mode))
        elif self.policy != "none":
            policy = v2.AutoAugment if self.policy == "autoaugment" else v2.TrivialAugmentWide
            steps.append(policy(interpolation=mode))
        steps.append(_to_tensor)
        if self.erasing:
            steps.append(v2.RandomErasing(self.erasing, value=[round(255 * value) for value in self.mean]))
        return _Chain(steps)

    def evaluation(self) -> Callable[[Any], Any]:
        """From a PIL image or a `uint8` tensor `(C, H, W)` to its central crop, `uint8`."""
        from torchvision.transforms import v2

        size = self.eval_size or self.size
        assert size is not None
        return _Chain([*self._central(size, v2.InterpolationMode(self.interpolation)), _to_tensor])

    def _central(self, size: int, mode: Any) -> list[Callable[[Any], Any]]:
        """Resize the shorter side and crop the centre; leave images that have the size already."""
        from torchvision.transforms import v2

        steps = [v2.Resize(self.resize or size, interpolation=mode, antialias=True), v2.CenterCrop(size)]
        return [_UnlessSized(size, steps)] if self.resize in (None, size) else list(steps)


class _Chain:
    """Transforms one after another; `v2.Compose` inspects its inputs again for each, which costs more than a crop."""

    def __init__(self, steps: list[Callable[[Any], Any]]) -> None:
        self.steps = steps

    def __call__(self, image: Any) -> Any:
        for step in self.steps:
            image = step(image)
        return image


class _UnlessSized:
    """Applies transforms to images that do not have the size yet."""

    def __init__(self, size: int, steps: list[Any]) -> None:
        self.size = size
        self.steps = steps

    def __call__(self, image: Any) -> Any:
        from torchvision.transforms.v2 import functional

        if functional.get_size(image) != [self.size, self.size]:
            for step in self.steps:
                image = step(image)
        return image


class _Sized(_UnlessSized):
    """Resizes images to a square of the size."""

    def __init__(self, size: int, mode: Any) -> None:
        from torchvision.transforms import v2

        super().__init__(size, [v2.Resize((size, size), interpolation=mode, antialias=True)])


def _to_tensor(image: Any) -> Any:
    from torch import Tensor
    from torchvision.transforms.v2 import functional

    return image if isinstance(image, Tensor) else functional.pil_to_tensor(image)
