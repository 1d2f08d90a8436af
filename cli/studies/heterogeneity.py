"""How different the spectra of a network's blocks are at the start ("Why Transformers Need Adam", Zhang et al. 2024).

JS0 is the mean Jensen-Shannon divergence between the spectra of all pairs of blocks. The papers print values that no
such divergence can have, so the sum without the grid's spacing is reported too; and since a divergence depends on the
unit of the eigenvalues, there are three units: none, the largest eigenvalue of all blocks, and that of each block.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lightning_adam_mini.hessian import (
    HessianOperator,
    ParameterBlock,
    Scale,
    Tridiagonal,
    block_tridiagonals,
    compare_spectra,
    quadrature,
)
from lightning_adam_mini.hessian.heterogeneity import MAX_POINTS
from lightning_adam_mini.hessian.spectrum import DEFAULT_SIGMA

from ...tasks.atomic_files import write_text
from .common.networks import NETWORKS, RESNET18_TRAIN, Network, NetworkSizes, blocks_to_compare, build_network
from .common.outcome import Claim, Outcome, Row, as_csv, mean_and_spread
from .common.quadratics import check_condition
from .common.study import check_above, check_least

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["UNITS", "Settings", "run", "sample_eigenvalues", "sampled_blocks", "write_samples"]

log = logging.getLogger(__name__)

PAPER = "Why Transformers Need Adam, JS0"
CNNS = ("ResNet18", "VGG16")
OTHERS = ("MLP-Mixer", "BERT", "GPT-2", "ViT")
UNITS = {"none": "as they are", "network": "by the network's largest", "block": "by the block's largest"}
SCALES = {"none": Scale.RAW, "network": Scale.MODEL, "block": Scale.TOP}
MOST_POINTS = 2**22
"""Points of a grid with which 50 blocks take some GB; beyond, sigma is not resolved, and a warning says so."""
SAMPLED = {
    "GPT-2": ("wte.weight", "h.2.attn.c_attn.weight[q]", "h.2.attn.c_attn.weight[v]", "h.2.mlp.c_fc.weight"),
    "ResNet18": tuple(f"layer{stage}.0.conv1.weight" for stage in range(1, 5)),
}
"""Ends of the names of blocks: the embedding and three of the third layer, and a convolution of each stage."""
Spectra = dict[str, list[Tridiagonal]]


@dataclass(frozen=True)
class Settings(NetworkSizes):
    """Sizes of the study.

    Args:
        seeds: Of weights, batches and starts.
        networks: Names of `NETWORKS`.
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
        check_least(self, 1, *(field.name for field in fields(NetworkSizes)), "probes")
        check_least(self, 2, "steps", "samples")
        check_above(self, 1, "condition_number")
        check_condition("condition_number", self.condition_number)
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads, {self.heads}")
        if self.spectra is not None:
            self._check_spectra(Path(self.spectra).expanduser())

    def _check_spectra(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"spectra {folder}: this is a file; give a folder")
        if not set(SAMPLED) & set(self.networks):
            raise ValueError(f"spectra are of {' and '.join(SAMPLED)}: give networks one of them, or spectra=null")
        if self.layers < 3 and "GPT-2" in self.networks:
            raise ValueError("spectra are of the third layer: give layers=3 or more, or spectra=null")


def run(settings: Settings) -> Outcome:
    """JS0 of each network, seed and unit."""
    for name in settings.networks:  # missing packages and networks that are too small are found before the work
        _blocks(name, build_network(name, settings, settings.seeds[0]), settings)
    rows: list[Row] = []
    for name in settings.networks:
        for number, seed in enumerate(settings.seeds):
            spectra = _spectra(name, settings, seed)
            rows += [_row(name, seed, unit, spectra) for unit in UNITS]
            if number == 0 and settings.spectra is not None and name in SAMPLED:
                chosen = {block: spectra[block] for block in sampled_blocks(name, spectra)}
                values = sample_eigenvalues(chosen, count=settings.samples, condition_number=settings.condition_number)
                write_samples(Path(settings.spectra).expanduser(), name, values)
        log.info("%s: JS0 %s", name, ", ".join(f"{row['js0']:.3f} ({row['unit']})" for row in rows[-len(UNITS) :]))
    summary = _means(rows)
    claims = [claim for unit in UNITS for claim in _claims_of_order(summary, unit)]
    return Outcome(rows, claims + _claims_of_scales(summary), partial(_draw, rows), size=(11, 7), summary=summary)


