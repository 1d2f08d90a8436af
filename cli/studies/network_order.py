"""What the papers say of the order of networks by how unlike their blocks are, as claims about measured figures."""

from __future__ import annotations

from collections.abc import Sequence

from .common.outcome import Claim, Row
from .six_networks import RESNET18_TRAIN

__all__ = ["CNNS", "claims_of_order", "claims_of_scales"]

PAPER = "Why Transformers Need Adam, JS0"
CNNS = ("ResNet18", "VGG16")
OTHERS = ("MLP-Mixer", "BERT", "GPT-2", "ViT")


def claims_of_order(summary: Sequence[Row], unit: str) -> list[Claim]:
    """What the papers say of the order, as far as the networks are there."""
    lines = {line["network"]: line for line in summary if line["unit"] == unit}
    cnns, others = ([name for name in names if name in lines] for names in (CNNS, OTHERS))
    if not cnns or not others:
        return []
    js0 = {name: line["js0"] for name, line in lines.items()}
    told = ", ".join(f"{name} {value:.3g}" for name, value in js0.items())
    most = max(js0[name] for name in cnns)
    claims = [
        Claim(
            f"unit {unit}: JS0 of every CNN is below that of each other network",
            most < min(js0[name] for name in others),
            told,
            PAPER,
        )
    ]
    if RESNET18_TRAIN in lines:
        claims.append(
            Claim(
                f"unit {unit}: so it is for ResNet18 that normalises by the batch",
                js0[RESNET18_TRAIN] < min(js0[name] for name in others),
                told,
            )
        )
    sums = {name: lines[name]["js0_sum"] for name in (*cnns, *others)}
    claims.append(
        Claim(
            f"unit {unit}: the sum without spacing is 100 times smaller for CNNs than for each other network",
            100 * max(sums[name] for name in cnns) <= min(sums[name] for name in others),
            ", ".join(f"{name} {value:.3g}" for name, value in sums.items()),
            PAPER,
        )
    )
    return claims


def claims_of_scales(summary: Sequence[Row]) -> list[Claim]:
    """Ours, of what no unit changes: how far apart the largest eigenvalues of blocks are."""
    ratios = {line["network"]: line["ratio"] for line in summary}
    told = ", ".join(f"{name} {ratio:.3g}" for name, ratio in ratios.items())
    cnns, others = ([ratios[name] for name in names if name in ratios] for names in (CNNS, OTHERS))
    if not cnns or not others:
        return []
    text = (
        "the sharpest block's largest eigenvalue over the flattest one's is 10 times smaller for CNNs than for others"
    )
    return [Claim(text, 10 * max(cnns) <= min(others), told)]
