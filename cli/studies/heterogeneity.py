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

from lightning_adam_mini.hessian import (
    HessianOperator,
    ParameterBlock,
    Scale,
    Tridiagonal,
    block_tridiagonals,
    quadrature,
)
from lightning_adam_mini.hessian.common_grid import MAX_POINTS
from lightning_adam_mini.hessian.heterogeneity import compare_spectra
from lightning_adam_mini.hessian.quadrature import DEFAULT_SIGMA

from .checks import check_above, check_least
from .common.networks import NetworkSizes
from .common.outcome import Outcome, Row, mean_and_spread
from .eigenvalue_samples import SAMPLED, sample_eigenvalues, sampled_blocks, write_samples
from .network_order import CNNS, claims_of_order, claims_of_scales
from .quadratics import check_condition
from .six_networks import NETWORKS, RESNET18_TRAIN, Network, blocks_to_compare, build_network

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["UNITS", "Settings", "run"]

log = logging.getLogger(__name__)

UNITS = {"none": "as they are", "network": "by the network's largest", "block": "by the block's largest"}
SCALES = {"none": Scale.RAW, "network": Scale.MODEL, "block": Scale.TOP}
MOST_POINTS = 2**22
"""Points of a grid with which 50 blocks take some GB; beyond, sigma is not resolved, and a warning says so."""
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
    for name in settings.networks:  # what is not installed, and what is too small, is told before the work
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
    claims = [claim for unit in UNITS for claim in claims_of_order(summary, unit)]
    return Outcome(rows, claims + claims_of_scales(summary), partial(_draw, rows), size=(11, 7), summary=summary)


def _blocks(name: str, network: Network, settings: Settings) -> list[ParameterBlock]:
    """The blocks that are compared, those whose eigenvalues are asked for among them."""
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
