"""The module tree, seen through wrappers: torch.compile, DDP, FSDP, activation checkpointing, adapters, weight norm.

A wrapper holds the module that it wraps as a child. The tree gives both the plain name of the wrapped one, so that
neither layouts nor overrides depend on how a model was prepared for training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_adam_mini.partition.module_layout import qualified_name

__all__ = ["WRAPPERS", "Leaf", "Node", "leaves", "plain_names", "walk"]

WRAPPERS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "torch._dynamo.eval_frame.OptimizedModule": frozenset({"_orig_mod"}),
        "torch.nn.parallel.distributed.DistributedDataParallel": frozenset({"module"}),
        "torch.nn.parallel.data_parallel.DataParallel": frozenset({"module"}),
        "torch.optim.swa_utils.AveragedModel": frozenset({"module"}),
        "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": frozenset(
            {"_fsdp_wrapped_module"}
        ),
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": frozenset(
            {"_checkpoint_wrapped_module"}
        ),
        "timm.models.gemma4_vit.Gemma4ClippableLinear": frozenset({"linear"}),
        "timm.models.levit.LinearNorm": frozenset({"linear"}),
        "transformers.models.gemma4.modeling_gemma4.Gemma4ClippableLinear": frozenset({"linear"}),
        "transformers.models.levit.modeling_levit.MLPLayerWithBN": frozenset({"linear"}),
        "lightning.fabric.wrappers._FabricModule": frozenset({"_forward_module"}),
        "peft.peft_model.PeftModel": frozenset({"base_model"}),
        "peft.tuners.tuners_utils.BaseTuner": frozenset({"model"}),
        "peft.tuners.tuners_utils.BaseTunerLayer": frozenset({"base_layer"}),
        "peft.utils.other.AuxiliaryTrainingWrapper": frozenset({"original_module", "modules_to_save.*"}),
    }
)
"""Wrapper classes, by the children that stand for the wrapped module; `name.*` for all children of a child."""


@dataclass(frozen=True)
class Node:
    """A module in the tree.

    Args:
        name: As in `named_modules()`.
        plain_name: Without the names that wrappers add.
        module: The module.
    """

    name: str
    plain_name: str
    module: nn.Module


@dataclass(frozen=True)
class Leaf:
    """A parameter in the tree, at one of the places where it is used.

    Args:
        name: As in `named_parameters()`.
        plain_name: Without the names that wrappers and parametrizations add.
        owner: The module that it belongs to.
        parameter: The parameter.
    """

    name: str
    plain_name: str
    owner: nn.Module
    parameter: nn.Parameter

    @property
    def own_name(self) -> str:
        """Its name within the owner."""
        return self.plain_name.rpartition(".")[2]

    @property
    def layer(self) -> str:
        """Plain name of the owner."""
        return self.plain_name.rpartition(".")[0]


def walk(module: nn.Module) -> Iterator[Node]:
    """Every module of the tree once, outer ones first."""
    yield from _walk(module, "", "", set())


def leaves(module: nn.Module) -> Iterator[Leaf]:
    """Every parameter, at each place where it is used, in the order of `named_parameters()`."""
    for node in walk(module):
        if isinstance(node.module, ParametrizationList):
            continue  # its owner gives the parameters
        for name, parameter in node.module._parameters.items():
            if parameter is not None:
                yield Leaf(_join(node.name, name), _join(node.plain_name, name), node.module, parameter)
        for name, originals in _parametrized(node.module):
            for suffix, parameter in originals._parameters.items():
                if parameter is not None:
                    # Weight norm keeps the direction, of the weight's shape, as `original1`, and its scale beside it.
                    plain = name if suffix in ("original", "original1") else f"{name}_scale"
                    full = _join(node.name, f"parametrizations.{name}.{suffix}")
                    yield Leaf(full, _join(node.plain_name, plain), node.module, parameter)


def plain_names(module: nn.Module) -> dict[str, str]:
    """Plain names of all parameters by their names in `module.named_parameters()`."""
    found = list(leaves(module))
    # Some wrappers leave their prefix out of `named_parameters()`, so that names alone do not tell which is which.
    by_parameter = {id(leaf.parameter): leaf.plain_name for leaf in reversed(found)}
    by_name = {leaf.name: leaf.plain_name for leaf in found}
    return {
        name: by_parameter.get(id(parameter)) or by_name.get(name, name)
        for name, parameter in module.named_parameters()
    }


def _walk(module: nn.Module, name: str, plain_name: str, seen: set[int]) -> Iterator[Node]:
    if id(module) in seen:
        return
    seen.add(id(module))
    yield Node(name, plain_name, module)
    transparent = _transparent_children(module)
    for child_name, child in module.named_children():
        full = _join(name, child_name)
        if child_name in transparent:
            yield from _walk(child, full, plain_name, seen)
        elif f"{child_name}.*" in transparent:
            for inner_name, inner in child.named_children():
                yield from _walk(inner, _join(full, inner_name), plain_name, seen)
        else:
            yield from _walk(child, full, _join(plain_name, child_name), seen)


def _transparent_children(module: nn.Module) -> frozenset[str]:
    for base in type(module).__mro__:
        children = WRAPPERS.get(qualified_name(base))
        if children is not None:
            return children
    return frozenset()


def _parametrized(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    lists = module._modules.get("parametrizations")
    if isinstance(lists, nn.ModuleDict):
        for name, originals in lists.items():
            if isinstance(originals, ParametrizationList):
                yield name, originals


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
