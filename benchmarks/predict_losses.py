"""Do the statistics of `adam-mini advise` predict the losses of partitions? A rank correlation.

    adam-mini advise llm/llama_tiny --threads 1 --out ADVICE
    adam-mini compare llm/llama_tiny --lr x1 --seeds 2 --out COMPARISON --optimizers AdamW LABEL=AdamMini:partition=...
    python benchmarks/predict_losses.py ADVICE COMPARISON --out benchmarks/results/predict_losses.json

A partition keeps one structure a matrix. Its log-deviation is the mean over the matrices of that structure's, which
AdamW's own second moments tell before any of the partitions is tried. Beside it stands the loss of each partition minus
AdamW's, the mean over the seeds.
"""

from __future__ import annotations

import argparse
import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy.stats import spearmanr

from children import save
from lightning_adam_mini.cli.compare.analysis import OptimizerSummary, load_comparison
from lightning_adam_mini.cli.main import main as adam_mini


def structures(recipe: str, summary: OptimizerSummary) -> dict[str, str]:
    """The block structure of each parameter of a recipe under an optimizer of the comparison."""
    options = dict(option.removeprefix("--optimizer.").split("=", 1) for option in summary.options if "=" in option)
    overrides = json.loads(options.get("partition_overrides", "{}"))
    words = [word for pair in overrides.items() for word in ("--override", "=".join(pair))]
    with redirect_stdout(StringIO()) as output:
        adam_mini(["explain", recipe, "--full", "--json", "--partition", options["partition"], *words])
    return {row["name"]: row["structure"] for row in json.loads(output.getvalue())["rows"]}


def main() -> None:
    """Print a line for each partition and the rank correlation, and save them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("advice", type=Path, help="folder of `adam-mini advise --out`")
    parser.add_argument("comparison", type=Path, help="folder of `adam-mini compare --out`")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    advice: dict[str, Any] = json.loads((options.advice / "advice.json").read_text())
    comparison = load_comparison(options.comparison)
    (task,) = comparison.tasks
    rows = []
    for summary in task.summaries:
        if summary.optimizer == comparison.reference or summary.verdict.difference is None:
            continue
        own = structures(task.recipe, summary)
        deviation = fmean(
            each["structures"][own[each["name"]]]["log_deviation"] if own[each["name"]] != "element" else 0.0
            for each in advice["matrices"]
        )
        rows.append({"partition": summary.optimizer, "log_deviation": deviation, "loss": summary.verdict.difference})
        print(f"{summary.optimizer:20} {deviation:7.3f} {summary.verdict.difference:+7.3f}")
    found = spearmanr([row["log_deviation"] for row in rows], [row["loss"] for row in rows])
    print(f"rank correlation {found.statistic:.2f}, {len(rows)} partitions, p = {found.pvalue:.2g}")
    if options.out:
        result = {"recipe": task.recipe, "seeds": list(comparison.seeds), "partitions": rows}
        save(options.out, result | {"rank_correlation": found.statistic, "p_value": found.pvalue})


if __name__ == "__main__":
    main()
