"""Layouts for classes of diffusers."""

from __future__ import annotations

from lightning_adam_mini.partition.layouts.orders import CONTIGUOUS_KEY_VALUE, JOINT_ATTENTION
from lightning_adam_mini.partition.module_layout import ModuleLayout, Rows, Span
from lightning_adam_mini.partition.roles import Role

__all__ = ["LAYOUTS"]

Q, K, V, OUT, MLP = Role.QUERY, Role.KEY, Role.VALUE, Role.ATTENTION_OUTPUT, Role.MLP


LAYOUTS: list[ModuleLayout] = [
    ModuleLayout(
        "diffusers_pixel_attention",  # within convolutional networks, over pixels: it makes no Transformer of them
        classes=("diffusers.models.attention_processor.Attention",),
        parameters=JOINT_ATTENTION,
        only_if="residual_connection",
        sizes={"head_dim": "inner_dim/heads"},
        attends=False,
    ),
    ModuleLayout(
        "diffusers_hidream",
        classes=("diffusers.models.transformers.transformer_hidream_image.HiDreamAttention",),
        parameters={
            **JOINT_ATTENTION,
            **{f"{name}_t.weight": role for name, role in (("to_q", Q), ("to_k", K), ("to_v", V), ("to_out", OUT))},
        },
        sizes={"head_dim": "inner_dim/heads"},
    ),
    ModuleLayout(
        "diffusers_flux2_parallel",  # query, key, value and the feed-forward rows of a parallel block
        classes=("diffusers.models.transformers.transformer_flux2.Flux2ParallelSelfAttention",),
        parameters={
            "to_qkv_mlp_proj.weight": Rows(Span(Q, "heads"), Span(K, "heads"), Span(V, "heads"), MLP),
            "to_out.weight": OUT,
        },
    ),
    ModuleLayout(
        "diffusers_mochi_pool",
        classes=("diffusers.models.embeddings.MochiAttentionPool",),
        parameters={"to_q.weight": Q, "to_kv.weight": CONTIGUOUS_KEY_VALUE, "to_out.weight": OUT},
    ),
    ModuleLayout(
        "diffusers_flux_feed_forward",
        classes=("diffusers.models.transformers.transformer_flux2.Flux2FeedForward",),
        parameters={"linear_in.weight": MLP, "linear_out.weight": MLP},
    ),
    ModuleLayout(
        "diffusers_feed_forward",
        classes=("diffusers.models.attention.FeedForward",),
        parameters={"net.*": MLP},
    ),
]
