"""What a strategy cannot do, told before training starts."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy

from .strategies import FSDP2

__all__ = ["check_strategy"]


def check_strategy(trainer: Trainer) -> None:
    """Refuse strategies and options that would fail, or do something else, at the first batch.

    Raises:
        ValueError: With what to do instead.
    """
    strategy = trainer.strategy
    if any(cls.__name__ == "DeepSpeedStrategy" for cls in type(strategy).__mro__):
        raise ValueError(
            "trainer.strategy: DeepSpeed flattens all parameters into one, and optimizers need each with its "
            "shape; use --trainer.strategy fsdp2, which shards as much"
        )
    if not isinstance(strategy, FSDP2):
        _check_foreign(strategy)
        return
    if trainer.precision in ("16-mixed", "transformer-engine", "transformer-engine-float16"):
        raise ValueError(
            f"trainer.precision {trainer.precision} does not run with trainer.strategy {strategy.strategy_name}, whose "
            "gradients are sharded: use bf16-mixed"
        )
    if strategy.cpu_offload and strategy.root_device.type == "cpu":
        raise ValueError(
            "trainer.strategy.cpu_offload moves parameters from GPUs to the host, and there is no GPU: leave it out"
        )
    if strategy.cpu_offload and strategy.tensor_parallel_size > 1:
        raise ValueError(
            "trainer.strategy.cpu_offload does not go with tensor_parallel_size above 1: set one of them back"
        )


def _check_foreign(strategy: Strategy) -> None:
    """Lightning's strategy with the same job leaves most of the work to the task."""
    if type(strategy).__name__ == "ModelParallelStrategy":
        raise ValueError(
            "trainer.strategy: use lightning_adam_mini.tasks.parallel.FSDP2 in place of Lightning's "
            "ModelParallelStrategy, with the same tensor_parallel_size"
        )
