"""Networks by name: classification models of torchvision, and models of timm as `timm/NAME`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_adam_mini.hints import did_you_mean, require_package

from ..errors import error_line

__all__ = ["build_model", "check_name", "inspect_model"]

TIMM = "timm/"


def check_name(name: str) -> None:
    """Check that a network of this name exists.

    Raises:
        ValueError: It does not; with similar names.
    """
    if name.startswith(TIMM):
        timm, short = _timm(), name.removeprefix(TIMM)
        if not timm.is_model(short):
            hint = did_you_mean(short, timm.list_models(), cutoff=0.5, template=f"{TIMM}{{}}")
            raise ValueError(f"model.architecture: timm has no model {short!r}{hint}")
        return
    models = _torchvision()
    known = models.list_models(module=models)
    if name not in known:
        otherwise = ", such as resnet18; those of timm are timm/NAME"
        hint = did_you_mean(name, known, cutoff=0.5, otherwise=otherwise)
        raise ValueError(f"model.architecture: torchvision has no classification model {name!r}{hint}")


def build_model(
    name: str, *, num_classes: int, in_channels: int = 3, small_input: bool = False, options: dict[str, Any]
) -> nn.Module:
    """A network with random weights.

    Args:
        name: Name in torchvision, such as `resnet50`, or in timm, such as `timm/convnext_tiny`.
        num_classes: Number of outputs.
        in_channels: Channels of an image, to which the first convolution is adapted.
        small_input: Give a ResNet a first convolution of 3x3 with stride 1, and no max pooling (He et al. 2016,
            section 4.2).
        options: Arguments of the model's constructor, such as `drop_path_rate`.

    Raises:
        ValueError: There is no such network, or the options do not fit it.
    """
    check_name(name)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The default weight initialization")
            if name.startswith(TIMM):
                channels = {} if in_channels == 3 else {"in_chans": in_channels}
                short = name.removeprefix(TIMM)
                model = _timm().create_model(short, pretrained=False, num_classes=num_classes, **channels, **options)
            else:
                model = _torchvision().get_model(name, weights=None, num_classes=num_classes, **options)
    except Exception as error:
        raise ValueError(f"model.options: {name} cannot be built with {options}: {error_line(error)}") from error
    if in_channels != 3 and not name.startswith(TIMM):
        _replace_first_convolution(model, name, in_channels)
    if small_input:
        _shrink_stem(model, name)
    return model


def inspect_model(model: nn.Module, name: str, shape: tuple[int, int, int], num_classes: int) -> float:
    """Run a meta-device network on images of a shape, which takes no memory and almost no time.

    Args:
        model: The network, on the meta device.
        name: Its name in messages.
        shape: Channels, height and width.
        num_classes: Number of outputs that it must have.

    Returns:
        FLOPs of a forward and backward pass for one image: three times those of the forward pass.

    Raises:
        ValueError: It does not accept such images, or does not return one score per class.
    """
    size = "x".join(map(str, shape))
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad():
            output = model.train()(torch.empty(2, *shape, device="meta"))
    except Exception as error:
        raise ValueError(
            f"{name} cannot take images of {size} ({error_line(error)}): set data.transforms.size, or the size in "
            "model.options (image_size in torchvision, img_size in timm)"
        ) from error
    if not isinstance(output, torch.Tensor):
        raise ValueError(
            f"{name} returns several outputs in training; turn the auxiliary ones off: model.options.aux_logits=false"
        )
    if output.shape != (2, num_classes):
        raise ValueError(
            f"{name} returns {tuple(output.shape[1:])} for an image, not one score for each of {num_classes} classes"
        )
    return 3.0 * counter.get_total_flops() / 2


def _replace_first_convolution(model: nn.Module, name: str, in_channels: int) -> None:
    """Replace the first convolution by one of other input channels, with weights of the same spread."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, _like(module, in_channels=in_channels))
            return
    raise ValueError(f"{name} has no convolution of RGB images to replace: in_channels = {in_channels} is not possible")


def _shrink_stem(model: nn.Module, name: str) -> None:
    first, pool = getattr(model, "conv1", None), getattr(model, "maxpool", None)
    if isinstance(first, nn.Sequential) and pool is not None:
        raise ValueError(f"model.small_input needs one first convolution; {name} has a stem of several: leave it out")
    if not isinstance(first, nn.Conv2d) or pool is None:
        raise ValueError(f"model.small_input is for ResNets, and {name} is not one: leave it out")
    model.conv1 = _like(first, kernel_size=3, stride=1, padding=1)
    model.maxpool = nn.Identity()


def _like(convolution: nn.Conv2d, **changes: Any) -> nn.Conv2d:
    """A copy of a convolution with some settings changed, initialised for the same variance of its output gradients."""
    own = {
        name: getattr(convolution, name)
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    }
    weight = convolution.weight.detach()
    made = nn.Conv2d(**{**own, **changes}, bias=convolution.bias is not None, device=weight.device, dtype=weight.dtype)
    if not weight.is_meta:
        # Kaiming's rule for `fan_out`, which does not depend on the input channels, with the model's own gain.
        fan_ratio = weight[0, 0].numel() / made.weight[0, 0].numel()
        nn.init.normal_(made.weight, std=float(weight.std()) * fan_ratio**0.5)
        if made.bias is not None and convolution.bias is not None:
            with torch.no_grad():
                made.bias.copy_(convolution.bias)
    return made


def _timm() -> Any:
    require_package("timm", "image classification", extra="vision")
    import timm

    return timm


def _torchvision() -> Any:
    require_package("torchvision", "image classification", extra="vision")
    import torchvision.models

    return torchvision.models
