"""A recipe's model, its task's loss, the first batches of its training data, and the blocks of its Hessian."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.factory import AdamMini, OptimizerFactory
from lightning_adam_mini.hessian import HessianOperator, ParameterBlock, block_of, blocks_of
from lightning_adam_mini.hessian.advice import KEEP
from lightning_adam_mini.hessian.loss import place
from lightning_adam_mini.hints import did_you_mean
from lightning_adam_mini.partition import expressible_structures, partition_module

from ...tasks.base import Task
from ...tasks.data.sampling import seed_of
from ..application import Application
from ..models import build_application, load_weights, open_data, trainer_options
from ..recipes import find_recipe
from ..run_folder import holds_run, resolve_checkpoint
from ..runnable_models import choose_device

__all__ = [
    "Problem",
    "choose_blocks",
    "load_problem",
    "own_structures",
    "structures_or_keep",
    "with_own_overrides",
]


@dataclass(frozen=True)
class Problem:
    """A model and the loss whose Hessian is computed.

    Args:
        task: With its network, in eval mode.
        batches: Number and batch, as the task's training step takes them.
        seed: Of what the loss draws.
        weights: Which ones, in words.
        dtype: Of the computation.
        notes: What the user should know besides the results.
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
        """The recipe's AdamMini; one with default options where the recipe has another optimizer."""
        own: OptimizerFactory = self.task.optimizer_factory
        return own if isinstance(own, AdamMini) else AdamMini()

    @property
    def has_other_optimizer(self) -> bool:
        """Whether the recipe has an optimizer without blocks."""
        return not isinstance(self.task.optimizer_factory, AdamMini)


def load_problem(options: Namespace) -> Problem:
    """Build the model of the options' recipe, load its weights and read its batches.

    Raises:
        ValueError: There is no such recipe or checkpoint, its data cannot be read, or its loss is not a function of one
            batch.
    """
    device = choose_device(options.device)
    recipe = find_recipe(options.recipe, given_as="RECIPE")
    of_run = [] if options.run_dir is None else [f"--run_dir={options.run_dir}"]
    application = build_application(recipe, [*options.recipe_options, *trainer_options(), *of_run])
    task, data = cast("Task", application.model), application.datamodule
    if not task.automatic_optimization:
        raise ValueError(
            f"{type(task).__name__} steps its optimizers in its training step: its loss is not a function of one "
            "batch, and has no Hessian here; take a task with one training loss, such as llm/gpt2_tiny.yaml"
        )
    checkpoint = _find_checkpoint(recipe, application, options)
    with _naming_the_recipe(options.recipe):
        open_data(data, checkpoint, "fit")
    cast("Any", application.trainer).datamodule = data  # as fit does
    task.trainer = application.trainer
    notes = _make_differentiable(task)
    task.configure_model()
    weights = f"fresh weights, seed {application.config.seed_everything}"
    if checkpoint is not None:
        saved = load_weights(task, checkpoint)
        kind = "averaged weights" if "current_model_state" in saved else "weights"
        weights = f"{kind} of step {saved.get('global_step', 0):,}, {checkpoint}"
    task.to(device).eval()
    batches = list(enumerate(_batches(task, data, options.batches, device)))
    if len(batches) < options.batches:
        notes.append(f"the training data have {len(batches)} batches, fewer than --batches {options.batches}")
    problem = Problem(task, batches, options.seed, weights, getattr(torch, options.precision), tuple(notes))
    _check_loss(problem)
    return problem


def _find_checkpoint(recipe: Path, application: Application, options: Namespace) -> str | None:
    """The checkpoint of `--ckpt_path`, in the recipe's newest run or that of `--run_dir`; None without the option."""
    if options.ckpt_path is None:
        return None
    own = options.run_dir is None and holds_run(recipe.parent)
    run_dir = recipe.parent if own else Path(application.config.run_dir)
    checkpoint = resolve_checkpoint(options.ckpt_path, run_dir, may_start=False)
    if checkpoint is None or checkpoint in ("hpc", "registry"):
        raise ValueError(f"--ckpt_path {options.ckpt_path}: give a path, last or best")
    return checkpoint


def _make_differentiable(task: Any) -> list[str]:
    """Turn off what has no second derivative or no use here; notes for the user."""
    for name in ("compile_model", "activation_checkpointing"):
        if getattr(task, name, False):
            setattr(task, name, False)
    for name in ("log", "log_dict"):  # no trainer runs that would take them
        object.__setattr__(task, name, lambda *_, **__: None)
    attention = getattr(task, "attention", None)
    if attention in (None, "sdpa", "eager"):
        return []
    task.attention = "sdpa"
    return [f"{attention} has no second derivatives: sdpa's math kernel computes attention instead"]


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


def _check_loss(problem: Problem) -> None:
    """Compute the loss of one batch; whatever a task's training step does may fail here."""
    name = type(problem.task).__name__
    try:
        with torch.no_grad():
            loss = problem.loss(problem.task, problem.batches[0])
    except Exception as error:
        line = " ".join(str(error).split())[:160]
        raise ValueError(f"{name}: its loss on one batch cannot be computed outside of training: {line}") from error
    if getattr(loss, "numel", int)() != 1:
        raise ValueError(f"{name}: its training step returns no loss, so that it has no Hessian here")


