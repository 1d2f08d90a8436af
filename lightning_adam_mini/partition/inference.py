"""Roles from the module tree: every parameter of a model gets a `ParameterRole`.

The order of precedence: the layout of an enclosing module, the model's own statement of its embeddings and output head,
the type of the module that owns the parameter. What none of them knows is `Role.OTHER`.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_adam_mini.partition.layouts import (
    FUSED_NAMES,
    QUERY_KEY_VALUE_NAMES,
    ModuleLayout,
    find_layout,
    qualified_name,
)
from lightning_adam_mini.partition.roles import ParameterRole, Part, Role

__all__ = ["has_tokens", "infer_roles"]

NORM_TYPES = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, _NormBase)
TRANSPOSED_LINEAR = "transformers.pytorch_utils.Conv1D"


def infer_roles(module: nn.Module) -> dict[str, ParameterRole]:
    """The role of each parameter.

    Args:
        module: A model, or any module tree around one.

    Returns:
        Roles by name, as in `module.named_parameters()`. A parameter that is used twice has one entry, under its
        first name and with the more specific of its roles.

    Note:
        Heads that cannot be told are no error here, since not every cut needs them: `ParameterRole.problem` says why.
    """
    by_parameter: dict[int, ParameterRole] = {}
    for name, owner, leaf, parameter in _owned_parameters(module):
        role = _from_type(name, owner, leaf, parameter)
        _keep_more_specific(by_parameter, parameter, role)
    for weight, role in _declared_embeddings(module):
        by_parameter[id(weight)] = role
    for prefix, child in module.named_modules():
        layout = find_layout(child)
        if layout is not None:
            _apply_layout(layout, prefix, child, by_parameter)
    _mark_unknown_fused(module, by_parameter)
    return {name: by_parameter[id(parameter)] for name, parameter in module.named_parameters()}


def has_tokens(module: nn.Module) -> bool:
    """Whether any part of `module` looks tokens up or attends over them, be it in a class that no layout knows."""
    for child in module.modules():
        if isinstance(child, nn.Embedding):
            return True
        layout = find_layout(child)
        if layout is not None and layout.is_attention:
            return True
        names = {name for name, _ in child.named_children()}
        if names & FUSED_NAMES or any(names.issuperset(triple) for triple in QUERY_KEY_VALUE_NAMES):
            return True
    return False


def _owned_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Full name, owning module, own name and parameter, for each place where a parameter is used."""
    for prefix, owner in module.named_modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            yield f"{prefix}.{leaf}" if prefix else leaf, owner, leaf, parameter


def _one(role: Role, parameter: Tensor, why: str, axis: int | None = 0) -> ParameterRole:
    rows = parameter.shape[axis] if axis is not None and parameter.dim() > axis else 1
    return ParameterRole((Part(role, rows),), why, axis if parameter.dim() else None)


def _from_type(name: str, owner: nn.Module, leaf: str, parameter: nn.Parameter) -> ParameterRole:
    """The role that the type of the owning module tells."""
    kind = type(owner).__name__
    is_norm = isinstance(owner, NORM_TYPES)
    if (parameter.dim() <= 1 or is_norm) and (leaf == "bias" or leaf.endswith("_bias")):
        return _one(Role.BIAS, parameter, f"bias of {kind}")
    if is_norm or (parameter.dim() <= 1 and kind.endswith("Norm")):
        return _one(Role.NORM, parameter, f"scale of {kind}")
    if isinstance(owner, nn.Embedding):
        return _one(Role.TOKEN_EMBEDDING, parameter, "nn.Embedding")
    if isinstance(owner, _ConvNd) and leaf == "weight":
        return _one(Role.CONV, parameter, kind, axis=1 if isinstance(owner, _ConvTransposeNd) else 0)
    if isinstance(owner, nn.Linear) and leaf == "weight":
        return _one(Role.LINEAR, parameter, "nn.Linear")
    if leaf == "weight" and any(qualified_name(base) == TRANSPOSED_LINEAR for base in type(owner).__mro__):
        return _one(Role.LINEAR, parameter, "Conv1D: a linear layer with a transposed weight", axis=1)
    return _one(Role.OTHER, parameter, f"no rule for {leaf!r} of {kind}", axis=0 if parameter.dim() else None)


_SPECIFICITY = {Role.OTHER: 0, Role.LINEAR: 1, Role.POSITION_EMBEDDING: 2, Role.OUTPUT_HEAD: 2, Role.TOKEN_EMBEDDING: 3}


def _keep_more_specific(roles: dict[int, ParameterRole], parameter: nn.Parameter, role: ParameterRole) -> None:
    known = roles.get(id(parameter))
    if known is None or _SPECIFICITY.get(role.roles[0], 2) > _SPECIFICITY.get(known.roles[0], 2):
        roles[id(parameter)] = role


