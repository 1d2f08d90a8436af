"""How unlike the spectra of a network's blocks are at the start (Zhang et al. 2024, "Why Transformers Need Adam").

JS0 is the mean Jensen-Shannon divergence between the spectra of all pairs of blocks. The papers print values that no
such divergence can have, so the sum without the grid's spacing is told beside it; and since a divergence depends on the
unit of the eigenvalues, three units are: none, the largest eigenvalue of all blocks, and that of each block.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_adam_mini.hessian import HessianOperator, Tridiagonal, block_tridiagonals, quadrature
from lightning_adam_mini.hessian.common_grid import MAX_POINTS
from lightning_adam_mini.hessian.heterogeneity import Heterogeneity, compare_spectra
from lightning_adam_mini.hessian.quadrature import DEFAULT_SIGMA

from ...tasks.run_files import write_text
from .eigenvalue_samples import as_csv, sample_eigenvalues
from .outcome import Claim, Outcome, Row, mean_and_spread
from .six_networks import NETWORKS, RESNET18_TRAIN, NetworkSizes, blocks_to_compare, build_network

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["UNITS", "Settings", "compare_in", "run"]

log = logging.getLogger(__name__)

PAPER = "Why Transformers Need Adam, JS0"
CNNS = ("ResNet18", "VGG16")
OTHERS = ("MLP-Mixer", "BERT", "GPT-2", "ViT")
UNITS = {"none": "as they are", "network": "by the network's largest", "block": "by the block's largest"}
SAMPLED = {
    "GPT-2": ("wte.weight", "h.2.attn.c_attn.weight[q]", "h.2.attn.c_attn.weight[v]", "h.2.mlp.c_fc.weight"),
    "ResNet18": tuple(f"layer{stage}.0.conv1.weight" for stage in range(1, 5)),
}
"""Blocks whose eigenvalues are written: the embedding and the third layer, and a convolution of each stage."""
Spectra = dict[str, list[Tridiagonal]]


@dataclass(frozen=True)
class Settings(NetworkSizes):
    """Sizes of the study.

    Args:
        seeds: Of weights, batches and starts.
        networks: Names of `six_networks.NETWORKS`.
        steps: Lanczos steps; smaller blocks are left out.
        probes: Random starts of each block.
        spectra: Folder that eigenvalues of blocks of GPT-2 and ResNet18 are written to, of the first seed, as
            `quadratic_cases` reads them; None writes none.
        samples: Eigenvalues of each block there.
        condition_number: Largest of them over the smallest.
    """

    seeds: list[int]
    networks: list[str]
    steps: int
    probes: int
    spectra: str | None
    samples: int
    condition_number: float

    def __post_init__(self) -> None:
        """Check what can be before the work."""
        if unknown := [name for name in self.networks if name not in NETWORKS]:
            raise ValueError(f"there is no network {unknown[0]!r}; networks are {', '.join(NETWORKS)}")
        sizes = [field.name for field in fields(NetworkSizes)]
        for name in (*sizes, "probes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads, {self.heads}")
        if self.steps < 2 or self.samples < 2 or not self.condition_number > 1:
            raise ValueError("steps and samples must be at least 2, and condition_number above 1")
        if self.spectra is not None and self.layers < 3 and "GPT-2" in self.networks:
            raise ValueError("spectra are of the third layer: give layers=3 or more, or spectra=null")


def run(settings: Settings) -> Outcome:
    """JS0 of each network, seed and unit."""
    rows: list[Row] = []
    for name in settings.networks:
        for number, seed in enumerate(settings.seeds):
            spectra = _spectra(name, settings, seed)
            rows += [_row(name, seed, unit, spectra) for unit in UNITS]
            if number == 0 and settings.spectra is not None and name in SAMPLED:
                _write_samples(Path(settings.spectra).expanduser(), name, spectra, settings)
        log.info("%s: JS0 %s", name, ", ".join(f"{row['js0']:.3f} ({row['unit']})" for row in rows[-len(UNITS) :]))
    summary = _means(rows)
    claims = [claim for unit in UNITS for claim in _claims(summary, unit)] + _scale_claims(summary)
    return Outcome(rows, claims, partial(_draw, rows), size=(11, 7), summary=summary)


def _spectra(name: str, settings: Settings, seed: int) -> Spectra:
    network = build_network(name, settings, seed)
    blocks = blocks_to_compare(network.model, settings.steps)
    operator = HessianOperator(network.model, network.loss, [network.batch])
    return block_tridiagonals(operator, blocks, steps=settings.steps, probes=settings.probes, seed=seed)


def _row(name: str, seed: int, unit: str, spectra: Spectra) -> Row:
    found, largest = compare_in(unit, spectra), _largest(spectra)
    return {
        "network": name, "seed": seed, "unit": unit, "blocks": len(spectra), "js0": found.js0,
        "js0_distance": found.js0_distance, "js0_sum": found.js0_unnormalized, "largest": max(largest),
        "smallest_of_largest": min(largest),
    }  # fmt: skip


def compare_in(unit: str, spectra: Spectra) -> Heterogeneity:
    """Divergences between the spectra of blocks, by name, with eigenvalues in a unit of `UNITS`."""
    if unit == "block":
        return compare_spectra(spectra, scale="top")
    largest = max(_largest(spectra))
    if unit == "network":
        spectra = {name: [_divided(t, largest) for t in some] for name, some in spectra.items()}
        largest = 1.0
    # The grid ends a unit below and above the eigenvalues; one that is coarser than sigma loses what lies between.
    enough = math.ceil(2 * (largest + 2) / DEFAULT_SIGMA)
    return compare_spectra(spectra, scale="raw", num_points=enough if enough > MAX_POINTS else None)


def _largest(spectra: Spectra) -> list[float]:
    """The largest absolute eigenvalue of each block."""
    return [max(quadrature(t).nodes.abs().max().item() for t in some) for some in spectra.values()]


def _divided(found: Tridiagonal, unit: float) -> Tridiagonal:
    return Tridiagonal(found.alphas / unit, found.betas / unit, found.residual / unit, found.orthogonality)


def _write_samples(folder: Path, name: str, spectra: Spectra, settings: Settings) -> None:
    chosen = {block: some for block, some in spectra.items() if block.endswith(SAMPLED[name])}
    values = sample_eigenvalues(chosen, count=settings.samples, condition_number=settings.condition_number)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{name.lower().replace('-', '')}.csv", as_csv(values))


def _means(rows: Sequence[Row]) -> list[Row]:
    """A line for each network and unit, with mean and standard deviation over seeds."""
    found = []
    for name, unit in dict.fromkeys((row["network"], row["unit"]) for row in rows):
        own = [row for row in rows if (row["network"], row["unit"]) == (name, unit)]
        line: Row = {"network": name, "unit": unit, "blocks": own[0]["blocks"]}
        for column in ("js0", "js0_distance", "js0_sum"):
            line[column], line[f"{column}_spread"] = mean_and_spread([row[column] for row in own])
        line["ratio"] = statistics.median(row["largest"] / row["smallest_of_largest"] for row in own)
        found.append(line)
    return found


def _claims(summary: list[Row], unit: str) -> list[Claim]:
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


def _scale_claims(summary: list[Row]) -> list[Claim]:
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


def _draw(rows: list[Row], figure: Figure) -> None:
    panels = figure.subplots(2, len(UNITS), sharex=True, sharey="row", squeeze=False)
    names = list(dict.fromkeys(row["network"] for row in rows))
    colors = ["tab:orange" if name in (*CNNS, RESNET18_TRAIN) else "tab:blue" for name in names]
    for number, (column, label) in enumerate((("js0", "JS0 in nats"), ("js0_sum", "sum without spacing"))):
        for axes, unit in zip(panels[number], UNITS, strict=True):
            by_name = [[r[column] for r in rows if (r["network"], r["unit"]) == (name, unit)] for name in names]
            axes.bar(range(len(names)), [mean_and_spread(values)[0] for values in by_name], color=colors, alpha=0.6)
            for place, values in enumerate(by_name):
                axes.plot([place] * len(values), values, "k.", markersize=4)
            axes.set_xticks(range(len(names)), [n.replace(", ", ",\n") for n in names], rotation=60, ha="right")
            axes.tick_params(labelsize=8)
            axes.set_yscale("log")
            if number == 0:
                axes.set_title(f"eigenvalues {UNITS[unit]}", fontsize=9)
        panels[number, 0].set_ylabel(label)
