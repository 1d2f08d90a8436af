"""What attention receives: the query, key and value of every attention call in a forward pass, head by head.

The spy knows operations and no model. It sees `scaled_dot_product_attention`, and products that become the weights of a
second product, through a softmax or without one. Two mechanisms have no such products and are watched by the names of
their arguments: the delta rules of linear attention, and messages of graphs.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PRODUCTS = {
    "matmul": ("input", "other"),
    "__matmul__": ("input", "other"),
    "bmm": ("input", "mat2"),
    "baddbmm": ("input", "batch1", "batch2"),
}
"""Names of the arguments of matrix products; the last two are multiplied."""

DELTA_RULES = ("torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention")


@dataclass(frozen=True)
class Call:
    """One attention call. Tensors are `(batch, heads, tokens, head_dim)`."""

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass
class Spy:
    """What was seen.

    Args:
        batch: Number of samples, where the model folds heads into the batch: those tensors have three dimensions.
        heads: Number of heads, where it folds windows into the batch too.
        heads_dim: Dimension of the heads; those before and after it, except for the last two, are samples or windows.
        stop_after: End the forward pass once so many calls are recorded.
        calls: The calls, in order.
    """

    batch: int = 1
    heads: int | None = None
    heads_dim: int = -3
    stop_after: int | None = None
    calls: list[Call] = field(default_factory=list)

    def record(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Note one call."""
        self.calls.append(Call(*(self._heads(tensor) for tensor in (query, key, value))))
        if len(self.calls) == self.stop_after:
            raise _EnoughError

    def _heads(self, tensor: Tensor) -> Tensor:
        """A copy as `(batch, heads, tokens, head_dim)`."""
        if tensor.dim() == 3:
            tensor = tensor.unflatten(0, (-1, self.heads) if self.heads else (self.batch, -1))
        return tensor.detach().clone().movedim(self.heads_dim, -3).flatten(0, -4)


class _EnoughError(BaseException):
    """Ends a forward pass; no `Exception`, so that no model takes it for an error of its own."""


@contextmanager
def spy_on_attention(model: nn.Module, **options: int | None) -> Iterator[Spy]:
    """Record the attention calls of a forward pass of `model` in the block.

    Args:
        model: The model.
        **options: Fields of `Spy`.

    Yields:
        The spy, whose `calls` fill. With `stop_after` the block ends early, without an error.
    """
    spy = Spy(**options)
    with ExitStack() as stack:
        modules = list(model.modules())
        for module in modules:
            if _is_graph_attention(module):
                stack.enter_context(patch.object(module, "message", _watched_message(spy, module.message)))
        operations = _Operations(spy)
        for file in {sys.modules[type(module).__module__] for module in modules}:
            for name in DELTA_RULES:
                if hasattr(file, name):
                    stack.enter_context(patch.object(file, name, _watched_rule(spy, operations, getattr(file, name))))
        stack.enter_context(operations)
        with suppress(_EnoughError):
            yield spy


@dataclass(frozen=True)
class _Product:
    """A product of two activations: attention's scores, if a softmax follows."""

    number: int
    left: Tensor
    right: Tensor