def _blocks(name: str, network: Network, settings: Settings) -> list[ParameterBlock]:
    """The blocks that are compared; they must include those whose eigenvalues are asked for."""
    blocks = blocks_to_compare(network.model, settings.steps)
    if len(blocks) < 2:
        raise ValueError(f"{name} has {len(blocks)} blocks of {settings.steps} elements or more: give fewer steps")
    if settings.spectra is not None and name in SAMPLED:
        sampled_blocks(name, [block.name for block in blocks])
    return blocks


def _spectra(name: str, settings: Settings, seed: int) -> Spectra:
    network = build_network(name, settings, seed)
    operator = HessianOperator(network.model, network.loss, [network.batch])
    blocks = _blocks(name, network, settings)
    return block_tridiagonals(operator, blocks, steps=settings.steps, probes=settings.probes, seed=seed)


def _row(name: str, seed: int, unit: str, spectra: Spectra) -> Row:
    # The largest absolute eigenvalue of each block.
    largest = [max(quadrature(t).nodes.abs().max().item() for t in some) for some in spectra.values()]
    found = compare_spectra(spectra, scale=SCALES[unit], num_points=_points(SCALES[unit], max(largest)))
    return {
        "network": name, "seed": seed, "unit": unit, "blocks": len(spectra), "js0": found.js0,
        "js0_distance": found.js0_distance, "js0_sum": found.js0_unnormalized, "largest": max(largest),
        "smallest_of_largest": min(largest),
    }  # fmt: skip


def _points(scale: Scale, largest: float) -> int | None:
    """Points of the grid, which loses what lies between them where it is coarser than sigma; None for the default."""
    enough = math.ceil(2 * (largest + 2) / DEFAULT_SIGMA)
    return min(enough, MOST_POINTS) if scale is Scale.RAW and enough > MAX_POINTS else None


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


def _claims_of_order(summary: Sequence[Row], unit: str) -> list[Claim]:
    """What the papers say about the order, for the networks that were measured."""
    lines = {line["network"]: line for line in summary if line["unit"] == unit}
    cnns, others = ([name for name in names if name in lines] for names in (CNNS, OTHERS))
    if not cnns or not others:
        return []
    js0 = {name: line["js0"] for name, line in lines.items()}
    values = ", ".join(f"{name} {value:.3g}" for name, value in js0.items())
    most = max(js0[name] for name in cnns)
    claims = [
        Claim(
            f"unit {unit}: JS0 of every CNN is below that of each other network",
            most < min(js0[name] for name in others),
            values,
            PAPER,
        )
    ]
    if RESNET18_TRAIN in lines:
        claims.append(
            Claim(
                f"unit {unit}: so it is for ResNet18 that normalises by the batch",
                js0[RESNET18_TRAIN] < min(js0[name] for name in others),
                values,
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


def _claims_of_scales(summary: Sequence[Row]) -> list[Claim]:
    """Our own claim about what no unit changes: how far apart the largest eigenvalues of blocks are."""
    ratios = {line["network"]: line["ratio"] for line in summary}
    values = ", ".join(f"{name} {ratio:.3g}" for name, ratio in ratios.items())
    cnns, others = ([ratios[name] for name in names if name in ratios] for names in (CNNS, OTHERS))
    if not cnns or not others:
        return []
    text = (
        "the sharpest block's largest eigenvalue over the flattest one's is 10 times smaller for CNNs than for others"
    )
    return [Claim(text, 10 * max(cnns) <= min(others), values)]


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
