"""Convert optimizer states of AdamW, of the package `adam-mini` and of other partitions to `AdamMini`, and back."""

from lightning_adam_mini.convert.conversion import from_adam_mini_package, from_adamw, repartition, to_adamw

__all__ = ["from_adam_mini_package", "from_adamw", "repartition", "to_adamw"]
