"""A run's configuration and weights for commands that train nothing: on one CPU, without what training alone takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule

    from ..tasks.base import Task

__all__ = ["ON_ONE_CPU", "load_weights", "open_data", "trainer_options", "without_start"]

ON_ONE_CPU = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "precision": "32-true",
    "logger": False,
    "callbacks": None,
    "plugins": None,
    "profiler": None,
}
"""Options of the trainer. What belongs to training alone may ask for devices and packages that are not here."""
_OF_A_START = ("ckpt_path", "weights_only")


def trainer_options() -> list[str]:
    """The same as options of the command line."""
    return [f"--trainer.{key}={'null' if value is None else value}" for key, value in ON_ONE_CPU.items()]


def without_start(content: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the options that only the subcommand of a run takes."""
    return {name: value for name, value in content.items() if name not in _OF_A_START}


def open_data(data: LightningDataModule, checkpoint: str | None, stage: str) -> None:
    """Open the data of a run by what the outputs of its checkpoint mean."""
    from ..tasks.data.module import SampledDataModule

    if checkpoint is not None and isinstance(data, SampledDataModule):
        data.recall(checkpoint)
    data.prepare_data()
    data.setup(stage)


def load_weights(task: Task, checkpoint: str) -> dict[str, Any]:
    """Load a checkpoint's weights, those that evaluations take; its other contents are returned with them."""
    from ..tasks.checkpoints.saving import AtomicCheckpointIO

    saved = AtomicCheckpointIO().load_checkpoint(checkpoint, weights_only=True)
    task.on_load_checkpoint(saved)
    task.load_state_dict(saved["state_dict"])
    return saved
