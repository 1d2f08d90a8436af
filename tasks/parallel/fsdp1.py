"""Lightning's own FSDP strategy (torch's FSDP1): its wrap policy, and how it loads checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.distributed.fsdp._common_utils import clean_tensor_name
from torch.optim import Optimizer

from ..checkpoints.folders import name_parameters
from ..checkpoints.saving import read_checkpoint
from ..errors import error_line
from .sharding import repeated_blocks

if TYPE_CHECKING:
    from lightning.pytorch.strategies import FSDPStrategy

__all__ = ["prepare_fsdp1"]


def prepare_fsdp1(strategy: FSDPStrategy, model: nn.Module) -> None:
    """Set a wrap policy of the repeated blocks, unless the user gives another, and load checkpoints as we do.

    Args:
        strategy: The strategy, which wraps the whole task after this.
        model: The network, whole.

    Raises:
        ValueError: `use_orig_params` is off, so that parameters cannot be told apart once they are flattened.
    """
    from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

    if not strategy.kwargs.get("use_orig_params", True):
        raise ValueError(
            "trainer.strategy.use_orig_params=false hides which parameter is which from the optimizer: leave it out, "
            "or use trainer.strategy fsdp2"
        )
    if "auto_wrap_policy" not in strategy.kwargs:
        blocks = {id(block) for block in repeated_blocks(model).values()}
        policy = partial(lambda_auto_wrap_policy, lambda_fn=lambda module: id(module) in blocks)
        strategy.kwargs["auto_wrap_policy"] = policy
    options: Any = strategy  # Lightning's own loading may run code, hides the weights and misreads numbered states
    options.load_checkpoint = partial(_read, strategy)
    options.load_model_state_dict = partial(_load, strategy)


def _read(strategy: FSDPStrategy, path: Any, weights_only: bool | None = None) -> dict[str, Any]:
    """Read a file or folder with whole tensors on every rank; those of a file stay on the disk until they are used."""
    return read_checkpoint(Path(strategy.broadcast(path)), weights_only=weights_only, mmap=True)


def _load(strategy: FSDPStrategy, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
    """Load weights and, to continue training, optimizer states, which Lightning leaves to the strategy.

    Raises:
        ValueError: The state of another optimizer, or one that was saved in another layout; nothing is changed then.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    model = cast("FullyShardedDataParallel", strategy.model)
    weights = checkpoint["state_dict"]
    states = checkpoint.get("optimizer_states", []) if strategy.optimizers else []
    named = [
        _named(state, optimizer, model, weights) for state, optimizer in zip(states, strategy.optimizers, strict=False)
    ]
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        try:
            model.load_state_dict(weights, strict=strict)
        except RuntimeError as error:
            first = " ".join(line.strip() for line in str(error).splitlines()[1:2]) or error_line(error)
            raise ValueError(f"the checkpoint belongs to another model: {first}") from error
        for state, optimizer in zip(named, strategy.optimizers, strict=False):
            optimizer.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(model, optimizer, state))


def _named(
    state: Mapping[str, Any], optimizer: Optimizer, model: nn.Module, weights: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The state of an optimizer by names, checked to have the shapes of the weights."""
    names = {parameter: clean_tensor_name(name) for name, parameter in model.named_parameters()}
    groups = [{"params": [names[parameter] for parameter in group["params"]]} for group in optimizer.param_groups]
    named = name_parameters(state, groups)
    for name, values in named["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != weights.get(name, value).shape:
                raise ValueError(
                    f"the saved {key} of {name!r} has shape {tuple(value.shape)}, and FSDP1 keeps one value "
                    "an element: continue with the strategy that saved it, or with --trainer.strategy fsdp2 or ddp"
                )
    return named
