"""The interface of the authors' package `adam-mini` 1.1.1, for code that is written for it.

There the optimizer gets names of parameters and numbers of heads, and its sets of words decide what a name means. Here
the same words give each parameter its role, and the blocks follow as everywhere.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_adam_mini.blocks import Kind
from lightning_adam_mini.convert import from_adam_mini_package
from lightning_adam_mini.convert.saved_states import SavedBy, saved_by
from lightning_adam_mini.optim import AdamMini
from lightning_adam_mini.optim.distributed import is_flattened
from lightning_adam_mini.optim.params import warn_user
from lightning_adam_mini.optim.state import steps_taken
from lightning_adam_mini.partition import (
    STRATEGIES,
    ParameterPartition,
    ParameterRole,
    Part,
    Role,
    Strategy,
    Structure,
    annotation_of,
    resolve_strategy,
)
from lightning_adam_mini.partition.layouts.parameter_names import fused_parts, projected_parts
from lightning_adam_mini.partition.partition import partition_parameters
from lightning_adam_mini.partition.strategies import Overrides

__all__ = ["Adam_mini", "convertible"]

log = logging.getLogger(__name__)

# The package's words and what they mean, in the order in which it asks; it looks for them anywhere in lower-case names.
_NAMES = {
    "adam_block_names": ({"bias"}, Role.BIAS),
    "wqk_names": ({"k_proj", "q_proj", "wq", "wk", "query", "key"}, Role.QUERY),
    "embd_names": ({"embed", "embd", "wte"}, Role.TOKEN_EMBEDDING),
    "output_names": ({"lm_head", "output", "final_layer"}, Role.OUTPUT_HEAD),
    "wv_names": ({"v_proj", "wv", "value"}, Role.VALUE),
    "mlp_names": ({"feed_forward", "linear", "mlp"}, Role.MLP),
    "attn_proj_names": ({"o_proj", "wo", "attn.proj"}, Role.ATTENTION_OUTPUT),
}
_WITHOUT_DECAY = ("norm", "ln", "bias")
_BY_PACKAGE = Strategy(
    "adam-mini", {**STRATEGIES["transformer"].structures, Role.LINEAR: Structure.WHOLE}
)  # matrices whose names it does not know are whole
_KEPT = ("_words", "_heads", "_partition", "_overrides", "_is_by_names", "_is_verbose")
_SHOWN = 3
Words = Mapping[str, frozenset[str]]


class Adam_mini(AdamMini):  # noqa: N801 - the name of the package's class
    """`AdamMini` with the constructor of the authors' class, and its blocks for the same names.

    Where the package cuts heads wrongly or takes no step, this class follows the paper: the rows of a query are cut by
    the number of heads, whatever their size; vectors have one second moment; LoRA's factors and stacked experts have
    one an output neuron. A fused query, key and value, which would be one block, is an error.

    Args:
        named_parameters: `model.named_parameters()`; frozen ones are left out. If the model was annotated
            (`lightning_adam_mini.annotate`), it decides, and names and heads only have to agree with it.
        lr: Learning rate.
        betas: Decay rates of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay coefficient of all parameters but those with `norm`, `ln` or `bias` in
            their names.
        model_sharding: Has no effect, there as here: sharded parameters are recognized.
        dim: Width of the model, the inputs of a query; 2048 by default, as there.
        n_heads: Heads of a query; 32 by default, as there.
        n_kv_heads: Heads of a key; `n_heads` by default.
        verbose: Log the number of parameters of each role at the level INFO, and warn of matrices whose names no word
            fits.
        partition: As for `AdamMini`; `auto` is the package's.
        partition_overrides: As for `AdamMini`.
        **options: Further options of `AdamMini`, such as `exp_avg_dtype`.

    Attributes:
        embd_names: Words that tell embeddings, as the package has them; so do `output_names`, `wqk_names`, `wv_names`,
            `attn_proj_names`, `mlp_names` and `adam_block_names`. They may be changed until the first step.

    Raises:
        ValueError: Heads that do not fit a query or key, or contradict the annotated model; a fused query, key and
            value; or as `AdamMini`.
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
        partition: str | Strategy = "auto",
        partition_overrides: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        pairs = list(named_parameters)
        if any(not isinstance(pair, tuple) for pair in pairs):
            raise ValueError("Adam_mini takes model.named_parameters(), pairs of a name and a parameter")
        _check_sizes(dim=dim, n_heads=n_heads, n_kv_heads=n_kv_heads)
        named = {name: parameter for name, parameter in pairs if parameter.requires_grad}
        self._is_by_names = "module" not in options and annotation_of(named.values()) is None
        if self._is_by_names:
            # The partition comes below, as it does again where words change.
            options["partition"] = "default"
            if any(is_flattened(parameter) for parameter in named.values()):
                options["module"] = holder = nn.Module()  # FSDP1's parameters have a shape in a module alone
                holder._parameters.update(named)
        else:
            options |= {"partition": partition, "partition_overrides": partition_overrides}
        groups: list[Any] = list(named.items())
        if "weight_decay_policy" not in options:
            decays = {True: [], False: []}  # type: dict[bool, list[tuple[str, Tensor]]]
            for name, parameter in named.items():
                decays[not any(word in name.lower() for word in _WITHOUT_DECAY)].append((name, parameter))
            rates = {True: weight_decay, False: 0.0}
            groups = [{"params": decays[key], "weight_decay": rates[key]} for key in decays if decays[key]]
        super().__init__(groups, lr, betas, eps, weight_decay, **options)
        for kind, (words, _) in _NAMES.items():
            setattr(self, kind, set(words))
        self._words: Words | None = None
        self._heads = (dim or 2048, n_heads or 32, n_kv_heads or n_heads or 32)
        self._partition, self._overrides = partition, dict(partition_overrides or {})
        self._is_verbose = verbose
        if self._is_by_names:
            self._follow_words()
        else:
            _check_heads(self.partition.values(), {Role.QUERY: n_heads, Role.KEY: n_kv_heads or n_heads})
        self.register_step_pre_hook(_before_step)

    @property
    def partition(self) -> dict[str, ParameterPartition]:
        """See `AdamMini.partition`."""
        self._follow_words()
        return super().partition

    def step_parameter(self, parameter: Tensor) -> None:
        """See `AdamMini.step_parameter`."""
        self._follow_words()
        super().step_parameter(parameter)

    def state_dict(self) -> dict[str, Any]:
        """See `AdamMini.state_dict`."""
        self._follow_words()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that this class saved, or the package's.

        Args:
            state_dict: What `state_dict()` returned, here or there.

        Raises:
            ValueError: As `AdamMini.load_state_dict`, or as `convert.from_adam_mini_package`.
        """
        self._follow_words()
        if any("beta1" in group for group in state_dict.get("param_groups", ())):
            state_dict = from_adam_mini_package(state_dict, self, keep_hyperparameters=True)
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles keep."""
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in (*_KEPT, *_NAMES)}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies look at the words before each step, too."""
        super().__setstate__(state)
        self.register_step_pre_hook(_before_step)

    def _follow_words(self) -> None:
        """Partition anew where a set of words has changed.

        Raises:
            ValueError: It has after the first step; the annotated model decides instead; or the partition does not fit.
        """
        if not all(kind in self.__dict__ for kind in _NAMES):
            return  # the constructor of the base class
        words = {kind: frozenset(self.__dict__[kind]) for kind in _NAMES}
        if words == self._words:
            return
        if not self._is_by_names:
            if words != {kind: frozenset(default) for kind, (default, _) in _NAMES.items()}:
                raise ValueError(
                    "the names of Adam_mini have no effect, as the model decides: give annotate(model, overrides=...)"
                )
            return
        if any(steps_taken(state) for state in self.state.values()):
            raise ValueError("the names of Adam_mini changed after its first step; change them before")
        partitions = self._partitions(words)
        table = self._table
        for group in self.param_groups:
            for parameter in group["params"]:
                known = table[parameter]
                partition = partitions[known.partition.name]
                table.known[parameter] = replace(known, partition=partition, shard=None, rounding=None)
                self._init_state(parameter, capturable=group["capturable"])
            group["partition"] = table.signatures(group["params"])
        self._words, self._plan = words, None

    def _partitions(self, words: Words) -> dict[str, ParameterPartition]:
        """The partition of each parameter by its name.

        Raises:
            ValueError: Heads are asked for and not known, or as `AdamMini`.
        """
        shapes = {name: found.blocks.shape for name, found in super().partition.items()}
        strategy = _BY_PACKAGE if self._partition == "auto" else resolve_strategy(self._partition, None)
        roles = {name: _role(name, shape, words, self._heads) for name, shape in shapes.items()}
        overrides = Overrides(self._overrides, {name: name for name in shapes})
        partitions, failed = partition_parameters(shapes, roles, strategy, overrides)
        for name, error in failed.items():
            raise ValueError(f"{name}: {error}")
        return partitions

    def _report(self) -> None:
        """Log what the names mean, and warn of matrices whose names no word fits."""
        found = list(super().partition.values())
        counts = Counter(each.role.name for each in found)
        log.info("Adam-mini found %s", ", ".join(f"{count} {role}" for role, count in counts.items()))
        unknown = [each.name for each in found if each.role.roles == (Role.LINEAR,) and not each.is_overridden]
        if self._is_by_names and self._partition == "auto" and unknown:
            shown = ", ".join(unknown[:_SHOWN]) + (f" and {len(unknown) - _SHOWN} more" if unknown[_SHOWN:] else "")
            warn_user(
                f"no word of Adam_mini fits {shown}: each of these matrices has one second moment. Add words to its "
                "sets before the first step, such as optimizer.mlp_names.add('fc'), or call annotate(model) before it"
            )


def _before_step(optimizer: Any, *_: Any) -> None:
    """A hook and no `step` of its own, around which torch would run the user's hooks a second time."""
    optimizer._follow_words()
    if optimizer._is_verbose:
        optimizer._report()
        optimizer._is_verbose = False


