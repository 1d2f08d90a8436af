"""Rows that many layouts share: orders of fused rows, experts, and projections by their usual names."""

from __future__ import annotations

from lightning_adam_mini.partition.module_layout import Rows, Span
from lightning_adam_mini.partition.roles import Role

__all__ = [
    "CONTIGUOUS",
    "CONTIGUOUS_KEY_VALUE",
    "EXPERT",
    "EXPERT_ROWS",
    "EXPERT_ROWS_LAST",
    "JOINT_ATTENTION",
    "KEY_VALUE_PER_HEAD",
    "LINEAR",
    "MLP",
    "OUT",
    "OUTPUTS",
    "PER_GROUP",
    "PER_HEAD",
    "QUERY_GATE",
    "SEPARABLE",
    "K",
    "Q",
    "V",
]

Q, K, V, OUT = Role.QUERY, Role.KEY, Role.VALUE, Role.ATTENTION_OUTPUT
MLP, LINEAR, EXPERT = Role.MLP, Role.LINEAR, Role.EXPERT

CONTIGUOUS = Rows(Span(Q, "heads"), Span(K, "kv_heads"), Span(V, "kv_heads"))
"""All queries, all keys, all values: Q Q Q Q K K V V."""
CONTIGUOUS_KEY_VALUE = Rows(Span(K, "kv_heads"), Span(V, "kv_heads"))
"""All keys, all values: K K V V."""
PER_HEAD = Rows(Span(Q, 1), Span(K, 1), Span(V, 1), repeats="heads")
"""Query, key and value of each head: Q K V, Q K V."""
KEY_VALUE_PER_HEAD = Rows(Span(K, 1), Span(V, 1), repeats="kv_heads")
"""Key and value of each head: K V, K V."""
PER_GROUP = Rows(Span(Q, "group"), Span(K, 1), Span(V, 1), repeats="kv_heads")
"""Queries, key and value of each key-value head: Q Q K V, Q Q K V."""
QUERY_GATE = Rows(Span(Q, 1), Span(LINEAR, 1), repeats="heads")
"""Query and output gate of each head: Q gate, Q gate."""
SEPARABLE = Rows(Span(Q, 1, 1), Span(K, 1, "embed_dim"), Span(V, 1, "embed_dim"))
"""One query row, which scores each token, then key and value (Mehta and Rastegari 2022, MobileViTv2)."""

# Experts in one tensor of three dimensions. Rows of gate and up projection come in halves or alternate, which makes no
# difference to blocks of one row.
EXPERT_ROWS = Rows(EXPERT, axis=1, batch_axes=(0,))
"""(experts, outputs, inputs)"""
EXPERT_ROWS_LAST = Rows(EXPERT, axis=2, batch_axes=(0,))
"""(experts, inputs, outputs)"""

OUTPUTS = {
    f"{name}.weight": OUT
    for name in (
        "Wo",
        "attn_out",
        "c_proj",
        "dense",
        "dense_output",
        "lin_out",
        "linear_out",
        "o",
        "o_proj",
        "out",
        "out_lin",
        "out_proj",
        "post_proj",
        "post_projection",
        "proj",
        "projection",
        "to_add_out",
        "to_out",
        "to_out.0",
        "wo",
    )
}
"""The projection after the heads, by its names in attention modules."""

JOINT_ATTENTION = {
    "to_q.weight": Q,
    "to_k.weight": K,
    "to_v.weight": V,
    "add_q_proj.weight": Q,
    "add_k_proj.weight": K,
    "add_v_proj.weight": V,
    **OUTPUTS,
}
"""Projections of images, and those of text in joint attention."""