class _Operations(TorchFunctionMode):
    """Follow the results of products through elementwise operations to a softmax, and on to the next product."""

    def __init__(self, spy: Spy):
        super().__init__()
        self.paused = False
        self._spy = spy
        self._scores: dict[int, _Product] = {}
        self._weights: dict[int, _Product] = {}
        self._kept: list[Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if self.paused:
            return function(*args, **kwargs)
        if name == "multi_head_attention_forward":
            return self._open(function, args, kwargs)
        if name == "scaled_dot_product_attention":
            self._spy.record(*_arguments(("query", "key", "value"), args, kwargs))
        result = function(*args, **kwargs)
        if name in PRODUCTS or name == "einsum":
            self._see_product(name, args, kwargs, result)
        elif isinstance(result, Tensor | tuple | list) and not self._is_projection(name, result):
            self._follow(name, args, kwargs, result)
        return result

    @staticmethod
    def _is_projection(name, result):
        """Whether attention ends here: linear layers, but for those that mix the scores of heads."""
        return name == "addmm" or (name == "linear" and result.dim() < 4)

    def _open(self, function, args, kwargs):
        """Call a function of torch that is written in Python so that the mode sees what it calls."""
        with patch.object(torch.nn.functional, "has_torch_function", lambda _: False), self:
            return function(*args, **kwargs)

    def _see_product(self, name, args, kwargs, result):
        tensors = _factors(name, args, kwargs)
        operands = _operands_of_einsum(args[0], *tensors) if name == "einsum" else tensors
        if operands is None or min(tensor.dim() for tensor in operands) < 3:
            return
        left, right = operands
        if weights := self._product_of(tensors[0]):
            self._spy.record(weights.left, weights.right.transpose(-1, -2), right)
        elif weights := self._weights.get(id(tensors[1])):
            self._spy.record(weights.left, weights.right.transpose(-1, -2), left.transpose(-1, -2))
        else:
            self._mark(self._scores, result, _Product(len(self._kept), left, right))

    def _product_of(self, tensor):
        """The product that a tensor came from, if it can be attention's weights.

        Without a softmax those have four dimensions; products with experts' weights, one after the other, have three.
        """
        return self._weights.get(id(tensor)) or (self._scores.get(id(tensor)) if tensor.dim() >= 4 else None)

    def _follow(self, name, args, kwargs, result):
        """Let a result inherit from its operands; of scores that are added up, those of the content come first."""
        if not self._scores:
            return
        operands = list(_tensors([args, kwargs]))
        for marks in (self._scores, self._weights):
            found = [marks[id(operand)] for operand in operands if id(operand) in marks]
            if found:
                target = self._weights if name == "softmax" else marks
                for tensor in _tensors(result):
                    self._mark(target, tensor, min(found, key=lambda product: product.number))

    def _mark(self, marks, tensor, product):
        """Tensors are known by their identity, so they must stay alive."""
        marks[id(tensor)] = product
        self._kept += [tensor, product.left, product.right]


def _is_graph_attention(module: nn.Module) -> bool:
    code = getattr(getattr(type(module), "message", None), "__code__", None)
    return code is not None and {"query_i", "key_j", "value_j"} <= set(code.co_varnames[: code.co_argcount])


def _watched_message(spy, message):
    """Edges stand for tokens: `(edges, heads, head_dim)`."""

    def watched(query_i, key_j, value_j, **rest):
        spy.record(*(tensor.transpose(0, 1).unsqueeze(0) for tensor in (query_i, key_j, value_j)))
        return message(query_i=query_i, key_j=key_j, value_j=value_j, **rest)

    return watched


def _watched_rule(spy, operations, rule):
    """Tensors come as `(batch, tokens, heads, head_dim)`; the products inside are no attention of their own."""

    def watched(query, key, value, **rest):
        spy.record(*(tensor.transpose(1, 2) for tensor in (query, key, value)))
        operations.paused = True
        try:
            return rule(query, key, value, **rest)
        finally:
            operations.paused = False

    return watched


def _factors(name, args, kwargs) -> list[Tensor]:
    """The tensors that a product multiplies."""
    if name != "einsum":
        return _arguments(PRODUCTS[name], args, kwargs)[-2:]
    return list(args[1]) if isinstance(args[1], list | tuple) else list(args[1:])


def _operands_of_einsum(equation, *tensors) -> list[Tensor] | None:
    """Operands as `matmul` takes them; None for a product that is not one of matrices."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(tensors) != 2:
        return None
    a, b = (_letters(term, tensor.dim()) for term, tensor in zip(terms, tensors, strict=True))
    output = _letters(output, len(output) + max(len(a), len(b)) if "..." in output else len(output))
    shared = [letter for letter in a if letter in b and letter in output]
    width = [letter for letter in a if letter in b and letter not in output]
    rows, columns = ([letter for letter in own if letter not in other] for own, other in ((a, b), (b, a)))
    if not shared or not len(width) == len(rows) == len(columns) == 1:
        return None
    orders = (a, [*shared, *rows, *width]), (b, [*shared, *width, *columns])
    return [
        tensor.permute([letters.index(letter) for letter in order])
        for tensor, (letters, order) in zip(tensors, orders, strict=True)
    ]


def _letters(term, dimensions) -> str:
    """A term of an einsum with digits for the dimensions that an ellipsis stands for, counted from its end."""
    count = dimensions - len(term.replace("...", ""))
    return term.replace("...", "".join(str(number) for number in reversed(range(count))))


def _arguments(names, args, kwargs):
    """Arguments in order, be they positional or by keyword."""
    return [args[place] if place < len(args) else kwargs[name] for place, name in enumerate(names)]


def _tensors(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
