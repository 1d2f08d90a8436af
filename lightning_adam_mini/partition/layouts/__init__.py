"""The table of layouts: the roles of parameters of known classes, and the order of fused rows.

The table is data, and a test checks it against the queries, keys and values in the forward pass of the models. A layout
is found by the class of a module or a base class, or by the names of its children, never by substrings of a parameter's
name. Of the layouts for a class, the first that describes a module counts; those for names of children add the
parameters that it leaves open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from lightning_adam_mini.hints import did_you_mean
from lightning_adam_mini.partition.layouts import (
    by_names,
    layers,
    of_diffusers,
    of_scripts,
    of_timm,
    of_torch,
    of_transformers,
)
from lightning_adam_mini.partition.layouts.orders import (
    CONTIGUOUS,
    CONTIGUOUS_KEY_VALUE,
    KEY_VALUE_PER_HEAD,
    PER_GROUP,
    PER_HEAD,
    K,
    Q,
    V,
)
from lightning_adam_mini.partition.layouts.parameter_names import (
    BARE_PARAMETERS,
    fused_parts,
    is_output_name,
    is_plain,
    projected_parts,
)
from lightning_adam_mini.partition.module_layout import ModuleLayout, Rows, Span, members
from lightning_adam_mini.partition.roles import Role

__all__ = [
    "BARE_PARAMETERS",
    "LAYERS",
    "LAYOUTS",
    "ORDERS",
    "REGISTERED",
    "OrderLayout",
    "find_layer",
    "find_layouts",
    "is_registered",
    "named_layout",
    "named_layouts",
    "register_layout",
]

LAYOUTS: list[ModuleLayout] = [
    *of_torch.LAYOUTS,
    *of_transformers.LAYOUTS,
    *of_timm.LAYOUTS,
    *of_diffusers.LAYOUTS,
    *of_scripts.LAYOUTS,
    *by_names.LAYOUTS,
]
"""Layouts of modules that consist of layers, those for classes first."""

REGISTERED: list[ModuleLayout] = []
"""Layouts that users registered; they take precedence over the table."""

LAYERS = layers.LAYOUTS
"""Layouts of single layers whose type is not one of torch's."""

_KEY_VALUE = (CONTIGUOUS_KEY_VALUE, KEY_VALUE_PER_HEAD)
_QUERY_KEY = (Rows(Span(Q, "heads"), Span(K, "kv_heads")), Rows(Span(Q, 1), Span(K, 1), repeats="heads"))


@dataclass(frozen=True)
class OrderLayout(ModuleLayout):
    """The order of fused rows in a class, whatever their names; a user gives it to classes without a layout.

    Args:
        fused: Rows of queries, keys and values.
        pairs: The same for pairs, by what they hold.
    """

    fused: Rows = CONTIGUOUS
    pairs: Mapping[frozenset[Role], Rows] = field(default_factory=dict)

    def find(self, relative_name: str) -> Rows | None:
        """The rows of a weight, by the name of its layer or its own name."""
        member = relative_name.removesuffix(".weight")
        names = [name for name in member.split(".") if not name.isdigit()]
        if len(names) != 1 or (member == relative_name and "." in relative_name):
            return None
        (name,) = names
        if name.lower().removesuffix("_weight") == "in_proj":
            return self.fused
        parts = fused_parts(name) or projected_parts(name)
        if {Q, K, V} == set(parts):
            return self.fused
        if not parts:
            return Rows(Role.ATTENTION_OUTPUT) if is_output_name(name) else None
        if not is_plain(name):
            return None
        return Rows(parts[0]) if len(parts) == 1 else self.pairs.get(frozenset(parts))


def _of_order(name: str, fused: Rows, pair: int) -> OrderLayout:
    pairs = {frozenset({K, V}): _KEY_VALUE[pair], frozenset({Q, K}): _QUERY_KEY[pair]}
    return OrderLayout(name, {}, attends=True, fused=fused, pairs=pairs)


ORDERS = (
    _of_order("fused_contiguous", CONTIGUOUS, 0),
    _of_order("fused_per_head", PER_HEAD, 1),
    _of_order("fused_per_group", PER_GROUP, 1),
)
"""The common orders, which belong to no class: users give them to classes without a layout."""


def register_layout(layout: ModuleLayout) -> None:
    """Add a layout for your own classes; it takes precedence over the table.

    It replaces a registered layout of the same name.

    Raises:
        ValueError: The layout describes no module, or a layout of the table has its name.
    """
    if not layout.classes and not layout.children:
        raise ValueError(f"layout {layout.name!r} names neither classes nor children, so it describes no module")
    for name in layout.classes:
        if "." not in name and "*" not in name:
            raise ValueError(
                f"layout {layout.name!r}: {name!r} is not a qualified name; write my_package.module.{name}"
            )
    if any(other.name == layout.name for other in [*LAYOUTS, *ORDERS]):
        raise ValueError(f"there is already a layout {layout.name!r}; choose another name")
    REGISTERED[:] = [layout, *(other for other in REGISTERED if other.name != layout.name)]


def is_registered(layout: ModuleLayout) -> bool:
    """Whether a user registered the layout."""
    return any(layout is other for other in REGISTERED)


def find_layouts(module: nn.Module) -> list[ModuleLayout]:
    """The first layout for the class of `module`, and those for the names of its children, in order."""
    names = members(module)
    found = [layout for layout in [*REGISTERED, *LAYOUTS] if layout.matches(module, names)]
    first_of_class = next((layout for layout in found if layout.classes), None)
    return [layout for layout in found if not layout.classes or layout is first_of_class]


def find_layer(module: nn.Module, name: str) -> tuple[ModuleLayout, Rows] | None:
    """The first entry of `LAYERS` for the type of `module` that knows its parameter `name`, with its rows, or None."""
    for layout in LAYERS:
        if layout.matches(module, frozenset()) and (rows := layout.find(name)):
            return layout, rows
    return None


def named_layouts() -> dict[str, ModuleLayout]:
    """Layouts by their names in `partition_layouts`."""
    return {layout.name: layout for layout in [*ORDERS, *REGISTERED, *LAYOUTS]}


def named_layout(name: str) -> ModuleLayout:
    """The layout of a name.

    Raises:
        ValueError: There is none; the message has similar names.
    """
    known = named_layouts()
    if name not in known:
        orders = f"; the common orders are {', '.join(layout.name for layout in ORDERS)}"
        raise ValueError(f"partition_layouts: there is no layout {name!r}{did_you_mean(name, known, otherwise=orders)}")
    return known[name]
