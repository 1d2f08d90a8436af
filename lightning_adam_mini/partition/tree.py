"""The module tree, seen through wrappers: torch.compile, DDP, FSDP, activation checkpointing, adapters, weight norm.

A wrapper holds the module that it wraps as a child. The tree gives both the plain name of the wrapped one, so that
neither layouts nor overrides depend on how a model was prepared for training.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from types import MappingProxyType

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_adam_mini.partition.module_layout import qualified_name

__all__ = ["WRAPPERS", "Leaf", "Node", "Tree", "leaves", "plain_names", "walk"]

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
        **{
            f"transformers.models.{family}.modeling_{family}.{prefix}{projection}Projection": frozenset({"linear"})
            for family, prefix in (("inkling2", "Inkling2"), ("inkling2_loop", "Inkling2Loop"))
            for projection in ("Query", "KeyValue", "GatedOutput")
        },
        "transformers.models.kyutai_speech_to_text.modeling_kyutai_speech_to_text.KyutaiSpeechToTextLinear": frozenset(
            {"linear"}
        ),
        "transformers.models.levit.modeling_levit.MLPLayerWithBN": frozenset({"linear"}),
        "transformers.models.moshi.modeling_moshi.MoshiLinear": frozenset({"linear"}),
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
        is_scale_of_weight_norm: Whether it is the scale that weight norm takes out of a weight.
    """

    name: str
    plain_name: str
    owner: nn.Module
    parameter: nn.Parameter
    is_scale_of_weight_norm: bool = False

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


def leaves(nodes: Iterable[Node]) -> Iterator[Leaf]:
    """Every parameter of a tree, at each place where it is used, in the order of `named_parameters()`."""
    for node in nodes:
        if isinstance(node.module, ParametrizationList):
            continue  # its owner gives the parameters
        for name, plain, parameter, is_scale in [*_own(node.module), *_parametrized(node.module)]:
            yield Leaf(_join(node.name, name), _join(node.plain_name, plain), node.module, parameter, is_scale)


def plain_names(module: nn.Module) -> dict[str, str]:
    """Plain names of all parameters by their names in `module.named_parameters()`."""
    found = list(leaves(walk(module)))
    # Some wrappers leave their prefix out of `named_parameters()`, so that names alone do not tell which is which.
    by_parameter = {id(leaf.parameter): leaf.plain_name for leaf in reversed(found)}
    by_name = {leaf.name: leaf.plain_name for leaf in found}
    return {
        name: by_parameter.get(id(parameter)) or by_name.get(name, name)
        for name, parameter in module.named_parameters()
    }


@dataclass(frozen=True)
class Tree:
    """A model's modules and parameters, found by their plain names."""

    nodes: list[Node]
    leaves: list[Leaf]

    @classmethod
    def of(cls, module: nn.Module) -> Tree:
        """The tree of a model."""
        nodes = list(walk(module))
        return cls(nodes, list(leaves(nodes)))

    @cached_property
    def _sorted(self) -> list[tuple[str, Leaf]]:
        return sorted(((leaf.plain_name, leaf) for leaf in self.leaves), key=itemgetter(0))

    @cached_property
    def modules(self) -> dict[str, Node]:
        """Modules by their plain names; of a wrapper and what it wraps, the wrapped one."""
        return {node.plain_name: node for node in self.nodes}

    @cached_property
    def looks_around(self) -> bool:
        """Whether a convolution takes more than one place at a time."""
        return any(isinstance(node.module, _ConvNd) and max(node.module.kernel_size) > 1 for node in self.nodes)

    def below(self, node: Node) -> Iterator[tuple[str, Leaf]]:
        """Parameters below a module, by their plain names relative to it."""
        prefix = f"{node.plain_name}." if node.plain_name else ""
        for place in range(bisect_left(self._sorted, prefix, key=itemgetter(0)), len(self._sorted)):
            plain_name, leaf = self._sorted[place]
            if not plain_name.startswith(prefix):
                return
            yield plain_name.removeprefix(prefix), leaf

    def parent(self, node: Node) -> Node | None:
        """The module that holds another under a name of its own; None for the root and for items of lists."""
        parent_name, _, name = node.plain_name.rpartition(".")
        return None if not name or name.isdigit() else self.modules.get(parent_name)


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


_Own = tuple[str, str, nn.Parameter, bool]
"""Name within the owner, plain name, parameter, and whether it is the scale that weight norm takes out of a weight."""


def _own(module: nn.Module) -> Iterator[_Own]:
    """Parameters that a module holds itself; older norms make `_g` and `_v`, or `_orig`, of one, by a hook."""
    normed = {hook.name for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm)}
    spectral = {f"{hook.name}_orig" for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)}
    for name, parameter in module._parameters.items():
        if parameter is not None:
            is_normed = name[:-2] in normed
            plain = name[:-2] if is_normed and name.endswith("_v") else name
            plain = name.removesuffix("_orig") if name in spectral else plain
            yield name, plain, parameter, is_normed and name.endswith("_g")


def _parametrized(module: nn.Module) -> Iterator[_Own]:
    """Parameters from which a module's own are computed."""
    lists = dict(module.named_children()).get("parametrizations")  # `_modules` of scripted modules is no dictionary
    for name, originals in lists.items() if isinstance(lists, nn.ModuleDict) else ():
        is_weight_norm = isinstance(next(iter(originals.children()), None), _WeightNorm)
        for suffix, parameter in originals._parameters.items():
            if parameter is not None:
                is_scale = is_weight_norm and suffix == "original0"
                is_weight = suffix == "original" or (is_weight_norm and suffix == "original1")
                plain = name if is_weight else f"{name}_scale" if is_scale else f"{name}.{suffix}"
                yield f"parametrizations.{name}.{suffix}", plain, parameter, is_scale


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
