"""Layouts for classes of timm."""

from __future__ import annotations

from lightning_adam_mini.partition.layouts.orders import (
    CONTIGUOUS,
    CONTIGUOUS_KEY_VALUE,
    LINEAR,
    MLP,
    OUT,
    OUTPUTS,
    PER_HEAD,
    SEPARABLE,
    K,
    Q,
    V,
)
from lightning_adam_mini.partition.module_layout import ModuleLayout, Rows, Span
from lightning_adam_mini.partition.roles import Role

__all__ = ["LAYOUTS"]


def _classes(*names: str) -> tuple[str, ...]:
    return tuple(f"timm.{name}" for name in names)


LAYOUTS: list[ModuleLayout] = [
    ModuleLayout(
        "timm_per_head",
        classes=_classes("layers.attention2d.Attention2d"),
        parameters={"qkv.weight": PER_HEAD, "proj.weight": OUT},
        only_if="head_first",
    ),
    ModuleLayout(
        "timm_contiguous",
        classes=_classes(
            "layers.attention.Attention",
            "layers.attention.AttentionRope",
            "layers.attention2d.Attention2d",
            "layers.attention_pool2d.AttentionPool2d",
            "layers.attention_pool2d.RotAttentionPool2d",
            "models.beit.Attention",
            "models.cait.TalkingHeadAttn",
            "models.coat.FactorAttnConvRelPosEnc",
            "models.convit.MHSA",
            "models.davit.WindowAttention",
            "models.eva.EvaAttention",
            "models.fastvit.Attention",
            "models.hiera.MaskUnitAttention",
            "models.hieradet_sam2.MultiScaleAttention",
            "models.metaformer.Attention",
            "models.mvitv2.MultiScaleAttention",
            "models.nest.Attention",
            "models.swin_transformer.WindowAttention",
            "models.swin_transformer_v2.WindowAttention",
            "models.swin_transformer_v2_cr.WindowMultiHeadAttention",
            "models.twins.LocallyGroupedAttn",
            "models.visformer.Attention",
            "models.vision_transformer_relpos.RelPosAttention",
            "models.vision_transformer_sam.Attention",
            "models.volo.Attention",
        ),
        parameters={
            "qkv.weight": CONTIGUOUS,
            "q.weight": Q,
            "k.weight": K,
            "v.weight": V,
            "q_proj.weight": Q,
            "k_proj.weight": K,
            "v_proj.weight": V,
            "proj.weight": OUT,
            "cpb_mlp.*": LINEAR,
            "meta_mlp.*": LINEAR,
            "rel_pos.mlp.*": LINEAR,
        },
    ),
    ModuleLayout(
        "timm_cross_covariance",  # attention between channels of a group: a head is a group of channels
        classes=_classes(
            "models.davit.ChannelAttention",
            "models.davit.ChannelAttentionV2",
            "models.edgenext.CrossCovarianceAttn",
            "models.xcit.XCA",
        ),
        parameters={"qkv.weight": CONTIGUOUS, "proj.weight": OUT, "temperature": Role.OTHER},
        sizes={"heads": ("groups", "num_heads"), "kv_heads": ("groups", "num_heads")},
    ),
    ModuleLayout(
        "timm_own_value_size",  # query, key and a value of another size for each head
        classes=_classes(
            "models.efficientformer.Attention",
            "models.levit.Attention",
            "models.levit.AttentionDownsample",
            "models.tiny_vit.Attention",
        ),
        parameters={
            "qkv.weight": Rows(Span(Q, 1), Span(K, 1), V, repeats="heads"),
            "q.ln.weight": Q,
            "kv.weight": Rows(Span(K, 1), V, repeats="heads"),
            "proj.weight": OUT,
            "proj.ln.weight": OUT,
        },
        sizes={"head_dim": "key_dim"},
    ),
    ModuleLayout(
        "timm_differential_attention",  # thirds; two queries and two keys of half the size for each head
        classes=_classes("layers.diff_attention.DiffAttention"),
        parameters={"qkv.weight": Rows(Q, K, V), "proj.weight": OUT},
    ),
    ModuleLayout(
        "timm_outlook_attention",  # scores come from a layer of their own, without keys
        classes=_classes("models.volo.OutlookAttention"),
        parameters={"v.weight": V, "proj.weight": OUT},
        attends=True,
    ),
    ModuleLayout(
        "maxxvit_per_head",
        classes=_classes("models.maxxvit.Attention2d", "models.maxxvit.AttentionCl"),
        parameters={"qkv.weight": PER_HEAD, **OUTPUTS},
        only_if="head_first",
    ),
    ModuleLayout(
        "maxxvit",
        classes=_classes("models.maxxvit.Attention2d", "models.maxxvit.AttentionCl"),
        parameters={"qkv.weight": CONTIGUOUS, **OUTPUTS},
    ),
    ModuleLayout(
        "gcvit",
        classes=_classes("models.gcvit.WindowAttentionGlobal"),
        parameters={"qkv.weight": CONTIGUOUS_KEY_VALUE, **OUTPUTS},
        only_if="use_global",
    ),
    ModuleLayout(
        "gcvit_local",
        classes=_classes("models.gcvit.WindowAttentionGlobal"),
        parameters={"qkv.weight": CONTIGUOUS, **OUTPUTS},
    ),
    ModuleLayout(
        "timm_query_then_key_value",
        classes=_classes(
            "layers.attention_pool.AttentionPoolLatent",
            "models.pvt_v2.Attention",
            "models.twins.GlobalSubSampleAttn",
            "models.volo.ClassAttention",
        ),
        parameters={"q.weight": Q, "kv.weight": CONTIGUOUS_KEY_VALUE, "proj.weight": OUT},
    ),
    ModuleLayout(
        "query_key_then_value",
        classes=_classes("models.convit.GPSA", "models.tnt.Attention"),
        parameters={"qk.weight": Rows(Span(Q, "heads"), Span(K, "heads")), "v.weight": V, **OUTPUTS},
    ),
    ModuleLayout(
        "parallel_scaling_block",  # the block's feed-forward rows first, then query, key and value
        classes=_classes(
            "models.vision_transformer.ParallelScalingBlock", "models.vision_transformer.DiffParallelScalingBlock"
        ),
        parameters={
            "in_proj.weight": Rows(Span(MLP), Span(Q, "heads"), Span(K, "heads"), Span(V, "heads")),
            "attn_out_proj.weight": OUT,
            "mlp_out_proj.weight": MLP,
        },
    ),
    ModuleLayout(
        "timm_halo",  # key and value of each head, of sizes of their own
        classes=_classes("layers.halo_attn.HaloAttn"),
        parameters={"q.weight": Q, "kv.weight": Rows(Span(K, 1), V, repeats="heads")},
        sizes={"head_dim": "dim_head_qk"},
    ),
    ModuleLayout(
        "timm_bottleneck",
        classes=_classes("layers.bottleneck_attn.BottleneckAttn"),
        parameters={"qkv.weight": Rows(Span(Q, "heads"), Span(K, "heads"), V)},
        sizes={"head_dim": "dim_head_qk"},
    ),
    ModuleLayout(
        "timm_lambda",  # all heads share one key and one value
        classes=_classes("layers.lambda_layer.LambdaLayer"),
        parameters={"qkv.weight": Rows(Span(Q, "heads"), Span(K, 1), V), "pos_emb": Role.BIAS},
        sizes={"head_dim": "dim_qk"},
    ),
    ModuleLayout(
        "timm_multi_query",
        classes=_classes("layers.attention2d.MultiQueryAttention2d"),
        parameters={
            "query.proj.weight": Q,
            "key.proj.weight": K,
            "value.proj.weight": V,
            "output.proj.weight": OUT,
        },
        sizes={"kv_heads": 1, "head_dim": "key_dim"},
    ),
    ModuleLayout(
        "timm_multi_query_einsum",  # (heads, key size, inputs), (inputs, size) twice and (outputs, heads, size)
        classes=_classes("layers.attention2d.MultiQueryAttentionV2"),
        parameters={
            "query_proj": Rows(Span(Q, size=1)),
            "key_proj": Rows(Span(K, 1, "key_dim"), axis=1),
            "value_proj": Rows(V, axis=1),
            "out_proj": OUT,
        },
        sizes={"heads": (), "kv_heads": (), "head_dim": (), "key_dim": "key_dim"},
    ),
    ModuleLayout(
        "timm_efficientformer_v2",
        classes=_classes(
            "models.efficientformer_v2.Attention2d",
            "models.efficientformer_v2.Attention2dDownsample",
        ),
        parameters={
            "q.conv.weight": Q,
            "q.proj.conv.weight": Q,
            "k.conv.weight": K,
            "v.conv.weight": V,
            "proj.conv.weight": OUT,
            "attention_biases": Role.BIAS,
        },
        sizes={"head_dim": "key_dim"},
    ),
    ModuleLayout(
        "timm_lite_multi_scale",  # for each head its query, key and value; further scales mix each within its head
        classes=_classes("models.efficientvit_mit.LiteMLA"),
        parameters={
            **dict.fromkeys(
                ("qkv.conv.weight", *(f"aggreg.{scale}.1.weight" for scale in range(4))),
                Rows(Span(Q, 1), Span(K, 1), Span(V, 1), repeats="heads"),
            ),
            "proj.conv.weight": OUT,
        },
        sizes={"heads": "qkv.conv.out_channels/dim/3", "head_dim": "dim"},
    ),
    ModuleLayout(
        "timm_cascaded_groups",  # a projection for each head
        classes=_classes("models.efficientvit_msra.CascadedGroupAttention"),
        parameters={
            "qkvs.*.conv.weight": Rows(Span(Q, 1), Span(K, 1), V),
            "proj.1.conv.weight": OUT,
            "attention_biases": Role.BIAS,
        },
        sizes={"head_dim": "key_dim"},
    ),
    ModuleLayout(
        "timm_single_head",  # over some channels
        classes=_classes("models.shvit.SHSA"),
        parameters={"qkv.c.weight": Rows(Span(Q, 1), Span(K, 1), V), "proj.1.c.weight": OUT},
        sizes={"head_dim": "qk_dim"},
    ),
    ModuleLayout(
        "timm_single_head_modulation",
        classes=_classes("models.iformer.SHMA"),
        parameters={
            "q.c.weight": Q,
            "k.c.weight": K,
            "v_gate.c.weight": Rows(V, LINEAR),
            "proj.c.weight": OUT,
        },
        sizes={"heads": 1, "kv_heads": 1},
    ),
    ModuleLayout(
        "timm_low_resolution",  # after a depthwise convolution of larger strides
        classes=_classes("models.cpubone.ConvAttention", "models.lowformer.ConvAttention"),
        parameters={"pwise.weight": PER_HEAD, "o_proj.weight": OUT},
    ),
    ModuleLayout(
        "timm_separable",
        classes=_classes("models.mobilevit.LinearSelfAttention"),
        parameters={"qkv_proj.weight": SEPARABLE, "out_proj.weight": OUT},
        sizes={"embed_dim": "embed_dim"},
    ),
    ModuleLayout(
        "timm_additive",
        classes=_classes("models.swiftformer.EfficientAdditiveAttention"),
        parameters={
            "to_query.weight": Q,
            "to_key.weight": K,
            "proj.weight": LINEAR,
            "final.weight": OUT,
            "w_g": Role.OTHER,
        },
        sizes={"heads": 1, "kv_heads": 1},
    ),
    ModuleLayout(
        "timm_non_local",
        classes=_classes("layers.non_local_attn.NonLocalAttn"),
        parameters={"t.weight": Q, "p.weight": K, "g.weight": V, "z.weight": OUT},
        sizes={"heads": 1, "kv_heads": 1},
        attends=False,
    ),
    ModuleLayout(
        "spatial_gating", classes=_classes("models.mlp_mixer.SpatialGatingUnit"), parameters={"proj.weight": MLP}
    ),
    ModuleLayout(
        "timm_small_networks",  # of a head, or from relative positions to scores
        classes=_classes("models.metaformer.MlpHead", "models.mambaout.MlpHead", "layers.pos_embed_rel.RelPosMlp"),
        parameters={"fc1.weight": LINEAR, "fc2.weight": LINEAR},
    ),
    ModuleLayout(
        "timm_csatv2",
        classes=_classes("models.csatv2.SpatialTransformerBlock"),
        parameters={"qkv.weight": CONTIGUOUS},
        sizes={"heads": 1, "kv_heads": 1},
    ),
]
