"""Layouts for classes of training scripts and of smaller libraries.

Scripts are copied, so their classes live in `model`, `train` or `__main__`. A class is known by its bare name together
with its children and size attributes. A class with another order of fused rows has other attributes, or needs a layout
from the user.
"""

from __future__ import annotations

from lightning_adam_mini.partition.layouts.orders import (
    CONTIGUOUS,
    CONTIGUOUS_KEY_VALUE,
    LINEAR,
    MLP,
    OUT,
    PER_GROUP,
    K,
    Q,
    V,
)
from lightning_adam_mini.partition.module_layout import ModuleLayout, Rows, Span
from lightning_adam_mini.partition.roles import Role

__all__ = ["LAYOUTS"]


TO_QKV: dict[str, Rows | Role] = {
    "to_qkv.weight": CONTIGUOUS,
    "to_q.weight": Q,
    "to_k.weight": K,
    "to_v.weight": V,
    "to_kv.weight": CONTIGUOUS_KEY_VALUE,
    "to_qk.weight": Rows(Span(Q, "heads"), Span(K, "heads")),
    "to_out.weight": OUT,
    "to_out.0.weight": OUT,
}
"""Names in lucidrains' libraries."""


LAYOUTS: list[ModuleLayout] = [
    ModuleLayout(
        "nanogpt",  # nanoGPT, minGPT, lit-llama, makemore: rows [Q | K | V]
        classes=("*.CausalSelfAttention",),
        children=("c_attn", "c_proj"),
        parameters={"c_attn.weight": CONTIGUOUS, "c_proj.weight": OUT},
        only_if=("n_head", "n_embd"),
        sizes={"heads": "n_head", "kv_heads": "n_head", "head_dim": "n_embd/n_head"},
    ),
    ModuleLayout(
        "nanochat",  # and the first modded-nanogpt
        classes=("*.CausalSelfAttention",),
        children=("c_q", "c_k", "c_v", "c_proj"),
        parameters={"c_q.weight": Q, "c_k.weight": K, "c_v.weight": V, "c_proj.weight": OUT, "ve_gate.weight": LINEAR},
        sizes={"kv_heads": ("n_kv_head", "num_kv_heads", "n_head", "num_heads")},
    ),
    ModuleLayout(
        "modded_nanogpt_stacked",  # (3, rows, inputs): one tensor, so that queries and keys have the values' rows
        classes=("*.CausalSelfAttention",),
        children=("qkv_w", "c_proj"),
        parameters={"qkv_w": Rows(LINEAR, axis=1, batch_axes=(0,)), "c_proj.weight": OUT},
        only_if="num_heads",
        attends=True,
    ),
    ModuleLayout(
        "modded_nanogpt",  # rows [Q | K | V | output projection]
        classes=("*.CausalSelfAttention",),
        children=("qkvo_w",),
        parameters={"qkvo_w": Rows(Span(Q, "heads"), Span(K, "heads"), Span(V, "heads"), OUT)},
        only_if=("num_heads", "head_dim"),
    ),
    ModuleLayout(
        "litgpt_latent",
        classes=("litgpt.model.MultiheadLatentAttention", "*.MultiheadLatentAttention"),
        children=("q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
        parameters={
            "q_a_proj.weight": LINEAR,
            "q_b_proj.weight": Q,
            "kv_a_proj_with_mqa.weight": Rows(Span(LINEAR), Span(K, 1, "rope_dim")),
            "kv_b_proj.weight": Rows(Span(K, 1, "nope_dim"), Span(V, 1, "value_dim"), repeats="kv_heads"),
            "proj.weight": OUT,
        },
        only_if="config.n_query_groups",
        sizes={
            "heads": "config.n_head",
            "kv_heads": "config.n_query_groups",
            "head_dim": "config.qk_head_dim",
            "nope_dim": "config.qk_nope_head_dim",
            "rope_dim": "config.qk_rope_head_dim",
            "value_dim": "config.v_head_dim",
        },
    ),
    *(
        ModuleLayout(
            name,
            classes=("*.CausalSelfAttention",),
            children=(fused, "proj"),
            parameters={f"{fused}.weight": rows, "proj.weight": OUT},
            only_if=("config.n_query_groups", "config.head_size"),
            sizes={"heads": "config.n_head", "kv_heads": "config.n_query_groups", "head_dim": "config.head_size"},
        )
        for name, fused, rows in (("litgpt", "qkv", CONTIGUOUS), ("lit_gpt", "attn", PER_GROUP))
    ),
    ModuleLayout(
        "litgpt_feed_forward",
        classes=("*.GptNeoxMLP", "*.LLaMAMLP"),
        children=("proj",),
        parameters={f"{name}.weight": MLP for name in ("fc", "fc_1", "fc_2", "proj")},
    ),
    ModuleLayout(
        "lit_llama_feed_forward",
        classes=("*.MLP",),
        children=("c_fc1", "c_fc2", "c_proj"),
        parameters={f"{name}.weight": MLP for name in ("c_fc1", "c_fc2", "c_proj")},
    ),
    ModuleLayout(
        "torchtitan",
        classes=("torchtitan.models.common.attention.GQAttention", "*.GQAttention"),
        children=("qkv_linear", "wo"),
        parameters={
            "qkv_linear.wq.weight": Q,
            "qkv_linear.wk.weight": K,
            "qkv_linear.wv.weight": V,
            "qkv_linear.wqkv.weight": PER_GROUP,
            "wo.weight": OUT,
        },
        only_if=("n_heads", "head_dim"),
    ),
    ModuleLayout(
        "torchtitan_fused",  # for each key-value head its query heads, its key and its value
        classes=("torchtitan.models.common.attention.FusedQKVLinear", "*.FusedQKVLinear"),
        children=("wqkv",),
        parameters={
            "wqkv.weight": Rows(Span(Q, "heads_per_kv"), Span(K, 1), Span(V, 1), repeats="kv_heads"),
        },
        only_if=("heads_per_kv", "head_dim"),
        sizes={"heads_per_kv": "heads_per_kv", "kv_heads": "wqkv.out_features/r_dim/head_dim"},
    ),
    ModuleLayout(
        "open_clip",
        classes=("open_clip.transformer.Attention", "*.Attention"),
        children=("in_proj_weight", "out_proj"),
        parameters={
            "in_proj_weight": CONTIGUOUS,
            "in_proj_bias": Role.BIAS,
            "out_proj.weight": OUT,
            "logit_scale": Role.OTHER,
            "head_scale": Role.OTHER,
        },
        only_if=("num_heads", "head_dim"),
        sizes={"kv_heads": "num_heads"},
    ),
    ModuleLayout(
        "open_clip_projections",  # x @ weight
        classes=(
            "open_clip.transformer.VisionTransformer",
            "open_clip.transformer.TextTransformer",
            "open_clip.transformer.MultimodalTransformer",
            "open_clip.model.CLIP",
        ),
        parameters={
            "proj": Rows(LINEAR, axis=1),
            "text_projection": Rows(LINEAR, axis=1),
            "cls_emb": Role.OTHER,
        },
        attends=False,
    ),
    ModuleLayout(
        "flash_attention_parallel",
        classes=("flash_attn.modules.mha.ParallelMHA", "*.ParallelMHA"),
        children=("Wqkv", "out_proj"),
        parameters={"Wqkv.weight": CONTIGUOUS, "out_proj.weight": OUT},
        sizes={"heads": "num_heads_per_rank", "kv_heads": "num_heads_kv_per_rank"},
    ),
    ModuleLayout(
        "flash_attention",
        classes=("flash_attn.modules.mha.MHA", "*.MHA"),
        children=("inner_attn", "inner_cross_attn", "out_proj"),
        parameters={
            "Wqkv.weight": CONTIGUOUS,
            "Wq.weight": Q,
            "Wkv.weight": CONTIGUOUS_KEY_VALUE,
            "out_proj.weight": OUT,
        },
        only_if=("num_heads", "head_dim"),
        sizes={"kv_heads": ("num_heads_kv", "num_heads")},
    ),
    ModuleLayout(
        "transformer_lens",  # (heads, inputs, head size); keys and values of grouped queries begin with an underscore
        classes=("transformer_lens.components.abstract_attention.AbstractAttention", "*.Attention"),
        children=("W_Q", "W_O"),
        parameters={
            "W_Q": Rows(Span(Q, "heads", 1)),
            **dict.fromkeys(("W_K", "_W_K"), Rows(Span(K, "kv_heads", 1))),
            **dict.fromkeys(("W_V", "_W_V"), Rows(V, axis=2, batch_axes=(0,))),
            "W_O": Rows(OUT, axis=2),
            **dict.fromkeys(("b_Q", "b_K", "b_V", "b_O", "_b_K", "_b_V"), Role.BIAS),
        },
        only_if="cfg.d_head",
        sizes={"heads": "cfg.n_heads", "kv_heads": ("cfg.n_key_value_heads", "cfg.n_heads"), "head_dim": ()},
    ),
    ModuleLayout(
        "transformer_lens_embed",
        classes=("*.Embed",),
        children=("W_E",),
        parameters={"W_E": Role.TOKEN_EMBEDDING},
        only_if="cfg.d_head",
    ),
    ModuleLayout(
        "transformer_lens_positions",
        classes=("*.PosEmbed",),
        children=("W_pos",),
        parameters={"W_pos": Role.POSITION_EMBEDDING},
        only_if="cfg.d_head",
    ),
    ModuleLayout(
        "transformer_lens_unembed",  # (inputs, tokens)
        classes=("*.Unembed",),
        children=("W_U",),
        parameters={"W_U": Rows(Role.OUTPUT_HEAD, axis=1), "b_U": Role.BIAS},
        only_if="cfg.d_head",
    ),
    ModuleLayout(
        "transformer_lens_feed_forward",  # (inputs, outputs)
        classes=("*.MLP", "*.GatedMLP"),
        children=("W_in", "W_out"),
        parameters={
            **dict.fromkeys(("W_in", "W_out", "W_gate"), Rows(MLP, axis=1)),
            "b_in": Role.BIAS,
            "b_out": Role.BIAS,
        },
        only_if="cfg.d_head",
    ),
    ModuleLayout(
        "transformer_lens_norm",
        classes=("*.LayerNorm", "*.RMSNorm"),
        children=("w",),
        parameters={"w": Role.NORM, "b": Role.BIAS},
        only_if="cfg.d_head",
    ),
    ModuleLayout(
        "x_transformers",  # queries, or keys and values, may come from a latent
        classes=("x_transformers.x_transformers.Attention",),
        parameters={
            **TO_QKV,
            "to_rotateable_k.weight": K,
            "to_latent_q.weight": LINEAR,
            "to_latent_kv.weight": LINEAR,
            **dict.fromkeys(("mem_k", "mem_v", "head_scale_params", "qk_norm_q_scale", "qk_norm_k_scale"), Role.OTHER),
        },
    ),
    ModuleLayout(
        "x_transformers_positions",
        classes=("x_transformers.x_transformers.AbsolutePositionalEmbedding",),
        parameters={"emb.weight": Role.POSITION_EMBEDDING},
    ),
    ModuleLayout(
        "lucidrains_feed_forward",
        classes=("x_transformers.x_transformers.FeedForward", "vit_pytorch.*FeedForward"),
        parameters={"ff.*": MLP, "net.*": MLP},
    ),
    *(
        ModuleLayout(
            name,
            classes=("vit_pytorch.*Attention",),
            children=(first, "to_out"),
            parameters=TO_QKV,
            only_if="heads",
            sizes={"kv_heads": "heads"},
        )
        for name, first in (("vit_pytorch", "to_qkv"), ("vit_pytorch_query_key", "to_qk"))
    ),
    ModuleLayout(
        "denoising_diffusion",  # within a convolutional network, over pixels: it makes no Transformer of it
        classes=("*.Attention", "*.LinearAttention"),
        children=("to_qkv", "to_out"),
        parameters={**TO_QKV, "mem_kv": Role.OTHER},
        only_if=("heads", "to_qkv.kernel_size"),
        sizes={"kv_heads": "heads"},
        attends=False,
    ),
    ModuleLayout(
        "lucidrains",  # copied from vit-pytorch
        classes=("*.Attention",),
        children=("to_qkv", "attend", "to_out"),
        parameters=TO_QKV,
        only_if=("heads", "scale"),
        sizes={"kv_heads": "heads"},
    ),
    ModuleLayout(
        "lucidrains_key_value",
        classes=("vit_pytorch.*Attention", "*.Attention", "*.CrossAttention", "*.PerceiverAttention"),
        children=("to_q", "to_kv", "to_out"),
        parameters=TO_QKV,
        only_if="heads",
        sizes={"kv_heads": "heads"},
    ),
    ModuleLayout(
        "fairseq",  # and ESM
        classes=("*.MultiheadAttention",),
        children=("k_proj", "v_proj", "q_proj", "out_proj"),
        parameters={
            "q_proj.weight": Q,
            "k_proj.weight": K,
            "v_proj.weight": V,
            "out_proj.weight": OUT,
            "bias_k": Role.BIAS,
            "bias_v": Role.BIAS,
        },
        only_if=("num_heads", "head_dim"),
        sizes={"kv_heads": "num_heads"},
    ),
    ModuleLayout(
        "annotated_transformer",  # https://nlp.seas.harvard.edu/annotated-transformer: four equal layers, in this order
        classes=("*.MultiHeadedAttention",),
        children=("linears",),
        parameters={"linears.0.weight": Q, "linears.1.weight": K, "linears.2.weight": V, "linears.3.weight": OUT},
        only_if=("h", "d_k"),
        sizes={"heads": "h", "kv_heads": "h", "head_dim": "d_k"},
    ),
    ModuleLayout(
        "latent_diffusion",  # taming-transformers, latent diffusion: over pixels, with a single head
        classes=("*.AttnBlock",),
        children=("q", "k", "v", "proj_out"),
        parameters={"q.weight": Q, "k.weight": K, "v.weight": V, "proj_out.weight": OUT},
        only_if="q.kernel_size",
        sizes={"heads": 1, "kv_heads": 1},
        attends=False,
    ),
    ModuleLayout(
        "moe_gate",  # DeepSeek's own code, MiniMind: a bare matrix that chooses experts
        classes=("*.MoEGate",),
        parameters={"weight": LINEAR},
        only_if="n_routed_experts",
    ),
]
