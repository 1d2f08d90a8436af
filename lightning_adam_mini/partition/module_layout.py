"""The vocabulary of layouts: how a module class orders the rows of its parameters.

A layout names sizes (`heads`, `head_dim`, ...), which are read from attributes of each module. So one layout holds for
every size of a model, and can be checked against the forward code of its class. `docs/layouts.md` explains the terms.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from operator import attrgetter
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from lightning_adam_mini.partition.roles import ParameterRole, Part, Role

__all__ = ["SIZES", "ModuleLayout", "Rows", "Span", "UnknownRowsError", "members", "own_size", "qualified_name"]

Size = str | int
"""A size by its name, or as a number."""

_CONFIGURATIONS = ("config", "cfg", "args", "params", "hparams", "model_args")
"""Attributes where modules keep the configuration of their model."""


def _also_in_configurations(*names: str) -> tuple[str, ...]:
    return (*names, *(f"{config}.{name}" for config in _CONFIGURATIONS for name in names))


SIZES: Mapping[str, tuple[Size, ...]] = MappingProxyType(
    {
        "heads": (
            *_also_in_configurations(
                "num_heads",
                "num_attention_heads",
                "n_heads",
                "n_head",
                "heads",
                "nhead",
                "no_heads",
                "n_local_heads",
                "num_head",
                "n_attention_heads",
                "num_attn_heads",
                "num_q_heads",
                "num_query_heads",
                "n_q_heads",
                "q_heads",
                "nheads",
                "nb_heads",
                "head_num",
                "num_of_heads",
                "head_count",
                "number_of_heads",
            ),
            "h",
        ),
        "kv_heads": (
            *_also_in_configurations(
                "num_key_value_heads",
                "num_kv_heads",
                "n_kv_heads",
                "n_kv_head",
                "kv_heads",
                "num_query_groups",
                "n_query_groups",
                "n_local_kv_heads",
                "num_kv_head",
                "n_head_kv",
                "n_heads_kv",
                "num_heads_kv",
                "num_head_kv",
                "num_heads_k",
                "nheads_kv",
                "kv_num_heads",
                "num_kv_groups",
                "n_kv_groups",
            ),
            "num_groups",
            "n_groups",
            "multi_query",
            "multi_query_attention",
            "multiquery",
            "use_multi_query",
        ),
        "head_dim": ("head_dim", "attention_head_size", "head_size", "d_head", "dim_per_head"),
    }
)
"""Attributes of each size, unless a layout names others: the first that holds a positive integer counts.

Without one, `kv_heads` equals `heads`, and `head_dim` follows from the number of rows and heads. `group` is the number
of query heads for each key-value head. A true flag such as `multi_query` means one key-value head.
"""

HEAD_WIDTHS = ("d_k", "dim_head", "head_width", "head_dimension", "hidden_per_head", "d_kv", "size_per_head", "hd")
"""Further attributes for the size of a head, which some classes use otherwise: they count if they fit the rows."""


_WORDS = {"heads": "the number of heads", "kv_heads": "the number of key-value heads", "head_dim": "the size of a head"}


class UnknownRowsError(Exception):
    """The order of a parameter's rows does not follow from its module."""


@dataclass(frozen=True)
class Span:
    """Consecutive rows of one role: `count` heads of `size` rows each.

    Args:
        role: Their role.
        count: Number of heads; None for the remaining rows, in equal shares if several spans take them.
        size: Rows of one head; of an interleaved head, in one repeat.
        interleaved: Whether the rows of a head are spread, `size` of them in each repeat of the sequence of spans.
    """

    role: Role
    count: Size | None = None
    size: Size = "head_dim"
    interleaved: bool = False


