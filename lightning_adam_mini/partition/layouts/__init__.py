"""The table of layouts: what the parameters of known classes do, and how fused ones order their rows.

It is data. Each entry can be checked against the forward code of the classes it names, and a test does so by perturbing
one block at a time and watching the queries, keys and values that the model's own forward pass computes. An entry is
found by the class of a module (or a base class of it), or by the names of its children; never by a substring of a
parameter's full name. Of the entries for a class the first that describes a module counts; those for names of children
add what it leaves open.
"""

from __future__ import annotations

import difflib

from torch import nn

from lightning_adam_mini.partition.layouts import by_names, layers, of_diffusers, of_timm, of_torch, of_transformers
from lightning_adam_mini.partition.layouts.bare_parameters import BARE_PARAMETERS
from lightning_adam_mini.partition.layouts.orders import CONTIGUOUS, OUTPUTS, PER_GROUP, PER_HEAD
from lightning_adam_mini.partition.module_layout import ModuleLayout, members

__all__ = [
    "BARE_PARAMETERS",
    "FUSED_NAMES",
    "LAYERS",
    "LAYOUTS",
    "find_layer",
    "find_layouts",
    "is_registered",
    "named_layout",
    "register_layout",
]

LAYOUTS: list[ModuleLayout] = [
    *of_torch.LAYOUTS,
    *of_transformers.LAYOUTS,
    *of_timm.LAYOUTS,
    *of_diffusers.LAYOUTS,
    *by_names.LAYOUTS,
]
"""Modules that are made of layers, those that are known by their class first."""

_BUILT_IN = frozenset(map(id, LAYOUTS))

LAYERS = layers.LAYOUTS
"""Layers whose parameters torch's own types do not tell."""

FUSED_NAMES = frozenset(
    {
        "Wqkv",
        "att_proj",
        "c_attn",
        "in_proj_qkv",
        "kv",
        "kv_proj",
        "qk",
        "qkv",
        "qkv_linear",
        "qkv_proj",
        "query_key_value",
        "to_kv",
        "to_qkv",
        "wqkv",
    }
)
"""Names of linear layers that hold a fused query, key or value, whose order only the class can tell."""

_ORDERS = [
    ModuleLayout(name, {**dict.fromkeys((f"{fused}.weight" for fused in sorted(FUSED_NAMES)), rows), **OUTPUTS})
    for name, rows in (
        ("fused_contiguous", CONTIGUOUS),
        ("fused_per_head", PER_HEAD),
        ("fused_per_group", PER_GROUP),
    )
]
"""Layouts that describe no class by themselves: users give them to classes of their own."""


def register_layout(layout: ModuleLayout) -> None:
    """Add a layout for a class of one's own; it takes precedence over those that are there.

    Raises:
        ValueError: The layout would describe no module, or another has its name.
    """
    if not layout.classes and not layout.children:
        raise ValueError(f"layout {layout.name!r} names neither classes nor children, so it would describe no module")
    if any(other.name == layout.name and other != layout for other in [*LAYOUTS, *_ORDERS]):
        raise ValueError(f"there is a layout {layout.name!r} already; give yours a name of its own")
    if layout in LAYOUTS:
        LAYOUTS.remove(layout)
    LAYOUTS.insert(0, layout)


def is_registered(layout: ModuleLayout) -> bool:
    """Whether a user added the layout."""
    return id(layout) not in _BUILT_IN


def find_layouts(module: nn.Module) -> list[ModuleLayout]:
    """The first layout for the class of `module`, and those for the names of its children, in order."""
    names = members(module)
    found = [layout for layout in LAYOUTS if layout.matches(module, names)]
    first_of_class = next((layout for layout in found if layout.classes), None)
    return [layout for layout in found if not layout.classes or layout is first_of_class]


def find_layer(module: nn.Module, name: str) -> ModuleLayout | None:
    """The first entry of `LAYERS` for the type of `module` that knows its parameter `name`, or None."""
    matching = (layout for layout in LAYERS if layout.matches(module, frozenset()))
    return next((layout for layout in matching if layout.find(name)), None)


def named_layout(name: str) -> ModuleLayout:
    """The layout of a name.

    Raises:
        ValueError: There is none; with the names that come near.
    """
    known = {layout.name: layout for layout in [*_ORDERS, *LAYOUTS]}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or [layout.name for layout in _ORDERS]
        raise ValueError(f"partition_layouts: there is no layout {name!r}; did you mean {', '.join(near)}?")
    return known[name]
