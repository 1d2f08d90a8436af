"""Optimizer states of AdamW, of the authors' package and of other partitions, as states of `AdamMini`, and back."""

from lightning_adam_mini.convert.conversion import from_adam_mini_package, from_adamw, repartition, to_adamw

__all__ = ["from_adam_mini_package", "from_adamw", "repartition", "to_adamw"]
