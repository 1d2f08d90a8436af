"""Lanczos on a model's Hessian: the whole of it, or all of its blocks at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from lightning_adam_mini.hessian.blocks_of import ParameterBlock
from lightning_adam_mini.hessian.checks import check_steps
from lightning_adam_mini.hessian.lanczos import DEFAULT_BUDGET, Recurrence, Tridiagonal, vector_bytes
from lightning_adam_mini.hessian.operators import HessianOperator
from lightning_adam_mini.hessian.probes import probe, seed_of
from lightning_adam_mini.hessian.quadrature import DEFAULT_PROBES, DEFAULT_STEPS

__all__ = ["block_tridiagonals", "model_tridiagonals"]

_logger = logging.getLogger(__name__)


def model_tridiagonals(
    operator: HessianOperator,
    *,
    steps: int = DEFAULT_STEPS,
    probes: int = DEFAULT_PROBES,
    seed: int = 0,
    budget_bytes: int = DEFAULT_BUDGET,
    on_step: Callable[[int, int], None] | None = None,
) -> list[Tridiagonal]:
    """Lanczos with the whole Hessian from random normal starts, one after another.

    Vectors of a start are kept for reorthogonalisation where they fit the budget, and freed after it. Else the
    three-term recurrence runs, whose memory beyond the model and its activations is four times the parameters: two
    vectors, and two more while a product is computed. What the vectors leave of the budget goes to the graphs of
    gradients, which spare each product the first two of its three passes.

    Args:
        operator: The Hessian.
        steps: Lanczos steps of a start.
        probes: Number of starts.
        seed: Of the starts.
        budget_bytes: For kept vectors and graphs, on one rank; with 0 none is kept.
        on_step: Called after each product with their number and the number of all.

    Returns:
        A tridiagonal matrix for each start, without its vectors.

    Raises:
        ValueError: More steps than parameters, or no start.
    """
    check_steps(steps, {"the model": operator.size})
    _check_probes(probes)
    needed = vector_bytes(steps, operator.local_size, operator.dtype)
    keeps = needed <= budget_bytes
    if not keeps:
        _logger.info(
            "Lanczos by the three-term recurrence: the vectors of %d steps would take %.1f GB, and the budget is %.1f",
            steps,
            needed / 1e9,
            budget_bytes / 1e9,
        )
    found = []
    with operator.keep_graphs(budget_bytes - (needed if keeps else 0)):
        for number in range(probes):
            start = _Start(operator, seed_of(seed, "", number))
            recurrence = Recurrence(start, steps, reorthogonalize=keeps, dots=operator.layout.dots)
            unused = None
            while not recurrence.is_done:
                unused = recurrence.advance(operator.product(recurrence.vector, out=unused))
                if on_step:
                    on_step(number * steps + recurrence.steps, probes * steps)
            found.append(_without_vectors(recurrence.result()))
            del recurrence, unused
    return found


def block_tridiagonals(
    operator: HessianOperator,
    blocks: Sequence[ParameterBlock],
    *,
    steps: int = DEFAULT_STEPS,
    probes: int = DEFAULT_PROBES,
    seed: int = 0,
    budget_bytes: int = DEFAULT_BUDGET,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, list[Tridiagonal]]:
    """Lanczos with principal blocks of the Hessian, in step: all blocks and starts share the passes over the batches.

    Args:
        operator: The Hessian.
        blocks: Blocks with names of their own.
        steps: Lanczos steps of a start; a block with fewer rows must be left out, or the steps be fewer.
        probes: Random normal starts of each block.
        seed: Of the starts; those of a block do not depend on which other blocks there are.
        budget_bytes: For the kept vectors of all blocks and starts together. Blocks are reorthogonalised from the
            smallest on, as long as they fit; the others run by the three-term recurrence. What is left goes to the
            graphs of gradients.
        on_step: Called after each pass with their number and the number of all.

    Returns:
        By the name of the block, a tridiagonal matrix for each start, without its vectors.

    Raises:
        ValueError: More steps than rows of a block, an unknown block, two of one name, or no start.
    """
    names = [block.name for block in blocks]
    if len(set(names)) < len(names):
        raise ValueError(f"two blocks have one name: {sorted({name for name in names if names.count(name) > 1})}")
    sizes = {block.name: operator.block_size(block) for block in blocks}
    check_steps(steps, sizes)
    _check_probes(probes)
    recurrences = {}
    kept, left = _kept(sizes, steps * probes, operator.dtype, budget_bytes)
    for name, keeps in kept.items():
        recurrences[name] = [
            Recurrence(_BlockStart(operator, sizes[name], seed, name, k), steps, reorthogonalize=keeps)
            for k in range(probes)
        ]
    with operator.keep_graphs(left):
        _run(operator, blocks, recurrences, steps, on_step)
    return {name: [_without_vectors(r.result()) for r in recurrences[name]] for name in names}


def _run(
    operator: HessianOperator,
    blocks: Sequence[ParameterBlock],
    recurrences: dict[str, list[Recurrence]],
    steps: int,
    on_step: Callable[[int, int], None] | None,
) -> None:
    """Advance all starts of all blocks, by one pass over the batches for each step."""
    for number in range(steps):
        active = {name: open_ for name, some in recurrences.items() if (open_ := [r for r in some if not r.is_done])}
        if not active:
            break
        vectors = {name: torch.stack([r.vector for r in some]) for name, some in active.items()}
        products = operator.block_products(vectors, blocks)
        del vectors
        for name, some in active.items():
            for recurrence, product in zip(some, products.pop(name), strict=True):
                # Its own memory: a view would keep the products of all blocks alive.
                recurrence.advance(product.clone())
        if on_step:
            on_step(number + 1, steps)


class _Start:
    """A random start of the whole model, drawn again each time."""

    def __init__(self, operator: HessianOperator, seed: int) -> None:
        self._operator, self._seed = operator, seed

    def __call__(self) -> torch.Tensor:
        return self._operator.layout.random(self._seed)


class _BlockStart:
    """A random start of a block, drawn again each time."""

    def __init__(self, operator: HessianOperator, size: int, seed: int, name: str, number: int) -> None:
        self._operator, self._arguments = operator, (size, seed, name, number)

    def __call__(self) -> torch.Tensor:
        return probe(*self._arguments, dtype=self._operator.dtype, device=self._operator.device)


def _kept(sizes: dict[str, int], vectors: int, dtype: torch.dtype, budget_bytes: int) -> tuple[dict[str, bool], int]:
    """Which blocks keep their vectors, from the smallest on, and the bytes that are left."""
    kept, left = {}, budget_bytes
    for name, size in sorted(sizes.items(), key=lambda item: item[1]):
        needed = vector_bytes(vectors, size, dtype)
        kept[name] = needed <= left
        left -= needed if kept[name] else 0
    rest = [name for name, keeps in kept.items() if not keeps]
    if rest:
        _logger.info(
            "Lanczos by the three-term recurrence for %d of %d blocks, whose vectors do not fit %.1f GB: %s",
            len(rest),
            len(kept),
            budget_bytes / 1e9,
            ", ".join(rest[:5]),
        )
    return kept, left


def _check_probes(probes: int) -> None:
    if probes < 1:
        raise ValueError(f"a spectrum needs one random start at least, not {probes}")


def _without_vectors(found: Tridiagonal) -> Tridiagonal:
    return Tridiagonal(found.alphas, found.betas, found.residual, found.orthogonality)