@contextmanager
def _naming_the_recipe(recipe: str) -> Iterator[None]:
    """Say in the error whose data are missing."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise ValueError(f"the data of {recipe} cannot be read, and a Hessian needs batches: {error}") from error


def own_structures(model: nn.Module, factory: AdamMini) -> dict[str, Blocks]:
    """The block structure of each parameter under the recipe's partition and overrides."""
    partition = partition_module(model, factory.partition, factory.partition_overrides, factory.partition_layouts)
    return {name: found.blocks for name, found in partition.items()}


def structures_or_keep(model: nn.Module, factory: AdamMini) -> dict[str, dict[str, Blocks]]:
    """By parameter, its present block structure, `keep`, and those that `partition_overrides` can ask for, by name."""
    own, asked = own_structures(model, factory), expressible_structures(model, factory.partition_layouts)
    return {name: ({KEEP: own[name]} if name in own else {}) | structures for name, structures in asked.items()}


def with_own_overrides(model: nn.Module, factory: AdamMini, advised: Mapping[str, str]) -> dict[str, str]:
    """Advised overrides, one parameter each, followed by those of the recipe that still match a parameter."""
    if not advised:
        return dict(factory.partition_overrides)
    found = dict(advised)
    for key, structure in factory.partition_overrides.items():
        if key in found:
            continue
        try:
            partition_module(model, factory.partition, {**found, key: structure}, factory.partition_layouts)
        except ValueError:  # the advice covers all that it matches
            continue
        found[key] = structure
    return found


def choose_blocks(
    model: nn.Module, patterns: Sequence[str] | None, factory: AdamMini, *, least: int = 1
) -> tuple[list[ParameterBlock], list[str]]:
    """Blocks of the patterns of `--blocks`, each once, in the order of the patterns; without any, trainable matrices.

    Args:
        model: The model.
        patterns: Names of parameters, patterns of the shell or `re:` patterns, with or without a leading `model.`; a
            trailing `[K]` or `[*]` takes blocks of the partition.
        factory: Knows the partition.
        least: Elements of a matrix below which it is left out, where there are no patterns.

    Returns:
        The blocks, and the names of the matrices that were left out.

    Raises:
        ValueError: A pattern matches nothing, a parameter has no such block, or there is no matrix.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if patterns is not None:
        return _blocks_by_pattern(model, patterns, list(parameters), factory), []
    matrices = {name: p.numel() for name, p in parameters.items() if p.dim() > 1}
    if not matrices:
        raise ValueError("the model has no trainable parameter of two dimensions: name others by --blocks")
    chosen = [ParameterBlock(name, name) for name, size in matrices.items() if size >= least]
    if not chosen:
        raise ValueError(f"no matrix has {least} elements: lower --steps, or name --blocks")
    return chosen, [name for name, size in matrices.items() if size < least]


def _blocks_by_pattern(
    model: nn.Module, patterns: Sequence[str], names: Sequence[str], factory: AdamMini
) -> list[ParameterBlock]:
    others = _without_hessian(model, names)
    structures: dict[str, Blocks] = {}
    found: dict[str, ParameterBlock] = {}
    for pattern in patterns:
        numbered = re.fullmatch(r"(.*)\[(\d+|\*)\]", pattern)
        if numbered and not structures:
            structures = own_structures(model, factory)
        for name in _matching(numbered[1] if numbered else pattern, names, others):
            if numbered is None:
                some = [ParameterBlock(name, name)]
            elif numbered[2] == "*":
                some = list(blocks_of(name, structures[name]))
            else:
                some = [block_of(name, structures[name], int(numbered[2]))]
            found |= {block.name: block for block in some if block.name not in found}
    return list(found.values())


def _without_hessian(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Why parameters have no Hessian of their own: other names of tied ones, and frozen ones."""
    first = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if first[id(p)] != name:
            found[name] = f"is the same tensor as {first[id(p)]}, which goes by that name"
        elif name not in names:
            found[name] = "is frozen, and the Hessian is that of trainable parameters"
    return found


def _matching(pattern: str, names: Sequence[str], others: Mapping[str, str]) -> list[str]:
    """Names of trainable parameters that a pattern matches."""
    found = _matches(pattern, names)
    if not found:
        if other := next(iter(_matches(pattern, list(others))), None):
            raise ValueError(f"--blocks {pattern!r}: {other} {others[other]}")
        forms = [form for name in names for form in _forms(name)]
        hint = did_you_mean(pattern, forms, otherwise=f"; there are {', '.join(names[:3])}, ...", cutoff=0.4)
        raise ValueError(f"--blocks {pattern!r}: no trainable parameter of that name{hint}")
    return found


def _matches(pattern: str, names: Sequence[str]) -> list[str]:
    if not pattern.startswith("re:"):
        return [name for name in names if any(fnmatchcase(form, pattern) for form in _forms(name))]
    try:
        expression = re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise ValueError(f"--blocks {pattern!r}: this is not a regular expression: {error}") from error
    return [name for name in names if any(expression.fullmatch(form) for form in _forms(name))]


def _forms(name: str) -> tuple[str, ...]:
    return (name, name.removeprefix("model."))
