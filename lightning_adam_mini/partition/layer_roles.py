"""Roles by the type of the layer that owns a parameter, by its own name, and by what a model declares as embeddings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_adam_mini.partition.layouts import BARE_PARAMETERS, find_layer
from lightning_adam_mini.partition.roles import ParameterRole, Part, Role
from lightning_adam_mini.partition.tree import Leaf, Node

__all__ = [
    "EMBEDDING_TYPES",
    "POSITION_WORDS",
    "found_output_axis",
    "is_pointwise",
    "role_from_type",
    "role_of_all",
    "roles_of_embeddings",
]

EMBEDDING_TYPES = (nn.Embedding, nn.EmbeddingBag)

NORM_SCALES = frozenset({"g", "gamma", "scale", "weight"})
LARGEST_TO_RUN = 2**22
"""Elements of the largest matrix whose layer runs to find its output dimension."""

NORM_TYPES = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, _NormBase)


def role_of_all(role: Role, parameter: Tensor, why: str, axis: int | None = 0, *, known: bool = True) -> ParameterRole:
    """The role of a parameter whose rows all have one role.

    If nothing else is known of a tensor with more than two dimensions, the last two are a matrix and the others count
    independent matrices.
    """
    axis = axis if parameter.dim() else None
    batch_axes: tuple[int, ...] = ()
    if role is Role.OTHER and parameter.dim() > 2:
        axis, batch_axes = parameter.dim() - 2, tuple(range(parameter.dim() - 2))
    length = parameter.shape[axis] if axis is not None else 1
    return ParameterRole((Part(role, length),), why, axis, batch_axes, known=known)


def _axis_of_factor(name: str) -> Callable[[Tensor], int] | None:
    """The output dimension of a low-rank factor: the rank of `lora_A`, the other dimension of `lora_B`.

    The rank is the smaller size, since classes differ in its position.
    """
    if "lora" not in (words := re.split(r"[^a-z]+", name.lower())):
        return None
    if words[-1] in ("a", "down"):
        return lambda factor: int(factor.shape[1] < factor.shape[0])
    if words[-1] in ("b", "up"):
        return lambda factor: int(factor.shape[1] > factor.shape[0])
    return None


def found_output_axis(layer: nn.Module, name: str) -> int | None:
    """The output dimension of a layer's matrix, from a forward pass of the layer alone; None if it does not show.

    The layer runs on random values of its own shapes. A change of one row of the matrix (outputs, inputs) changes one
    output, a change of one column all of them. A layer with hooks does not run, since hooks may do anything.
    """
    weight = dict(layer.named_parameters(recurse=False)).get(name)
    if weight is None or weight.dim() != 2 or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    if sum(parameter.dim() > 1 for parameter in layer.parameters()) > 1:
        return None  # a module of several layers
    is_square = weight.shape[0] == weight.shape[1]
    is_large = weight.numel() > LARGEST_TO_RUN
    if is_square and is_large:
        return None
    device = torch.device("meta" if is_large else "cpu")
    generator = None if is_large else torch.Generator().manual_seed(0)
    own = [*layer.named_parameters(), *layer.named_buffers()]
    tensors = {key: _random(value.shape, device, generator) for key, value in own}

    def outputs(inputs: int) -> Tensor | None:
        given = _random(torch.Size((2, inputs)), device, torch.Generator().manual_seed(1) if generator else None)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                found = functional_call(layer, tensors, (given,))
        except Exception:  # noqa: BLE001 - it is the model's code
            return None
        return found if isinstance(found, Tensor) and found.dim() == 2 and found.shape[0] == 2 else None

    if not is_square:
        fits = [axis for axis in (0, 1) if (y := outputs(weight.shape[1 - axis])) is not None
                and y.shape[1] == weight.shape[axis]]  # fmt: skip
        return fits[0] if len(fits) == 1 else None
    before, moved, matrix = outputs(weight.shape[0]), [], tensors[name]
    for axis in (0, 1):
        tensors[name] = matrix.clone()
        tensors[name].select(axis, 0).add_(1)
        after = outputs(weight.shape[0])
        if before is None or after is None or after.shape != before.shape:
            return None
        moved.append((before != after).any(0).nonzero().flatten().tolist())
    fits = [axis for axis in (0, 1) if moved[axis] == [0] and len(moved[1 - axis]) > 1]
    return fits[0] if len(fits) == 1 else None


def _random(shape: torch.Size, device: torch.device, generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.float32, generator=generator)


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a convolution of kernel size 1: a linear layer at each pixel, or one for each group."""
    if not isinstance(module, _ConvNd) or any(size != 1 for size in module.kernel_size):
        return False
    return module.groups == 1 or not isinstance(module, _ConvTransposeNd)  # its groups share an output axis


