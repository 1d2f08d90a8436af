"""Layouts for modules of any class, by the names of their children and own parameters."""

from __future__ import annotations

from lightning_adam_mini.partition.layouts.orders import (
    EXPERT,
    EXPERT_ROWS,
    EXPERT_ROWS_LAST,
    JOINT_ATTENTION,
    LINEAR,
    MLP,
    OUT,
    OUTPUTS,
    K,
    Q,
    V,
)
from lightning_adam_mini.partition.module_layout import ModuleLayout, Rows, Span
from lightning_adam_mini.partition.roles import Role

__all__ = ["LAYOUTS"]


LAYOUTS: list[ModuleLayout] = [
    ModuleLayout(
        "latent_attention",  # DeepSeek-V2 (2024), Sec. 2.1: compressed queries, keys and values
        children=("kv_a_proj_with_mqa", "kv_b_proj"),
        parameters={
            "q_proj.weight": Q,
            "q_a_proj.weight": LINEAR,
            "q_b_proj.weight": Q,
            "kv_a_proj_with_mqa.weight": Rows(Span(LINEAR), Span(K, 1, "rope_dim")),
            "kv_b_proj.weight": Rows(Span(K, 1, "nope_dim"), Span(V, 1, "value_dim"), repeats="heads"),
            "o_proj.weight": OUT,
        },
        sizes={
            "head_dim": ("qk_head_dim", "q_head_dim"),
            "nope_dim": "qk_nope_head_dim",
            "rope_dim": "qk_rope_head_dim",
            "value_dim": "v_head_dim",
        },
    ),
    ModuleLayout(
        "t5",
        children=("q", "k", "v", "o"),
        parameters={
            "q.weight": Q,
            "k.weight": K,
            "v.weight": V,
            "o.weight": OUT,
            "relative_attention_bias.weight": Role.BIAS,
            "global_relative_attention_bias.weight": Role.BIAS,
        },
        sizes={"head_dim": ("key_value_proj_dim", "attention_head_size", "head_dim")},
    ),
    ModuleLayout(
        "diffusers_attention",
        children=("to_q", "to_k", "to_v"),
        parameters=JOINT_ATTENTION,
        sizes={"head_dim": ("head_dim", "dim_head", "attention_head_dim", "inner_dim/heads")},
    ),
    ModuleLayout(
        "query_key_value",
        children=("query", "key", "value"),
        parameters={
            "query.weight": Q,
            "key.weight": K,
            "value.weight": V,
            "query_global.weight": Q,
            "key_global.weight": K,
            "value_global.weight": V,
            "w2e_query.weight": Q,
            "e2w_query.weight": Q,
            "e2e_query.weight": Q,
            **OUTPUTS,
        },
    ),
    ModuleLayout(
        "query_proj_key_proj_value_proj",  # DeBERTa's positions have queries and keys of their own
        children=("query_proj", "key_proj", "value_proj"),
        parameters={
            "query_proj.weight": Q,
            "key_proj.weight": K,
            "value_proj.weight": V,
            "pos_query_proj.weight": Q,
            "pos_key_proj.weight": K,
            **OUTPUTS,
        },
    ),
    *(
        ModuleLayout(
            f"{q}_{k}_{v}",
            children=(q, k, v),
            parameters={f"{q}.weight": Q, f"{k}.weight": K, f"{v}.weight": V, **OUTPUTS},
        )
        for q, k, v in (
            ("q_proj", "k_proj", "v_proj"),
            ("q_lin", "k_lin", "v_lin"),
            ("q_head", "k_head", "v_head"),
            ("q", "k", "v"),
            ("wq", "wk", "wv"),
            ("Wq", "Wk", "Wv"),
            ("linear_q", "linear_k", "linear_v"),
            ("q_linear", "k_linear", "v_linear"),
        )
    ),
    ModuleLayout(
        "torch_geometric_attention",
        children=("lin_query", "lin_key", "lin_value"),
        parameters={
            "lin_query.weight": Q,
            "lin_key.weight": K,
            "lin_value.weight": V,
            "lin_skip.weight": LINEAR,
            "lin_edge.weight": LINEAR,
            "lin_beta.weight": LINEAR,
        },
        sizes={"head_dim": "out_channels"},
    ),
    ModuleLayout(
        "deformable_attention",  # Zhu et al. 2021, "Deformable DETR": where to look, and how much, instead of keys
        children=("sampling_offsets", "attention_weights"),
        parameters={
            "sampling_offsets.weight": LINEAR,
            "attention_weights.weight": LINEAR,
            "value_proj.weight": V,
            **OUTPUTS,
        },
    ),
    ModuleLayout(
        "experts_transposed_flag",
        children=("gate_up_proj", "down_proj"),
        parameters={
            "gate_up_proj": EXPERT_ROWS_LAST,
            "down_proj": EXPERT_ROWS_LAST,
            "gate_up_proj_bias": Role.BIAS,
            "down_proj_bias": Role.BIAS,
        },
        only_if="is_transposed",
    ),
    ModuleLayout(
        "experts",
        children=("experts",),
        parameters={"experts.[0-9]*.weight": EXPERT, "experts.expert_*.weight": EXPERT},
    ),
    *(
        ModuleLayout(name, children=(name,), parameters={f"{name}.weight": role})
        for name, role in (
            ("relative_attention_bias", Role.BIAS),
            ("rel_attn_embed", Role.BIAS),
            ("embed_positions", Role.POSITION_EMBEDDING),
            ("embed_timestep", Role.POSITION_EMBEDDING),
            ("position_embedding", Role.POSITION_EMBEDDING),
            ("position_embeddings", Role.POSITION_EMBEDDING),
            ("query_position_embeddings", Role.POSITION_EMBEDDING),
            ("lm_head", Role.OUTPUT_HEAD),
        )
    ),
    *(
        ModuleLayout(name, children=(name,), parameters={f"{name}.*weight": LINEAR})
        for name in ("continuous_position_bias_mlp", "gru_rel_pos_linear", "relative_pos_embeddings")
    ),
    ModuleLayout(
        "low_rank_gates",
        children=("g_a_proj", "g_b_proj"),
        parameters=dict.fromkeys(
            ("f_a_proj.weight", "f_b_proj.weight", "g_a_proj.weight", "g_b_proj.weight", "b_proj.weight"), LINEAR
        ),
    ),
    ModuleLayout("lm_heads", children=("lm_heads",), parameters={"lm_heads.*.weight": Role.OUTPUT_HEAD}),
    ModuleLayout(
        "gate_up_down",
        children=("gate_up_proj", "down_proj"),
        parameters={
            "gate_up_proj.weight": MLP,
            "down_proj.weight": MLP,
            "gate_up_proj": EXPERT_ROWS,
            "down_proj": EXPERT_ROWS,
        },
    ),
    ModuleLayout(
        "up_down",
        children=("up_proj", "down_proj"),
        parameters={
            "gate_proj.weight": MLP,
            "up_proj.weight": MLP,
            "down_proj.weight": MLP,
            "gate_proj": EXPERT_ROWS,
            "up_proj": EXPERT_ROWS,
            "down_proj": EXPERT_ROWS,
        },
    ),
    ModuleLayout(
        "bert_attention",
        children=("self", "output"),
        parameters={"output.dense.weight": OUT},
    ),
    ModuleLayout(
        "bert_layer",
        children=("intermediate", "output"),
        parameters={
            "intermediate.dense.weight": MLP,
            "output.dense.weight": MLP,
            "intermediate.weight": MLP,
            "output.weight": MLP,
        },
    ),
    ModuleLayout(
        "vit_attention",
        children=("attention", "output"),
        parameters={"output.dense.weight": OUT},
    ),
    ModuleLayout(
        "albert_layer", children=("ffn", "ffn_output"), parameters={"ffn.weight": MLP, "ffn_output.weight": MLP}
    ),
    ModuleLayout(
        "diffusers_auraflow_feed_forward",
        children=("linear_1", "linear_2", "out_projection"),
        parameters={"linear_1.weight": MLP, "linear_2.weight": MLP, "out_projection.weight": MLP},
    ),
    ModuleLayout(
        "diffusers_lumina_feed_forward",
        children=("linear_1", "linear_2", "linear_3"),
        parameters={"linear_1.weight": MLP, "linear_2.weight": MLP, "linear_3.weight": MLP},
    ),
    ModuleLayout("diffusers_parallel_block", children=("proj_mlp", "proj_out"), parameters={"proj_mlp.weight": MLP}),
    *(
        ModuleLayout(f"{first}_{second}", children=(first, second), parameters=dict.fromkeys(weights.split(), MLP))
        for first, second, weights in (
            ("fc1", "fc2", "fc1.weight fc2.weight"),
            ("fc1_g", "fc2", "fc1_g.weight fc1_x.weight fc2.weight"),
            ("ln1", "ln2", "ln1.weight ln2.weight"),
            ("layer_1", "layer_2", "layer_1.weight layer_2.weight"),
            ("input_linear", "output_linear", "input_linear.weight output_linear.weight"),
            ("c_fc", "c_proj", "c_fc.weight c_fc2.weight c_proj.weight"),
            ("fc_in", "fc_out", "fc_in.weight fc_out.weight"),
            ("dense_h_to_4h", "dense_4h_to_h", "dense_h_to_4h.weight dense_4h_to_h.weight"),
            ("w1", "w2", "w1.weight w2.weight w3.weight"),
            ("wi", "wo", "wi.weight wo.weight"),
            ("wi_0", "wo", "wi_0.weight wi_1.weight wo.weight"),
            ("Wi", "Wo", "Wi.weight Wo.weight"),
            ("dense1", "dense2", "dense1.weight dense2.weight"),
            ("linear_up", "linear_down", "linear_up.weight linear_down.weight"),
            ("linear1", "linear2", "linear1.weight linear2.weight"),
            ("intermediate_dense", "output_dense", "intermediate_dense.weight output_dense.weight"),
        )
    ),
    ModuleLayout(
        "indexer",  # of sparse attention: many query heads, one key
        children=("wq_b", "wk", "weights_proj"),
        parameters={
            "wq_b.weight": Q,
            "wk.weight": K,
            "weights_proj.weight": LINEAR,
            "index_kpool_compress_gate": LINEAR,
            "index_kpool_compress_ape": Role.BIAS,
        },
        sizes={"kv_heads": 1},
    ),
    ModuleLayout(
        "to_query_to_key_to_value",
        children=("to_query", "to_key", "to_value"),
        parameters={
            "to_query.weight": Q,
            "to_key.weight": K,
            "to_value.weight": V,
            "out_layer.weight": OUT,
            **OUTPUTS,
        },
    ),
    ModuleLayout(
        "relative_keys",
        children=("relative_k_proj",),
        parameters={"relative_k_proj.weight": K},
    ),
    ModuleLayout(
        "relative_keys_linear_pos",
        children=("linear_q", "linear_pos"),
        parameters={"linear_pos.weight": K},
    ),
    ModuleLayout(
        "shared_keys_and_values",
        children=("q_proj", "o_proj"),
        parameters={
            "q_proj.weight": Q,
            "o_proj.weight": OUT,
        },
    ),
]
