"""Layouts for classes of torch, torchvision, torch_geometric and peft."""

from __future__ import annotations

from lightning_adam_mini.partition.layouts.orders import CONTIGUOUS, LINEAR, MLP, OUT, K, Q, V
from lightning_adam_mini.partition.module_layout import ModuleLayout, Rows, Span
from lightning_adam_mini.partition.roles import Role

__all__ = ["LAYOUTS"]


LAYOUTS: list[ModuleLayout] = [
    ModuleLayout(
        "lora",
        classes=("peft.tuners.lora.layer.LoraLayer",),
        parameters={
            "lora_A.*": Role.LORA,
            "lora_B.*": Role.LORA,
            "lora_embedding_A.*": Rows(Role.LORA, axis=1),
            "lora_embedding_B.*": Role.LORA,
            "lora_magnitude_vector.*": Role.NORM,
        },
    ),
    ModuleLayout(
        "torch_multihead_attention",
        classes=("torch.nn.modules.activation.MultiheadAttention",),
        parameters={
            "in_proj_weight": CONTIGUOUS,
            "q_proj_weight": Q,
            "k_proj_weight": K,
            "v_proj_weight": V,
            "bias_k": Role.BIAS,
            "bias_v": Role.BIAS,
            "out_proj.weight": OUT,
        },
        sizes={"kv_heads": "num_heads"},
    ),
    ModuleLayout(
        "torch_transformer_layer",
        classes=(
            "torch.nn.modules.transformer.TransformerEncoderLayer",
            "torch.nn.modules.transformer.TransformerDecoderLayer",
        ),
        parameters={"linear1.weight": MLP, "linear2.weight": MLP},
    ),
    ModuleLayout(
        "torchvision_contiguous",
        classes=(
            "torchvision.models.maxvit.RelativePositionalMultiHeadAttention",
            "torchvision.models.swin_transformer.ShiftedWindowAttention",
            "torchvision.models.video.mvit.MultiscaleAttention",
            "torchvision.models.video.swin_transformer.ShiftedWindowAttention3d",
        ),
        parameters={
            "qkv.weight": CONTIGUOUS,
            "to_qkv.weight": CONTIGUOUS,
            "proj.weight": OUT,
            "merge.weight": OUT,
            "project.*": OUT,
            "cpb_mlp.*": LINEAR,
        },
    ),
    ModuleLayout("torchvision_mlp", classes=("torchvision.ops.misc.MLP",), parameters={"*": MLP}),
    ModuleLayout(
        "torchvision_convnext",
        classes=("torchvision.models.convnext.CNBlock",),
        parameters={"block.*": MLP},
    ),
    ModuleLayout(
        "torchvision_maxvit",
        classes=("torchvision.models.maxvit.PartitionAttentionLayer",),
        parameters={"mlp_layer.*": MLP},
    ),
    ModuleLayout(
        "torch_geometric_heterogeneous",  # keys first; one layer for each type of node
        classes=("torch_geometric.nn.conv.hgt_conv.HGTConv",),
        parameters={
            "kqv_lin.lins.*.weight": Rows(Span(K, "heads"), Span(Q, "heads"), Span(V, "heads")),
            "out_lin.lins.*.weight": OUT,
        },
    ),
    ModuleLayout(
        "torch_geometric_residual_gates",  # Bresson and Laurent (2017): key and query add up to a gate, without heads
        classes=("torch_geometric.nn.conv.res_gated_graph_conv.ResGatedGraphConv",),
        parameters={f"lin_{name}.weight": LINEAR for name in ("key", "query", "value", "skip")},
        attends=False,
    ),
    ModuleLayout(
        "torch_geometric_gps", classes=("torch_geometric.nn.conv.gps_conv.GPSConv",), parameters={"mlp.*": MLP}
    ),
]
