"""What parameters outside of layers do, by their own name, in classes that no layout knows."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lightning_adam_mini.partition.roles import Role

__all__ = ["BARE_PARAMETERS"]

_POSITIONS = (
    "decoder_pos_embed",
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
    "rel_pos_h",
    "rel_pos_w",
    "time_embeddings",
)
_SCALES = (
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
)
_SMALL = (
    # tokens that stand for no word or patch
    "class_embedding",
    "class_token",
    "cls_token",
    "dist_token",
    "distillation_token",
    "latent",
    "mask_token",
    "masked_spec_embed",
    "mem_kv",
    "probe",
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
    # of state-space layers
    "A_log",
    "D",
)

BARE_PARAMETERS: Mapping[str, Role] = MappingProxyType(
    {
        **dict.fromkeys(_POSITIONS, Role.POSITION_EMBEDDING),
        **dict.fromkeys(_SCALES, Role.NORM),
        **dict.fromkeys(_SMALL, Role.OTHER),
        **dict.fromkeys(("dt_bias", "relative_position_bias_table", "sinks"), Role.BIAS),
    }
)
