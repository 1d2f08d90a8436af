"""Gradients with their graphs, which a second backward pass turns into products: for one product, or kept for many.

A product with a linear layer's Hessian takes nine matrix products: one in the forward pass, two in the first backward
pass, six in the second. Only the second depends on the vector. Where the graphs are kept a product takes these six,
as many as two training passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from lightning_adam_mini.hessian.loss import Leaves, LossOfParameters

__all__ = ["BatchGradient", "GradientGraphs"]


@dataclass(frozen=True, eq=False)
class BatchGradient:
    """The gradient of one batch's loss, times the weight of the batch.

    Args:
        weight: Of the batch.
        edges: By the name of the parameter, where the graph of its gradient ends; the gradient itself is freed.
            Without those that depend on no parameter, where the loss is linear or does not reach.
        is_kept: Whether the graph is wanted again.
    """

    weight: float
    edges: dict[str, GradientEdge]
    is_kept: bool = False


@dataclass(eq=False)
class _Kept:
    """Graphs of the first batches, with the leaves that they end at."""

    leaves: Leaves
    names: frozenset[str]
    versions: list[int]
    gradients: list[BatchGradient] = field(default_factory=list)
    is_filled: bool = False


class GradientGraphs:
    """Gradients of the batches' losses with their graphs.

    Args:
        loss: As a function of the parameters.
    """

    def __init__(self, loss: LossOfParameters) -> None:
        self._loss = loss
        self._budget = 0
        self._kept: _Kept | None = None

    @contextmanager
    def keep(self, budget_bytes: int) -> Iterator[None]:
        """Within it, keep the graphs of the first batches, as many as fit, for the products that follow.

        Args:
            budget_bytes: For what the graphs save, and for copies of the parameters that they begin at.
        """
        before, self._budget, self._kept = (self._budget, self._kept), budget_bytes, None
        try:
            yield
        finally:
            self._budget, self._kept = before

    @contextmanager
    def open(self, names: Iterable[str]) -> Iterator[tuple[dict[str, Tensor], Iterator[BatchGradient]]]:
        """The leaves by name, and the gradients of all batches with respect to those that are named.

        Raises:
            ValueError: As in `LossOfParameters`; or the parameters have changed since graphs were kept.
        """
        wanted = frozenset(names)
        with self._loss.evaluating():
            kept = self._reusable(wanted)
            leaves = kept.leaves if kept else self._loss.leaves(wanted)
            if kept is None and self._budget > 0:
                kept = self._kept = _Kept(leaves, wanted, self._loss.versions())
            inputs = {name: leaf for name, leaf in leaves.tensors.items() if name in wanted}
            yield inputs, self._gradients(leaves, inputs, kept)

    def _reusable(self, wanted: frozenset[str]) -> _Kept | None:
        kept = self._kept
        if kept is None or not kept.is_filled or not wanted <= kept.names:
            return None
        if kept.versions != self._loss.versions():
            raise ValueError("the parameters changed while graphs of their gradients are kept: end keep_graphs first")
        return kept

    def _gradients(self, leaves: Leaves, inputs: dict[str, Tensor], kept: _Kept | None) -> Iterator[BatchGradient]:
        if kept is not None and not kept.is_filled:
            yield from self._filling(kept, inputs)
            return
        known = kept.gradients if kept else []
        yield from known
        for weight, loss in self._loss.losses(leaves, skip=len(known)):
            yield BatchGradient(weight, _edges(loss * weight, inputs))

    def _filling(self, kept: _Kept, inputs: dict[str, Tensor]) -> Iterator[BatchGradient]:
        """The gradients of all batches; the first of them stay, as long as they fit."""
        saved = _SavedBytes(self._loss.storages())
        for leaf in kept.leaves.tensors.values():
            saved.add(*_memory(leaf))
        losses, fits = self._loss.losses(kept.leaves), True
        while True:
            with saved.counting() if fits else nullcontext():
                if (following := next(losses, None)) is None:
                    break
                weight, loss = following
                edges = _edges(loss * weight, inputs)
                del following, loss
            gradient = BatchGradient(weight, edges, fits := fits and saved.total <= self._budget)
            del edges
            if gradient.is_kept:
                kept.gradients.append(gradient)
            yield gradient
            del gradient
        kept.is_filled = True


class _SavedBytes:
    """Bytes of the memory that graphs hold on to, as long as they do.

    Args:
        known: Addresses of memory that does not count, since it is there anyway.
    """

    def __init__(self, known: set[int]) -> None:
        self._known = known
        self._uses: Counter[int] = Counter()
        self.total = 0

    def counting(self) -> saved_tensors_hooks:
        """Within it, count what autograd saves for a backward pass, until it is freed."""
        return saved_tensors_hooks(self._pack, _Saved.unpack)

    def add(self, address: int, num_bytes: int) -> None:
        """Count memory, once for each address."""
        if address not in self._known:
            self.total += num_bytes if not self._uses[address] else 0
            self._uses[address] += 1

    def remove(self, address: int, num_bytes: int) -> None:
        """Undo one `add`."""
        if address not in self._known:
            self._uses[address] -= 1
            self.total -= num_bytes if not self._uses[address] else 0

    def _pack(self, tensor: Tensor) -> _Saved:
        return _Saved(tensor, self)


class _Saved:
    """A tensor that a graph has saved."""

    def __init__(self, tensor: Tensor, counter: _SavedBytes) -> None:
        # Detached, for the tensor itself may hold on to the graph that holds on to this; autograd links it up again.
        self._tensor, self._version, self._counter = tensor.detach(), tensor._version, counter
        self._memory = _memory(tensor)
        counter.add(*self._memory)

    def __del__(self) -> None:
        """The graph is gone, or this part of it."""
        self._counter.remove(*self._memory)

    def unpack(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: It was written to in the meantime; torch leaves this check to the hooks.
        """
        if self._tensor._version != self._version:
            shape = tuple(self._tensor.shape)
            raise RuntimeError(f"a tensor {shape} that the gradient needs was modified by an inplace operation")
        return self._tensor


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Address and bytes."""
    if tensor.layout is not torch.strided:  # its parts have no address of their own
        return id(tensor), tensor._nnz() * (tensor.element_size() + 8 * tensor.dim())
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _edges(loss: Tensor, inputs: dict[str, Tensor]) -> dict[str, GradientEdge]:
    if not loss.requires_grad:
        return {}
    grads: tuple[Tensor | None, ...] = torch.autograd.grad(
        loss, list(inputs.values()), create_graph=True, allow_unused=True
    )
    found = zip(inputs, grads, strict=True)
    return {name: get_gradient_edge(grad) for name, grad in found if grad is not None and grad.requires_grad}
