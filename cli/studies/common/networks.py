"""Small models of the papers' six architectures: depth and width are reduced, layers and initialisation kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ....tasks.packages import require
from ..image_task import CLASSES
from .training import NUM_BYTES

__all__ = ["ARCHITECTURES", "MASK", "SIDE", "NetworkSizes"]

SIDE, PATCH = 32, 8
MASK = NUM_BYTES


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
    require("timm", "this study", extra="vision")
    from timm.models.resnet import BasicBlock, ResNet

    channels = tuple(sizes.channels * factor for factor in (1, 2, 4, 8))
    # As in torchvision, no residual branch starts at zero.
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
    for module in model.modules():  # torchvision's; its 0.01 is of layers with 4096 inputs
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01 * (4096 / before) ** 0.5)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


def _vit(sizes: NetworkSizes) -> nn.Module:
    require("timm", "this study", extra="vision")
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(SIDE, PATCH, 1, CLASSES, embed_dim=sizes.width, depth=sizes.layers, num_heads=sizes.heads)


def _mixer(sizes: NetworkSizes) -> nn.Module:
    require("timm", "this study", extra="vision")
    from timm.models.mlp_mixer import MlpMixer

    model = MlpMixer(CLASSES, SIDE, 1, PATCH, num_blocks=sizes.layers, embed_dim=sizes.width)
    model.head.reset_parameters()  # timm's is zero, and so would be the Hessians of all other blocks
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
