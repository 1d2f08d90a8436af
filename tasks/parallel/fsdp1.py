"""Lightning's own FSDP strategy (torch's FSDP1): which modules it wraps, and how it clips."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..checkpoint_io import verify
from .units import repeated_blocks

if TYPE_CHECKING:
    from lightning.pytorch.strategies import FSDPStrategy

__all__ = ["prepare_fsdp1"]


def prepare_fsdp1(strategy: FSDPStrategy, model: nn.Module) -> None:
    """Have the strategy wrap the repeated blocks of a network, where the user names no others, and verify checkpoints.

    Args:
        strategy: It wraps the whole task after this.
        model: The network, whole.

    Raises:
        ValueError: Parameters would be flattened with nothing to tell them apart.
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
    load = strategy.load_checkpoint

    def verify_and_load(checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(strategy.broadcast(checkpoint_path))
        verify(path, weights_only=weights_only)  # Lightning's own reading unpickles any class and compares nothing
        return load(path, weights_only=weights_only)

    strategy.load_checkpoint = verify_and_load  # type: ignore[method-assign]
