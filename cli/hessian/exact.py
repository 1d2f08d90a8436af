"""`adam-mini hessian exact`: dense Hessians of blocks, and their scores for each cut."""

from __future__ import annotations

import logging
from argparse import Namespace
from typing import Any

import torch
from torch import Tensor

from lightning_adam_mini.hessian.block_structure import candidate_cuts, exact_scores, tau
from lightning_adam_mini.hessian.exact import dense_block

from ...tasks.checkpoint_file import write_file
from ...tasks.run_files import replacing
from .memory import check_all, dense_bytes_of
from .pictures import draw_hessians, drawn
from .problem import load_problem
from .progress import tell_duration, tell_each
from .report import Report, Table, head
from .selection import choose_blocks

__all__ = ["run"]

log = logging.getLogger(__name__)


def run(options: Namespace) -> None:
    """Compute the dense Hessians of the options' blocks and write them.

    Raises:
        ValueError: See `command.main`.
    """
    problem = load_problem(options)
    blocks, _ = choose_blocks(problem.task, options.blocks, problem.factory)
    operator = problem.operator()
    sizes = {block.name: operator.block_size(block) for block in blocks}
    check_all(sizes, options)
    gigabytes = dense_bytes_of(sizes) / 1e9
    log.info("%d blocks, the largest of %d parameters: %.2g GB", len(blocks), max(sizes.values()), gigabytes)
    report = Report(options, head(options, problem) | {"memory": options.memory_text}, notes=list(problem.notes))
    shapes = {name: tuple(parameter.shape) for name, parameter in problem.task.named_parameters()}
    tell = tell_each("dense Hessians", list(sizes.values()))
    dense: dict[str, Tensor] = {}
    figures: dict[str, Any] = {}
    rows, scores_of = [], {}
    for number, block in enumerate(blocks, 1):
        tell(block.name, number, len(blocks))
        alone = tell_duration("its rows") if len(blocks) == 1 else None
        found = dense_block(operator, block, budget_bytes=options.memory, on_step=alone)
        dense[block.name] = found.matrix
        eigenvalues = torch.linalg.eigvalsh(found.matrix)
        figures[block.name] = {
            "parameters": len(found.matrix),
            "asymmetry": found.asymmetry,
            "eigenvalues": eigenvalues.tolist(),
        }
        positive = eigenvalues[eigenvalues > 0]
        is_zero = not found.matrix.any()
        diagonal = 1.0 if is_zero else tau(found.matrix)
        rows.append(
            [
                block.name,
                f"{len(found.matrix):,}",
                f"{eigenvalues[-1]:.4g}",
                f"{eigenvalues[0]:.3g}",
                f"{len(positive) / len(eigenvalues):.0%}",
                f"{diagonal:.3f}",
                f"{found.asymmetry:.0e}",
            ]
        )
        if block.index is None and not is_zero:
            scores = exact_scores(found.matrix, candidate_cuts(shapes[block.parameter]))
            scores_of[block.name] = scores
            figures[block.name]["scores"] = {
                cut: {
                    "share": s.share,
                    "expected": s.expected,
                    "absolute_share": s.absolute_share,
                    "information": s.information,
                    "blocks": s.num_blocks,
                }
                for cut, s in scores.items()
            }
    columns = ["block", "parameters", "largest", "smallest", "positive", "tau", "asymmetry"]
    note = "tau: absolute diagonal over all absolute entries. Asymmetry: of the matrix as computed, which is rounding."
    report.tables.append(Table("Dense Hessians", columns, rows, note))
    if scores_of:
        best = [
            [name, cut, f"{s.share:.3f}", f"{s.expected:.4f}", f"{s.contrast:.1f}", f"{s.information:.3f}"]
            for name, scores in scores_of.items()
            for cut, s in sorted(scores.items(), key=lambda item: item[1].information, reverse=True)[:3]
        ]
        columns = ["parameter", "cut", "share inside", "share of entries", "contrast", "information, nats"]
        report.tables.append(Table("The three cuts with the most information", columns, best))
    shown, part = drawn(dense)
    caption = f"Absolute entries of the dense Hessians, each up to its 99th percentile{part}"
    report.pictures["hessians"] = (caption, draw_hessians(shown))
    with replacing(path := options.out / "hessians.pt") as beside:
        write_file(dense, beside)
    report.tell([path, *report.write("exact.json", {"blocks": figures})])
