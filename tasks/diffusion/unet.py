"""Building diffusers' U-Net from the fields of its configuration."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

import torch

from lightning_adam_mini.hints import did_you_mean

from ..errors import error_line

if TYPE_CHECKING:
    from diffusers import UNet2DModel

__all__ = ["build_unet", "check_unet", "fit_to_data"]

# Class-conditional models would need labels in training and in sampling.
_CLASS_OPTIONS = ("class_embed_type", "num_class_embeds")


def check_unet(config: dict[str, Any]) -> None:
    """Check a configuration before any data are read: the network is built without memory.

    Args:
        config: Fields of diffusers' UNet2DModel.

    Raises:
        ValueError: A field does not exist, with similar names; or the network cannot be built.
    """
    known = _fields()
    for name in config:
        if name in _CLASS_OPTIONS:
            raise ValueError(f"model.config.{name}: class-conditional models are not supported; leave it out")
        if name not in known:
            hint = did_you_mean(name, known, otherwise=f"; it has {', '.join(known)}")
            raise ValueError(f"UNet2DModel has no option {name!r}{hint}")
    size, channels = config.get("sample_size"), config.get("in_channels", 3)
    if config.get("out_channels", channels) != channels:
        raise ValueError(
            f"model.config.out_channels is {config['out_channels']} and in_channels {channels}: both are the channels "
            "of the images; leave them out to use the data's"
        )
    if size is not None and (not isinstance(size, int) or size < 1):
        raise ValueError(f"model.config.sample_size must be a number of pixels, not {size!r}")
    with torch.device("meta"):
        build_unet(config)


def fit_to_data(config: dict[str, Any], image_shape: tuple[int, int, int] | None) -> dict[str, Any]:
    """The configuration for images of a shape.

    Args:
        config: Fields of diffusers' UNet2DModel; channels and size default to the data's.
        image_shape: `(C, H, W)` of the data's images; None if unknown.

    Raises:
        ValueError: Channels or size differ from the data's, or the size cannot be halved as often as the U-Net does.
    """
    channels, size, width = image_shape or (config.get("in_channels", 3), *[config.get("sample_size")] * 2)
    for name, own, other in (("in_channels", channels, "channels"), ("sample_size", size, "pixels a side")):
        if config.get(name, own) != own:
            raise ValueError(
                f"the images have {own} {other}, but model.config.{name} is {config[name]}; leave it out to use the "
                "data's"
            )
    halvings = len(config.get("block_out_channels", _fields()["block_out_channels"])) - 1
    if size is not None and (size != width or size % 2**halvings):
        raise ValueError(
            f"images of {size} x {width} pixels: this U-Net halves a square {halvings} times, so the size must be a "
            f"multiple of {2**halvings}; change data.image_size, or the number of model.config.block_out_channels"
        )
    return {**config, "in_channels": channels, "out_channels": channels, "sample_size": size}


def build_unet(config: dict[str, Any]) -> UNet2DModel:
    """The U-Net of a configuration, with random weights.

    Raises:
        ValueError: diffusers cannot build it.
    """
    from diffusers import UNet2DModel

    # diffusers checks few of its arguments, so errors of any type are about the configuration.
    try:
        return UNet2DModel(**config)
    except Exception as error:
        raise ValueError(f"UNet2DModel cannot be built from model.config: {error_line(error)}") from error


def _fields() -> dict[str, Any]:
    """Fields of the configuration and their defaults."""
    from diffusers import UNet2DModel

    parameters = signature(UNet2DModel.__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}
