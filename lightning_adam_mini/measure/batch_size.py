"""The largest batch that fits, and the memory of one rank that it has to fit into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["RankMemory", "largest_batch"]


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one of `ranks` ranks that FSDP2 shards a model over, before any activation.

    Gradients count in full, as they are there while micro-batches are accumulated. With more than one rank the root
    unit is gathered for the whole pass; of the blocks two are at a time, the one in use and the next, and the gradient
    of one unit is whole before it is reduced.

    Args:
        parameters: Bytes of all parameters, as of all gradients.
        state: Bytes of the optimizer's state over all ranks.
        root: Bytes of the parameters outside of the repeated blocks.
        largest_block: Bytes of the parameters of the largest block.
        ranks: Number of ranks.
    """

    parameters: int
    state: int
    root: int
    largest_block: int
    ranks: int = 1

    @property
    def gathered(self) -> int:
        """Whole parameters and gradients of units in use, beside the shards."""
        return 0 if self.ranks == 1 else self.root + 2 * self.largest_block + max(self.root, self.largest_block)

    @property
    def total(self) -> int:
        """All that is there whatever the batch."""
        return -(-(2 * self.parameters + self.state) // self.ranks) + self.gathered


def largest_batch(fits: Callable[[int], bool], *, start: int = 1, limit: int = 1 << 20) -> int:
    """The largest number for which `fits` holds, 0 where it does not hold for 1; it holds for all below the largest.

    Args:
        fits: Whether a batch of this size fits; each size is asked once.
        start: A first guess; a good one saves calls.
        limit: Where the search ends.
    """
    low, high, step = 0, limit + 1, 1
    guess = min(max(start, 1), limit)
    while high - low > 1:
        if fits(guess):
            low = guess
            guess = low + step if high > limit else (low + high) // 2
        else:
            high = guess
            guess = high - step if low == 0 else (low + high) // 2
        step *= 2
        guess = min(max(guess, low + 1), high - 1)
    return low
