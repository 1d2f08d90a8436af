"""The model of a checkpoint without its memory: of a run's configuration, with the shapes of the saved weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
import yaml
from torch import Tensor

from .model_building import quiet
from .recipes import read_yaml
from .without_training import ON_ONE_CPU, without_start

if TYPE_CHECKING:
    from ..tasks.base import Task

__all__ = ["outline_task"]


def outline_task(config: Path, weights: Mapping[str, Tensor], optimizer: str | None, options: Sequence[str]) -> Task:
    """The task of a run on the meta device; no data are read.

    Args:
        config: The run's `config.yaml`, or a recipe.
        weights: Saved weights. They decide sizes that follow from data, such as a vocabulary, and dtypes.
        optimizer: Optimizer to take instead of the configuration's.
        options: Further options of the command line, such as `--optimizer.partition=default`.

    Raises:
        ValueError: The configuration cannot be read, or the weights belong to another model.
    """
    from .application import Application

    content = read_yaml(config)
    own = content.get("optimizer")
    own = own.get("class_path", "") if isinstance(own, dict) else str(own or "AdamMini")
    content = without_start(content)
    content["trainer"] = {**(content.get("trainer") or {}), **ON_ONE_CPU}
    content["seed_everything"] = False
    replaced = [f"--optimizer={optimizer}"] if optimizer and own.rpartition(".")[2] != optimizer else []
    with TemporaryDirectory() as folder, quiet():
        cleaned = Path(folder) / config.name
        cleaned.write_text(yaml.safe_dump(content), "utf-8")
        application = Application(["--config", str(cleaned), *replaced, *options], run=False)
        task: Task = application.model
        told = task.configure_meta_model(application.datamodule)
    _take_shapes(task, weights, config, may_differ=bool(told))
    return task


def _take_shapes(task: Task, weights: Mapping[str, Tensor], config: Path, *, may_differ: bool) -> None:
    """Give parameters on the meta device the dtypes and shapes of saved weights.

    Args:
        task: The task.
        weights: Saved weights by name.
        config: Where the task comes from, for messages.
        may_differ: Whether one size, of the first dimension, follows from data that were not read.
    """
    sizes: set[tuple[int, int]] = set()
    for name, parameter in task.named_parameters():
        saved = weights.get(name)
        if saved is None:
            raise ValueError(_other_model(config, f"it has no {name!r}"))
        if saved.shape != parameter.shape:
            is_count = may_differ and saved.dim() == parameter.dim() and saved.shape[1:] == parameter.shape[1:]
            sizes |= {(saved.shape[0], parameter.shape[0])} if is_count else set()
            if not is_count or len(sizes) > 1:
                shapes = f"{name!r} has shape {tuple(saved.shape)} there and {tuple(parameter.shape)} here"
                raise ValueError(_other_model(config, shapes))
        # In place, so that tied parameters stay one.
        parameter.data = torch.empty(saved.shape, dtype=saved.dtype, device="meta")


def _other_model(config: Path, difference: str) -> str:
    return (
        f"the checkpoint belongs to another model than {config}: {difference}; give --recipe, the recipe or "
        "config.yaml that it was trained with"
    )
