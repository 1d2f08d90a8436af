"""Follow parameters through a forward pass to the products that consume them, and to the heads of attention.

The tracer knows operations, not models. It takes derivatives of intermediate results, which are exactly zero where
nothing depends on a parameter, for three purposes:

- **Outputs.** In a product of a parameter and an activation, one element of the result depends on one output of the
  parameter and on all of its inputs. This shows which dimensions are outputs.
- **Attention.** If the product of two activations multiplies a third, they are query, key and value, with or without a
  softmax, also in the order of linear attention. `scaled_dot_product_attention` and the like are known by name.
- **Heads.** Each head of a query, key or value is differentiated by the parameters that it comes from without another
  product in between. Inputs of products are random and detached, so that neither zeros nor earlier layers matter.
  Norms and activation functions pass the derivative unchanged, so that statistics over all heads do not mix them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from unittest.mock import patch
from weakref import ref

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_adam_mini.verify.operations import (
    ELEMENTWISE,
    FIRST_OPERAND,
    LAYERS,
    PRODUCTS,
    Factor,
    activations_of_product,
    arguments,
    factors_of_product,
    is_statistic,
    tensors_in,
)

__all__ = ["Call", "Heads", "Operand", "Outputs", "Tracer"]

LOOKUPS = ("embedding", "embedding_bag")

MAX_HEADS = 4096
"""Limit of heads times samples that are differentiated one by one for a call."""


class Operand(StrEnum):
    """The operands of attention."""

    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    SCORE = "query or key"
    """An operand of scores that are added to those of the content, as for relative positions."""


@dataclass(frozen=True)
class Outputs:
    """How one product consumes a parameter.

    Args:
        operation: Name of the operation.
        axes: Dimensions of the parameter that are outputs or count matrices; the product sums over the others.
            Dimensions of size one belong to neither.
    """

    operation: str
    axes: tuple[int, ...]

    @property
    def is_lookup(self) -> bool:
        """Whether it looks up rows, by token or position."""
        return self.operation in LOOKUPS


@dataclass(frozen=True)
class Heads:
    """Which elements of a parameter one operand of an attention call comes from.

    Args:
        call: Number of the call.
        operand: Which operand.
        masks: `(heads, *shape)`, with size one for dimensions that are summed over.
    """

    call: int
    operand: Operand
    masks: Tensor


@dataclass(frozen=True)
class Call:
    """One attention call.

    Args:
        modules: The modules whose forward pass is running, outer ones first.
        factors: The operands, while the call runs.
    """

    modules: tuple[nn.Module, ...]
    factors: Mapping[Operand, Factor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Product:
    """A product of two activations: attention scores, if its result multiplies a third."""

    number: int
    left: Factor
    right: Factor
    is_of_weights: bool
    """Whether both factors come from parameters, as queries and keys do, and inputs such as masks do not."""


@dataclass(frozen=True)
class _Mark:
    """What is known of a tensor.

    Args:
        is_weight: Whether it was computed from parameters alone.
        sources: Names of the parameters that it comes from, with no product in between.
        products: Products of activations that it comes from elementwise, in order.
        is_softmax: Whether a softmax is in between.
    """

    is_weight: bool
    sources: frozenset[str] = frozenset()
    products: tuple[_Product, ...] = ()
    is_softmax: bool = False


class _Attach(torch.autograd.Function):
    """A value with the derivative of another tensor that broadcasts to its shape."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, graph: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = graph.shape, graph.dtype
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad.sum_to_size(ctx.shape).to(ctx.dtype)


