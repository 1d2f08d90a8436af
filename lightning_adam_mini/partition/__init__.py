"""From a module tree to the role of each parameter, and from roles to blocks."""

from lightning_adam_mini.partition.annotation import Annotation, annotate, annotation_of
from lightning_adam_mini.partition.expressible import expressible_structures, merge_overrides
from lightning_adam_mini.partition.inference import Layouts
from lightning_adam_mini.partition.layouts import register_layout
from lightning_adam_mini.partition.module_layout import ModuleLayout, Rows, Span
from lightning_adam_mini.partition.partition import (
    ParameterPartition,
    advise_layouts,
    doubts,
    partition_module,
    partition_tensors,
    recut,
    resolve_strategy,
)
from lightning_adam_mini.partition.roles import ParameterRole, Part, Role
from lightning_adam_mini.partition.strategies import EVIDENCE, PAPERS, RECOMMENDED, STRATEGIES, Strategy, Structure

__all__ = [
    "EVIDENCE",
    "PAPERS",
    "RECOMMENDED",
    "STRATEGIES",
    "Annotation",
    "Layouts",
    "ModuleLayout",
    "ParameterPartition",
    "ParameterRole",
    "Part",
    "Role",
    "Rows",
    "Span",
    "Strategy",
    "Structure",
    "advise_layouts",
    "annotate",
    "annotation_of",
    "doubts",
    "expressible_structures",
    "merge_overrides",
    "partition_module",
    "partition_tensors",
    "recut",
    "register_layout",
    "resolve_strategy",
]
