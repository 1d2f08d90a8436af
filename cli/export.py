"""`adam-mini export`: a trained model as a folder of the library that its network comes from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from .arguments import Parser, check_place
from .recipes import read_yaml
from .run_folder import resolve_checkpoint

__all__ = ["main"]

log = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> None:
    """Export the checkpoint of a run.

    Raises:
        ValueError: The folder holds no run, or its task cannot be exported.
    """
    parser = Parser(
        prog="adam-mini export",
        description="Save the model of a run for the from_pretrained of its library: transformers or diffusers.",
    )
    parser.add_argument("run_dir", type=Path, help="Folder of the run.")
    parser.add_argument("--ckpt_path", default="last", help="Checkpoint file, or `last`.")
    parser.add_argument(
        "--out", type=Path, default=None, help="New folder for the model; RUN_DIR/hf or RUN_DIR/diffusers by default."
    )
    options = parser.parse_args(arguments)
    run_dir, out = options.run_dir, options.out
    if not (config := run_dir / "config.yaml").is_file():
        raise ValueError(f"{run_dir} holds no run: there is no config.yaml in it")
    if out is not None:
        if out.expanduser().exists():
            raise ValueError(f"{out} exists; choose another folder for the export, or remove it")
        check_place(out)

    from lightning.pytorch.trainer.states import TrainerFn

    from .application import Application
    from .models import ON_ONE_CPU, load_weights, open_data, without_start

    checkpoint = resolve_checkpoint(options.ckpt_path, run_dir, may_start=False)
    assert checkpoint is not None
    content = without_start(read_yaml(config))
    on_one_cpu = {"trainer": {**content["trainer"], **ON_ONE_CPU}, "run_dir": str(run_dir)}
    application = Application({**content, **on_one_cpu}, run=False)
    task, data, trainer = application.model, application.datamodule, application.trainer
    if not hasattr(task, "export"):
        raise ValueError(f"{type(task).__name__} has no export; language models and diffusion models have")
    trainer.state.fn = TrainerFn.PREDICTING
    cast("Any", trainer).datamodule, data.trainer, task.trainer = data, trainer, trainer  # as predict does
    open_data(data, checkpoint, "predict")
    task.configure_model()
    load_weights(task, checkpoint)
    folder = out or run_dir / getattr(task, "export_folder", "hf")
    log.info("%s", f"exported to {task.export(folder)}")
