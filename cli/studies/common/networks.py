"""Six small networks of the papers' architectures: depth and width are reduced, layers and initialisation kept.

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
from lightning_adam_mini.hints import require_package

from ....tasks.data.sampling import seed_of
from .training import CLASSES, NUM_BYTES, ImageTask, TextSizes, TextTask

__all__ = ["NETWORKS", "RESNET18_TRAIN", "Network", "NetworkSizes", "blocks_to_compare", "build_network"]

RESNET18_TRAIN = "ResNet18, batch statistics"
NETWORKS = ("ResNet18", RESNET18_TRAIN, "VGG16", "MLP-Mixer", "BERT", "GPT-2", "ViT")
"""In the papers' order. ResNet18 normalises by its running statistics, which are 0 and 1 at the start, as the papers'
code does (`model.eval()`); and once by those of the batch, as in training."""
TEXT = ("BERT", "GPT-2")
PIXELS, SIDE, PATCH = 28, 32, 8
MASK, MASKED_SHARE = NUM_BYTES, 0.15
# The papers' code leaves these out of its sample of blocks: positions and tokens that are no layer.
LEFT_OUT = ("pos", "wpe", "cls_token", "token_type")
Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class NetworkSizes:
    """How small the networks are.

    Args:
        layers: Blocks of ViT, MLP-Mixer, BERT and GPT-2.
        width: Of the same.
        heads: Of attention.
        channels: Of the first convolutions of ResNet18 and VGG16, which have 64; later ones have 2, 4 and 8 times that.
        images: In the batch.
        windows: Of text in the batch.
        context: Bytes in a window.
    """

    layers: int
    width: int
    heads: int
    channels: int
    images: int
    windows: int
    context: int


def _resnet18(sizes: NetworkSizes) -> nn.Module:
    require_package("timm", "this study", extra="vision")
    from timm.models.resnet import BasicBlock, ResNet

    channels = tuple(sizes.channels * factor for factor in (1, 2, 4, 8))
    # As in torchvision, residual branches do not start at zero.
    return ResNet(BasicBlock, (2, 2, 2, 2), CLASSES, in_chans=1, channels=channels, zero_init_last=False)


def _vgg16(sizes: NetworkSizes) -> nn.Module:
    layers: list[nn.Module] = []
    before = 1
    for factor, count in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(before, factor * sizes.channels, 3, padding=1), nn.ReLU()]
            before = factor * sizes.channels
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(before, before), nn.ReLU(), nn.Linear(before, before), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(before, CLASSES))
    for module in model.modules():  # as torchvision, whose 0.01 is for layers with 4096 inputs
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01 * (4096 / before) ** 0.5)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


def _vit(sizes: NetworkSizes) -> nn.Module:
    require_package("timm", "this study", extra="vision")
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(SIDE, PATCH, 1, CLASSES, embed_dim=sizes.width, depth=sizes.layers, num_heads=sizes.heads)


def _mixer(sizes: NetworkSizes) -> nn.Module:
    require_package("timm", "this study", extra="vision")
    from timm.models.mlp_mixer import MlpMixer

    model = MlpMixer(CLASSES, SIDE, 1, PATCH, num_blocks=sizes.layers, embed_dim=sizes.width)
    model.head.reset_parameters()  # zero in timm, which would make the Hessians of all other blocks zero
    return model


def _bert(sizes: NetworkSizes) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=NUM_BYTES + 1, hidden_size=sizes.width, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, intermediate_size=4 * sizes.width, attn_implementation="eager",
        max_position_embeddings=sizes.context + 1,
    )  # fmt: skip
    return BertForMaskedLM(config)


def _gpt2(sizes: NetworkSizes) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=NUM_BYTES, n_embd=sizes.width, n_layer=sizes.layers, n_head=sizes.heads, n_positions=sizes.context,
        bos_token_id=None, eos_token_id=None, use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    return GPT2LMHeadModel(config)


ARCHITECTURES: dict[str, Callable[[NetworkSizes], nn.Module]] = {
    "ResNet18": _resnet18,
    "VGG16": _vgg16,
    "MLP-Mixer": _mixer,
    "BERT": _bert,
    "GPT-2": _gpt2,
    "ViT": _vit,
}
"""How each is built, in the papers' order; weights are drawn from torch's global generator."""


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
    """Matrices and kernels of the model's layers; queries, keys and values of a fused matrix separately.

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
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return [b for b in found if (sizes[b.parameter] if b.index is None else b.index.numel()) >= least]


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
