"""Roles by the type of the layer that owns a parameter, or else by the parameter's own name."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_adam_mini.partition.layouts import BARE_PARAMETERS, find_layer
from lightning_adam_mini.partition.roles import ParameterRole, Part, Role
from lightning_adam_mini.partition.tree import Leaf

__all__ = ["EMBEDDING_TYPES", "is_pointwise", "role_from_type", "role_of_all"]

EMBEDDING_TYPES = (nn.Embedding, nn.EmbeddingBag)

NORM_SCALES = frozenset({"g", "gamma", "scale", "weight"})
NORM_TYPES = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, _NormBase)


def role_of_all(role: Role, parameter: Tensor, why: str, axis: int | None = 0, *, known: bool = True) -> ParameterRole:
    """The role of a parameter whose rows all do the same."""
    axis = axis if parameter.dim() else None
    return ParameterRole((Part(role, parameter.shape[axis] if axis is not None else 1),), why, axis, known=known)


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a convolution of size 1: a linear layer at each pixel, or several where it has groups."""
    if not isinstance(module, _ConvNd) or any(size != 1 for size in module.kernel_size):
        return False
    return module.groups == 1 or not isinstance(module, _ConvTransposeNd)  # whose groups share output axes


def role_from_type(leaf: Leaf) -> ParameterRole:
    """The role that the type of the owning module tells, or else the name of a bare parameter."""
    owner, name, parameter = leaf.owner, leaf.own_name, leaf.parameter
    kind = type(owner).__name__
    is_vector = parameter.numel() == max(parameter.shape, default=1)
    if parameter.dim() == 0:
        return role_of_all(Role.OTHER, parameter, f"{name!r} of {kind}: a number")
    if found := find_layer(owner, name):
        layer, rows = found
        role = layer.role(rows, owner, tuple(parameter.shape), 0, f"{name} of {kind}")
        # One number for a matrix takes a class that is named in full.
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
            return role_of_all(Role.CONV, parameter, kind, axis)
        if isinstance(owner, nn.Linear):
            return role_of_all(Role.LINEAR, parameter, "nn.Linear")
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
