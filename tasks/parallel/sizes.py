"""How many ranks replicate a model, shard it, and share its matrix products."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MeshSizes", "fit_sizes"]


@dataclass(frozen=True, kw_only=True)
class MeshSizes:
    """Sizes of a mesh of ranks, outermost first: `replicate * shard * tensor` is the world.

    Args:
        replicate: Groups of ranks that hold the same parameters.
        shard: Ranks that a parameter is divided over, and that read different data.
        tensor: Ranks that read the same data, and compute parts of each matrix product.
    """

    replicate: int = 1
    shard: int = 1
    tensor: int = 1

    @property
    def data_ranks(self) -> int:
        """Ranks that read different data."""
        return self.replicate * self.shard


def fit_sizes(world: int, *, replicate: int, tensor: int) -> MeshSizes:
    """Divide the world; what neither replicates nor computes together shards.

    Args:
        world: Number of ranks.
        replicate: Groups that hold the same parameters.
        tensor: Ranks that compute together.

    Raises:
        ValueError: A size does not divide the ranks; with those that do.
    """
    if tensor < 1 or world % tensor:
        raise ValueError(_misfit("tensor_parallel_size", tensor, world, "ranks"))
    if replicate < 1 or (world // tensor) % replicate:
        ranks = "ranks" if tensor == 1 else f"ranks (of {world}, {tensor} at a time compute together)"
        raise ValueError(_misfit("replicate_size", replicate, world // tensor, ranks))
    return MeshSizes(replicate=replicate, shard=world // tensor // replicate, tensor=tensor)


def _misfit(option: str, size: int, number: int, what: str) -> str:
    *others, last = [str(divisor) for divisor in range(1, number + 1) if number % divisor == 0]
    fitting = f"{', '.join(others)} or {last}" if others else last
    return (
        f"trainer.strategy.{option} {size} does not divide {number} {what}: set it to {fitting}, or change the devices"
    )
