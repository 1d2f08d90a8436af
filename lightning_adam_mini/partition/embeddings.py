"""Token embeddings, position tables and output heads, as models declare them or as shapes tell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from lightning_adam_mini.partition.layer_types import role_of_all
from lightning_adam_mini.partition.roles import ParameterRole, Role
from lightning_adam_mini.partition.tree import Leaf, Node

__all__ = ["roles_of_embeddings"]


def roles_of_embeddings(nodes: Sequence[Node], leaves: Sequence[Leaf]) -> Iterator[tuple[Leaf, ParameterRole]]:
    """Roles that the type of a layer alone does not tell.

    Layers are compared by their plain names, since a model may declare a wrapper, and parameters are those of the tree,
    since reading a parametrized weight computes it.
    """
    embeddings = [leaf for leaf in leaves if leaf.own_name == "weight" and isinstance(leaf.owner, nn.Embedding)]
    declared_in = _declared(nodes, "get_input_embeddings")
    declared_out = _declared(nodes, "get_output_embeddings")
    tokens = [leaf for leaf in embeddings if leaf.layer in declared_in]
    token_parameters = {id(leaf.parameter) for leaf in tokens or embeddings}
    if tokens:
        for leaf in embeddings:
            if id(leaf.parameter) not in token_parameters:
                why = "an embedding that is not the model's input embedding"
                yield leaf, role_of_all(Role.POSITION_EMBEDDING, leaf.parameter, why)
    token_shapes = {leaf.parameter.shape for leaf in tokens or embeddings}
    for leaf in leaves:
        is_linear = leaf.own_name == "weight" and isinstance(leaf.owner, nn.Linear)
        if not is_linear or id(leaf.parameter) in token_parameters:
            continue
        if leaf.layer in declared_out:
            yield leaf, role_of_all(Role.OUTPUT_HEAD, leaf.parameter, "the model's output embeddings")
        elif not declared_out and leaf.parameter.shape in token_shapes and _is_oblong(leaf):
            yield leaf, role_of_all(Role.OUTPUT_HEAD, leaf.parameter, "a linear layer onto the vocabulary")


def _is_oblong(leaf: Leaf) -> bool:
    """Whether it can be a head: a square matrix, or a single row, rather happens to have the shape of a table."""
    return leaf.parameter.dim() == 2 and leaf.parameter.shape[0] not in (1, leaf.parameter.shape[1])


def _declared(nodes: Sequence[Node], method: str) -> set[str]:
    """Plain names of what modules return from `method`; a model may have none, or decline to answer."""
    plain_names = {id(node.module): node.plain_name for node in nodes}
    found = set()
    for node in nodes:
        declare = getattr(node.module, method, None)
        if callable(declare):
            try:
                answer = declare()
            except (NotImplementedError, AttributeError, TypeError):
                continue
            if id(answer) in plain_names:
                found.add(plain_names[id(answer)])
    return found
