"""Roles by names, for classes without a layout: of projections, and of parameters outside of layers.

The name of a projection is read token by token, never by substrings: `W_q`, `toQ`, `query_dense` and `proj_q` mean
queries, `monkey` and `sequence` do not. It counts only in a module whose structure shows that it attends.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

from lightning_adam_mini.partition.roles import Role

__all__ = [
    "BARE_PARAMETERS",
    "NAMELESS_FUSED",
    "fused_parts",
    "is_bias_name",
    "is_output_name",
    "is_plain",
    "projected_parts",
]

Q, K, V = Role.QUERY, Role.KEY, Role.VALUE

NAMELESS_FUSED = frozenset({"att_proj", "c_attn", "in_proj_qkvz", "qkvo", "qkvo_w", "w_pack"})
"""Lower-case names of fused projections that do not spell their parts, or also contain gates."""

_LETTERS = {"q": Q, "k": K, "v": V}
_WORDS = {
    **dict.fromkeys(("query", "queries", "qry"), Q),
    **dict.fromkeys(("key", "keys"), K),
    **dict.fromkeys(("value", "values", "val", "vals"), V),
}
_FILLERS = frozenset({
    "add", "added", "all", "att", "attention", "attn", "base", "c", "ca", "combined", "context", "conv", "cross",
    "ctx", "dec", "dense", "enc", "fc", "for", "from", "fused", "global", "head", "heads", "image", "img", "in",
    "input", "inputs", "into", "joint", "kernel", "layer", "layers", "lin", "linear", "linears", "local", "map",
    "mapper", "mapping", "mat", "matrix", "mh", "mha", "mhsa", "mixed", "module", "multi", "net", "nn", "of", "orig",
    "out", "output", "outputs", "pack", "packed", "pre", "proj", "projected", "projection", "projections",
    "projector", "projs", "sa", "self", "sep", "text", "the", "to", "token", "tokens", "trans", "transform",
    "transforms", "txt", "w", "weight", "weights", "ws", "wt", "x",
})  # fmt: skip
"""Words without a meaning for the role: kinds of layers, directions, the attention itself."""

_OUTPUT_WORDS = frozenset({
    "back", "c", "collapse", "combine", "concat", "dense", "fc", "final", "head", "heads", "kernel", "layer", "lin",
    "linear", "mat", "matrix", "merge", "o", "out", "output", "outputs", "post", "proj", "projection", "projector",
    "res", "resid", "to", "unify", "unifyheads", "w", "weight", "weights", "wo",
})  # fmt: skip
_TOKEN = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")
_GLUED = re.compile(r"(?:w|to)?([qkv]{1,3})(?:s|w|proj|lin|linear|layer|net|dense|fc|weight)?")
_GLUED_WORDS = re.compile(rf"(?:w|to)?((?:{'|'.join(sorted(_WORDS, key=len, reverse=True))})+)")
_WORD = re.compile("|".join(sorted(_WORDS, key=len, reverse=True)))


@lru_cache(maxsize=4096)
def projected_parts(name: str) -> tuple[Role, ...]:
    """Queries, keys and values in a name, in its order; empty if it means something else."""
    parts, _ = _read(name)
    return parts


def fused_parts(name: str) -> tuple[Role, ...]:
    """The same for names of fused projections; empty for a name of one part."""
    if name.lower() in NAMELESS_FUSED:
        return Q, K, V
    parts = projected_parts(name)
    return parts if len(parts) > 1 else ()


def is_plain(name: str) -> bool:
    """Whether a name says nothing else than its parts; `wq_b` and `q_norm` do, so they may have another role."""
    _, others = _read(name)
    return name.lower() in NAMELESS_FUSED or not others


def is_output_name(name: str) -> bool:
    """Whether a name may mean the projection after the heads."""
    return bool(words := _tokens(name)) and all(word in _OUTPUT_WORDS for word in words) and not projected_parts(name)


def is_bias_name(name: str) -> bool:
    """Whether the name of a parameter means a bias, such as `b_Q`."""
    words = _tokens(name)
    return bool(words) and (words[0] in ("b", "bias") or words[-1] in ("bias", "biases"))


def _tokens(name: str) -> list[str]:
    return [token.lower() for token in _TOKEN.findall(name)]


@lru_cache(maxsize=4096)
def _read(name: str) -> tuple[tuple[Role, ...], tuple[str, ...]]:
    """The parts, and the tokens that are neither parts nor fillers."""
    parts: list[Role] = []
    others: list[str] = []
    for token in _tokens(name):
        found = _parts_of(token)
        parts += found
        if not found and token not in _FILLERS and not token.isdigit():
            others.append(token)
    return (tuple(parts), tuple(others)) if len(set(parts)) == len(parts) else ((), tuple(others))


def _parts_of(token: str) -> list[Role]:
    if token == "tok":  # a token
        return []
    if glued := _GLUED.fullmatch(token):
        letters = glued.group(1)
        return [_LETTERS[letter] for letter in letters] if len(set(letters)) == len(letters) else []
    if words := _GLUED_WORDS.fullmatch(token):
        return [_WORDS[word] for word in _WORD.findall(words.group(1))]
    return []


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
    # learned tokens that are neither words nor patches
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
