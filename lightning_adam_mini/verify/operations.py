"""The operations of torch by name, and the role of their operands: products, lookups, statistics.

Shapes: `...` leading dimensions, of which heads are some.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

__all__ = [
    "ELEMENTWISE",
    "FIRST_OPERAND",
    "LAYERS",
    "PRODUCTS",
    "Factor",
    "arguments",
    "factors_of_product",
    "is_statistic",
    "tensors_in",
]

LAYERS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "linear": ("input", "weight"),
        "embedding": ("input", "weight"),
        "embedding_bag": ("input", "weight"),
        **{f"conv{n}d": ("input", "weight") for n in (1, 2, 3)},
        **{f"conv_transpose{n}d": ("input", "weight") for n in (1, 2, 3)},
    }
)
"""Operations of layers: the second operand is the weight, whatever it was computed from."""

PRODUCTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **dict.fromkeys(("matmul", "__matmul__"), ("input", "other")),
        **dict.fromkeys(("mm", "bmm"), ("input", "mat2")),
        "addmm": ("input", "mat1", "mat2"),
        "baddbmm": ("input", "batch1", "batch2"),
        "mv": ("input", "vec"),
        "tensordot": ("a", "b"),
        "inner": ("input", "other"),
        "_grouped_mm": ("mat_a", "mat_b"),
        "grouped_mm": ("mat_a", "mat_b"),
    }
)
"""Arguments of products by name; the last two are multiplied. `einsum` and `__rmatmul__` are handled separately."""

ELEMENTWISE = frozenset(
    [
        "layer_norm",
        "rms_norm",
        "group_norm",
        "batch_norm",
        "instance_norm",
        "normalize",
        "dropout",
        "alpha_dropout",
        "feature_alpha_dropout",
        "relu",
        "relu_",
        "relu6",
        "elu",
        "selu",
        "celu",
        "gelu",
        "silu",
        "mish",
        "sigmoid",
        "tanh",
        "hardtanh",
        "hardswish",
        "hardsigmoid",
        "leaky_relu",
        "softplus",
        "clamp",
        "clamp_min",
        "square",
        "exp",
    ]
)
"""Operations that depend on other elements only through statistics; their derivative may be zero."""

FIRST_OPERAND = frozenset(["to", "type_as", "expand_as", "view_as", "reshape_as"])
"""Operations that use only the shape or dtype of their other operands."""

_STATISTICS = frozenset(
    ["norm", "vector_norm", "linalg_norm", "linalg_vector_norm", "var", "std", "var_mean", "std_mean", "dot", "vdot"]
)
_REDUCTIONS = frozenset(["mean", "sum", "amax", "amin", "max", "min", "logsumexp"])


@dataclass(frozen=True)
class Factor:
    """One operand of a product of two activations.

    Args:
        tensor: The operand.
        leading: Dimensions that may be heads.
        contracted: Dimensions that are summed over.
    """

    tensor: Tensor
    leading: tuple[int, ...]
    contracted: tuple[int, ...] = (-1,)

    @property
    def rows(self) -> tuple[int, ...]:
        """The other dimensions."""
        size = self.tensor.dim()
        others = {*self.leading, *(axis % size for axis in self.contracted)}
        return tuple(axis for axis in range(size) if axis not in others)


def is_statistic(name: str, operand: Any, result: Any) -> bool:
    """Whether an operation gives a statistic of whole vectors, such as the mean that a norm divides by.

    Sums over tokens or experts do not count: they remove the dimension.
    """
    if name in _STATISTICS:
        return True
    first = result[0] if isinstance(result, tuple | list) and result else result
    return (
        name in _REDUCTIONS
        and isinstance(operand, Tensor)
        and isinstance(first, Tensor)
        and first.dim() == operand.dim() > 1
        and first.shape != operand.shape
        and operand.dim() > 0
        and first.shape[-1] == 1
    )


def factors_of_product(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that a product multiplies."""
    if name == "einsum":
        found = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else args[1:]
        return [tensor for tensor in found if isinstance(tensor, Tensor)]
    if name == "__rmatmul__":
        return [args[1], args[0]]
    return arguments(PRODUCTS[name], args, kwargs)[-2:]


def activations_of_product(name: str, args: Sequence[Any], factors: Sequence[Tensor]) -> tuple[Factor, Factor] | None:
    """Both factors with their dimensions; None for a product that cannot be one of queries and keys."""
    if len(factors) != 2 or min(tensor.dim() for tensor in factors) < 3:
        return None
    if name == "einsum":
        return _factors_of_einsum(args[0], *factors)
    if name in ("tensordot", "inner", "mv"):
        return None
    a, b = factors
    return Factor(a, tuple(range(a.dim() - 2)), (-1,)), Factor(b, tuple(range(b.dim() - 2)), (-2,))


def _factors_of_einsum(equation: Any, a: Tensor, b: Tensor) -> tuple[Factor, Factor] | None:
    if not isinstance(equation, str) or "->" not in equation:
        return None
    inputs, _, output = equation.replace(" ", "").partition("->")
    if inputs.count(",") != 1:
        return None
    terms = [_letters(term, tensor.dim()) for term, tensor in zip(inputs.split(","), (a, b), strict=True)]
    output = _letters(output, len(output) + max(map(len, terms)) if "..." in output else len(output))
    shared = set(terms[0]) & set(terms[1])
    contracted, leading = shared - set(output), shared & set(output)
    found = []
    for own, other, tensor in zip(terms, reversed(terms), (a, b), strict=True):
        rows = [letter for letter in own if letter not in other and letter in output]
        if not contracted or not leading or not rows:
            return None
        # Query heads that share a key have their own letter, besides that of the tokens.
        heads = [n for n, letter in enumerate(own) if letter in leading or (len(rows) > 1 and letter in rows)]
        found.append(Factor(tensor, tuple(heads), tuple(n for n, letter in enumerate(own) if letter in contracted)))
    return found[0], found[1]


def _letters(term: str, dimensions: int) -> str:
    """A term of an einsum with digits in place of its ellipsis, counted from the end."""
    count = dimensions - len(term.replace("...", ""))
    return term.replace("...", "".join(str(number) for number in reversed(range(count))))


def arguments(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Arguments in order, whether positional or by keyword."""
    return [args[place] if place < len(args) else kwargs.get(name) for place, name in enumerate(names)]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors in nested lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
