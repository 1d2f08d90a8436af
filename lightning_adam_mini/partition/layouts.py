"""Layouts: which parameter of a module class plays which role, and how fused parameters order their parts.

The table is data: a row can be checked against the forward code of the class it names. A row is found by the class of
a module (or a base class of it), or by the names of its children; never by a substring of a parameter's full name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from lightning_adam_mini.partition.roles import Role

__all__ = ["LAYOUTS", "ModuleLayout", "find_layout", "qualified_name", "register_layout"]

Q, K, V, OUT, MLP = Role.QUERY, Role.KEY, Role.VALUE, Role.ATTENTION_OUTPUT, Role.MLP


@dataclass(frozen=True)
class ModuleLayout:
    """Roles of the parameters of a module class.

    Args:
        parameters: Roles by parameter name relative to the module. Several roles: a fused parameter, whose parts lie
            in that order along the output axis.
        classes: Qualified names of the classes; subclasses count.
        children: Names of children that identify the module where no class does.
        head_dim: Attributes of the module to read the rows of one head from, the first that exists.
        num_heads: Attributes with the number of query heads, to derive `head_dim` from where no attribute gives it.
        num_key_value_heads: Attributes with the number of key and value heads; the query heads where none exists.
        only_if: An attribute that must be true for the row to apply, for classes with two layouts.
    """

    parameters: Mapping[str, tuple[Role, ...]]
    classes: tuple[str, ...] = ()
    children: tuple[str, ...] = ()
    head_dim: tuple[str, ...] = ("head_dim",)
    num_heads: tuple[str, ...] = ("num_heads", "config.num_attention_heads")
    num_key_value_heads: tuple[str, ...] = ("num_key_value_heads", "config.num_key_value_heads")
    only_if: str | None = None
    class_names: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Keep the class names as a set for look-up."""
        object.__setattr__(self, "class_names", frozenset(self.classes))

    @property
    def is_attention(self) -> bool:
        """Whether the module attends over tokens."""
        return any(Q in roles for roles in self.parameters.values())

    def matches(self, module: nn.Module) -> bool:
        """Whether the row describes `module`."""
        if self.class_names:
            if self.class_names.isdisjoint(qualified_name(base) for base in type(module).__mro__):
                return False
        elif not self.children or any(getattr(module, child, None) is None for child in self.children):
            return False
        return self.only_if is None or bool(getattr(module, self.only_if, False))


LAYOUTS: list[ModuleLayout] = [
    # Attention with a fused query, key and value.
    ModuleLayout(
        classes=("torch.nn.modules.activation.MultiheadAttention",),
        parameters={
            "in_proj_weight": (Q, K, V),
            "q_proj_weight": (Q,),
            "k_proj_weight": (K,),
            "v_proj_weight": (V,),
            "out_proj.weight": (OUT,),
        },
        num_key_value_heads=("num_heads",),
    ),
    ModuleLayout(
        classes=("transformers.models.gpt2.modeling_gpt2.GPT2Attention",),
        parameters={"q_attn.weight": (Q,), "c_attn.weight": (K, V), "c_proj.weight": (OUT,)},
        num_key_value_heads=("num_heads",),
        only_if="is_cross_attention",
    ),
    ModuleLayout(
        classes=("transformers.models.gpt2.modeling_gpt2.GPT2Attention",),
        parameters={"c_attn.weight": (Q, K, V), "c_proj.weight": (OUT,)},
        num_key_value_heads=("num_heads",),
    ),
    # Attention with separate projections: Llama and the families that share its names.
    ModuleLayout(
        children=("q_proj", "k_proj", "v_proj", "o_proj"),
        parameters={
            "q_proj.weight": (Q,),
            "k_proj.weight": (K,),
            "v_proj.weight": (V,),
            "o_proj.weight": (OUT,),
        },
    ),
    # Feed-forward layers.
    ModuleLayout(
        children=("gate_proj", "up_proj", "down_proj"),
        parameters={"gate_proj.weight": (MLP,), "up_proj.weight": (MLP,), "down_proj.weight": (MLP,)},
    ),
    ModuleLayout(
        classes=("transformers.models.gpt2.modeling_gpt2.GPT2MLP",),
        parameters={"c_fc.weight": (MLP,), "c_proj.weight": (MLP,)},
    ),
    ModuleLayout(
        classes=(
            "torch.nn.modules.transformer.TransformerEncoderLayer",
            "torch.nn.modules.transformer.TransformerDecoderLayer",
        ),
        parameters={"linear1.weight": (MLP,), "linear2.weight": (MLP,)},
    ),
]

FUSED_NAMES = frozenset({"qkv", "qkv_proj", "query_key_value", "Wqkv", "wqkv", "c_attn", "in_proj_qkv", "to_qkv"})
"""Names of children that hold a fused query, key and value, whose order only the class can tell."""

QUERY_KEY_VALUE_NAMES = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
)
"""Names of children that tell attention over tokens, also in classes that no layout knows."""


def register_layout(layout: ModuleLayout) -> None:
    """Add a layout for a class of one's own; it takes precedence over the rows that are there."""
    LAYOUTS.insert(0, layout)


def find_layout(module: nn.Module) -> ModuleLayout | None:
    """The first row that describes `module`, or None."""
    return next((layout for layout in LAYOUTS if layout.matches(module)), None)


def qualified_name(cls: type) -> str:
    """Module and name of a class, as the table spells it."""
    return f"{cls.__module__}.{cls.__qualname__}"
