"""What parameters outside of layers do, by their own name, in classes that no layout knows."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lightning_adam_mini.partition.roles import Role

__all__ = ["BARE_PARAMETERS"]

_POSITIONS = (
    "decoder_pos_embed",
    "height_rel",
    "level_embed",
    "memory_temporal_positional_encoding",
    "pos_emb_h",
    "pos_emb_t",
    "pos_emb_w",
    "patch_pos",
    "pos_embed",
    "pos_embed_0",
    "pos_embed_1",
    "pos_embedding",
    "position_embedding",
    "position_embedding_table",
    "position_embeddings",
    "position_enc",
    "positional_embedding",
    "positional_embedding_vlm",
    "rel_pos_h",
    "rel_pos_w",
    "time_embeddings",
    "width_rel",
)
_SMALL = (
    # tokens that stand for no word or patch
    "class_embedding",
    "class_token",
    "cls_token",
    "detection_tokens",
    "dist_token",
    "distillation_token",
    "image_newline",
    "latent",
    "latent_queries",
    "latent_query",
    "latents",
    "mask_token",
    "masked_spec_embed",
    "mem_kv",
    "memory_tokens",
    "no_memory_embedding",
    "no_memory_positional_encoding",
    "no_object_pointer",
    "occlusion_spatial_embedding_parameter",
    "probe",
    "query_tokens",
    "reg_token",
    "register_tokens",
    "storage_tokens",
    # temperatures, and scores of graph attention
    "att",
    "att_dst",
    "att_edge",
    "att_src",
    "logit_bias",
    "logit_scale",
    # modulations that adaptive norms add to those of the time step
    "adaln_scale_shift",
    "modulate_table",
    "modulation",
    "scale_shift_table",
    "to_scale_shift_gate",
    # of state-space layers
    "A_log",
    "D",
)

BARE_PARAMETERS: Mapping[str, Role] = MappingProxyType(
    {
        **dict.fromkeys(_POSITIONS, Role.POSITION_EMBEDDING),
        **dict.fromkeys(_SMALL, Role.OTHER),
        **dict.fromkeys(
            ("bias_u", "bias_v", "dt_bias", "pos_bias_u", "pos_bias_v", "relative_position_bias_table", "sinks"),
            Role.BIAS,
        ),
    }
)
