"""`adam-mini hessian advise`: which cut each matrix asks for."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import yaml

from lightning_adam_mini.hessian.advice import Advice, advise
from lightning_adam_mini.hessian.block_structure import Score
from lightning_adam_mini.hessian.cut_advice import CutAdvice
from lightning_adam_mini.hessian.gradient_spread import mean_square_gradients

from .cuts import expressible_cuts, with_own_overrides
from .memory import check_each
from .problem import load_problem
from .progress import tell_each
from .report import Report, Table, head
from .selection import choose_blocks

__all__ = ["run"]


def run(options: Namespace) -> None:
    """Compare cuts of the options' parameters and write the advice.

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
        raise ValueError(f"--blocks: {', '.join(vectors[:3])}: vectors have no rows or heads to cut by; name matrices")
    operator = problem.operator()
    if options.method == "exact":
        check_each({block.name: operator.block_size(block) for block in blocks}, options)
    squares = mean_square_gradients(model, problem.loss, problem.batches)
    found = advise(
        operator,
        expressible_cuts(model, problem.factory),
        parameters=[block.parameter for block in blocks],
        squares=squares,
        method=options.method,
        columns=options.columns,
        seed=options.seed,
        budget_bytes=options.memory,
        on_parameter=tell_each("advice"),
    )
    settings = {"method": options.method, "columns": options.columns, "memory": options.memory_text}
    report = Report(options, head(options, problem) | settings, notes=list(problem.notes))
    report.tables += _tables(found)
    if vectors:
        report.notes.append(f"vectors keep their cuts, for they have no rows or heads: {', '.join(vectors)}")
    report.notes.append(
        f"second moments of these matrices: {found.state_bytes:,} bytes under the advice, {found.full_bytes:,} in full"
    )
    overrides = with_own_overrides(model, problem.factory, found.overrides)
    asked: dict[str, Any] = {"init_args": {"partition_overrides": overrides}}
    if problem.has_other_optimizer:
        asked = {"class_path": "lightning_adam_mini.factory.AdamMini", **asked}
    text = yaml.safe_dump({"optimizer": asked}, sort_keys=False, width=200)
    report.notes.append(
        f"for the recipe:\n{text}" if found.overrides else "no override is needed: the cuts stay as they are"
    )
    figures = {
        "partition_overrides": overrides,
        "state_bytes": found.state_bytes,
        "full_bytes": found.full_bytes,
        "parameters_advised": [_figures(row) for row in found.rows],
    }
    report.tell(report.write("advice.json", figures))


def _tables(found: Advice) -> list[Table]:
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
        "Best and next: cuts by what they tell about where the Hessian's energy lies; a question mark where the sketch "
        "does not settle it. In parts: each of the runs has a best cut of its own, told in the reason, and nats are "
        "the mean over them. Gradients: part of the variance of ln g^2 that the best cut explains. Advice: what to ask "
        "for; `keep` needs no override."
    )
    reasons = [[row.parameter, row.reason] for row in found.rows]
    return [Table("Advice", columns, rows, note), Table("Reasons", ["parameter", "reason"], reasons)]


def _figures(row: CutAdvice) -> dict[str, Any]:
    return {
        "parameter": row.parameter,
        "shape": list(row.shape),
        "best": row.best,
        "runner_up": row.runner_up,
        "is_clear": row.is_clear,
        "cut": row.structure,
        "state_bytes": row.state_bytes,
        "reason": row.reason,
        "scores": _scores(row.scores),
        "parts": [{"best": part.best, "scores": _scores(part.scores)} for part in row.parts],
        "spreads": {cut: {**asdict(s), "explained": s.explained} for cut, s in row.spreads.items()},
    }


def _scores(scores: Mapping[str, Score]) -> dict[str, Any]:
    return {cut: {**asdict(s), "information": s.information, "noise": s.noise} for cut, s in scores.items()}
