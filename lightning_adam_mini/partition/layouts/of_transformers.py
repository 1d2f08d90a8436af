"""Layouts for classes of transformers."""

from __future__ import annotations

from lightning_adam_mini.partition.layouts.orders import (
    CONTIGUOUS,
    CONTIGUOUS_KEY_VALUE,
    EXPERT,
    EXPERT_ROWS_LAST,
    LINEAR,
    MLP,
    OUT,
    OUTPUTS,
    PER_GROUP,
    PER_HEAD,
    QUERY_GATE,
    SEPARABLE,
    K,
    Q,
    V,
)
from lightning_adam_mini.partition.module_layout import ModuleLayout, Rows, Span
from lightning_adam_mini.partition.roles import Role

__all__ = ["LAYOUTS"]


def _classes(*names: str) -> tuple[str, ...]:
    """Qualified names from `model.Class`."""
    models = (name.split(".") for name in names)
    return tuple(f"transformers.models.{model}.modeling_{model}.{cls}" for model, cls in models)


LAYOUTS: list[ModuleLayout] = [
    ModuleLayout(
        "gpt2_cross_attention",
        classes=_classes("gpt2.GPT2Attention", "decision_transformer.DecisionTransformerGPT2Attention")
        + _classes("gpt_bigcode.GPTBigCodeAttention", "imagegpt.ImageGPTAttention"),
        parameters={"q_attn.weight": Q, "c_attn.weight": CONTIGUOUS_KEY_VALUE, "c_proj.weight": OUT},
        only_if="is_cross_attention",
        sizes={"kv_heads": "num_heads"},
    ),
    ModuleLayout(
        "gpt2",
        classes=_classes("gpt2.GPT2Attention", "decision_transformer.DecisionTransformerGPT2Attention")
        + _classes("imagegpt.ImageGPTAttention", "openai.Attention"),
        parameters={"c_attn.weight": CONTIGUOUS, "c_proj.weight": OUT},
        sizes={"kv_heads": ("num_heads", "n_head")},
    ),
    ModuleLayout(
        "gpt_bigcode_multi_query",
        classes=_classes("gpt_bigcode.GPTBigCodeAttention"),
        parameters={"c_attn.weight": CONTIGUOUS, "c_proj.weight": OUT},
        only_if="multi_query",
        sizes={"kv_heads": "kv_heads"},
    ),
    ModuleLayout(
        "gpt_bigcode",
        classes=_classes("gpt_bigcode.GPTBigCodeAttention"),
        parameters={"c_attn.weight": PER_HEAD, "c_proj.weight": OUT},
    ),
    ModuleLayout(
        "falcon_new_decoder",
        classes=_classes("falcon.FalconAttention"),
        parameters={"query_key_value.weight": PER_GROUP, "dense.weight": OUT},
        only_if="new_decoder_architecture",
    ),
    ModuleLayout(
        "falcon_multi_query",
        classes=_classes("falcon.FalconAttention"),
        parameters={"query_key_value.weight": CONTIGUOUS, "dense.weight": OUT},
        only_if="multi_query",
    ),
    ModuleLayout(
        "per_head",
        classes=_classes(
            "bloom.BloomAttention",
            "falcon.FalconAttention",
            "gpt_neox.GPTNeoXAttention",
            "gpt_neox_japanese.GPTNeoXJapaneseAttention",
            "minimax.MiniMaxLightningAttention",
            "persimmon.PersimmonAttention",
        ),
        parameters={"query_key_value.weight": PER_HEAD, "qkv_proj.weight": PER_HEAD, **OUTPUTS},
    ),
    ModuleLayout(
        "deberta",
        classes=_classes("deberta.DisentangledSelfAttention"),
        parameters={"in_proj.weight": PER_HEAD, "pos_proj.weight": K, "pos_q_proj.weight": Q},
    ),
    ModuleLayout(
        "codegen",  # four chunks, from its origin on four model-parallel devices; values before keys
        classes=_classes("codegen.CodeGenAttention"),
        parameters={
            "qkv_proj.weight": Rows(Q, V, K, repeats=4),
            "out_proj.weight": OUT,
        },
    ),
    ModuleLayout(
        "contiguous",
        classes=_classes(
            "bark.BarkSelfAttention",
            "blip.BlipAttention",
            "blip_2.Blip2Attention",
            "cohere_compass.CohereCompassVisionAttention",
            "dbrx.DbrxAttention",
            "deepseek_ocr2.DeepseekOcr2SamVisionAttention",
            "dots3_note.Dots3NoteVisionAttention",
            "ernie4_5_vl_moe.Ernie4_5_VLMoeVisionAttention",
            "exaone4_5.Exaone4_5_VisionAttention",
            "florence2.Florence2VisionWindowAttention",
            "glm4v.Glm4vVisionAttention",
            "glm4v_moe.Glm4vMoeVisionAttention",
            "glm5_next.Glm5NextVisionAttention",
            "glm_image.GlmImageVisionAttention",
            "glm_ocr.GlmOcrVisionAttention",
            "got_ocr2.GotOcr2VisionAttention",
            "hiera.HieraMaskUnitAttention",
            "instructblip.InstructBlipAttention",
            "instructblipvideo.InstructBlipVideoAttention",
            "layoutlmv2.LayoutLMv2SelfAttention",
            "mgp_str.MgpstrAttention",
            "modernbert.ModernBertAttention",
            "mpt.MptAttention",
            "phi3.Phi3Attention",
            "phi4_multimodal.Phi4MultimodalAttention",
            "pp_formulanet.PPFormulaNetVisionAttention",
            "pp_ocrv5_mobile_rec.PPOCRV5MobileRecAttention",
            "pp_ocrv5_server_rec.PPOCRV5ServerRecAttention",
            "pp_ocrv6_small_rec.PPOCRV6SmallRecAttention",
            "qwen2_5_vl.Qwen2_5_VLVisionAttention",
            "qwen2_vl.VisionAttention",
            "qwen3_5.Qwen3_5VisionAttention",
            "qwen3_5_moe.Qwen3_5MoeVisionAttention",
            "qwen3_omni_moe.Qwen3OmniMoeVisionAttention",
            "qwen3_vl.Qwen3VLVisionAttention",
            "qwen3_vl_moe.Qwen3VLMoeVisionAttention",
            "sam.SamVisionAttention",
            "sam2.Sam2MultiScaleAttention",
            "sam_hq.SamHQVisionAttention",
            "seggpt.SegGptAttention",
            "slanext.SLANeXtVisionAttention",
            "timesformer.TimesformerSelfAttention",
            "unlimited_ocr.UnlimitedOcrSamVisionAttention",
            "vitdet.VitDetAttention",
        ),
        parameters={
            "qkv.weight": CONTIGUOUS,
            "qkv_proj.weight": CONTIGUOUS,
            "query_key_value.weight": CONTIGUOUS,
            "Wqkv.weight": CONTIGUOUS,
            "att_proj.weight": CONTIGUOUS,
            "qkv_linear.weight": CONTIGUOUS,
            **OUTPUTS,
        },
    ),
    ModuleLayout(
        "cross_covariance",  # attention between channels of a group: a head is a group of channels
        classes=_classes("florence2.Florence2VisionChannelAttention"),
        parameters={"qkv.weight": CONTIGUOUS, **OUTPUTS},
        sizes={"heads": "groups", "kv_heads": "groups"},
    ),
    ModuleLayout(
        "levit",  # query, key and a wider value for each head
        classes=_classes("levit.LevitAttention", "levit.LevitAttentionSubsample"),
        parameters={
            "queries_keys_values.weight": Rows(Span(Q, 1), Span(K, 1), V, repeats="heads"),
            "queries.weight": Q,
            "keys_values.weight": Rows(Span(K, 1), V, repeats="heads"),
            "projection.weight": OUT,
        },
        sizes={"head_dim": "key_dim"},
    ),
    ModuleLayout(
        "query_then_key_value",
        classes=_classes(
            "evolla.EvollaSequenceCompressorAttention",
            "granite_speech.GraniteSpeechConformerAttention",
            "granite_speech_plus.GraniteSpeechPlusConformerAttention",
        ),
        parameters={"to_q.weight": Q, "to_kv.weight": CONTIGUOUS_KEY_VALUE, **OUTPUTS},
    ),
    ModuleLayout(
        "gated_query",
        classes=_classes(
            "qwen3_next.Qwen3NextAttention",
            "qwen3_5.Qwen3_5Attention",
            "qwen3_5_moe.Qwen3_5MoeAttention",
            "qwen4_exp.Qwen4ExpTextAttention",
        ),
        parameters={"q_proj.weight": QUERY_GATE, "k_proj.weight": K, "v_proj.weight": V, "o_proj.weight": OUT},
    ),
    ModuleLayout(
        "gated_delta_net",  # for each key head its query, its key, and the values and gates of its value heads
        classes=_classes("qwen3_next.Qwen3NextGatedDeltaNet"),
        parameters={
            "in_proj_qkvz.weight": Rows(Span(Q, 1, "key_size"), Span(K, 1, "key_size"), V, LINEAR, repeats="key_heads"),
            "out_proj.weight": OUT,
        },
        sizes={"key_heads": "num_k_heads", "key_size": "head_k_dim"},
    ),
    ModuleLayout(
        "gated_delta_net_contiguous",
        classes=("transformers.models.*GatedDeltaNet",),
        children=("in_proj_qkv",),
        parameters={
            "in_proj_qkv.weight": Rows(
                Span(Q, "key_heads", "key_size"),
                Span(K, "key_heads", "key_size"),
                Span(V, "value_heads", "value_size"),
            ),
            "out_proj.weight": OUT,
        },
        sizes={
            "key_heads": "num_k_heads",
            "value_heads": "num_v_heads",
            "key_size": "head_k_dim",
            "value_size": "head_v_dim",
        },
    ),
    ModuleLayout(
        "jetmoe",  # each expert has queries and outputs of its own, all share keys and values
        classes=_classes("jetmoe.JetMoeAttention"),
        parameters={
            "experts.input_linear.weight": Rows(Q, axis=1, batch_axes=(0,)),
            "experts.output_linear.weight": Rows(OUT, axis=1, batch_axes=(0,)),
            "kv_proj.weight": CONTIGUOUS_KEY_VALUE,
        },
        sizes={"heads": ()},
    ),
    ModuleLayout(
        "led",
        classes=_classes("led.LEDEncoderAttention"),
        parameters={"output.weight": OUT},
    ),
    ModuleLayout(
        "xlnet",  # (width, heads, head size): relative positions have keys of their own
        classes=_classes("xlnet.XLNetRelativeAttention"),
        parameters={
            "q": Rows(Span(Q, size=1), axis=1),
            "k": Rows(Span(K, size=1), axis=1),
            "r": Rows(Span(K, size=1), axis=1),
            "v": Rows(V, axis=2, batch_axes=(1,)),
            "o": OUT,
            "r_w_bias": Role.BIAS,
            "r_r_bias": Role.BIAS,
            "r_s_bias": Role.BIAS,
        },
        sizes={"heads": (), "kv_heads": ()},
    ),
    ModuleLayout(
        "experts_transposed",  # (experts, inputs, outputs)
        classes=_classes("llama4.Llama4TextExperts"),
        parameters={"gate_up_proj": EXPERT_ROWS_LAST, "down_proj": EXPERT_ROWS_LAST},
    ),
    ModuleLayout(
        "dbrx_experts",  # (experts x hidden units, width): outputs of w1 and v1, inputs of w2
        classes=_classes("dbrx.DbrxExpertGLU"),
        parameters={"w1": EXPERT, "v1": EXPERT, "w2": EXPERT},
    ),
    ModuleLayout(
        "layoutlmv3",
        classes=_classes("layoutlmv3.LayoutLMv3Encoder"),
        parameters={f"{name}.weight": Role.BIAS for name in ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias")},
    ),
    ModuleLayout(
        "luke",
        classes=_classes("luke.LukeEntityEmbeddings"),
        parameters={"entity_embeddings.weight": Role.TOKEN_EMBEDDING},
    ),
    ModuleLayout(
        "perceiver",
        classes=_classes("perceiver.PerceiverTextPreprocessor"),
        parameters={"position_embeddings.weight": Role.POSITION_EMBEDDING},
    ),
    ModuleLayout(
        "funnel",  # (width, heads, head size): relative positions have keys of their own
        classes=_classes("funnel.FunnelRelMultiheadAttention"),
        parameters={
            "q_head.weight": Q,
            "k_head.weight": K,
            "v_head.weight": V,
            "r_kernel": Rows(Span(K, "heads", 1), axis=1),
            "post_proj.weight": OUT,
            "r_*_bias": Role.BIAS,
            "seg_embed": Role.BIAS,
        },
    ),
    ModuleLayout(
        "convbert",  # a kernel for each head and token, which weighs values of its own
        classes=_classes("convbert.ConvBertSelfAttention"),
        parameters={
            "query.weight": Q,
            "key.weight": K,
            "value.weight": V,
            "key_conv_attn_layer.pointwise.weight": LINEAR,
            "conv_kernel_layer.weight": LINEAR,
            "conv_out_layer.weight": LINEAR,
        },
    ),
    ModuleLayout(
        "funnel_feed_forward",
        classes=_classes("funnel.FunnelPositionwiseFFN"),
        parameters={"linear_1.weight": MLP, "linear_2.weight": MLP},
    ),
    ModuleLayout("ctrl_layer", classes=_classes("ctrl.EncoderLayer"), parameters={"ffn.*": MLP}),
    ModuleLayout(
        "rwkv_feed_forward",
        classes=_classes("rwkv.RwkvFeedForward"),
        parameters={"key.weight": MLP, "receptance.weight": MLP, "value.weight": MLP},
    ),
    ModuleLayout(
        "bark_feed_forward",
        classes=_classes("bark.BarkMLP"),
        parameters={"in_proj.weight": MLP, "out_proj.weight": MLP},
    ),
    ModuleLayout("patchtst_layer", classes=_classes("patchtst.PatchTSTEncoderLayer"), parameters={"ff.*": MLP}),
    ModuleLayout(
        "lin1_lin2",
        classes=_classes(
            "distilbert.FFN",
            "flaubert.TransformerFFN",
            "sam.SamMLPBlock",
            "sam_hq.SamHQMLPBlock",
            "xlm.TransformerFFN",
        ),
        parameters={"lin1.weight": MLP, "lin2.weight": MLP},
    ),
    ModuleLayout(
        "deepseek_v4",  # one projection is read as key and as value: its rows are those of the value
        classes=_classes("deepseek_v4.DeepseekV4Attention"),
        parameters={
            "q_a_proj.weight": LINEAR,
            "q_b_proj.weight": Q,
            "kv_proj.weight": V,
            "o_a_proj.weight": OUT,
            "o_b_proj.weight": OUT,
        },
    ),
    ModuleLayout(
        "deepseek_v4_compressor",
        classes=_classes("deepseek_v4.DeepseekV4CSACompressor", "deepseek_v4.DeepseekV4HCACompressor"),
        parameters={
            "kv_proj.weight": V,
            "gate_proj.weight": LINEAR,
            "position_bias": Role.BIAS,
        },
        attends=True,
    ),
    ModuleLayout(
        "deepseek_v4_indexer",
        classes=_classes("deepseek_v4.DeepseekV4Indexer"),
        parameters={
            "q_b_proj.weight": Q,
            "kv_proj.weight": K,
            "gate_proj.weight": LINEAR,
            "position_bias": Role.BIAS,
        },
    ),
    ModuleLayout(
        "groupvit_assign",
        classes=_classes("groupvit.GroupViTAssignAttention"),
        parameters={
            "q_proj.weight": Q,
            "k_proj.weight": K,
            "v_proj.weight": V,
            **OUTPUTS,
        },
        sizes={"heads": 1, "kv_heads": 1},
    ),
    ModuleLayout(
        "olmo_hybrid",
        classes=_classes("olmo_hybrid.OlmoHybridGatedDeltaNet"),
        parameters={
            "q_proj.weight": Q,
            "k_proj.weight": K,
            "v_proj.weight": Rows(Span(V, "value_heads", "value_size")),
            **OUTPUTS,
        },
        sizes={
            "heads": "num_k_heads",
            "kv_heads": "num_k_heads",
            "head_dim": "head_k_dim",
            "value_heads": "num_v_heads",
            "value_size": "head_v_dim",
        },
    ),
    ModuleLayout(
        "qwen4_exp_vision",
        classes=_classes("qwen4_exp.Qwen4ExpVisionAttention"),
        parameters={
            "qkv.weight": CONTIGUOUS,
            **OUTPUTS,
        },
    ),
    ModuleLayout(
        "xlstm",
        classes=_classes("xlstm.xLSTMLayer"),
        parameters={
            "q.weight": Q,
            "k.weight": K,
            "v.weight": V,
            "qkv_opreact.weight": Rows(
                Span(Q, "heads", "qk_size"),
                Span(K, "heads", "qk_size"),
                Span(V, "heads", "v_size"),
                Span(LINEAR, "heads", "v_size"),
            ),
            **OUTPUTS,
        },
        sizes={
            "heads": "config.num_heads",
            "kv_heads": "config.num_heads",
            "qk_size": "qk_dim/config.num_heads",
            "v_size": "v_dim/config.num_heads",
        },
    ),
    ModuleLayout(
        "reformer_shared_query_key",  # each row is query and key at once
        classes=_classes("reformer.LSHSelfAttention"),
        parameters={
            "query_key.weight": Q,
            "value.weight": V,
        },
    ),
    ModuleLayout(
        "cpmant",
        classes=_classes("cpmant.CpmAntAttention"),
        parameters={
            "project_q.weight": Q,
            "project_k.weight": K,
            "project_v.weight": V,
            "attention_out.weight": OUT,
        },
        sizes={"head_dim": "dim_head"},
    ),
    ModuleLayout(
        "cvt",
        classes=_classes("cvt.CvtSelfAttention"),
        parameters={
            "projection_query.weight": Q,
            "projection_key.weight": K,
            "projection_value.weight": V,
        },
    ),
    ModuleLayout(
        "gemma3n_audio_positions",
        classes=_classes("gemma3n.Gemma3nAudioRelativePositionEmbedding"),
        parameters={"pos_proj.weight": K},
        attends=False,
    ),
    ModuleLayout(
        "zaya",
        classes=_classes("zaya.ZayaCCAProjection"),
        parameters={
            "q_proj.weight": Q,
            "k_proj.weight": K,
            "v_proj_current.weight": V,
            "v_proj_delayed.weight": V,
        },
    ),
    ModuleLayout(
        "conditional_detr",
        classes=_classes(
            "conditional_detr.ConditionalDetrDecoderSelfAttention",
            "conditional_detr.ConditionalDetrDecoderCrossAttention",
        ),
        parameters={
            "q_content_proj.weight": Q,
            "q_pos_proj.weight": Q,
            "q_pos_sine_proj.weight": Q,
            "k_content_proj.weight": K,
            "k_pos_proj.weight": K,
            "v_proj.weight": V,
            "o_proj.weight": OUT,
        },
        sizes={"heads": (), "kv_heads": ()},
    ),
    ModuleLayout(
        "dab_detr_self",
        classes=_classes("dab_detr.DabDetrDecoderLayerSelfAttention"),
        parameters={
            "self_attn_query_content_proj.weight": Q,
            "self_attn_query_pos_proj.weight": Q,
            "self_attn_key_content_proj.weight": K,
            "self_attn_key_pos_proj.weight": K,
            "self_attn_value_proj.weight": V,
            "self_attn.output_proj.weight": OUT,
        },
        sizes={"heads": "self_attn.attention_heads", "kv_heads": "self_attn.attention_heads"},
    ),
    ModuleLayout(
        "dab_detr_cross",
        classes=_classes("dab_detr.DabDetrDecoderLayerCrossAttention"),
        parameters={
            "cross_attn_query_content_proj.weight": Q,
            "cross_attn_query_pos_proj.weight": Q,
            "cross_attn_query_pos_sine_proj.weight": Q,
            "cross_attn_key_content_proj.weight": K,
            "cross_attn_key_pos_proj.weight": K,
            "cross_attn_value_proj.weight": V,
            "cross_attn.output_proj.weight": OUT,
        },
        sizes={"heads": "decoder_attention_heads", "kv_heads": "decoder_attention_heads"},
    ),
    ModuleLayout(
        "lilt",  # the flow of the page's layout has smaller heads
        classes=_classes("lilt.LiltSelfAttention"),
        parameters={
            "query.weight": Q,
            "key.weight": K,
            "value.weight": V,
            "layout_query.weight": Rows(Span(Q, "heads", "layout_size")),
            "layout_key.weight": Rows(Span(K, "heads", "layout_size")),
            "layout_value.weight": V,
        },
        sizes={"layout_size": "attention_head_size/channel_shrink_ratio"},
    ),
    ModuleLayout(
        "aimv2_pooling",
        classes=_classes("aimv2.Aimv2AttentionPoolingHead"),
        parameters={
            "k_proj.weight": K,
            "v_proj.weight": V,
            "output_proj.weight": OUT,
        },
        attends=True,
    ),
    ModuleLayout(
        "grounding_dino_fusion",
        classes=_classes(
            "grounding_dino.GroundingDinoBiMultiHeadAttention", "mm_grounding_dino.MMGroundingDinoBiMultiHeadAttention"
        ),
        parameters={
            "vision_proj.weight": Q,
            "text_proj.weight": K,
            "values_vision_proj.weight": V,
            "values_text_proj.weight": V,
            "out_vision_proj.weight": OUT,
            "out_text_proj.weight": OUT,
        },
    ),
    ModuleLayout(
        "axk2",  # query and output gate of each head
        classes=_classes("axk2.AXK2Attention"),
        parameters={
            "q_a_proj.weight": LINEAR,
            "q_gate_proj.weight": Rows(Span(Q, 1), Span(LINEAR, 1, "value_dim"), repeats="heads"),
        },
        sizes={"head_dim": "qk_head_dim", "value_dim": "v_head_dim"},
    ),
    ModuleLayout(
        "pp_doclayout_pointer",
        classes=_classes("pp_doclayout_v4.PPDocLayoutV4GlobalPointer"),
        parameters={
            "q_proj.weight": Q,
            "k_proj.weight": K,
        },
        sizes={"heads": 1, "kv_heads": 1},
    ),
    ModuleLayout(
        "ibert_embeddings",
        classes=_classes("ibert.IBertEmbeddings"),
        parameters={
            "word_embeddings.weight": Role.TOKEN_EMBEDDING,
            "token_type_embeddings.weight": Role.POSITION_EMBEDDING,
            "position_embeddings.weight": Role.POSITION_EMBEDDING,
        },
    ),
    ModuleLayout(
        "qwen4_exp_indexer",
        classes=_classes("qwen4_exp.Qwen4ExpTextQSAIndexer"),
        parameters={"index_qk_proj.weight": Rows(Span(Q, "heads"), Span(K, "kv_heads"))},
        sizes={"heads": "index_n_heads", "kv_heads": "index_kv_heads", "head_dim": "index_head_dim"},
    ),
    ModuleLayout(
        "qwen4_exp_n_grams",  # keys meet the stream itself, and become a gate of each value
        classes=_classes("qwen4_exp.Qwen4ExpTextPLELayer"),
        parameters={"key_proj.weight": LINEAR, "value_proj.weight": LINEAR},
        attends=False,
    ),
    ModuleLayout(
        "inkling",  # r_proj mixes profiles of relative positions for each head
        classes=_classes("inkling.InklingAttention"),
        parameters={"r_proj.weight": LINEAR},
        attends=True,
    ),
    ModuleLayout(
        "inkling2",
        classes=_classes("inkling2.Inkling2SlidingAttention", "inkling2.Inkling2FullAttention")
        + _classes("inkling2_loop.Inkling2LoopSlidingAttention", "inkling2_loop.Inkling2LoopFullAttention"),
        parameters={
            "o_proj.gate_proj.weight": LINEAR,
            "sink_proj.weight": LINEAR,
            "relative_position_bias.linear.weight": LINEAR,
        },
        attends=True,
    ),
    ModuleLayout(
        "evolla_aligner",
        classes=_classes("evolla.EvollaSequenceAlignerCrossAttention"),
        parameters={
            "query.weight": Q,
            **{
                f"{name}_{source}.weight": role
                for source in ("protein", "structure", "msa")
                for name, role in (("key", K), ("value", V))
            },
            "out_proj.weight": OUT,
        },
        sizes={"kv_heads": "num_attention_heads"},
    ),
    ModuleLayout(
        "moshi",
        classes=_classes("moshi.MoshiAttention"),
        parameters={"q_proj.weight": Q, "k_proj.weight": K, "v_proj.weight": V, "o_proj.weight": OUT},
        only_if="q_proj.linear.in_features",
    ),
    ModuleLayout(
        "moshi_per_codebook",  # (codebooks, outputs, inputs): a layer for each codebook
        classes=_classes("moshi.MoshiAttention"),
        parameters={
            f"{name}_proj.weight": Rows(role, axis=1, batch_axes=(0,))
            for name, role in (("q", Q), ("k", K), ("v", V), ("o", OUT))
        },
    ),
    ModuleLayout(
        "moshi_feed_forward",
        classes=_classes("moshi.MoshiGatingMLP"),
        parameters={"fc1.weight": MLP, "fc2.weight": MLP},
        only_if="fc1.in_features",
    ),
    ModuleLayout(
        "moshi_feed_forward_per_codebook",
        classes=_classes("moshi.MoshiGatingMLP"),
        parameters={f"{name}.weight": Rows(MLP, axis=1, batch_axes=(0,)) for name in ("fc1", "fc2")},
    ),
    ModuleLayout(
        "moshi_heads_per_codebook",
        classes=_classes("moshi.MoshiDepthDecoder"),
        parameters={"lm_heads.weight": Rows(Role.OUTPUT_HEAD, axis=1, batch_axes=(0,))},
    ),
    ModuleLayout(
        "squeezebert",  # convolutions of size 1, grouped: each head lies within one group
        classes=_classes("squeezebert.SqueezeBertSelfAttention"),
        parameters={"query.weight": Q, "key.weight": K, "value.weight": V},
    ),
    ModuleLayout(
        "squeezebert_module",
        classes=_classes("squeezebert.SqueezeBertModule"),
        parameters={
            "post_attention.conv1d.weight": OUT,
            "intermediate.conv1d.weight": MLP,
            "output.conv1d.weight": MLP,
        },
    ),
    ModuleLayout(
        "convolutional_attention",  # over pixels or moments, with convolutions of size 1 and a single head
        classes=_classes(
            "apertus1p5.Apertus1p5VisionTokenizerAttnBlock",
            "chameleon.ChameleonVQVAEEncoderAttnBlock",
            "janus.JanusVQVAEAttnBlock",
            "wavtokenizer.WavTokenizerVocosAttention",
        ),
        parameters={"q.weight": Q, "k.weight": K, "v.weight": V, "proj_out.weight": OUT},
        sizes={"heads": 1, "kv_heads": 1},
        attends=False,
    ),
    ModuleLayout(
        "reformer_positions",
        classes=_classes("reformer.AxialPositionEmbeddings"),
        parameters={
            "weights.0": Rows(Role.POSITION_EMBEDDING, axis=0),
            "weights.1": Rows(Role.POSITION_EMBEDDING, axis=1),
        },
    ),
    ModuleLayout(
        "mobilevitv2",
        classes=_classes("mobilevitv2.MobileViTV2LinearSelfAttention"),
        parameters={"qkv_proj.convolution.weight": SEPARABLE, "out_proj.convolution.weight": OUT},
        sizes={"embed_dim": "embed_dim"},
    ),
]
