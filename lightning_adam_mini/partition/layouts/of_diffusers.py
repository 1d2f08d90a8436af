"""Layouts for classes of diffusers."""

from __future__ import annotations

from lightning_adam_mini.partition.layouts.orders import (
    CONTIGUOUS,
    CONTIGUOUS_KEY_VALUE,
    EXPERT_ROWS_LAST,
    JOINT_ATTENTION,
    MLP,
    OUT,
    OUTPUTS,
    K,
    Q,
    V,
)
from lightning_adam_mini.partition.module_layout import ModuleLayout, Rows, Span

__all__ = ["LAYOUTS"]


LAYOUTS: list[ModuleLayout] = [
    ModuleLayout(
        "diffusers_convolutional_attention",  # over pixels, with convolutions of size 1 and a single head
        classes=(
            "diffusers.models.autoencoders.autoencoder_kl_hunyuanimage.HunyuanImageAttentionBlock",
            "diffusers.models.autoencoders.autoencoder_kl_hunyuanimage_refiner.HunyuanImageRefinerAttnBlock",
            "diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15.HunyuanVideo15AttnBlock",
            "diffusers.models.autoencoders.autoencoder_kl_ltx2_audio.LTX2AudioAttnBlock",
            "diffusers.models.autoencoders.autoencoder_kl_qwenimage.QwenImageAttentionBlock",
            "diffusers.models.autoencoders.autoencoder_kl_qwenimage21.QwenImage21AttentionBlock",
            "diffusers.models.autoencoders.autoencoder_kl_wan.WanAttentionBlock",
            "diffusers.models.autoencoders.autoencoder_vidtok.VidTokAttnBlock",
        ),
        parameters={
            "to_qkv.weight": CONTIGUOUS,
            **{
                place.format(name): role
                for place in ("to_{}.weight", "{}.weight", "{}.conv.weight")
                for name, role in (("q", Q), ("k", K), ("v", V), ("proj_out", OUT))
            },
            **OUTPUTS,
        },
        sizes={"heads": 1, "kv_heads": 1},
        attends=False,
    ),
    ModuleLayout(
        "diffusers_cosmos_convolutional_attention",
        classes=("diffusers.models.autoencoders.autoencoder_kl_cosmos.CosmosCausalAttention",),
        parameters=JOINT_ATTENTION,
        sizes={"kv_heads": "num_attention_heads"},
        attends=False,
    ),
    ModuleLayout(
        "diffusers_mmaudio",  # query, key and value in turn, row by row: heads lie apart, so each row is a block
        classes=("diffusers.models.autoencoders.autoencoder_mmaudio.MMAudioAttnBlock1D",),
        parameters={
            "qkv.weight": Rows(Span(Q, 1, 1), Span(K, 1, 1), Span(V, 1, 1), repeats="channels"),
            "proj_out.weight": OUT,
        },
        sizes={"channels": "qkv.in_channels"},
        attends=False,
    ),
    ModuleLayout(
        "diffusers_multiscale_attention",  # linear, over pixels, also within convolutional networks
        classes=("diffusers.models.attention_processor.SanaMultiscaleLinearAttention",),
        parameters=JOINT_ATTENTION,
        sizes={"head_dim": "attention_head_dim"},
        attends=False,
    ),
    ModuleLayout(
        "diffusers_pixel_attention",  # within convolutional networks, over pixels: it makes no Transformer of them
        classes=("diffusers.models.attention_processor.Attention",),
        parameters=JOINT_ATTENTION,
        only_if="residual_connection",
        sizes={"head_dim": "inner_dim/heads"},
        attends=False,
    ),
    ModuleLayout(
        "diffusers_attention_1d",
        classes=("diffusers.models.unets.unet_1d_blocks.SelfAttention1d",),
        parameters={"query.weight": Q, "key.weight": K, "value.weight": V, "proj_attn.weight": OUT},
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
    ModuleLayout(
        "diffusers_nucleus_experts",
        classes=("diffusers.models.transformers.transformer_nucleusmoe_image.SwiGLUExperts",),
        parameters={
            "gate_up_proj": EXPERT_ROWS_LAST,
            "down_proj": EXPERT_ROWS_LAST,
        },
    ),
    ModuleLayout(
        "diffusers_prx",
        classes=("diffusers.models.transformers.transformer_prx.PRXAttention",),
        parameters={
            "img_qkv_proj.weight": CONTIGUOUS,
            "txt_kv_proj.weight": CONTIGUOUS_KEY_VALUE,
            **OUTPUTS,
        },
    ),
    ModuleLayout(
        "diffusers_joyimage",
        classes=(
            "diffusers.models.transformers.transformer_joyimage.JoyImageAttention",
            "diffusers.models.transformers.transformer_joyimage_edit_plus.JoyImageEditPlusAttention",
        ),
        parameters={
            "img_attn_qkv.weight": CONTIGUOUS,
            "txt_attn_qkv.weight": CONTIGUOUS,
            "img_attn_proj.weight": OUT,
            "txt_attn_proj.weight": OUT,
        },
    ),
    ModuleLayout(
        "diffusers_minimax_h3_audio",
        classes=("diffusers.models.autoencoders.autoencoder_kl_minimax_h3_audio.MiniMaxH3AudioCausalAttention",),
        parameters={
            "qkv.weight": CONTIGUOUS,
            **OUTPUTS,
        },
    ),
    ModuleLayout(
        "diffusers_differential",  # two queries and two keys for each head
        classes=(
            "diffusers.models.autoencoders.autoencoder_same.SAMEAttention",
            "diffusers.models.transformers.transformer_stable_audio3.StableAudio3SelfAttention",
            "diffusers.models.transformers.transformer_stable_audio3.StableAudio3CrossAttention",
        ),
        parameters={
            "to_qkv.weight": Rows(
                Span(Q, "heads"), Span(Q, "heads"), Span(K, "heads"), Span(K, "heads"), Span(V, "heads")
            ),
            "to_q.weight": Rows(Span(Q, "heads"), Span(Q, "heads")),
            "to_kv.weight": Rows(Span(K, "heads"), Span(K, "heads"), Span(V, "heads")),
            **OUTPUTS,
        },
        only_if="use_differential",
        sizes={"head_dim": "dim_heads"},
    ),
    ModuleLayout(
        "diffusers_not_differential",
        classes=(
            "diffusers.models.autoencoders.autoencoder_same.SAMEAttention",
            "diffusers.models.transformers.transformer_stable_audio3.StableAudio3SelfAttention",
            "diffusers.models.transformers.transformer_stable_audio3.StableAudio3CrossAttention",
        ),
        parameters={
            "to_qkv.weight": CONTIGUOUS,
            "to_q.weight": Q,
            "to_kv.weight": CONTIGUOUS_KEY_VALUE,
            **OUTPUTS,
        },
        sizes={"head_dim": "dim_heads"},
    ),
    ModuleLayout(
        "diffusers_sana_wm",
        classes=(
            "diffusers.models.transformers.transformer_sana_wm.BidirectionalGDNUCPESinglePathLiteLA",
            "diffusers.models.transformers.transformer_sana_wm._SoftmaxUCPESinglePathLiteLA",
        ),
        parameters={
            "qkv.weight": CONTIGUOUS,
            "q_proj_cam.weight": Q,
            "k_proj_cam.weight": K,
            "v_proj_cam.weight": V,
            "out_proj_cam.weight": OUT,
            **OUTPUTS,
        },
        sizes={"head_dim": "dim"},
    ),
    ModuleLayout(
        "diffusers_sana_wm_cross",
        classes=("diffusers.models.transformers.transformer_sana_wm.MultiHeadCrossAttention",),
        parameters={
            "q_linear.weight": Q,
            "kv_linear.weight": CONTIGUOUS_KEY_VALUE,
            **OUTPUTS,
        },
    ),
]
