"""A stand-in for `adam-mini fit` that trains nothing and starts at once: what comparisons see of a run.

The loss is lowest at a learning rate of 1e-3. SGD fails, and so does the learning rate `STAND_IN_FAILS_AT`; one of 1 or
more diverges. With `STAND_IN_INTERRUPTED`, it ends as after a signal. Each step takes `STAND_IN_STEP` seconds. Ctrl-C
and SIGTERM save the step, with which `--ckpt_path=last` goes on.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

from lightning_adam_mini.cli.compare.process import guard

OFFSETS = {"AdamW": 0.0, "AdamMini": 0.5, "Adam": 0.0}


def options_of(arguments):
    """`--name value` and `--name=value` as a dict."""
    found, name = {}, None
    for argument in arguments:
        if argument.startswith("--"):
            name, _, value = argument[2:].partition("=")
            found[name] = value
        elif name:
            found[name] = argument
    return found


def loss_at(optimizer, lr, seed, step, total):
    """Falls over the steps to its final value, which the seed moves a little."""
    final = 2.0 + OFFSETS[optimizer] + (math.log10(lr) + 3) ** 2 + 0.01 * seed
    return final + (1 - step / total)


def main():
    guard()
    options = options_of(sys.argv[2:])
    optimizer, lr, seed = options["optimizer"], float(options["optimizer.lr"]), int(options["seed_everything"])
    total = int(options.get("trainer.max_steps", 4))
    folder = Path(options["run_dir"])
    if optimizer == "SGD":
        sys.exit("some line\nadam-mini: error: SGD cannot train this model\nlast words")
    if str(lr) == os.environ.get("STAND_IN_FAILS_AT"):
        sys.exit("adam-mini: error: the disk is full")
    if "STAND_IN_INTERRUPTED" in os.environ:
        sys.exit(128 + signal.SIGTERM)
    if lr >= 1:
        sys.stderr.write("adam-mini: error: training has diverged: the training loss is not finite at step 2\n")
        sys.exit(3)
    last = folder / "checkpoints" / "last.ckpt"
    step = int(last.read_text()) if options.get("ckpt_path") == "last" and last.exists() else 0

    def stop(signum, frame):
        last.parent.mkdir(exist_ok=True)
        last.write_text(str(step))
        sys.stdout.write(f"stopped at {step}\n")
        sys.exit(128 + signum)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    with (folder / "metrics.jsonl").open("a") as file:
        while step < total:
            time.sleep(float(os.environ.get("STAND_IN_STEP", "0")))
            step += 1
            loss = loss_at(optimizer, lr, seed, step, total)
            row = {"step": step, "time": 0.0, "val_loss": loss, "training_seconds": 0.5 * step, "pid": os.getpid()}
            file.write(json.dumps(row) + "\n")
            file.flush()
    result = {
        "steps": total,
        "optimizer": {"name": optimizer, "lr": lr},
        "primary_metric": {"metric": "val_loss", "mode": "min", "label": "validation loss", "curve": "val_loss"}
        | {"value": loss},
        "metrics": {"val_loss": loss},
        "costs": {"step_milliseconds": 2.0 if optimizer == "AdamW" else 3.0, "unit": "tokens"}
        | {"optimizer_state_bytes": 800 if optimizer == "AdamW" else 400, "parameter_bytes": 400}
        | {"predicted_state_bytes": 800 if optimizer == "AdamW" else 400},
        "hardware": {"cpu": "stand-in", "cores": 2, "threads": int(os.environ["OMP_NUM_THREADS"])},
        "versions": {"python": "3"},
        "command": sys.argv,
    }
    if os.environ.get("STAND_IN_RESULT", "yes") == "yes":
        (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
