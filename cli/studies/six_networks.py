"""Six small networks of the papers' six architectures, with a loss on data that is on the machine.

ResNet18, VGG16, ViT and MLP-Mixer classify 5,000 digits; BERT predicts masked bytes and GPT-2 next bytes of Python's
standard library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lightning_adam_mini.hessian import ParameterBlock

from ...tasks.seeds import seed_of
from .common.networks import ARCHITECTURES, MASK, SIDE, NetworkSizes
from .common.training import TextSizes, TextTask
from .image_task import ImageTask

__all__ = ["NETWORKS", "RESNET18_TRAIN", "Network", "blocks_to_compare", "build_network"]

RESNET18_TRAIN = "ResNet18, batch statistics"
NETWORKS = ("ResNet18", RESNET18_TRAIN, "VGG16", "MLP-Mixer", "BERT", "GPT-2", "ViT")
"""In the papers' order. ResNet18 normalises by its running statistics, which are 0 and 1 at the start, as the papers'
code has it (`model.eval()`); and once by those of the batch, as in training."""
TEXT = ("BERT", "GPT-2")
PIXELS, MASKED_SHARE = 28, 0.15
# What the papers' code leaves out of its sample of blocks: positions and tokens that are no layer.
LEFT_OUT = ("pos", "wpe", "cls_token", "token_type")
Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Network:
    """A network, its data and its loss.

    Args:
        model: With random weights.
        batch: What the loss takes.
        loss: Mean cross entropy.
    """

    model: nn.Module
    batch: Any
    loss: Loss


def build_network(name: str, sizes: NetworkSizes, seed: int) -> Network:
    """One of `NETWORKS`; weights and batch depend on the seed alone.

    Args:
        name: One of `NETWORKS`.
        sizes: How small.
        seed: Of weights and batch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "weights"))
        model = ARCHITECTURES["ResNet18" if name == RESNET18_TRAIN else name](sizes)
    model.train(name == RESNET18_TRAIN)
    if name not in TEXT:
        return Network(model, _image_batch(sizes, seed), _classify)
    windows = TextSizes(sizes.width, sizes.layers, sizes.heads, sizes.context, sizes.windows, validation_windows=1)
    text = TextTask(windows).batch(seed, 0)
    if name == "GPT-2":
        return Network(model, (text[:, :-1], text[:, 1:]), _predict)
    is_masked = torch.rand(text.shape, generator=Generator().manual_seed(seed_of(seed, "mask"))) < MASKED_SHARE
    is_masked[:, 0] = True
    return Network(model, (text.masked_fill(is_masked, MASK), text.masked_fill(~is_masked, -100)), _predict)


def blocks_to_compare(model: nn.Module, least: int) -> list[ParameterBlock]:
    """Matrices and kernels of the model's layers; queries, keys and values of one fused matrix apart.

    Args:
        model: The network.
        least: Elements that a block must have.
    """
    found = []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or any(part in name for part in LEFT_OUT):
            continue
        if name.endswith(("c_attn.weight", "attn.qkv.weight")):  # transformers keeps the transpose
            positions = torch.arange(parameter.numel()).view(parameter.shape)
            parts = positions.chunk(3, dim=1 if "c_attn" in name else 0)
            fused = zip("qkv", parts, strict=True)
            found += [ParameterBlock(f"{name}[{letter}]", name, part.flatten()) for letter, part in fused]
        else:
            found.append(ParameterBlock(name, name))
    return [block for block in found if block.size(model.get_parameter(block.parameter)) >= least]


def _image_batch(sizes: NetworkSizes, seed: int) -> tuple[Tensor, Tensor]:
    images, labels = ImageTask(sizes.images).batch(seed, 0)
    margin = (SIDE - PIXELS) // 2
    return F.pad(images.view(-1, 1, PIXELS, PIXELS), (margin,) * 4), labels


def _classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def _predict(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    tokens, labels = batch
    return F.cross_entropy(model(input_ids=tokens).logits.flatten(0, 1), labels.flatten())
