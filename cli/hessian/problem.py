"""A recipe's model, its task's loss and the first batches of its training data."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from lightning_adam_mini.factory import AdamMini, OptimizerFactory
from lightning_adam_mini.hessian import HessianOperator
from lightning_adam_mini.hessian.batches import place

from ...tasks.base import Task
from ...tasks.seeds import seed_of
from ..application import Application
from ..bench.models import choose_device
from ..export import ONE_CPU
from ..model_building import quiet
from ..recipes import find_recipe
from ..run_folder import holds_run, resolve_checkpoint

__all__ = ["Problem", "load_problem"]


@dataclass(frozen=True)
class Problem:
    """What the Hessian is of.

    Args:
        task: With its network, in eval mode.
        batches: Number and batch, as the task's training step takes them.
        seed: Of what the loss draws.
        weights: Which ones, in words.
        dtype: Of the computation.
    """

    task: Task
    batches: list[tuple[int, Any]]
    seed: int
    weights: str
    dtype: torch.dtype

    def loss(self, task: nn.Module, numbered: tuple[int, Any]) -> Tensor:
        """The training loss of a batch; noise that it draws is the same on each pass."""
        number, batch = numbered
        device = next(task.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed_of(self.seed, number))
            found = cast("Any", task).training_step(batch, number)
        return found["loss"] if isinstance(found, dict) else found

    def operator(self) -> HessianOperator:
        """The Hessian of the mean loss over the batches."""
        return HessianOperator(self.task, self.loss, self.batches, dtype=self.dtype)

    @property
    def factory(self) -> AdamMini:
        """AdamMini as the recipe cuts; its defaults where the recipe has another optimizer."""
        own: OptimizerFactory = self.task.optimizer_factory
        return own if isinstance(own, AdamMini) else AdamMini()


def load_problem(options: Namespace) -> Problem:
    """Build the model of the options' recipe, load its weights and read its batches.

    Raises:
        ValueError: There is no such recipe or checkpoint, its data cannot be read, or its loss is no function of one
            batch.
    """
    device = choose_device(options.device)
    recipe = find_recipe(options.recipe, given_as="RECIPE")
    application = _application(recipe, options)
    task, data = cast("Task", application.model), application.datamodule
    if not task.automatic_optimization:
        raise ValueError(
            f"{type(task).__name__} steps its optimizers by itself: its loss is no function of one batch, and has no "
            "Hessian here; take a task with one training loss, such as llm/gpt2_tiny.yaml"
        )
    checkpoint = _checkpoint(recipe, application, options)
    with _named(options.recipe):
        data.prepare_data()
        data.setup("fit")
    cast("Any", application.trainer).datamodule = data  # as fit does
    task.trainer = application.trainer
    _plain(task)
    task.configure_model()
    if checkpoint is not None:
        _load(task, checkpoint)
    task.to(device).eval()
    batches = _batches(task, data, options.batches, device)
    weights = f"checkpoint {checkpoint}" if checkpoint else f"fresh weights, seed {application.config.seed_everything}"
    dtype = getattr(torch, options.precision)
    return _checked(Problem(task, list(enumerate(batches)), options.seed, weights, dtype), options)


def _application(recipe: Path, options: Namespace) -> Application:
    # What belongs to training alone may ask for devices and packages that are not here.
    trainer = {**ONE_CPU, "logger": False, "callbacks": None, "plugins": None, "profiler": None}
    given = [f"--trainer.{key}={'null' if value is None else value}" for key, value in trainer.items()]
    of_run = [] if options.run_dir is None else [f"--run_dir={options.run_dir}"]
    with quiet():
        return Application(
            ["--config", str(recipe), *options.recipe_options, *given, *of_run], recipe=recipe.stem, run=False
        )


def _checkpoint(recipe: Path, application: Application, options: Namespace) -> str | None:
    if options.ckpt_path is None:
        return None
    # A run's own config.yaml names its run.
    own = options.run_dir is None and holds_run(recipe.parent)
    run_dir = recipe.parent if own else Path(application.config.run_dir)
    checkpoint = resolve_checkpoint(options.ckpt_path, run_dir, may_start=False)
    if checkpoint is None or checkpoint in ("hpc", "registry"):
        raise ValueError(f"--ckpt_path {options.ckpt_path}: give a path, last or best")
    return checkpoint


def _plain(task: Any) -> None:
    """Without what has no second derivative or no use here."""
    for name in ("compile_model", "activation_checkpointing"):
        if getattr(task, name, False):
            setattr(task, name, False)
    for name in ("log", "log_dict"):  # there is no trainer that would take them
        object.__setattr__(task, name, _nothing)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Log nothing."""


def _load(task: Task, checkpoint: str) -> None:
    from ...tasks.checkpoint_io import AtomicCheckpointIO

    saved = AtomicCheckpointIO().load_checkpoint(checkpoint, weights_only=True)
    task.on_load_checkpoint(saved)
    task.load_state_dict(saved["state_dict"])


def _batches(task: Task, data: LightningDataModule, count: int, device: torch.device) -> list[Any]:
    """The first batches of training, as the training step gets them."""
    found = []
    for batch in islice(data.train_dataloader(), count):
        batch = place(batch, device, None)
        for name in ("on_before_batch_transfer", "on_after_batch_transfer"):
            owner = data if getattr(type(data), name) is not getattr(LightningDataModule, name) else task
            batch = getattr(owner, name)(batch, 0)
        found.append(batch)
    if not found:
        raise ValueError("the training data have no batch: lower --data.batch_size")
    return found


def _checked(problem: Problem, options: Namespace) -> Problem:
    """The problem, once its loss was computed for one batch."""
    name = type(problem.task).__name__
    try:
        with torch.no_grad():
            loss = problem.loss(problem.task, problem.batches[0])
    except Exception as error:
        line = " ".join(str(error).split())[:160]
        raise ValueError(f"{name}: its loss on one batch cannot be computed outside of training: {line}") from error
    if getattr(loss, "numel", int)() != 1:  # whatever a task may return
        raise ValueError(f"{name}: its training step returns no loss, so that it has no Hessian here")
    return problem


@contextmanager
def _named(recipe: str) -> Iterator[None]:
    """Tell which recipe's data are missing."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise ValueError(f"the data of {recipe} cannot be read, and a Hessian needs batches: {error}") from error
