"""A recipe's model, its task's loss and the first batches of its training data."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from lightning_adam_mini.factory import AdamMini, OptimizerFactory
from lightning_adam_mini.hessian import HessianOperator
from lightning_adam_mini.hessian.batches import place

from ...tasks.base import Task
from ...tasks.data.sampling import seed_of
from ..models import load_weights, open_data
from ..recipes import find_recipe
from ..runnable_models import choose_device
from .recipe import build_application, find_checkpoint

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
        notes: What the user should know beside the figures.
    """

    task: Task
    batches: list[tuple[int, Any]]
    seed: int
    weights: str
    dtype: torch.dtype
    notes: tuple[str, ...] = ()

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

    @property
    def has_other_optimizer(self) -> bool:
        """Whether the recipe has an optimizer that does not cut."""
        return not isinstance(self.task.optimizer_factory, AdamMini)


def load_problem(options: Namespace) -> Problem:
    """Build the model of the options' recipe, load its weights and read its batches.

    Raises:
        ValueError: There is no such recipe or checkpoint, its data cannot be read, or its loss is no function of one
            batch.
    """
    device = choose_device(options.device)
    recipe = find_recipe(options.recipe, given_as="RECIPE")
    application = build_application(recipe, options)
    task, data = cast("Task", application.model), application.datamodule
    if not task.automatic_optimization:
        raise ValueError(
            f"{type(task).__name__} steps its optimizers by itself: its loss is no function of one batch, and has no "
            "Hessian here; take a task with one training loss, such as llm/gpt2_tiny.yaml"
        )
    checkpoint = find_checkpoint(recipe, application, options)
    with _named(options.recipe):
        open_data(data, checkpoint, "fit")
    cast("Any", application.trainer).datamodule = data  # as fit does
    task.trainer = application.trainer
    notes = _plain(task)
    task.configure_model()
    weights = f"fresh weights, seed {application.config.seed_everything}"
    if checkpoint is not None:
        weights = _load(task, checkpoint)
    task.to(device).eval()
    batches = list(enumerate(_batches(task, data, options.batches, device)))
    if len(batches) < options.batches:
        notes.append(f"the training data have {len(batches)} batches, fewer than --batches {options.batches}")
    dtype = getattr(torch, options.precision)
    return _checked(Problem(task, batches, options.seed, weights, dtype, tuple(notes)), options)


def _plain(task: Any) -> list[str]:
    """Leave out what has no second derivative or no use here; what the user should know of it."""
    for name in ("compile_model", "activation_checkpointing"):
        if getattr(task, name, False):
            setattr(task, name, False)
    for name in ("log", "log_dict"):  # there is no trainer that would take them
        object.__setattr__(task, name, _nothing)
    attention = getattr(task, "attention", None)
    if attention in (None, "sdpa", "eager"):
        return []
    task.attention = "sdpa"
    return [f"{attention} has no second derivatives: attention is computed by sdpa's math kernel in its place"]


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Log nothing."""


def _load(task: Task, checkpoint: str) -> str:
    """Load a checkpoint's weights; what they are, in words."""
    saved = load_weights(task, checkpoint)
    kind = "averaged weights" if "current_model_state" in saved else "weights"
    return f"{kind} of step {saved.get('global_step', 0):,}, {checkpoint}"


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
