"""Eigenvalues of blocks of a network, drawn from their spectra, for the quadratics of `quadratic_cases`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lightning_adam_mini.hessian import Tridiagonal, quadrature

__all__ = ["as_csv", "sample_eigenvalues"]


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


def as_csv(eigenvalues: Mapping[str, Sequence[float]]) -> str:
    """Lines of `block` and `eigenvalue`, as `quadratic_cases` reads them."""
    lines = [f"{name},{value:.6g}" for name, values in eigenvalues.items() for value in values]
    return "\n".join(["block,eigenvalue", *lines]) + "\n"
