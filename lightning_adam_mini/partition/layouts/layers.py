"""Layouts of single layers whose type is not one of torch's; names are relative to the layer."""

from __future__ import annotations

from lightning_adam_mini.partition.layouts.orders import EXPERT_ROWS, EXPERT_ROWS_LAST, LINEAR
from lightning_adam_mini.partition.module_layout import ModuleLayout, Rows
from lightning_adam_mini.partition.roles import Role

__all__ = ["LAYOUTS"]


LIBRARIES = ("diffusers", "timm", "torchvision", "transformers")

SCALES = (
    "ffn_gamma",
    "gain",
    "gamma",
    "gamma1",
    "gamma2",
    "gamma3",
    "gamma_1",
    "gamma_2",
    "lambda1",
    "lambda_1",
    "lambda_2",
    "layer_scale",
    "layer_scale_1",
    "layer_scale_2",
    "layer_scale_parameter",
    "ls1",
    "ls2",
    "per_dim_scale",
)
"""Scales of norms and residual branches, by their names in these libraries; elsewhere a name proves nothing."""


def _in_libraries(*patterns: str) -> tuple[str, ...]:
    return tuple(f"{library}.{pattern}" for library in LIBRARIES for pattern in patterns)


LAYOUTS: list[ModuleLayout] = [
    ModuleLayout(
        "conv1d",
        classes=("transformers.pytorch_utils.Conv1D",),
        parameters={"weight": Rows(LINEAR, axis=1)},  # (inputs, outputs)
    ),
    ModuleLayout(
        "quantised_linear",  # I-BERT's, which does not run without the scales of its inputs
        classes=("transformers.models.ibert.quant_modules.QuantLinear",),
        parameters={"weight": LINEAR},
    ),
    ModuleLayout(
        "recurrent",
        classes=("torch.nn.modules.rnn.RNNBase", "torch.nn.modules.rnn.RNNCellBase"),
        parameters={"weight_*": LINEAR, "bias_*": Role.BIAS},
    ),
    ModuleLayout("bilinear", classes=("torch.nn.modules.linear.Bilinear",), parameters={"weight": LINEAR}),
    ModuleLayout(
        "parallel_experts",
        classes=("transformers.models.*ParallelExperts",),
        parameters={"weight": EXPERT_ROWS},
    ),
    ModuleLayout(
        "router",
        classes=("transformers.models.*Router", "diffusers.models.*MoEGate"),
        parameters={"weight": LINEAR, "bias": Role.BIAS, "e_score_correction_bias": Role.BIAS},
    ),
    ModuleLayout(
        "recurrent_gemma",  # block-diagonal gates, (blocks, inputs, outputs)
        classes=("transformers.models.recurrent_gemma.modeling_recurrent_gemma.RecurrentGemmaRglru",),
        parameters={
            "input_gate_weight": Rows(LINEAR, axis=2, batch_axes=(0,)),
            "recurrent_gate_weight": Rows(LINEAR, axis=2, batch_axes=(0,)),
        },
    ),
    ModuleLayout(
        "positions_on_a_grid",  # (1, rows, columns, width), or windows for rows
        classes=(
            "timm.models.naflexvit.NaFlexEmbeds",
            "timm.models.nest.NestLevel",
            "timm.models.vision_transformer_sam.VisionTransformerSAM",
            "timm.models.volo.VOLO",
            "transformers.models.*VisionEncoder",
            "transformers.models.pp_formulanet.modeling_pp_formulanet.PPFormulaNetVisionModel",
        ),
        parameters={"pos_embed": Rows(Role.POSITION_EMBEDDING, axis=2, batch_axes=(0, 1))},
    ),
    ModuleLayout(
        "positions_on_a_grid_after_width",  # (1, width, rows, columns)
        classes=(
            "timm.models.hiera.Hiera",
            "timm.models.hieradet_sam2.HieraDet",
            "timm.models.pit.PoolingVisionTransformer",
            "timm.models.tnt.TNT",
            "timm.models.visformer.Visformer",
            "transformers.models.sam2.modeling_sam2.Sam2HieraDetModel",
        ),
        parameters=dict.fromkeys(
            (
                "pos_embed",
                "pos_embed1",
                "pos_embed2",
                "pos_embed3",
                "pos_embed_win",
                "pos_embed_window",
                "pixel_pos",
            ),
            Rows(Role.POSITION_EMBEDDING, axis=3, batch_axes=(2,)),
        ),
    ),
    ModuleLayout(
        "affine",
        classes=("timm.models.mlp_mixer.Affine",),
        parameters={"alpha": Role.NORM, "beta": Role.BIAS},
    ),
    ModuleLayout(
        "cohere_norm",  # (heads, head size), over the size
        classes=(
            "transformers.models.cohere.modeling_cohere.CohereLayerNorm",
            "transformers.models.cohere2.modeling_cohere2.Cohere2LayerNorm",
        ),
        parameters={"weight": Role.NORM},
    ),
    ModuleLayout(
        "scale",
        classes=("timm.models.metaformer.Scale", *_in_libraries("*LayerScale")),
        parameters={"scale": Role.NORM},
    ),
    ModuleLayout(
        "mllama_positions",
        classes=("transformers.models.mllama.modeling_mllama.MllamaPrecomputedPositionEmbedding",),
        parameters={"embedding": Role.POSITION_EMBEDDING},
    ),
    ModuleLayout(
        "torch_geometric_steps",  # (steps, inputs, outputs)
        classes=("torch_geometric.nn.conv.gated_graph_conv.GatedGraphConv",),
        parameters={"weight": Rows(LINEAR, axis=2, batch_axes=(0,))},
    ),
    ModuleLayout(
        "torch_geometric_linear",
        classes=("torch_geometric.nn.dense.linear.Linear",),
        parameters={"weight": LINEAR},
    ),
    ModuleLayout(
        "torch_geometric_relational",  # (relations or node types, inputs, outputs)
        classes=(
            "torch_geometric.nn.dense.linear.HeteroLinear",
            "torch_geometric.nn.conv.rgcn_conv.RGCNConv",
        ),
        parameters={"weight": EXPERT_ROWS_LAST, "root": Rows(LINEAR, axis=1)},
    ),
    ModuleLayout(
        "hyper_connection",
        classes=("transformers.models.*HyperConnection", "transformers.models.*HyperHead"),
        parameters={
            "fn": LINEAR,
            "base": Role.BIAS,
            "scale": Role.NORM,
            "hc_fn": LINEAR,
            "hc_base": Role.BIAS,
            "hc_scale": Role.NORM,
        },
    ),
    ModuleLayout(
        "zamba",
        classes=("transformers.models.zamba.modeling_zamba.ZambaMambaMixer",),
        parameters={
            "x_proj_weight": Rows(LINEAR, axis=1, batch_axes=(0,)),
            "dt_proj_weight": Rows(LINEAR, axis=1, batch_axes=(0,)),
            "dt_proj_bias": Role.BIAS,
        },
    ),
    ModuleLayout(
        "codebook_heads",
        classes=("transformers.models.csm.modeling_csm.CsmCodebooksHead",),
        parameters={"weight": Rows(Role.OUTPUT_HEAD, axis=2, batch_axes=(0,))},
    ),
    ModuleLayout(
        "linear_per_codebook",  # (codebooks, outputs, inputs)
        classes=(
            "transformers.models.kyutai_speech_to_text.modeling_kyutai_speech_to_text.KyutaiSpeechToTextFlexibleLinear",
            "transformers.models.moshi.modeling_moshi.MoshiFlexibleLinear",
        ),
        parameters={"weight": Rows(LINEAR, axis=1, batch_axes=(0,))},
    ),
    ModuleLayout(
        "relative_logits",  # (relative size, distances)
        classes=(
            "transformers.models.inkling.modeling_inkling.InklingRelativeLogits",
            "transformers.models.inkling2.modeling_inkling2.Inkling2RelativePositionBias",
            "transformers.models.inkling2_loop.modeling_inkling2_loop.Inkling2LoopRelativePositionBias",
        ),
        parameters={"proj": Rows(LINEAR, axis=1)},
    ),
    ModuleLayout(
        "scaled_clip",  # (heads, head size)
        classes=(
            "transformers.models.inkling2.modeling_inkling2.Inkling2LogScaledL2Clip",
            "transformers.models.inkling2.modeling_inkling2.Inkling2ScaledL2Clip",
            "transformers.models.inkling2_loop.modeling_inkling2_loop.Inkling2LoopLogScaledL2Clip",
            "transformers.models.inkling2_loop.modeling_inkling2_loop.Inkling2LoopScaledL2Clip",
        ),
        parameters={"scale": Role.NORM},
    ),
    ModuleLayout(
        "dynamic_short_convolution",  # (moments, channels)
        classes=(
            "transformers.models.inkling2.modeling_inkling2.Inkling2DynamicShortConvolution",
            "transformers.models.inkling2_loop.modeling_inkling2_loop.Inkling2LoopDynamicShortConvolution",
        ),
        parameters={"static_weight": Role.CONV},
    ),
    ModuleLayout(
        "yolos_positions",
        classes=("transformers.models.yolos.modeling_yolos.InterpolateMidPositionEmbeddings",),
        parameters={"mid_position_embeddings": Rows(Role.POSITION_EMBEDDING, axis=2, batch_axes=(0, 1))},
    ),
    ModuleLayout(
        "projections_from_the_right",
        classes=(
            "transformers.models.gemma3.modeling_gemma3.Gemma3MultiModalProjector",
            "transformers.models.t5gemma2.modeling_t5gemma2.T5Gemma2MultiModalProjector",
            "transformers.models.omdet_turbo.modeling_omdet_turbo.OmDetTurboLanguageBackbone",
            "transformers.models.x_clip.modeling_x_clip.XCLIPModel",
        ),
        parameters={
            "mm_input_projection_weight": Rows(LINEAR, axis=1),
            "text_projection": Rows(LINEAR, axis=1),
            "prompts_visual_projection": Rows(LINEAR, axis=1),
        },
    ),
    ModuleLayout(
        "snake",
        classes=_in_libraries("*Snake1d", "*SnakeBeta", "*DynamicTanh"),
        parameters={
            "alpha": Role.NORM,
            "beta": Role.NORM,
        },
    ),
    ModuleLayout(
        "grn",
        classes=_in_libraries("*GRN", "*GlobalResponseNorm"),
        parameters={
            "weight": Role.NORM,
            "gamma": Role.NORM,
            "beta": Role.BIAS,
            "bias": Role.BIAS,
        },
    ),
    ModuleLayout(
        "prelu",
        classes=("torch.nn.modules.activation.PReLU",),
        parameters={"weight": Role.NORM},
    ),
    ModuleLayout(
        "motion",
        classes=("diffusers.models.transformers.transformer_wan_animate.MotionLinear",),
        parameters={"weight": LINEAR},
    ),
    ModuleLayout("scales", classes=_in_libraries("*"), parameters=dict.fromkeys(SCALES, Role.NORM)),
]
