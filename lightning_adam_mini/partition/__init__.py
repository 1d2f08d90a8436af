"""From a module tree to the role of each parameter, and from roles to blocks."""

from lightning_adam_mini.partition.inference import Layouts
from lightning_adam_mini.partition.layouts import register_layout
from lightning_adam_mini.partition.module_layout import ModuleLayout, Rows, Span
from lightning_adam_mini.partition.partition import (
    CutParameter,
    partition_module,
    partition_tensors,
    recut,
    resolve_strategy,
)
from lightning_adam_mini.partition.remedies import advise_layouts, doubts
from lightning_adam_mini.partition.roles import ParameterRole, Part, Role
from lightning_adam_mini.partition.strategies import STRATEGIES, Cut, Strategy

__all__ = [
    "STRATEGIES",
    "Cut",
    "CutParameter",
    "Layouts",
    "ModuleLayout",
    "ParameterRole",
    "Part",
    "Role",
    "Rows",
    "Span",
    "Strategy",
    "advise_layouts",
    "doubts",
    "partition_module",
    "partition_tensors",
    "recut",
    "register_layout",
    "resolve_strategy",
]