@dataclass(frozen=True)
class Rows:
    """The rows of one parameter, along its output axis.

    Args:
        *spans: What they do, in order; a role alone means all remaining rows.
        repeats: How often the sequence of spans repeats.
        axis: Dimension of the rows, negative to count from the end; None for the output dimension of the layer's type.
        batch_axes: Dimensions that count independent matrices (experts).
    """

    spans: tuple[Span, ...]
    repeats: Size = 1
    axis: int | None = None
    batch_axes: tuple[int, ...] = ()

    def __init__(
        self, *spans: Span | Role, repeats: Size = 1, axis: int | None = None, batch_axes: tuple[int, ...] = ()
    ) -> None:
        as_spans = tuple(span if isinstance(span, Span) else Span(span) for span in spans)
        for name, value in (("spans", as_spans), ("repeats", repeats), ("axis", axis), ("batch_axes", batch_axes)):
            object.__setattr__(self, name, value)

    @property
    def roles(self) -> tuple[Role, ...]:
        """Roles of the spans, in order."""
        return tuple(span.role for span in self.spans)

    @property
    def takes_all(self) -> bool:
        """Whether all rows have one role, however many there are."""
        return len(self.spans) == 1 and self.spans[0].count is None


@dataclass(frozen=True)
class ModuleLayout:
    """What the parameters of a module class do.

    Args:
        name: Its name in recipes and messages.
        parameters: Rows by parameter name relative to the module, where `*` matches anything; names that a module lacks
            are skipped. A role alone means `Rows(role)`.
        classes: Qualified names of the classes that it describes, where `*` matches anything; subclasses count.
        children: Names of children and own parameters that a module must have, besides its class if `classes` is given.
        only_if: Attributes (dotted paths) that must be true for the layout to apply, for classes with several layouts
            or known by their bare name.
        sizes: Attributes (dotted paths, or quotients of them and numbers, `a/b/3`) or numbers, for sizes of its own or
            in place of those in `SIZES`.
        attends: Whether a model with such a module is a Transformer; by default, if the layout names queries.
    """

    name: str
    parameters: Mapping[str, Rows | Role]
    classes: tuple[str, ...] = ()
    children: tuple[str, ...] = ()
    only_if: str | tuple[str, ...] = ()
    sizes: Mapping[str, Size | tuple[Size, ...]] = field(default_factory=dict)
    attends: bool | None = None
    _described: WeakKeyDictionary[type, bool] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """Check the types of the fields that are easily mistaken.

        Raises:
            ValueError: A string in place of a tuple of names, or neither a role nor rows for a parameter.
        """
        for field_name in ("classes", "children"):
            if isinstance(getattr(self, field_name), str):
                raise ValueError(f"layout {self.name!r}: {field_name} must be a tuple of names, not one string")
        for name, rows in self.parameters.items():
            if not isinstance(rows, Role | Rows):
                raise ValueError(f"layout {self.name!r}: {name!r} must have a Role or Rows, not {rows!r}")

    @property
    def is_attention(self) -> bool:
        """Whether the module attends over tokens."""
        if self.attends is not None:
            return self.attends
        return any(Role.QUERY in rows.roles for rows in self.rows.values())

    @cached_property
    def rows(self) -> dict[str, Rows]:
        """`parameters` with `Rows` for every name."""
        return {name: Rows(rows) if isinstance(rows, Role) else rows for name, rows in self.parameters.items()}

    def matches(self, module: nn.Module, members: frozenset[str]) -> bool:
        """Whether the layout describes `module`, whose children and own parameters are `members`."""
        if not (self.classes or self.children) or not members.issuperset(self.children):
            return False
        if self.classes and not self.describes(type(module)):
            return False
        conditions = (self.only_if,) if isinstance(self.only_if, str) else self.only_if
        return all(bool(_attribute(module, path)) for path in conditions)

    def describes(self, cls: type) -> bool:
        """Whether the layout names a class or one of its bases."""
        known = self._described.get(cls)
        if known is None:
            known = any(_is_among(qualified_name(base), self.classes) for base in cls.__mro__)
            self._described[cls] = known
        return known

    def has_own_sizes(self, module: nn.Module) -> bool:
        """Whether `module` has all sizes of the layout, one of them under a name that no other layout uses."""
        sizes, usual = _Sizes(self, module), {path for paths in SIZES.values() for path in paths}
        own = {path for given in self.sizes.values() for path in (given if isinstance(given, tuple) else (given,))}
        has_own = any(isinstance(path, str) and _attribute(module, path) is not None for path in own - usual)
        return has_own and all(sizes.get(size) is not None for size in self.sizes)

    def counts_heads(self, module: nn.Module) -> bool:
        """Whether `module` has an attribute with its number of query heads."""
        return _Sizes(self, module).get("heads") is not None

    def find(self, relative_name: str) -> Rows | None:
        """The rows of a parameter by its name relative to the module, or None."""
        for pattern, rows in self.rows.items():
            if pattern == relative_name or ("*" in pattern and fnmatch.fnmatchcase(relative_name, pattern)):
                return rows
        return None

    def role(
        self,
        rows: Rows,
        module: nn.Module,
        shape: tuple[int, ...],
        axis: int,
        why: str,
        widths: frozenset[int] | None = None,
    ) -> ParameterRole:
        """The role of one parameter of `module`.

        Args:
            rows: What `find` returned.
            module: The module that the layout describes.
            shape: Shape of the parameter.
            axis: Dimension of its output neurons, if `rows` names none.
            why: The reason, for reports.
            widths: Numbers of rows that all heads of the module may have together, to confirm a size of heads that
                follows from their number alone; None if the layout is made for the class.

        Returns:
            The role, with a `problem` if the rows are unknown.
        """
        axis = axis if rows.axis is None else rows.axis
        problem = "" if -len(shape) <= axis < len(shape) else f"its shape {shape} has no dimension {axis}"
        axis %= len(shape)
        if rows.batch_axes and (max(rows.batch_axes) >= axis or len(rows.batch_axes) + 1 >= len(shape)):
            problem = problem or f"its shape {shape} has too few dimensions"
        if problem:
            return ParameterRole((Part(Role.OTHER, shape[0]),), why, problem=problem, known=False)
        try:
            repeats, parts = self._parts(rows, module, shape[axis], widths)
        except UnknownRowsError as error:
            role = rows.roles[0] if len(rows.spans) == 1 else Role.FUSED_QKV
            return ParameterRole((Part(role, shape[axis]),), why, axis, rows.batch_axes, problem=str(error))
        return ParameterRole(parts, why, axis, rows.batch_axes, repeats)

    def _parts(
        self, rows: Rows, module: nn.Module, length: int, widths: frozenset[int] | None
    ) -> tuple[int, tuple[Part, ...]]:
        """Number of repeats and the parts of one, checked against the actual `length` rows."""
        sizes = _Sizes(self, module)
        if rows.takes_all:
            span = rows.spans[0]
            heads = sizes.get("heads" if span.role is Role.QUERY else "kv_heads")
            head_dim = _head_dim(span, sizes, length, heads)
            if span.role is Role.QUERY and head_dim and heads and _are_other_heads(length, heads * head_dim, sizes):
                raise UnknownRowsError(f"its {length} rows are not {heads} heads of {head_dim} rows")
            return 1, (Part(span.role, length, head_dim),)
        repeats = sizes.need(rows.repeats)
        counts = [None if span.count is None else sizes.need(span.count) for span in rows.spans]
        if widths is not None and rows.repeats == "heads" and sizes.get("kv_heads") != sizes.get("heads"):
            counts_of = f"{sizes.get('heads')} query heads and {sizes.get('kv_heads')} key-value heads"
            raise UnknownRowsError(f"{type(module).__name__} has {counts_of}, so its rows cannot come head by head")
        if sizes.get("head_dim") is None and all(counts) and all(span.size == "head_dim" for span in rows.spans):
            sizes.settle("head_dim", length, repeats * sum(count or 0 for count in counts))
            if widths is not None:
                sizes.check_settled(length, widths)
        known = [None if n is None else n * sizes.need(s.size) for n, s in zip(counts, rows.spans, strict=True)]
        rest = length // repeats - sum(n or 0 for n in known)
        lengths = [rest // known.count(None) if n is None else n for n in known]
        if repeats * sum(lengths) != length or rest < 0:
            of_module = ", ".join(f"{name} {size}" for name, size in sizes.read.items())
            raise UnknownRowsError(f"its {length} rows do not match {type(module).__name__} ({of_module})")
        parts: list[Part] = []
        for span, count, rows_of_span in zip(rows.spans, counts, lengths, strict=True):
            if span.interleaved and count:
                size = rows_of_span // count
                parts += [Part(span.role, size, size * repeats)] * count
            elif rows_of_span:
                parts.append(Part(span.role, rows_of_span, _head_dim(span, sizes, rows_of_span)))
        return repeats, tuple(parts)


class _Sizes:
    """Sizes by name, read from a module's attributes; `read` has those that were requested and found."""

    def __init__(self, layout: ModuleLayout, module: nn.Module) -> None:
        self._layout, self._module = layout, module
        self._of_configuration: set[str] = set()
        self._given: set[str] = set()
        self.read: dict[str, int] = {}

    def is_of_configuration(self, size: str) -> bool:
        """Whether a size was read from the model's configuration instead of the module's own attributes."""
        return size in self._of_configuration

    def get(self, size: Size) -> int | None:
        """The size, or None if the module does not have it."""
        if isinstance(size, int):
            return size
        if size not in self.read:
            value = self._look_up(size)
            if value is None:
                return None
            self.read[size] = value
        return self.read[size]

    def need(self, size: Size) -> int:
        """The size.

        Raises:
            UnknownRowsError: The module does not have it.
        """
        value = self.get(size)
        if value is None:
            raise UnknownRowsError(f"{type(self._module).__name__} has no attribute for {self.describe(size)}")
        return value

    def describe(self, size: Size) -> str:
        """A size in words, with the attributes that may hold it."""
        own = [str(path) for path in self._paths(size) if str(path).partition(".")[0] not in _CONFIGURATIONS]
        paths = ", ".join([*own[:3], "..."] if len(own) > 3 else own)
        return f"{_WORDS.get(str(size), size)} ({paths})" if paths else _WORDS.get(str(size), str(size))

    def settle(self, size: str, length: int, count: int) -> None:
        """Derive a size from `length` rows that contain it `count` times.

        Raises:
            UnknownRowsError: `length` is not a multiple of `count`.
        """
        if length % count:
            raise UnknownRowsError(f"its {length} rows are not a multiple of the {count} heads")
        self.read[size] = length // count

    def check_settled(self, length: int, widths: frozenset[int]) -> None:
        """Confirm a head size that follows from the number of heads and rows alone.

        Raises:
            UnknownRowsError: Nothing else in the module has the size of all heads, so that the number of key-value
                heads may differ; or the module has another head size.
        """
        head_dim, kind = self.read["head_dim"], type(self._module).__name__
        heads = self.get("heads") or self.get("kv_heads") or 1
        widths_of_head = {name: _attribute(self._module, name) for name in HEAD_WIDTHS}
        for name, value in widths_of_head.items():
            if _is_integer(value) and 0 < value != head_dim and value != heads * head_dim:
                raise UnknownRowsError(
                    f"its {length} rows would be {self._counted()} of {head_dim} rows, but {name} of {kind} is {value}"
                )
        if "kv_heads" not in self._given and heads * head_dim not in widths and head_dim not in widths_of_head.values():
            raise UnknownRowsError(
                f"its {length} rows do not determine the size of a head: nothing else in {kind} has the "
                f"{heads * head_dim} rows of {heads} heads of {head_dim} (set the attribute head_dim of {kind}, or "
                f"num_key_value_heads if there are fewer key-value heads)"
            )

    def _counted(self) -> str:
        return ", ".join(f"{name} {size}" for name, size in self.read.items() if name != "head_dim")

    def _look_up(self, size: Size) -> int | None:
        if size == "group":
            heads, kv_heads = self.get("heads"), self.get("kv_heads")
            return heads // kv_heads if heads and kv_heads and heads % kv_heads == 0 else None
        for path in self._paths(size):
            value: Any = _attribute(self._module, path) if isinstance(path, str) else path
            # A part of a layout may be absent, such as latent attention's rows for positions: zero is valid.
            least = 0 if size in self._layout.sizes and size not in SIZES else 1
            if value is True and size == "kv_heads" and "quer" in str(path):
                value = 1
            if _is_integer(value) and value >= least and not self._is_no_group(size, path, value):
                if isinstance(path, str) and path.split(".")[0] in _CONFIGURATIONS:
                    self._of_configuration.add(str(size))
                self._given.add(str(size))
                return int(value)
        if size == "head_dim" and size not in self._layout.sizes and self.get("heads") is None:
            widths = (_attribute(self._module, name) for name in HEAD_WIDTHS)
            return next((int(width) for width in widths if _is_integer(width) and width > 0), None)
        return self.get("heads") if size == "kv_heads" else None

    def _is_no_group(self, size: Size, path: Size, value: int) -> bool:
        """Whether an attribute counts the groups of a norm: it cannot count key-value heads."""
        return size == "kv_heads" and str(path) in ("num_groups", "n_groups") and (self.get("heads") or 0) % value != 0

    def _paths(self, size: Size) -> tuple[Size, ...]:
        own = self._layout.sizes.get(str(size))
        if own is None:
            return SIZES.get(str(size), ())
        return own if isinstance(own, tuple) else (own,)


def _head_dim(span: Span, sizes: _Sizes, length: int, heads: int | None = None) -> int | None:
    """Rows of a head in `length` rows of one role; None for roles without heads, and for values of unknown heads.

    Raises:
        UnknownRowsError: The heads of queries or keys are unknown.
    """
    if span.role not in (Role.QUERY, Role.KEY, Role.VALUE):
        return None
    head_dim = sizes.get(span.size)
    if head_dim is None and heads and length % heads == 0:
        head_dim = length // heads
    if span.role is Role.VALUE:
        return head_dim if head_dim and length % head_dim == 0 else None
    if head_dim is None:
        of_heads = sizes.describe("heads" if span.role is Role.QUERY else "kv_heads")
        raise UnknownRowsError(f"its module has neither {sizes.describe(span.size)} nor {of_heads}")
    if length % head_dim:
        raise UnknownRowsError(f"its {length} rows are not a multiple of the head size {head_dim}")
    return head_dim


def _are_other_heads(length: int, expected: int, sizes: _Sizes) -> bool:
    """Whether the rows of queries contradict their heads.

    A configuration may count the heads of another part of the model, so it proves nothing; but twice the expected rows
    are queries with gates.
    """
    return length != expected and (not sizes.is_of_configuration("heads") or length == 2 * expected)


def own_size(module: nn.Module, size: str) -> int | None:
    """A size of `SIZES` from an attribute of the module itself, not from its configuration; None without one."""
    for path in SIZES[size]:
        if isinstance(path, str) and "." not in path and _is_integer(value := _attribute(module, path)) and value > 0:
            return int(value)
    return None


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _attribute(module: nn.Module, path: str) -> Any:
    """An attribute by its dotted path, or a quotient such as `a/b/3`; None if there is none."""
    try:
        value, *divisors = (int(part) if part.isdigit() else attrgetter(part)(module) for part in path.split("/"))
        for divisor in divisors:
            if value % divisor:
                return None
            value //= divisor
        return value
    except Exception:  # noqa: BLE001 - a property of the model may raise anything
        return None


def _is_among(name: str, names: tuple[str, ...]) -> bool:
    return name in names or any("*" in pattern and fnmatch.fnmatchcase(name, pattern) for pattern in names)


def members(module: nn.Module) -> frozenset[str]:
    """Names of the children and own parameters that a module has."""
    own = [*module._modules.items(), *module._parameters.items()]
    return frozenset(name for name, member in own if member is not None)


def qualified_name(cls: type) -> str:
    """Module and name of a class, as in the table."""
    return f"{cls.__module__}.{cls.__qualname__}"
