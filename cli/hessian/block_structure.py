"""`adam-mini hessian exact`, and advice from the Hessian: how well block structures fit the Hessian of each matrix."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
import yaml
from torch import Tensor

from lightning_adam_mini.hessian import ModelAdvice, advise, candidate_structures, dense_block, exact_scores
from lightning_adam_mini.hessian.advice import MatrixAdvice
from lightning_adam_mini.hessian.block_structure import Score, mean_square_gradients, tau
from lightning_adam_mini.hessian.exact import check_dense, dense_bytes

from ...tasks.atomic_files import replacing
from ...tasks.checkpoints.files import write_file
from ..progress import log_duration, log_each
from .pictures import draw_hessians, drawn
from .problem import choose_blocks, load_problem, structures_or_keep, with_own_overrides
from .report import HessianReport, PageTable, common_settings

__all__ = ["run_advise", "run_exact"]

log = logging.getLogger(__name__)


def run_exact(options: Namespace) -> None:
    """Compute the dense Hessians of the options' blocks and write them.

    Raises:
        ValueError: See `command.main`.
    """
    problem = load_problem(options)
    blocks, _ = choose_blocks(problem.task, options.blocks, problem.factory)
    operator = problem.operator()
    sizes = {block.name: operator.block_size(block) for block in blocks}
    _check_each(sizes, options)
    largest = max(sizes.values())
    needed = dense_bytes(largest) - 8 * largest**2 + sum(8 * size**2 for size in sizes.values())
    if needed > options.memory:
        raise ValueError(
            f"--memory {options.memory_text}: the dense Hessians of {len(sizes)} blocks take {needed / 1e9:.2f} GB "
            "together: name fewer --blocks, or give more memory"
        )
    log.info("%d blocks, the largest of %d parameters: %.2g GB", len(blocks), largest, needed / 1e9)
    settings = common_settings(options, problem) | {"memory": options.memory_text}
    report = HessianReport(options, settings, notes=list(problem.notes))
    shapes = {name: tuple(parameter.shape) for name, parameter in problem.task.named_parameters()}
    log_block = log_each("dense Hessians", list(sizes.values()))
    dense: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    rows, scores_of = [], {}
    for number, block in enumerate(blocks, 1):
        log_block(block.name, number, len(blocks))
        on_step = log_duration("its rows") if len(blocks) == 1 else None
        found = dense_block(operator, block, budget_bytes=options.memory, on_step=on_step)
        dense[block.name] = found.matrix
        eigenvalues = torch.linalg.eigvalsh(found.matrix)
        values[block.name] = {
            "parameters": len(found.matrix),
            "asymmetry": found.asymmetry,
            "eigenvalues": eigenvalues.tolist(),
        }
        positive = eigenvalues[eigenvalues > 0]
        is_zero = not found.matrix.any()
        rows.append(
            [
                block.name,
                f"{len(found.matrix):,}",
                f"{eigenvalues[-1]:.4g}",
                f"{eigenvalues[0]:.3g}",
                f"{len(positive) / len(eigenvalues):.0%}",
                f"{1.0 if is_zero else tau(found.matrix):.3f}",
                f"{found.asymmetry:.0e}",
            ]
        )
        if block.index is None and not is_zero:
            scores = exact_scores(found.matrix, candidate_structures(shapes[block.parameter]))
            scores_of[block.name] = scores
            values[block.name]["scores"] = {
                structure: {
                    "share": s.share,
                    "expected": s.expected,
                    "absolute_share": s.absolute_share,
                    "information": s.information,
                    "blocks": s.num_blocks,
                }
                for structure, s in scores.items()
            }
    columns = ["block", "parameters", "largest", "smallest", "positive", "tau", "asymmetry"]
    note = "tau: absolute diagonal over all absolute entries. Asymmetry: of the matrix as computed, which is rounding."
    report.tables.append(PageTable("Dense Hessians", columns, rows, note))
    if scores_of:
        best = [
            [name, structure, f"{s.share:.3f}", f"{s.expected:.4f}", f"{s.contrast:.1f}", f"{s.information:.3f}"]
            for name, scores in scores_of.items()
            for structure, s in sorted(scores.items(), key=lambda item: item[1].information, reverse=True)[:3]
        ]
        columns = ["parameter", "structure", "share inside", "share of entries", "contrast", "information, nats"]
        title = "The three block structures with the most information"
        report.tables.append(PageTable(title, columns, best, left=2))
    shown, part = drawn(dense)
    caption = f"Absolute entries of the dense Hessians, each up to its 99th percentile{part}"
    report.pictures["hessians"] = (caption, draw_hessians(shown))
    with replacing(path := options.out / "hessians.pt") as temporary:
        write_file(dense, temporary)
    report.log([path, *report.write("exact.json", {"blocks": values})])


def run_advise(options: Namespace) -> None:
    """Compare block structures of the options' parameters and write the advice.

    Raises:
        ValueError: See `command.main`.
    """
    problem = load_problem(options)
    model = problem.task
    blocks, _ = choose_blocks(model, options.blocks, problem.factory)
    if part := next((block.name for block in blocks if block.index is not None), None):
        raise ValueError(f"--blocks {part}: advice is about whole parameters; leave [...] out")
    vectors = [block.name for block in blocks if model.get_parameter(block.parameter).dim() < 2]
    blocks = [block for block in blocks if block.name not in vectors]
    if not blocks:
        raise ValueError(f"--blocks: {', '.join(vectors[:3])}: vectors have no rows or heads; name matrices")
    operator = problem.operator()
    if options.method == "exact":
        _check_each({block.name: operator.block_size(block) for block in blocks}, options)
    squares = mean_square_gradients(model, problem.loss, problem.batches)
    found = advise(
        operator,
        structures_or_keep(model, problem.factory),
        parameters=[block.parameter for block in blocks],
        squares=squares,
        method=options.method,
        columns=options.columns,
        seed=options.seed,
        budget_bytes=options.memory,
        on_parameter=log_each("advice"),
    )
    settings = {"method": options.method, "columns": options.columns, "memory": options.memory_text}
    report = HessianReport(options, common_settings(options, problem) | settings, notes=list(problem.notes))
    report.tables += _advice_tables(found)
    if vectors:
        report.notes.append(f"vectors keep their blocks, since they have no rows or heads: {', '.join(vectors)}")
    report.notes.append(
        f"second moments of these matrices: {found.state_bytes:,} bytes under the advice, {found.full_bytes:,} in full"
    )
    overrides = with_own_overrides(model, problem.factory, found.overrides)
    optimizer: dict[str, Any] = {"init_args": {"partition_overrides": overrides}}
    if problem.has_other_optimizer:
        optimizer = {"class_path": "lightning_adam_mini.factory.AdamMini", **optimizer}
    text = yaml.safe_dump({"optimizer": optimizer}, sort_keys=False, width=200)
    report.notes.append(
        f"for the recipe:\n{text}" if found.overrides else "no override is needed: the partition stays as it is"
    )
    values = {
        "partition_overrides": overrides,
        "state_bytes": found.state_bytes,
        "full_bytes": found.full_bytes,
        "parameters_advised": [_advice_values(row) for row in found.rows],
    }
    report.log(report.write("advice.json", values))


def _check_each(sizes: Mapping[str, int], options: Namespace) -> None:
    """Reject blocks whose dense Hessian does not fit `--memory`, before the first is computed."""
    try:
        check_dense(sizes, options.memory)
    except ValueError as error:
        raise ValueError(f"--memory {options.memory_text}: {error}") from error


def _advice_tables(found: ModelAdvice) -> list[PageTable]:
    rows = [
        [
            row.parameter,
            "x".join(map(str, row.shape)),
            row.best + ("" if row.is_clear else " ?") + (" in parts" if row.parts else ""),
            f"{row.information:.2f}",
            row.runner_up,
            "-" if row.parts else f"{row.scores[row.runner_up].information:.2f}",
            f"{row.spreads[row.best].explained:.2f}",
            row.structure or "-",
            f"{row.state_bytes:,}",
        ]
        for row in found.rows
    ]
    columns = ["parameter", "shape", "best", "nats", "next", "nats", "gradients", "advice", "bytes"]
    note = (
        "Best and next: the block structures with the most information about where the Hessian's energy is; a question "
        "mark where the sketch does not settle it. In parts: each of the runs has a best structure of its own, which "
        "the reason lists, and nats are the mean over them. Gradients: part of the variance of ln g^2 that the best "
        "structure explains. Advice: what to ask for; `keep` needs no override."
    )
    reasons = [[row.parameter, row.reason] for row in found.rows]
    return [
        PageTable("Advice", columns, rows, note),
        PageTable("Reasons", ["parameter", "reason"], reasons, left=2),
    ]


def _advice_values(row: MatrixAdvice) -> dict[str, Any]:
    return {
        "parameter": row.parameter,
        "shape": list(row.shape),
        "best": row.best,
        "runner_up": row.runner_up,
        "is_clear": row.is_clear,
        "structure": row.structure,
        "state_bytes": row.state_bytes,
        "reason": row.reason,
        "scores": _score_values(row.scores),
        "parts": [{"best": part.best, "scores": _score_values(part.scores)} for part in row.parts],
        "spreads": {name: {**asdict(s), "explained": s.explained} for name, s in row.spreads.items()},
    }


def _score_values(scores: Mapping[str, Score]) -> dict[str, Any]:
    return {name: {**asdict(s), "information": s.information, "noise": s.noise} for name, s in scores.items()}
