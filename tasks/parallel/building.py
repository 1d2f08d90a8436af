"""From a task's function that builds its network to the network as a trainer's strategy wants it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch import nn

from .activation_checkpointing import checkpoint_activations
from .fsdp1 import prepare_fsdp1
from .initialisation import LARGE, load_from_first_rank, materialise, share_random_state
from .sharding import shard_model
from .strategies import FSDP2
from .tensor_parallel import apply_tensor_parallel, check_tensor_parallel

__all__ = ["Recipe", "build_for"]

Build = Callable[[], nn.Module]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is made.

    Args:
        whole: Builds it with its weights, on the CPU.
        outline: Builds it on the meta device, where it can be large; None where it cannot.
        initialise: Draws all weights and sets all buffers in place, from an outline that was given memory.
        is_trained: Whether `whole` reads its weights from a file.
    """

    whole: Build
    outline: Build | None = None
    initialise: Callable[[nn.Module], None] | None = None
    is_trained: bool = False


def build_for(strategy: Strategy | None, recipe: Recipe) -> nn.Module:
    """Build a network, and divide it where the strategy shards.

    Under FSDP2 all ranks have the first one's random state: equal weights, those of one process with its seed.

    Args:
        strategy: The trainer's; None without a trainer.
        recipe: How the network is made.

    Raises:
        ValueError: The strategy cannot divide this network.
    """
    if isinstance(strategy, FSDPStrategy):
        share_random_state()
        model = recipe.whole()
        prepare_fsdp1(strategy, model)
        return model
    if not isinstance(strategy, FSDP2):
        return recipe.whole()
    share_random_state()
    _hide_warnings_without_cause()
    model, is_outline = _undivided(strategy, recipe)
    if strategy._layer_sync is not None:  # trainer.sync_batchnorm; Lightning itself ignores it under this strategy
        model = strategy._layer_sync.apply(model)
    if strategy.tensor_mesh is not None:
        check_tensor_parallel(model, strategy.tensor_mesh.size())
        apply_tensor_parallel(model, strategy.tensor_mesh)
    if strategy.activation_checkpointing:
        checkpoint_activations(model)
    if strategy.sizes.data_ranks > 1 or strategy.tensor_mesh is None or strategy.param_dtype is not None:
        shard_model(
            model,
            strategy.data_mesh,
            reshard_after_forward=strategy.reshard_after_forward,
            param_dtype=strategy.param_dtype,
            reduce_dtype=strategy.reduce_dtype,
            cpu_offload=strategy.cpu_offload,
        )
    if is_outline:
        assert recipe.initialise is not None
        device = torch.device("cpu") if strategy.cpu_offload else strategy.root_device
        initialise = recipe.initialise
        materialise(model, device, lambda: initialise(model))
        if recipe.is_trained:
            load_from_first_rank(model, recipe.whole)
    return model


def _undivided(strategy: FSDP2, recipe: Recipe) -> tuple[nn.Module, bool]:
    """The network before it is divided, and whether it is an outline without weights."""
    if recipe.outline is None or strategy.initialisation == "whole":
        if strategy.initialisation == "sharded":
            raise ValueError(
                "trainer.strategy.initialisation sharded is for language models: leave it out, and the model is built "
                "on each rank before it is sharded"
            )
        return recipe.whole(), False
    with torch.device("meta"):
        outline = recipe.outline()
    large = sum(parameter.numel() for parameter in outline.parameters()) >= LARGE
    if large or strategy.initialisation == "sharded":
        return outline, True
    return recipe.whole(), False


def _hide_warnings_without_cause() -> None:
    """Hide what torch says about networks that tasks use rightly."""
    # Outputs are views, and no task changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # Whole parameters are gathered in two steps under FSDP2 with tensor parallelism, for checkpoints alone.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
