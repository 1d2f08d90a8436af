"""The module tree without wrappers: torch.compile, DDP, FSDP, activation checkpointing, adapters, weight norm.

A wrapper has the wrapped module as a child. Both have one plain name in the tree, so that neither layouts nor overrides
depend on how a model is prepared for training.
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
"""The children of each wrapper class that stand for the wrapped module; `name.*` means all children of a child."""


@dataclass(frozen=True)
class Node:
    """A module in the tree.

    Args:
        name: As in `named_modules()`.
        plain_name: The name without the parts that wrappers add.
        module: The module.
    """

    name: str
    plain_name: str
    module: nn.Module


@dataclass(frozen=True)
class Leaf:
    """A parameter in the tree, at one of its places.

    Args:
        name: As in `named_parameters()`.
        plain_name: The name without the parts that wrappers and parametrizations add.
        owner: The module that it belongs to.
        parameter: The parameter.
        is_scale_of_weight_norm: Whether it is the scale that weight norm separates from a weight.
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
    """Every parameter of a tree at each of its places, in the order of `named_parameters()`."""
    for node in nodes:
        if isinstance(node.module, ParametrizationList):
            continue  # its parameters are yielded with their owner
        for name, plain, parameter, is_scale in [*_own(node.module), *_parametrized(node.module)]:
            yield Leaf(_join(node.name, name), _join(node.plain_name, plain), node.module, parameter, is_scale)


def plain_names(module: nn.Module) -> dict[str, str]:
    """Plain names of all parameters by their names in `module.named_parameters()`."""
    found = list(leaves(walk(module)))
    # Some wrappers omit their prefix in `named_parameters()`, so names alone are ambiguous.
    by_parameter = {id(leaf.parameter): leaf.plain_name for leaf in reversed(found)}
    by_name = {leaf.name: leaf.plain_name for leaf in found}
    return {
        name: by_parameter.get(id(parameter)) or by_name.get(name, name)
        for name, parameter in module.named_parameters()
    }


@dataclass(frozen=True)
class Tree:
    """The modules and parameters of a model by their plain names."""

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
        """Modules by their plain names; the wrapped module where a wrapper has the same name."""
        return {node.plain_name: node for node in self.nodes}

    @cached_property
    def has_spatial_convolutions(self) -> bool:
        """Whether some convolution has a kernel larger than one."""
        return any(isinstance(node.module, _ConvNd) and max(node.module.kernel_size) > 1 for node in self.nodes)

    def class_name(self, cls: type) -> str:
        """The bare name of a class, or the qualified one if another class of the model has the same bare name."""
        same_name = {type(node.module) for node in self.nodes if type(node.module).__name__ == cls.__name__}
        return cls.__name__ if len(same_name) == 1 else qualified_name(cls)

    def below(self, node: Node) -> Iterator[tuple[str, Leaf]]:
        """Parameters below a module, with their plain names relative to it."""
        prefix = f"{node.plain_name}." if node.plain_name else ""
        for place in range(bisect_left(self._sorted, prefix, key=itemgetter(0)), len(self._sorted)):
            plain_name, leaf = self._sorted[place]
            if not plain_name.startswith(prefix):
                return
            yield plain_name.removeprefix(prefix), leaf

    def parent(self, node: Node) -> Node | None:
        """The module that has another as a named child; None for the root and for items of lists."""
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
"""Name within the owner, plain name, parameter, and whether it is the scale of weight norm."""


def _own(module: nn.Module) -> Iterator[_Own]:
    """Parameters of a module itself; hooks of the older norms split one into `_g` and `_v`, or rename it `_orig`."""
    normed = {hook.name for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm)}
    spectral = {f"{hook.name}_orig" for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)}
    for name, parameter in module._parameters.items():
        if parameter is not None:
            is_normed = name[:-2] in normed
            plain = name[:-2] if is_normed and name.endswith("_v") else name
            plain = name.removesuffix("_orig") if name in spectral else plain
            yield name, plain, parameter, is_normed and name.endswith("_g")


def _parametrized(module: nn.Module) -> Iterator[_Own]:
    """Parameters from which parametrizations compute those of a module."""
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
