"""Token embeddings, position tables and output heads, as models declare them or as shapes tell."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import nn

from lightning_adam_mini.partition.layer_types import EMBEDDING_TYPES, role_of_all
from lightning_adam_mini.partition.roles import ParameterRole, Role
from lightning_adam_mini.partition.tree import Leaf, Node

__all__ = ["POSITION_WORDS", "roles_of_embeddings"]

POSITION_WORDS = frozenset({"pe", "pos", "posemb", "posembed", "position", "positional", "positions", "wpe"})


def roles_of_embeddings(nodes: Sequence[Node], leaves: Sequence[Leaf]) -> Iterator[tuple[Leaf, ParameterRole]]:
    """Roles that the type of a layer alone does not tell.

    Layers are compared by their plain names, since a model may declare a wrapper, and parameters are those of the tree,
    since reading a parametrized weight computes it.
    """
    embeddings = [leaf for leaf in leaves if leaf.own_name == "weight" and isinstance(leaf.owner, EMBEDDING_TYPES)]
    declared_in = _declared(nodes, "get_input_embeddings")
    declared_out = {name for names in _declared(nodes, "get_output_embeddings").values() for name in names}
    tokens = [leaf for leaf in embeddings if any(leaf.layer in names for names in declared_in.values())]
    token_parameters = {id(leaf.parameter) for leaf in tokens or embeddings}
    # A model speaks of the tables within it.
    scopes = [scope for scope, names in declared_in.items() if any(leaf.layer in names for leaf in tokens)]
    for leaf in embeddings:
        if id(leaf.parameter) not in token_parameters and any(_is_within(leaf, scope) for scope in scopes):
            why = "an embedding that is not the model's input embedding"
            yield leaf, role_of_all(Role.POSITION_EMBEDDING, leaf.parameter, why)
        elif not declared_in and POSITION_WORDS.intersection(
            re.split(r"[^a-z]+", leaf.layer.rpartition(".")[2].lower())
        ):
            yield leaf, role_of_all(Role.POSITION_EMBEDDING, leaf.parameter, "an embedding whose name says positions")
    linear = [leaf for leaf in leaves if leaf.own_name == "weight" and isinstance(leaf.owner, nn.Linear)]
    untied = [leaf for leaf in linear if id(leaf.parameter) not in token_parameters]
    for leaf in untied:
        if leaf.layer in declared_out:
            yield leaf, role_of_all(Role.OUTPUT_HEAD, leaf.parameter, "the model's output embeddings")
    token_shapes = {leaf.parameter.shape for leaf in tokens or embeddings}
    by_shape = [leaf for leaf in untied if leaf.parameter.shape in token_shapes and _is_oblong(leaf)]
    by_shape = [leaf for leaf in by_shape[-1:] if not _feeds_another(leaf, linear, embeddings)]
    if by_shape and not declared_out:  # the last one: others happen to have the shape of some table
        why = "the last linear layer with the shape of a table of tokens"
        yield by_shape[-1], role_of_all(Role.OUTPUT_HEAD, by_shape[-1].parameter, why)


def _is_within(leaf: Leaf, scope: str) -> bool:
    return not scope or leaf.plain_name.startswith(f"{scope}.")


def _is_oblong(leaf: Leaf) -> bool:
    """Whether it can be a head: a square matrix, or a single row, rather happens to have the shape of a table."""
    return leaf.parameter.dim() == 2 and leaf.parameter.shape[0] not in (1, leaf.parameter.shape[1])


def _feeds_another(leaf: Leaf, linear: Sequence[Leaf], embeddings: Sequence[Leaf]) -> bool:
    """Whether a later layer, or one beside it in a module without tables, takes as many inputs as a layer has rows.

    Then it is rather the first half of a feed-forward part than a head.
    """
    parent = leaf.layer.rpartition(".")[0]
    is_of_model = any(other.layer.rpartition(".")[0] == parent for other in embeddings)
    later = linear[linear.index(leaf) + 1 :]
    beside = [] if is_of_model else [other for other in linear if other.layer.rpartition(".")[0] == parent]
    return any(other.parameter.shape[1:] == leaf.parameter.shape[:1] for other in [*later, *beside])


def _declared(nodes: Sequence[Node], method: str) -> dict[str, set[str]]:
    """Plain names of what modules return from `method`, by those of the modules.

    A model may have no such method, or decline to answer in whatever way.
    """
    plain_names = {id(node.module): node.plain_name for node in nodes}
    found: dict[str, set[str]] = {}
    for node in nodes:
        declare = getattr(node.module, method, None)
        if callable(declare):
            try:
                answer = declare()
            except Exception:  # noqa: BLE001 - it is the model's code
                continue
            if id(answer) in plain_names:
                found.setdefault(node.plain_name, set()).add(plain_names[id(answer)])
    return found