class Tracer(TorchFunctionMode):
    """Trace the operations of one forward pass.

    Args:
        parameters: Leaves that stand for the parameters, by name.
        on_call: Called with each attention call, while its operands are alive.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, on_call: Callable[[Call], None] | None = None) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.outputs: dict[str, list[Outputs]] = {}
        self.heads: dict[str, list[Heads]] = {}
        self.running: list[nn.Module] = []
        self._parameters = dict(parameters)
        self._on_call = on_call
        self._marks: dict[int, tuple[Callable[[], object], _Mark]] = {}
        self._number = 0
        self._paused = 0
        for name, parameter in self._parameters.items():
            self._mark(parameter, _Mark(True, frozenset((name,))))

    def mark_inputs(self, inputs: Any) -> None:
        """Mark tensors as activations."""
        for tensor in tensors_in(inputs):
            self._mark(tensor, _Mark(False))

    def attend(
        self, function: Callable[..., Any], operands: tuple[Factor, Factor, Factor], args: Any, kwargs: Any
    ) -> Any:
        """Run a function that computes attention, without tracing the operations inside."""
        self._paused += 1
        self._record(*operands)
        args = [_detached(argument) for argument in args]
        kwargs = {key: _detached(argument) for key, argument in kwargs.items()}
        try:
            with torch.no_grad():
                result = function(*args, **kwargs)
        finally:
            self._paused -= 1
        for tensor in tensors_in(result):
            self._mark(tensor, _Mark(False))
        return result

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if self._paused:
            return function(*args, **kwargs)
        if name == "multi_head_attention_forward":
            # This function is written in Python: pretend that no mode overrides it, to trace what it calls.
            with patch.object(nn.functional, "has_torch_function", lambda _: False), self:
                return function(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            operands = arguments(("query", "key", "value"), args, kwargs)
            query, key, value = (Factor(operand, tuple(range(operand.dim() - 2))) for operand in operands)
            return self.attend(function, (query, key, value), args, kwargs)
        if function is torch.autograd.grad:  # forces from an energy: the graph ends at detached inputs of products
            wanted = list(tensors_in([arguments(("outputs", "inputs"), args, kwargs)[1]]))
            self.mark_inputs(found := tuple(torch.randn_like(tensor) for tensor in wanted))
            return found
        if name in LAYERS or name in PRODUCTS or name in ("einsum", "__rmatmul__"):
            return self._product(name, function, args, kwargs)
        result = function(*args, **kwargs)
        if is_statistic(name, next(iter(args), None), result):
            return _detached(result)
        if name in ELEMENTWISE and args and isinstance(args[0], Tensor) and isinstance(result, Tensor):
            result = _straight_through(args[0], result)
        self._inherit(name, args, kwargs, result)
        return result

    # Marks

    def _mark(self, tensor: Tensor, mark: _Mark) -> None:
        self._marks[id(tensor)] = (ref(tensor), mark)

    def _mark_of(self, tensor: Any) -> _Mark | None:
        found = self._marks.get(id(tensor))
        return found[1] if found and found[0]() is tensor else None

    def _inherit(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Give a result the marks of its operands."""
        operands = list(tensors_in(args[:1] if name in FIRST_OPERAND else [args, kwargs]))
        marks = [mark for mark in map(self._mark_of, operands) if mark]
        if not marks:
            return
        products = {product.number: product for mark in marks for product in mark.products}
        mark = _Mark(
            all(mark.is_weight for mark in marks),
            frozenset().union(*(mark.sources for mark in marks)),
            tuple(products[number] for number in sorted(products)),
            any(mark.is_softmax for mark in marks) or (name == "softmax" and bool(products)),
        )
        is_written = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        for tensor in [args[0]] if is_written else tensors_in(result):
            self._mark(tensor, mark)
            if is_written and (whole := tensor._base) is not None:
                self._inherit("", [whole, tensor], {}, whole)

    # Products

    def _product(self, name: str, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if name in LAYERS:
            inputs, weight = arguments(LAYERS[name], args, kwargs)
            factors, weights = [inputs, weight], [weight]
        else:
            factors = factors_of_product(name, args, kwargs)
            weights = [factor for factor in factors if (mark := self._mark_of(factor)) and mark.is_weight]
        marks = [mark for mark in map(self._mark_of, weights) if mark and mark.is_weight]
        others = [factor for factor in factors if not any(factor is weight for weight in weights)]
        if not marks or not others or _is_depthwise(name, factors):
            if not weights and (pair := activations_of_product(name, args, factors)):
                return self._product_of_activations(function, args, kwargs, pair)
            result = function(*args, **kwargs)
            self._inherit(name, args, kwargs, result)
            return result
        sources = frozenset().union(*(mark.sources for mark in marks))
        with torch.enable_grad():
            graph = self._graph(function, args, kwargs, others)
            if graph is not None:
                self._record_outputs(name, graph, sources)
        with torch.no_grad():
            result = function(*args, **kwargs)
        if graph is not None and isinstance(result, Tensor) and torch.is_grad_enabled():
            result = _Attach.apply(result, graph)
        scores = self._mark_of(others[0])
        mark = _Mark(False, sources)
        is_pointwise = name == "linear" or (name.startswith("conv") and factors[1].shape[2:].numel() == 1)
        if scores is not None and is_pointwise and others[0].dim() >= 4:  # mixes the scores of heads
            mark = _Mark(False, sources, scores.products, scores.is_softmax)
        for tensor in tensors_in(result):
            self._mark(tensor, mark)
        return result

    def _graph(
        self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], others: Sequence[Tensor]
    ) -> Tensor | None:
        """The product with random, detached inputs; None if it cannot be differentiated."""

        def replace(value: Any) -> Any:
            if isinstance(value, Tensor):
                if not value.is_floating_point() or value.is_nested:
                    return value
                if any(value is other for other in others):
                    return torch.randn_like(value)
                mark = self._mark_of(value)
                return value if mark and mark.is_weight else value.detach()
            if isinstance(value, list | tuple):
                return type(value)(replace(item) for item in value)
            return value

        try:
            graph = function(*replace(tuple(args)), **{key: replace(value) for key, value in kwargs.items()})
        except (RuntimeError, TypeError, ValueError):
            return None
        is_derived = isinstance(graph, Tensor) and graph.requires_grad and graph.numel()
        return graph if is_derived else None

    def _record_outputs(self, name: str, graph: Tensor, sources: frozenset[str]) -> None:
        """Record which dimensions of parameters are outputs, from one element of a product."""
        wanted = [
            source
            for source in sorted(sources)
            if self._parameters[source].dim() > 1
            and not any(seen.operation == name for seen in self.outputs.get(source, ()))
        ]
        if not wanted:
            return
        # The middle element, since the borders of a convolution see padding. A lookup returns whole rows.
        middle = tuple(size // 2 for size in graph.shape)
        element = graph[middle[:-1]].sum() if name in LOOKUPS else graph[middle]
        grads: tuple[Tensor | None, ...] = torch.autograd.grad(
            element, [self._parameters[source] for source in wanted], retain_graph=True, allow_unused=True
        )
        for source, grad in zip(wanted, grads, strict=True):
            if grad is None or not grad.count_nonzero():
                continue
            parameter = self._parameters[source]
            kernel = range(2, parameter.dim()) if name.startswith("conv") else ()
            axes = tuple(
                axis
                for axis, size in enumerate(parameter.shape)
                if size > 1 and axis not in kernel and int(_any_except(grad != 0, {axis}).count_nonzero()) == 1
            )
            self.outputs.setdefault(source, []).append(Outputs(name, axes))

    def _product_of_activations(self, function: Any, args: Any, kwargs: Any, pair: tuple[Factor, Factor]) -> Any:
        left, right = pair
        mark_left, mark_right = self._mark_of(left.tensor), self._mark_of(right.tensor)
        for mark, other in ((mark_left, right), (mark_right, left)):
            # Two consecutive products with weights of experts look alike, but have three dimensions.
            if (
                mark
                and mark.products
                and (mark.is_softmax or (left.tensor.dim() >= 4 and mark.products[0].is_of_weights))
            ):
                operands = _operands(mark, is_left=mark is mark_left, other=other, mask=self._any_mask)
                self._record(*operands, *mark.products[1:])
                with torch.no_grad():
                    result = function(*args, **kwargs)
                self._mark(result, _Mark(False))
                return result
        result = function(*args, **kwargs)
        self._inherit("", args, kwargs, result)
        if mark_left and mark_right:  # else one factor is a constant, as in rotations or random features
            self._number += 1
            product = _Product(self._number, left, right, bool(mark_left.sources and mark_right.sources))
            self._mark(result, _Mark(False, mark_left.sources | mark_right.sources, (product,)))
        return result

    # Attention

    def _record(self, query: Factor, key: Factor, value: Factor, *more: _Product) -> None:
        """Record one attention call."""
        number = len(self.calls)
        factors = {Operand.QUERY: query, Operand.KEY: key, Operand.VALUE: value}
        content: set[str] = set()
        for operand, factor in factors.items():
            found = self._heads_of(factor)
            content |= found.keys()
            self._keep(number, operand, found)
        for product in more:
            for factor in (product.left, product.right):
                found = {name: masks for name, masks in self._heads_of(factor).items() if name not in content}
                self._keep(number, Operand.SCORE, found)
        self.calls.append(Call(tuple(self.running)))
        if self._on_call is not None:
            self._on_call(Call(tuple(self.running), factors))

    def _keep(self, call: int, operand: Operand, found: Mapping[str, Tensor]) -> None:
        for name, masks in found.items():
            self.heads.setdefault(name, []).append(Heads(call, operand, masks))

    def _sources(self, tensor: Tensor) -> list[str]:
        """Matrices that a tensor comes from and that are multiplied with activations."""
        mark = self._mark_of(tensor)
        if mark is None or not tensor.requires_grad:
            return []
        return [name for name in sorted(mark.sources) if self._parameters[name].dim() > 1 and name in self.outputs]

    def _masks(self, part: Tensor, noise: Tensor, sources: Sequence[str]) -> dict[str, Tensor]:
        """The outputs of parameters that a part of a tensor depends on."""
        with torch.enable_grad():
            total = (part * noise).sum()
        parameters = [self._parameters[name] for name in sources]
        grads = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
        masks = {}
        for name, grad in zip(sources, grads, strict=True):
            if grad is not None:
                axes = {axis for outputs in self.outputs[name] for axis in outputs.axes}
                masks[name] = _any_except(grad != 0, axes)
        return masks

    def _any_mask(self, factor: Factor, dimension: int, index: int) -> dict[str, Tensor]:
        sources = self._sources(factor.tensor)
        part = factor.tensor.select(dimension, index)
        return self._masks(part, torch.randn_like(part), sources) if sources else {}

    def _heads_of(self, factor: Factor) -> dict[str, Tensor]:
        """The outputs that each head of a factor depends on: `(heads, *shape)` for each parameter."""
        tensor, sources = factor.tensor, self._sources(factor.tensor)
        if not sources:
            return {}
        noise = torch.randn_like(tensor)
        total = {name: mask for name, mask in self._masks(tensor, noise, sources).items() if mask.any()}
        sources = list(total)
        if not sources:
            return {}

        def at(places: Mapping[int, int]) -> dict[str, Tensor]:
            index = tuple(places.get(axis, slice(None)) for axis in range(tensor.dim()))
            return self._masks(tensor[index], noise[index], sources)

        sizes = {axis: tensor.shape[axis] for axis in factor.leading if tensor.shape[axis] > 1}
        varying = [axis for axis, size in sizes.items() if not _equal(at({axis: 0}), at({axis: size - 1}))]
        if not varying and (row := _row_of_heads(factor, at)) is not None:
            varying, sizes[row] = [row], tensor.shape[row]
        found: dict[bytes, dict[str, Tensor]] = {}
        covered = {name: torch.zeros_like(mask) for name, mask in total.items()}
        for number, places in enumerate(itertools.product(*(range(sizes[axis]) for axis in varying))):
            masks = at(dict(zip(varying, places, strict=True)))
            masks = {name: masks.get(name, torch.zeros_like(total[name])) for name in sources}
            if any(mask.any() for mask in masks.values()):
                found.setdefault(b"".join(bytes(mask.flatten().tolist()) for mask in masks.values()), masks)
            for name, mask in masks.items():
                covered[name] |= mask
            if _equal(covered, total) or number == MAX_HEADS:
                break
        # Heads that share a key, or a part of one, depend on the same rows.
        return {name: torch.stack([masks[name] for masks in found.values()]).unique(dim=0) for name in sources}


def _row_of_heads(factor: Factor, at: Callable[[Mapping[int, int]], dict[str, Tensor]]) -> int | None:
    """The token dimension of a query, if it also contains its heads because all of them use one key; else None."""
    row, contracted = next(iter(factor.rows), None), factor.contracted[0] % factor.tensor.dim()
    if row is None:
        return None
    first, last = (at({row: place}) for place in (0, factor.tensor.shape[row] - 1))
    are_apart = first.keys() == last.keys() and all(
        mask.any() and last[name].any() and not (mask & last[name]).any() for name, mask in first.items()
    )
    # In a sum over tokens, this dimension is channels instead.
    if not are_apart or _equal(at({contracted: 0}), at({contracted: factor.tensor.shape[contracted] - 1})):
        return None
    return row


def _operands(
    mark: _Mark, *, is_left: bool, other: Factor, mask: Callable[[Factor, int, int], dict[str, Tensor]]
) -> tuple[Factor, Factor, Factor]:
    """Query, key and value, from a product and its product with a third activation.

    `softmax(query @ key) @ value` sums over channels, then over tokens. Linear attention, `query @ (key @ value)`, sums
    over tokens first. All tokens depend on the same rows of a parameter, channels on different ones.
    """
    product = mark.products[0]
    left, right = product.left, product.right
    contracted, rows = left.contracted[0], left.rows
    sums_over_tokens = False
    if not mark.is_softmax:
        if left.tensor.shape[contracted] > 1:
            sums_over_tokens = _is_of_tokens(left, contracted, mask)
        elif rows and left.tensor.shape[rows[0]] > 1:  # a single token, or heads of one channel
            sums_over_tokens = not _is_of_tokens(left, rows[0], mask)
    if sums_over_tokens:
        key, value = (right, left) if is_left else (left, right)
        return other, key, value
    query, key = (left, right) if is_left or mark.is_softmax else (right, left)
    return query, key, other


def _is_of_tokens(factor: Factor, axis: int, mask: Callable[[Factor, int, int], dict[str, Tensor]]) -> bool:
    """Whether all indices of a dimension depend on the same rows."""
    first, last = mask(factor, axis, 0), mask(factor, axis, factor.tensor.shape[axis] - 1)
    return bool(first) and _equal(first, last)


def _is_depthwise(name: str, factors: Sequence[Tensor]) -> bool:
    """Whether a convolution keeps channels separate, and so heads."""
    return (
        name.startswith("conv")
        and factors[1].dim() > 2
        and factors[1].shape[1] == 1
        and factors[0].shape[-factors[1].dim() + 1] > 1
    )


def _straight_through(operand: Tensor, result: Tensor) -> Tensor:
    usable = operand.requires_grad and operand.shape == result.shape and result.is_floating_point()
    if not usable or not torch.is_grad_enabled() or result is operand:
        return result
    return _Attach.apply(result, operand)


def _detached(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.detach()
    if isinstance(result, tuple):
        values = [_detached(item) for item in result]
        return type(result)(values) if hasattr(result, "n_fields") else tuple(values)
    return result


def _any_except(mask: Tensor, axes: set[int]) -> Tensor:
    """`any` over all dimensions except `axes`, with sizes of one for the others."""
    for axis in range(mask.dim()):
        if axis not in axes:
            mask = mask.any(axis, keepdim=True)
    return mask


def _equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(mask, second[name]) for name, mask in first.items())