def _declared_embeddings(module: nn.Module) -> Iterator[tuple[Tensor, ParameterRole]]:
    """Token embeddings, position tables and output heads, as models declare them or as shapes tell."""
    embeddings = [child for child in module.modules() if isinstance(child, nn.Embedding)]
    declared_in, declared_out = _declared(module, "get_input_embeddings"), _declared(module, "get_output_embeddings")
    tokens = [e for e in embeddings if any(e is other for other in declared_in)]
    if tokens:
        for embedding in embeddings:
            if not any(embedding.weight is token.weight for token in tokens):
                why = "an embedding that is not the model's input embedding"
                yield embedding.weight, _one(Role.POSITION_EMBEDDING, embedding.weight, why)
    token_weights = {id(token.weight) for token in tokens or embeddings}
    for child in module.modules():
        if not isinstance(child, nn.Linear) or id(child.weight) in token_weights:
            continue
        declared = any(child is other for other in declared_out)
        by_shape = not declared_out and any(child.weight.shape == token.weight.shape for token in tokens or embeddings)
        if declared or by_shape:
            why = "the model's output embeddings" if declared else "a linear layer onto the vocabulary"
            yield child.weight, _one(Role.OUTPUT_HEAD, child.weight, why)


def _declared(module: nn.Module, method: str) -> list[nn.Module]:
    """What the models in `module` return from `method`; a model may have none, or decline to answer."""
    found = []
    for child in module.modules():
        declare = getattr(child, method, None)
        if callable(declare):
            try:
                answer = declare()
            except (NotImplementedError, AttributeError, TypeError):
                continue
            if isinstance(answer, nn.Module):
                found.append(answer)
    return found


def _apply_layout(layout: ModuleLayout, prefix: str, module: nn.Module, roles: dict[int, ParameterRole]) -> None:
    """Give the parameters of `module` the roles its layout names."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for relative, part_roles in layout.parameters.items():
        parameter = parameters.get(relative)
        if parameter is None:
            continue
        axis = roles[id(parameter)].axis or 0
        rows = parameter.shape[axis]
        why = f"{relative} of {type(module).__name__}"
        if len(part_roles) == 1 and part_roles[0] not in (Role.QUERY, Role.KEY):
            roles[id(parameter)] = ParameterRole((Part(part_roles[0], rows),), why, axis)
            continue
        try:
            parts, problem = _head_parts(layout, module, part_roles, rows), ""
        except _UnknownHeadsError as error:
            role = part_roles[0] if len(part_roles) == 1 else Role.FUSED_QKV
            parts, problem = (Part(role, rows),), str(error)
        roles[id(parameter)] = ParameterRole(parts, why, axis, problem=problem)


class _UnknownHeadsError(Exception):
    """The heads of a projection cannot be told."""


def _head_parts(layout: ModuleLayout, module: nn.Module, part_roles: tuple[Role, ...], rows: int) -> tuple[Part, ...]:
    """Parts whose rows come in heads, checked against the rows that are there."""
    heads = _first_attribute(module, layout.num_heads)
    key_heads = _first_attribute(module, layout.num_key_value_heads) or heads
    head_dim = _first_attribute(module, layout.head_dim)
    if head_dim is None and part_roles == (Role.QUERY,) and heads and rows % heads == 0:
        head_dim = rows // heads
    if head_dim is None:
        raise _UnknownHeadsError(f"{type(module).__name__} tells no head size in {' or '.join(layout.head_dim)}")
    if rows % head_dim:
        raise _UnknownHeadsError(
            f"{rows} rows are no multiple of the head size {head_dim} that {type(module).__name__} tells"
        )
    if len(part_roles) == 1:
        return (Part(part_roles[0], rows, head_dim),)
    counts = {Role.QUERY: heads, Role.KEY: key_heads, Role.VALUE: key_heads}
    parts = tuple(Part(role, (counts[role] or 0) * head_dim, head_dim) for role in part_roles)
    if sum(part.length for part in parts) != rows:
        raise _UnknownHeadsError(
            f"{heads} query heads and {key_heads} key-value heads of {head_dim} rows do not add up to the {rows} rows"
        )
    return parts


def _first_attribute(module: nn.Module, paths: tuple[str, ...]) -> int | None:
    """The first of the dotted attributes that holds a positive integer."""
    for path in paths:
        try:
            value: Any = attrgetter(path)(module)
        except AttributeError:
            continue
        if isinstance(value, int) and value > 0:
            return value
    return None


def _mark_unknown_fused(module: nn.Module, roles: dict[int, ParameterRole]) -> None:
    """Mark fused query-key-value matrices of classes that no layout knows, for the strategy to refuse."""
    for prefix, child in module.named_modules():
        parent, _, leaf = prefix.rpartition(".")
        weight = getattr(child, "weight", None)
        if leaf not in FUSED_NAMES or not isinstance(weight, nn.Parameter):
            continue
        known = roles[id(weight)]
        if known.roles == (Role.LINEAR,):
            problem = f"no layout tells how {type(module.get_submodule(parent)).__name__} orders query, key and value"
            parts = (Part(Role.FUSED_QKV, known.parts[0].length),)
            roles[id(weight)] = ParameterRole(parts, f"{leaf!r}: fused", known.axis, problem=problem)
