"""Eigenvalues of blocks of a network, drawn from their spectra, for the quadratics of `quadratic_cases`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from lightning_adam_mini.hessian import Tridiagonal, quadrature

from ...tasks.run_files import write_text
from .common.outcome import as_csv

__all__ = ["SAMPLED", "sample_eigenvalues", "sampled_blocks", "write_samples"]

SAMPLED = {
    "GPT-2": ("wte.weight", "h.2.attn.c_attn.weight[q]", "h.2.attn.c_attn.weight[v]", "h.2.mlp.c_fc.weight"),
    "ResNet18": tuple(f"layer{stage}.0.conv1.weight" for stage in range(1, 5)),
}
"""Ends of the names of blocks: the embedding and three of the third layer, and a convolution of each stage."""


def sample_eigenvalues(
    tridiagonals: Mapping[str, Sequence[Tridiagonal]], *, count: int, condition_number: float
) -> dict[str, list[float]]:
    """Some eigenvalues of each block, all of them positive, as multiples of the smallest.

    A block's are its largest one and evenly spaced quantiles of the density above 0. Adam's bound needs positive
    definite blocks, and gradient descent some condition number: what lies below the largest of all blocks over
    `condition_number`, as most of a network's spectrum does, is raised to that.

    Args:
        tridiagonals: By the name of the block.
        count: Eigenvalues of each block.
        condition_number: Largest of all blocks over the smallest.

    Raises:
        ValueError: A block has no positive eigenvalue.
    """
    found = {}
    for name, some in tridiagonals.items():
        measures = [quadrature(t) for t in some]
        nodes = torch.cat([m.nodes for m in measures])
        weights = torch.cat([m.weights for m in measures])[nodes > 0]
        nodes = nodes[nodes > 0]
        if not nodes.numel():
            raise ValueError(f"{name} has no positive eigenvalue: leave it out")
        order = nodes.argsort()
        shares = weights[order].cumsum(0) / weights.sum()
        places = (torch.arange(count - 1, dtype=torch.float64) + 0.5) / (count - 1)
        at = torch.searchsorted(shares, places).clamp_(max=nodes.numel() - 1)
        found[name] = torch.cat([nodes[order][at], nodes.max().unsqueeze(0)])
    floor = max(values.max().item() for values in found.values()) / condition_number
    return {name: (values / floor).clamp(min=1.0).tolist() for name, values in found.items()}


def sampled_blocks(network: str, blocks: Iterable[str]) -> list[str]:
    """Names of the blocks of a network whose eigenvalues are sampled.

    Raises:
        ValueError: One of them is not there.
    """
    names = list(blocks)
    found = [next((name for name in names if name.endswith(end)), None) for end in SAMPLED[network]]
    if None in found:
        lost = SAMPLED[network][found.index(None)]
        raise ValueError(f"{network}: {lost} is not among the blocks: give fewer steps, or spectra=null")
    return [name for name in found if name is not None]


def write_samples(folder: Path, network: str, eigenvalues: Mapping[str, Sequence[float]]) -> None:
    """Write `gpt2.csv` or `resnet18.csv`, with the columns `block` and `eigenvalue` that `quadratic_cases` reads."""
    rows = [{"block": name, "eigenvalue": f"{one:.6g}"} for name, values in eigenvalues.items() for one in values]
    write_text(folder / f"{network.lower().replace('-', '')}.csv", as_csv(rows))