def _role(name: str, shape: tuple[int, ...], words: Words, heads: tuple[int, int, int]) -> ParameterRole:
    """What a name means: the first set with a word in it."""
    lower = name.lower()
    *_, layer = [part for part in name.split(".") if part != "weight"] or [name]
    kind = next((kind for kind in _NAMES if any(word in lower for word in words[kind])), None)
    why = f"{kind} of Adam_mini" if kind else "no word of Adam_mini"
    rows = shape[0] if shape else 1

    def role(found: Role, **options: Any) -> ParameterRole:
        return ParameterRole((Part(found, rows),), why, 0 if shape else None, **options)

    if kind == "adam_block_names":
        return role(Role.BIAS)
    if len(shape) < 2:
        return role(Role.NORM)
    if len(shape) > 2:
        if kind is None or "expert" not in lower or len(shape) > 3:
            return role(Role.CONV)
        return ParameterRole((Part(Role.EXPERT, shape[1]),), why, 1, (0,))  # experts, outputs, inputs
    if "lora_" in lower:
        return role(Role.LORA)
    if fused_parts(layer):
        return role(
            Role.FUSED_QKV,
            problem="query, key and value are one matrix, whose order names and heads do not tell; call "
            "lightning_adam_mini.annotate(model) before Adam_mini",
        )
    if kind == "wqk_names":
        return _of_heads(layer, shape, heads, role(Role.QUERY))
    return role(_NAMES[kind][1]) if kind else role(Role.LINEAR)


