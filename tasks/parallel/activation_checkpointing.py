"""Activations that are computed again in the backward pass, in any network."""

from __future__ import annotations

from typing import Any

from torch import nn

from .units import repeated_blocks

__all__ = ["checkpoint_activations"]


def checkpoint_activations(model: nn.Module) -> None:
    """Keep the inputs of each repeated block for the backward pass, and nothing within, by the network's own means.

    Networks of transformers and diffusers have their own way. In others each repeated block is wrapped; names in state
    dicts stay as they are.

    Raises:
        ValueError: The network has no repeated blocks.
    """
    network: Any = model
    if hasattr(model, "activation_checkpointing_enable"):  # transformers from 5.23
        network.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    elif hasattr(model, "gradient_checkpointing_enable"):
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif hasattr(model, "enable_gradient_checkpointing"):
        network.enable_gradient_checkpointing()
    else:
        _wrap_blocks(model)


def _wrap_blocks(model: nn.Module) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    blocks = repeated_blocks(model)
    if not blocks:
        raise ValueError(
            f"trainer.strategy.activation_checkpointing: {type(model).__name__} has no repeated blocks to compute "
            "again; set it to false"
        )
    for name, block in blocks.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, checkpoint_wrapper(block))
