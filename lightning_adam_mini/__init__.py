"""Adam-mini for PyTorch: AdamW with one second moment a block, or a factored one, at half of its state's memory."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_adam_mini.blocks import Blocks
    from lightning_adam_mini.measure import explain
    from lightning_adam_mini.optim import AdamMini
    from lightning_adam_mini.partition import annotate, partition_module, register_layout
    from lightning_adam_mini.verify import verify_partition

__all__ = ["AdamMini", "Blocks", "annotate", "explain", "partition_module", "register_layout", "verify_partition"]
__version__ = "0.1.0"

_HOMES = {
    "AdamMini": "lightning_adam_mini.optim",
    "Blocks": "lightning_adam_mini.blocks",
    "annotate": "lightning_adam_mini.partition",
    "explain": "lightning_adam_mini.measure",
    "partition_module": "lightning_adam_mini.partition",
    "register_layout": "lightning_adam_mini.partition",
    "verify_partition": "lightning_adam_mini.verify",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the command line lists its recipes without waiting for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted([*globals(), *__all__])
