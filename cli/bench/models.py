"""Models to measure: from an outline on the meta device to parameters with memory and random content."""

from __future__ import annotations

from argparse import Namespace

import torch
from torch import Tensor, nn

from ..model_building import Source
from ..model_sources import SOURCES

__all__ = ["WEIGHT_STD", "choose_device", "give_memory", "outline", "trained_bytes"]

WEIGHT_STD = 0.02


def outline(options: Namespace) -> Source:
    """The model that the options name, on the meta device.

    Raises:
        ValueError: There is no such model, or a package is missing.
    """
    return SOURCES[options.source](getattr(options, options.source))


def choose_device(name: str | None) -> torch.device:
    """The device of `--device`.

    Raises:
        ValueError: CUDA was asked for, and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; leave it out, or give --device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def give_memory(model: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Replace parameters and buffers of an outline by tensors with memory; tied parameters stay one.

    Parameters are drawn from a normal distribution of deviation `WEIGHT_STD`, buffers are zero.

    Args:
        model: A model on the meta device; it is changed in place.
        device: Where the tensors shall lie.
        dtype: Dtype of floating-point parameters; their own by default.
    """
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    kind = dtype if parameter.is_floating_point() and dtype else parameter.dtype
                    # Not `empty_like`, which fake tensors refuse for a tensor that is none.
                    content = torch.empty_strided(parameter.shape, parameter.stride(), dtype=kind, device=device)
                    if content.is_floating_point():
                        content.normal_(0.0, WEIGHT_STD)
                    made[parameter] = nn.Parameter(content, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[parameter]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)


def trained_bytes(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Bytes of the parameters that are trained, in `dtype` or their own."""
    return sum(p.numel() * (dtype or p.dtype).itemsize for p in model.parameters() if p.requires_grad)
