"""`adam-mini hessian spectrum` and `js`: spectra of blocks, and how different they are."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from lightning_adam_mini.hessian import (
    Heterogeneity,
    SpectralDensity,
    Tridiagonal,
    block_tridiagonals,
    compare_spectra,
    density,
    make_grid,
    model_tridiagonals,
    moments,
    quadrature,
    top_eigenvalues,
)
from lightning_adam_mini.hessian.lanczos import check_steps

from ..progress import log_duration
from .pictures import draw_densities, draw_divergences, drawn
from .problem import choose_blocks, load_problem
from .report import HessianReport, PageTable, common_settings

__all__ = ["run"]

log = logging.getLogger(__name__)
WHOLE = "the whole model"
_POINTS = 2000
_BLUR = 1 / 300
"""Width of the blur of pictures, as a part of the range of a spectrum."""


def run(options: Namespace) -> None:
    """Compute the spectra of the options' blocks and write them.

    Raises:
        ValueError: See `command.main`.
    """
    problem = load_problem(options)
    blocks, left = choose_blocks(problem.task, options.blocks, problem.factory, least=options.steps)
    operator = problem.operator()
    sizes = {block.name: operator.block_size(block) for block in blocks}
    check_steps(options.steps, {**sizes, **({WHOLE: operator.size} if options.whole else {})})
    if options.command == "js" and len(blocks) < 2:
        raise ValueError("js compares blocks, and there is one: name more --blocks, or use `hessian spectrum`")
    log.info("%d blocks, %d steps, %d starts, %s", len(blocks), options.steps, options.probes, problem.weights)
    settings = {"steps": options.steps, "probes": options.probes, "seed": options.seed, "budget_bytes": options.memory}
    found = block_tridiagonals(operator, blocks, **settings, on_step=log_duration("spectra of the blocks"))
    if options.whole:
        found[WHOLE] = model_tridiagonals(operator, **settings, on_step=log_duration("the whole spectrum"))
        sizes[WHOLE] = operator.size
    shown = {"steps": options.steps, "probes": options.probes, "memory": options.memory_text}
    if options.command == "js":
        shown |= {"scale": options.scale, "sigma": options.sigma}
    report = HessianReport(options, common_settings(options, problem) | shown, notes=list(problem.notes))
    if left:
        names = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        report.notes.append(f"left out, with fewer than {options.steps} elements: {names}")
    report.tables.append(_table(found, sizes))
    chosen, part = drawn(found)
    own = {name: _own_density(some) for name, some in chosen.items()}
    for kind, logarithmic in (("linear", False), ("log", True)):
        caption = f"Densities of eigenvalues ({kind} axis), each blurred by {_BLUR:.2%} of its own range{part}"
        report.pictures[f"spectra_{kind}"] = (caption, draw_densities(own, logarithmic=logarithmic))
    values: dict[str, Any] = {"blocks": {name: _values(some, sizes[name]) for name, some in found.items()}}
    if options.command == "js":
        try:
            of_blocks = {name: some for name, some in found.items() if name != WHOLE}
            compared = compare_spectra(of_blocks, scale=options.scale, sigma=options.sigma)
        except ValueError as error:  # save the spectra: they took long, and are right
            raise ValueError(f"{error}; the spectra are in {report.write('spectra.json', values)[-1]}") from error
        values["js"] = _divergences(compared)
        _add_divergences(report, compared, found)
    report.log(report.write("spectra.json", values))


def _table(found: Mapping[str, list[Tridiagonal]], sizes: Mapping[str, int]) -> PageTable:
    rows = []
    for name, some in found.items():
        quadratures = [quadrature(t) for t in some]
        mean, error = moments(quadratures, 1)
        square, _ = moments(quadratures, 2)
        rows.append(
            [
                name,
                f"{sizes[name]:,}",
                f"{max(q.nodes[-1].item() for q in quadratures):.4g}",
                f"{min(q.nodes[0].item() for q in quadratures):.3g}",
                f"{mean * sizes[name]:.4g}" + (f" ± {error * sizes[name]:.1g}" if len(some) > 1 else ""),
                f"{square**0.5:.3g}",
                f"{max(t.orthogonality for t in some):.0e}",
            ]
        )
    columns = ["block", "parameters", "largest", "smallest", "trace", "root mean square", "lost orthogonality"]
    note = "Largest and smallest eigenvalues that Lanczos found; the trace with its standard error over starts."
    return PageTable("Spectra", columns, rows, note)


def _own_density(some: list[Tridiagonal]) -> SpectralDensity:
    quadratures = [quadrature(t) for t in some]
    width = max(q.nodes[-1].item() for q in quadratures) - min(q.nodes[0].item() for q in quadratures)
    sigma = _BLUR * width if width > 0 else 1e-3 * max(abs(quadratures[0].nodes[0].item()), 1e-12)
    return density(quadratures, make_grid(quadratures, num_points=_POINTS, margin=10 * sigma), sigma=sigma)


def _values(some: list[Tridiagonal], size: int) -> dict[str, Any]:
    quadratures = [quadrature(t) for t in some]
    mean, error = moments(quadratures, 1)
    return {
        "parameters": size,
        "trace": mean * size,
        "trace_standard_error": error * size,
        "starts": [
            {
                "alphas": t.alphas.tolist(),
                "betas": t.betas.tolist(),
                "nodes": q.nodes.tolist(),
                "weights": q.weights.tolist(),
                "residual": t.residual,
                "lost_orthogonality": t.orthogonality,
                "top_residual": top_eigenvalues(t, 1).residuals[0].item(),
            }
            for t, q in zip(some, quadratures, strict=True)
        ],
    }


def _divergences(found: Heterogeneity) -> dict[str, Any]:
    return {
        "scale": str(found.scale),
        "sigma": found.sigma,
        "spacing": found.spacing,
        "js0": found.js0,
        "js0_distance": found.js0_distance,
        "js0_unnormalized": found.js0_unnormalized,
        "names": list(found.names),
        "divergences": found.divergences.tolist(),
    }


def _add_divergences(report: HessianReport, found: Heterogeneity, spectra: Mapping[str, list[Tridiagonal]]) -> None:
    rows = [
        ["mean divergence, nats (0 to 0.693)", f"{found.js0:.4f}"],
        ["mean distance (0 to 0.833)", f"{found.js0_distance:.4f}"],
        ["mean of the sums without the spacing of the grid", f"{found.js0_unnormalized:.4g}"],
    ]
    note = f"Eigenvalues: {found.scale}; blur {found.sigma:.3g}; spacing of the grid {found.spacing:.3g}."
    report.tables.append(
        PageTable("Heterogeneity of the blocks (JS0 if the weights are fresh)", ["JS", "value"], rows, note)
    )
    report.pictures["js"] = ("Divergences between the spectra of blocks", draw_divergences(found))
    if found.scale == "raw":
        largest = max(quadrature(t).nodes.abs().max().item() for some in spectra.values() for t in some)
        if largest < 30 * found.sigma:
            report.notes.append(
                f"all eigenvalues are within {largest:.2g}, and the blur is {found.sigma:.2g}: the divergences depend "
                f"on the blur too; give --sigma {largest / 1000:.1g}, or --scale top"
            )