def _of_heads(layer: str, shape: tuple[int, ...], heads: tuple[int, int, int], role: ParameterRole) -> ParameterRole:
    """The role of a query or key.

    Args:
        layer: Name of its layer. One that says neither query nor key has heads of the package's size.
        shape: Its shape.
        heads: Width of the model, heads of a query, heads of a key.
        role: The role without heads.
    """
    rows, inputs = shape
    dim, n_heads, n_kv_heads = heads
    parts = projected_parts(layer)
    is_key = parts == (Role.KEY,)
    if is_key or parts == (Role.QUERY,):
        count = n_kv_heads if is_key else n_heads
        head_dim, rest = divmod(rows, count)
        fits = not rest and (is_key or inputs == dim)
    else:
        count = n_heads
        head_dim, rest = divmod(dim * dim, n_heads * inputs)
        fits = not rest and head_dim > 0 and rows % head_dim == 0
    if not fits:
        return replace(
            role,
            problem=f"a weight of shape {shape} does not have {count} heads of a model with dim={dim}; give Adam_mini "
            "the dim, n_heads and n_kv_heads of the model, or call lightning_adam_mini.annotate(model) before it",
        )
    return replace(role, parts=(Part(Role.KEY if is_key else Role.QUERY, rows, head_dim),))


def _check_sizes(**sizes: Any) -> None:
    for option, size in sizes.items():
        if size is not None and (not isinstance(size, int) or size < 1):
            raise ValueError(f"{option} must be a positive integer, not {size!r}")


def _check_heads(partitions: Iterable[ParameterPartition], given: Mapping[Role, int | None]) -> None:
    """Raise if numbers of heads contradict the annotated model."""
    for found in partitions:
        for part in found.role.parts:
            heads = given.get(part.role)
            if heads is None or not part.head_dim:
                continue
            own = part.length * found.role.repeats // part.head_dim
            if own != heads:
                raise ValueError(
                    f"{found.name}: the annotated model has {own} heads of {part.role.value}, and Adam_mini got "
                    f"{heads}; leave n_heads and n_kv_heads out"
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

    Raises:
        ValueError: The state of another optimizer.
    """
    source = saved_by(state_dict)
    if source is not SavedBy.PACKAGE:
        raise ValueError(f"convertible takes a state of {SavedBy.PACKAGE}, but this is one of {source}")
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
