"""The optimizer: its update, its state and the class."""

from lightning_adam_mini.optim.adam_mini import AdamMini

__all__ = ["AdamMini"]
