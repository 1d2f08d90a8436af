"""The interface of the authors' package `adam-mini` 1.1.1, for code that is written for it.

There the optimizer gets names of parameters and numbers of heads. From these a module is put together that has the same
parameters in layers of the kinds that the names mean, and `AdamMini` partitions it like any other model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_adam_mini.blocks import Kind
from lightning_adam_mini.optim import AdamMini
from lightning_adam_mini.optim.fsdp1 import flat_ranges, whole_shapes
from lightning_adam_mini.optim.state import steps_taken
from lightning_adam_mini.partition import ParameterPartition, annotation_of
from lightning_adam_mini.partition.layouts.parameter_names import fused_parts

__all__ = ["Adam_mini", "convertible"]

log = logging.getLogger(__name__)

# What the words of the package's sets mean, in the order in which it asks, and the block structure that follows.
_NAMES = {
    "adam_block_names": ({"bias"}, "element"),
    "wqk_names": ({"k_proj", "q_proj", "wq", "wk", "query", "key"}, "head"),
    "embd_names": ({"embed", "embd", "wte"}, "row"),
    "output_names": ({"lm_head", "output", "final_layer"}, "row"),
    "wv_names": ({"v_proj", "wv", "value"}, "row"),
    "mlp_names": ({"feed_forward", "linear", "mlp"}, "row"),
    "attn_proj_names": ({"o_proj", "wo", "attn.proj"}, "row"),
}
_TABLES = (*_NAMES["embd_names"][0], "wpe", "position")
_CONVOLUTIONS: Mapping[int, Callable[..., nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


class Adam_mini(AdamMini):  # noqa: N801 - the name of the package's class
    """`AdamMini` with the constructor of the authors' class.

    Blocks are those of the paper. Where the package departs from it, this class does not follow: heads have the size
    that the rows of a query give, and not `dim / n_heads`; a position table is cut by position; and a fused query, key
    and value, whose order no name tells, is an error instead of one block.

    Args:
        named_parameters: `model.named_parameters()`; frozen ones are left out. If the model was annotated
            (`lightning_adam_mini.annotate`), it decides, and names and heads only have to agree with it.
        lr: Learning rate.
        betas: Decay rates of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay coefficient, of matrices alone.
        model_sharding: Has no effect, there as here: sharded parameters are recognized.
        dim: Width of the model, the inputs of a query. Needed, as are the heads, if there are queries.
        n_heads: Heads of a query.
        n_kv_heads: Heads of keys and values; `n_heads` by default.
        verbose: Log the number of parameters of each role, at the level INFO.
        **options: Options of `AdamMini`, such as `partition="factored"`.

    Attributes:
        embd_names: Words that tell embeddings, as the package has them; so do `output_names`, `wqk_names`, `wv_names`,
            `attn_proj_names`, `mlp_names` and `adam_block_names`. They may be changed until the first step.

    Raises:
        ValueError: Heads that do not fit, or are missing; or as `AdamMini`.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        model_sharding: bool | None = None,
        dim: int | None = None,
        n_heads: int | None = None,
        n_kv_heads: int | None = None,
        verbose: bool = True,
        **options: Any,
    ) -> None:
        pairs: list[Any] = list(named_parameters)
        if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
            raise ValueError("Adam_mini takes model.named_parameters(), pairs of a name and a parameter")
        named = {name: parameter for name, parameter in pairs if parameter.requires_grad}
        annotation = annotation_of(named.values()) if named else None
        if annotation is None:
            options["module"] = _module_of(named, dim, n_heads, n_kv_heads)
        self._asked: dict[str, Any] = {"betas": betas, "eps": eps, "weight_decay": weight_decay, **options}
        super().__init__(list(named.items()), lr, **self._asked)
        if annotation is not None:
            _check_heads(self.partition.values(), {"query": n_heads, "key": n_kv_heads or n_heads})
        self._words = {kind: frozenset(words) for kind, (words, _) in _NAMES.items()}
        for kind, words in self._words.items():
            setattr(self, kind, set(words))
        if verbose:
            counts: dict[str, int] = {}
            for found in self.partition.values():
                counts[found.role.name] = counts.get(found.role.name, 0) + 1
            log.info("Adam-mini found %s", ", ".join(f"{count} {role}" for role, count in counts.items()))

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """See `AdamMini.step`; the sets of names count until the first step."""
        self._follow_names()
        return super().step(closure) if closure is not None else super().step()

    def state_dict(self) -> dict[str, Any]:
        """See `torch.optim.Optimizer.state_dict`."""
        self._follow_names()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer.load_state_dict`."""
        self._follow_names()
        super().load_state_dict(state_dict)

    def _follow_names(self) -> None:
        """Partition anew where a set of names has changed."""
        words = {kind: frozenset(getattr(self, kind)) for kind in _NAMES}
        if words == self._words:
            return
        if any(steps_taken(state) for state in self.state.values()):
            raise ValueError("the names of Adam_mini changed after its first step; change them before")
        overrides = dict(self._asked.get("partition_overrides") or {})
        named = {found.name: p for p, found in ((p, self._table[p].partition) for p in self._parameters())}
        for name in named:
            before, after = (_structure(name, own) for own in (self._words, words))
            if before != after:
                overrides[name] = after
        options = {**self._asked, "partition_overrides": overrides}
        fresh = AdamMini(list(named.items()), **options)
        self._asked, self._words, self._plan = options, words, None
        self._table, self.state = fresh._table, fresh.state
        for group in self.param_groups:
            group["partition"] = self._table.signatures(group["params"])

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]


def _structure(name: str, words: Mapping[str, frozenset[str]]) -> str:
    """The block structure that the package gives a parameter of this name."""
    lower = name.lower()
    return next((cut for kind, (_, cut) in _NAMES.items() if any(word in lower for word in words[kind])), "whole")


def _module_of(
    named: Mapping[str, nn.Parameter], dim: int | None, n_heads: int | None, n_kv_heads: int | None
) -> nn.Module:
    """A module with these parameters under these names, in layers of the kinds that names and shapes mean."""
    holder = nn.Module()
    holder._parameters.update({name.replace(".", "/"): p for name, p in named.items()})
    root = nn.Module()
    owners: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in named.items():
        path, _, own = name.rpartition(".")
        owners.setdefault(path, {})[own] = parameter
    with whole_shapes(flat_ranges(holder)):  # FSDP1 has flattened them
        for path, parameters in owners.items():
            if fused_parts(path.rpartition(".")[2]):
                raise ValueError(
                    f"{path} holds query, key and value in one matrix, whose order names and heads do not tell; call "
                    "lightning_adam_mini.annotate(model) before Adam_mini"
                )
            has_children = any(other.startswith(f"{path}.") for other in owners)
            weight = None if has_children else parameters.get("weight")
            layer = nn.Module() if weight is None else _layer(path, tuple(weight.shape))
            layer._parameters.clear()
            layer._parameters.update(parameters)
            parent = _place(root, path, layer)
            words = _NAMES["wqk_names"][0]
            if parent is not None and weight is not None and any(word in path.lower() for word in words):
                _count_heads(parent, path, tuple(weight.shape), dim, n_heads, n_kv_heads)
    return root


def _layer(path: str, shape: tuple[int, ...]) -> nn.Module:
    """A layer without memory for a weight of this shape."""
    with torch.device("meta"):
        if len(shape) == 2:
            is_table = any(word in path.lower().rpartition(".")[2] for word in _TABLES)
            return nn.Embedding(*shape) if is_table else nn.Linear(shape[1], shape[0])
        if len(shape) in _CONVOLUTIONS:
            return _CONVOLUTIONS[len(shape)](shape[1], shape[0], shape[2:])
        return nn.LayerNorm(shape) if len(shape) == 1 else nn.Module()


def _place(root: nn.Module, path: str, layer: nn.Module) -> nn.Module | None:
    """Put a layer into the module of its path, with all modules on the way; its parent, or None for the root itself."""
    if not path:
        root._parameters.update(layer._parameters)
        return None
    *above, own = path.split(".")
    module = root
    for part in above:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]  # type: ignore[assignment]
    for part, child in module._modules.get(own, nn.Module())._modules.items():  # type: ignore[union-attr]
        layer.add_module(part, child)
    module.add_module(own, layer)
    return module


def _count_heads(
    attention: Any, path: str, shape: tuple[int, ...], dim: int | None, n_heads: int | None, n_kv_heads: int | None
) -> None:
    """Tell a module that attends how many heads it has."""
    name = path.rpartition(".")[2].lower()
    if dim is None or n_heads is None:
        raise ValueError(f"{path}: queries and keys are partitioned by heads; give Adam_mini dim= and n_heads=")
    is_key = any(word in name for word in ("k_proj", "wk", "key"))
    heads = (n_kv_heads or n_heads) if is_key else n_heads
    if shape[0] % heads or (not is_key and len(shape) == 2 and shape[1] != dim):
        raise ValueError(
            f"{path}: a weight of shape {shape} does not have {heads} heads of a model with dim={dim}; give Adam_mini "
            "the dim, n_heads and n_kv_heads of the model"
        )
    attention.num_heads, attention.num_key_value_heads = n_heads, n_kv_heads or n_heads


def _check_heads(partitions: Iterable[ParameterPartition], given: Mapping[str, int | None]) -> None:
    """Raise if numbers of heads contradict the annotated model."""
    for found in partitions:
        for part in found.role.parts:
            heads = given.get(part.role.value)
            if heads is not None and part.head_dim and part.length != heads * part.head_dim:
                raise ValueError(
                    f"{found.name}: the annotated model has {part.length // part.head_dim} heads of {part.role.value}, "
                    f"and Adam_mini got {heads}; leave n_heads and n_kv_heads out"
                )


def convertible(state_dict: dict[str, Any], optimizer: AdamMini) -> dict[str, str]:
    """Which states of the package's optimizer continue in this one.

    `convert.from_adam_mini_package` converts all of them, or raises.

    Args:
        state_dict: `state_dict()` of the package's `Adam_mini`.
        optimizer: The `AdamMini` or `Adam_mini` over the same model; it is not changed.

    Returns:
        For each parameter that the package saved: `equal` if its blocks are the same, `averaged` if they differ and its
        second moments are averaged over the new blocks, `new` if it had taken no step, or why it does not convert.
    """
    numbers = {group["name"]: number for group in state_dict["param_groups"] for number in group["params"]}
    own = {name.lower(): found for name, found in optimizer.partition.items()}
    found = {}
    for name, number in numbers.items():
        saved = state_dict["state"].get(number) or {}
        if name not in own:
            found[name] = "this optimizer has no parameter of that name"
        elif not saved:
            found[name] = "new"
        else:
            blocks, first = own[name].blocks, saved["m"]
            kept = (saved["v"] if "v" in saved else saved["vmean"]).numel()
            # The package's blocks are consecutive elements: rows, heads of rows, or the whole.
            same = kept == blocks.num_values and blocks.axis in (None, 0) and blocks.kind is not Kind.FACTORED
            if first.numel() != math.prod(blocks.shape):
                found[name] = f"its first moment has {first.numel()} elements, and the parameter {blocks.shape}"
            else:
                found[name] = "equal" if same else "averaged"
    return found