def role_from_type(leaf: Leaf) -> ParameterRole:
    """The role by the type of the owning module, or else by the name of a bare parameter."""
    owner, name, parameter = leaf.owner, leaf.own_name, leaf.parameter
    kind = type(owner).__name__
    is_vector = parameter.numel() == max(parameter.shape, default=1)
    if parameter.dim() == 0:
        return role_of_all(Role.OTHER, parameter, f"{name!r} of {kind}: a scalar")
    if found := find_layer(owner, name):
        layer, rows = found
        role = layer.role(rows, owner, tuple(parameter.shape), 0, f"{name} of {kind}")
        # A matrix gets the role of a norm scale, one block, only from a class that is named in full.
        if role.known and (is_vector or Role.NORM not in role.roles or not any("*" in c for c in layer.classes)):
            return role
    is_norm = isinstance(owner, NORM_TYPES)
    if ((is_vector or is_norm) and name == "bias") or name.endswith(("_bias", "_biases")):
        return role_of_all(Role.BIAS, parameter, f"{name} of {kind}")
    if is_norm or (is_vector and "Norm" in kind and name in NORM_SCALES):
        return role_of_all(Role.NORM, parameter, f"scale of {kind}")
    if leaf.is_scale_of_weight_norm:
        return role_of_all(Role.NORM, parameter, f"scale of {kind} with weight norm")
    if name == "weight":
        if isinstance(owner, EMBEDDING_TYPES):
            return role_of_all(Role.TOKEN_EMBEDDING, parameter, "nn.Embedding")
        if isinstance(owner, _ConvNd):
            axis = 1 if isinstance(owner, _ConvTransposeNd) else 0
            if is_pointwise(owner) and owner.groups == 1:
                return role_of_all(Role.LINEAR, parameter, f"{kind} of size 1", axis)
            role = role_of_all(Role.CONV, parameter, kind, axis)
            # (inputs, outputs of a group, ...): an output belongs to the group of its input.
            return replace(role, batch_axes=(0,)) if axis and owner.groups > 1 else role
        if isinstance(owner, nn.Linear):
            is_factor = _axis_of_factor(leaf.layer.rpartition(".")[2]) is not None
            return role_of_all(Role.LORA if is_factor else Role.LINEAR, parameter, "nn.Linear")
    if parameter.dim() == 2 and (axis_of := _axis_of_factor(name)) is not None and not is_vector:
        return role_of_all(Role.LORA, parameter, f"{name} of {kind}", axis=axis_of(parameter))
    bare = BARE_PARAMETERS.get(name)
    if bare is None:
        return role_of_all(Role.OTHER, parameter, f"no rule for {name!r} of {kind}", known=False)
    why = f"{name} of {kind}"
    if bare is not Role.POSITION_EMBEDDING:
        return role_of_all(bare, parameter, why)
    if parameter.dim() not in (2, 3):
        return role_of_all(Role.OTHER, parameter, f"{why}: positions in {parameter.dim()} dimensions", known=False)
    # (positions, width), or (1 or tables, positions, width)
    return ParameterRole(
        (Part(bare, parameter.shape[-2]),), why, parameter.dim() - 2, tuple(range(parameter.dim() - 2))
    )


POSITION_WORDS = frozenset({"pe", "pos", "posemb", "posembed", "position", "positional", "positions", "wpe"})


def roles_of_embeddings(nodes: Sequence[Node], leaves: Sequence[Leaf]) -> Iterator[tuple[Leaf, ParameterRole]]:
    """Token embeddings, position tables and output heads, as models declare them or as their shapes suggest.

    Layers are compared by their plain names, since a model may declare a wrapper, and parameters come from the tree,
    since access to a parametrized weight computes it.
    """
    embeddings = [leaf for leaf in leaves if leaf.own_name == "weight" and isinstance(leaf.owner, EMBEDDING_TYPES)]
    declared_in = _declared(nodes, "get_input_embeddings")
    declared_out = {name for names in _declared(nodes, "get_output_embeddings").values() for name in names}
    tokens = [leaf for leaf in embeddings if any(leaf.layer in names for names in declared_in.values())]
    token_parameters = {id(leaf.parameter) for leaf in tokens or embeddings}
    # A declaration covers the tables within the model that declares it.
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
    if by_shape and not declared_out:  # only the last one: others may have the shape of a table by chance
        why = "the last linear layer with the shape of a table of tokens"
        yield by_shape[-1], role_of_all(Role.OUTPUT_HEAD, by_shape[-1].parameter, why)


def _is_within(leaf: Leaf, scope: str) -> bool:
    return not scope or leaf.plain_name.startswith(f"{scope}.")


def _is_oblong(leaf: Leaf) -> bool:
    """Whether it can be a head: a square matrix or a single row may have the shape of a table by chance."""
    return leaf.parameter.dim() == 2 and leaf.parameter.shape[0] not in (1, leaf.parameter.shape[1])


def _feeds_another(leaf: Leaf, linear: Sequence[Leaf], embeddings: Sequence[Leaf]) -> bool:
    """Whether a layer may feed another: a later one, or one of the same module if that has no tables.

    Then it is more likely the first half of a feed-forward block than a head.
    """
    parent = leaf.layer.rpartition(".")[0]
    is_of_model = any(other.layer.rpartition(".")[0] == parent for other in embeddings)
    later = linear[linear.index(leaf) + 1 :]
    siblings = [] if is_of_model else [other for other in linear if other.layer.rpartition(".")[0] == parent]
    return any(other.parameter.shape[1:] == leaf.parameter.shape[:1] for other in [*later, *siblings])


def _declared(nodes: Sequence[Node], method: str) -> dict[str, set[str]]:
    """Plain names of the modules that `method` returns, by the plain names of those that have it.

    A model may lack the method, or raise anything.
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
