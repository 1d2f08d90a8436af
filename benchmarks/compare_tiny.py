"""Compare optimizers on the tiny language models: the same learning rates for each, then three seeds at the best one.

    python benchmarks/compare_tiny.py --out runs/compare_tiny

Every run is the command `adam-mini fit` in a process and folder of its own; finished runs are not repeated, so the
script can be stopped and started again. It writes `comparison.json` and `comparison.md` beside the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch

from lightning_adam_mini.measure import cpu_name
from lightning_adam_mini.tasks.metrics_file import read_metrics

RECIPES = ("llm/llama_tiny.yaml", "llm/gpt2_tiny.yaml")
OVERRIDES = "--optimizer.partition_overrides"
ADAM_MINI = ["--optimizer", "AdamMini"]
RANK_ONE = [*ADAM_MINI, "--optimizer.partition", "transformer_rank_one"]
OPTIMIZERS = {
    "AdamW": ["--optimizer", "AdamW"],
    "Adam-mini": ADAM_MINI,
    "rank one": RANK_ONE,
}
VARIANTS = {
    "Adam-mini, value whole": [*ADAM_MINI, OVERRIDES, '{"value": "whole"}'],
    "Adam-mini, norms element": [*ADAM_MINI, OVERRIDES, '{"norm": "element"}'],
    "Adam-mini, embedding rank one": [*ADAM_MINI, OVERRIDES, '{"token_embedding": "row_column"}'],
    "Adam-mini, MLP rank one": [*ADAM_MINI, OVERRIDES, '{"mlp": "row_column"}'],
    "rank one, norms whole": [*RANK_ONE, OVERRIDES, '{"norm": "whole"}'],
    "rank one, embedding by row": [*RANK_ONE, OVERRIDES, '{"token_embedding": "row"}'],
    "Adam-mini, early partition": [*ADAM_MINI, "--optimizer.partition", "transformer_early"],
}
COMMANDS = {**OPTIMIZERS, **VARIANTS}
RATES = ("1e-3", "2e-3", "3e-3", "6e-3")


@dataclass(frozen=True)
class Run:
    """One training: a recipe, an optimizer, a peak learning rate and a seed."""

    recipe: str
    optimizer: str
    lr: str
    seed: int

    def folder(self, out: Path) -> Path:
        """Where the run lies."""
        label = self.optimizer.lower().replace(", ", "-").replace(" ", "-")
        return out / Path(self.recipe).stem / label / f"lr{self.lr}-seed{self.seed}"

    def result(self, out: Path, steps: int) -> float | None:
        """Final validation loss; None where the run has not finished."""
        losses = read_metrics(self.folder(out)).get("val_loss", {})
        return losses.get(steps)

    def command(self, out: Path, steps: int, extra: list[str]) -> list[str]:
        """The command of the run."""
        return [
            *(sys.executable, "-m", "lightning_adam_mini.cli.main", "fit", "--config", self.recipe),
            *COMMANDS[self.optimizer],
            *("--optimizer.lr", self.lr, "--seed_everything", str(self.seed), "--data.seed", str(self.seed)),
            *("--run_dir", str(self.folder(out)), "--trainer.max_steps", str(steps)),
            *("--trainer.enable_progress_bar", "false", "--model.sample_prompt", "", *extra),
        ]


def train(run: Run, out: Path, steps: int, extra: list[str]) -> float:
    """Train unless that is done; a run that does not finish counts as infinitely bad."""
    if run.result(out, steps) is None:
        folder = run.folder(out)
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("metrics.jsonl"):
            leftover.rename(folder / f"metrics.{os.getpid()}.interrupted")
        command = run.command(out, steps, extra)
        if (folder / "checkpoints").exists() or (folder / "config.yaml").exists():
            command += ["--ckpt_path", "last"]
        with (folder / "log.txt").open("a") as log:
            subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
    loss = run.result(out, steps)
    return float("inf") if loss is None or loss != loss else loss


def main() -> None:
    """Run the grid and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/compare_tiny"))
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(COMMANDS))
    parser.add_argument("--lr", nargs="+", default=RATES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--parallel", type=int, default=2, help="Runs at a time, one thread each.")
    options, extra = parser.parse_known_args()

    cases = [(recipe, optimizer) for recipe in options.recipes for optimizer in options.optimizers]
    with ThreadPoolExecutor(options.parallel) as pool:

        def losses(runs: list[Run]) -> dict[Run, float]:
            found = pool.map(lambda run: train(run, options.out, options.steps, extra), runs)
            return dict(zip(runs, found, strict=True))

        search = losses([Run(*case, lr, 0) for case in cases for lr in options.lr])
        best = {case: min(options.lr, key=lambda lr, case=case: search[Run(*case, lr, 0)]) for case in cases}
        final = losses([Run(*case, best[case], seed) for case in cases for seed in range(options.seeds)])

    rows = []
    for case in cases:
        values = [final[Run(*case, best[case], seed)] for seed in range(options.seeds)]
        rows.append(
            {
                "recipe": case[0],
                "optimizer": case[1],
                "search": {lr: search[Run(*case, lr, 0)] for lr in options.lr},
                "lr": best[case],
                "losses": values,
                "mean": mean(values),
                "std": stdev(values) if len(values) > 1 else 0.0,
            }
        )
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "threads": 1,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "comparison.json").write_text(json.dumps({"versions": versions, "rows": rows}, indent=1))
    (options.out / "comparison.md").write_text(table(rows, list(options.lr)))
    sys.stdout.write(table(rows, list(options.lr)))


def table(rows: list[dict], rates: list[str]) -> str:
    """The comparison in Markdown."""
    header = ["recipe", "optimizer", *(f"lr {lr}, seed 0" for lr in rates), "best lr", "mean ± std over seeds", "seeds"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        cells = [
            row["recipe"],
            row["optimizer"],
            *(f"{row['search'][lr]:.4f}" for lr in rates),
            row["lr"],
            f"**{row['mean']:.4f}** ± {row['std']:.4f}",
            " ".join(f"{loss:.4f}" for loss in row["losses"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
