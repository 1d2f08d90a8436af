"""What one huge gradient does to a run, with and without the floor of factored second moments.

    python benchmarks/huge_gradient.py --out benchmarks/results/huge_gradient.json

Trains `llm/llama_tiny` on one thread, without clipping. At step 100 one element of each matrix gets a gradient of 100,
about a hundred thousand times that of the others. Prints and saves the validation loss at the end, next to that of an
undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from children import measure, save, tell
from lightning_adam_mini import blocks
from lightning_adam_mini.cli.main import main as adam_mini

RECIPE = "llm/llama_tiny"
FACTORED = ("--optimizer.partition=factored", "--optimizer.implementation=foreach")
RUNS: dict[str, tuple[str, ...]] = {
    "AdamW": ("--optimizer=AdamW",),
    "transformer": ("--optimizer.partition=transformer",),
    "factored": FACTORED,
    "factored, no floor": FACTORED,
}
AT_STEP, GRADIENT = 100, 100.0


class HugeGradient(Callback):
    """Sets the gradient of one element of each matrix at one step.

    Args:
        step: Steps taken before it; a negative number for none.
        floor: Of factored second moments, for torch's operations.
    """

    def __init__(self, step: int, floor: float = blocks.FLOOR) -> None:
        self._step = step
        blocks.FLOOR = floor

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Hook of Lightning, after the backward pass."""
        if trainer.global_step == self._step:
            with torch.no_grad():
                for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.dim() > 1):
                    parameter.grad[3, 5] = GRADIENT


def child(name: str, step: int) -> None:
    """Tell the validation loss at the end of a run."""
    floor = 0.0 if name.endswith("no floor") else blocks.FLOOR
    callback = {"class_path": "huge_gradient.HugeGradient", "init_args": {"step": step, "floor": floor}}
    with tempfile.TemporaryDirectory() as folder:
        words = [*RUNS[name], f"--trainer.callbacks+={json.dumps(callback)}", "--trainer.enable_progress_bar=false"]
        words.append("--trainer.gradient_clip_val=0")
        if code := adam_mini(["fit", RECIPE, *words, f"--run_dir={folder}/run"]):
            sys.exit(code)
        result = json.loads((Path(folder) / "run" / "result.json").read_text())
    tell({"val_loss": result["metrics"]["val_loss"]})


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--child", nargs=2, metavar=("NAME", "STEP"))
    options = parser.parse_args()
    if options.child:
        torch.set_num_threads(1)
        child(options.child[0], int(options.child[1]))
        return
    rows = {}
    for name in RUNS:
        undisturbed, disturbed = (measure(__file__, name, step)["val_loss"] for step in (-1, AT_STEP))
        rows[name] = {"undisturbed": undisturbed, "disturbed": disturbed}
        print(name, rows[name], flush=True)
    if options.out:
        save(options.out, {"recipe": RECIPE, "step": AT_STEP, "gradient": GRADIENT, "val_loss": rows})


if __name__ == "__main__":
    main()
