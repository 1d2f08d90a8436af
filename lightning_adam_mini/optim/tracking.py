"""What the optimizer knows of its parameters besides their state, and how it follows parameters that change.

AdamW goes on where a parameter is unfrozen, resized before its first step, moved to another device or dtype, or
replaced in `param_groups` by its shards. So does AdamMini: before each step, unless all tensors are the same as in the
last one, it compares every parameter with its *form*, which its blocks, state and shard were made for.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.optim.distributed import is_dtensor, is_flattened, shard_dtensor
from lightning_adam_mini.optim.fsdp1 import FlatRange, FlatState
from lightning_adam_mini.optim.params import check_gradient, check_parameter
from lightning_adam_mini.optim.quantized import check_format
from lightning_adam_mini.optim.shards import Shard
from lightning_adam_mini.optim.state import NO_STATE, init_state, is_sharded_as, restore_state, steps_taken
from lightning_adam_mini.optim.stochastic_rounding import Rounding, dtensor_positions, name_seed
from lightning_adam_mini.partition import ParameterPartition, recut
from lightning_adam_mini.partition.tree import plain_names

__all__ = ["KnownParameter", "ParameterTable"]

Form = tuple[object, ...]
"""What the blocks, the state and the shard of a parameter were made for."""
Groups = Sequence[dict[str, Any]]
States = dict[Tensor, Any]


def form_of(parameter: Tensor) -> Form:
    """The form of a parameter as it is now."""
    form = (type(parameter), parameter.shape, parameter.dtype, parameter.device)
    return (*form, parameter.device_mesh, parameter.placements) if is_dtensor(parameter) else form


@dataclass(frozen=True)
class KnownParameter:
    """What the optimizer knows of one parameter.

    Args:
        partition: Its name, role and blocks.
        plain_name: Its name without what wrappers add.
        flat_range: The elements that FSDP1 left on this rank; None for other parameters.
        form: Its form when it was last looked at; None if it never was, as in a copy of the optimizer.
        shard: This rank's part of it; None until it is needed.
        rounding: Its random bits; None until they are needed.
    """

    partition: ParameterPartition
    plain_name: str
    flat_range: FlatRange | None = None
    form: Form | None = None
    shard: Shard | None = None
    rounding: Rounding | None = None

    @property
    def saved_blocks(self) -> Blocks:
        """The blocks of the second moments in a state dict: DTensors are whole, FSDP1's parameters this rank's part."""
        assert self.shard is not None or self.flat_range is None
        return self.partition.blocks if self.flat_range is None or self.shard is None else self.shard.local_blocks

    def make_shard(self, parameter: Tensor) -> Shard:
        """This rank's part of the parameter."""
        blocks = self.partition.blocks
        if self.flat_range is not None:
            return self.flat_range.shard(blocks, parameter.device.type)
        return shard_dtensor(self.partition.name, parameter, blocks) if is_dtensor(parameter) else Shard(blocks)

    def make_rounding(self, parameter: Tensor) -> Rounding:
        """The random bits of the parameter."""
        seed, flat = name_seed(self.plain_name), self.flat_range
        if flat is not None:
            return Rounding(seed, (flat.stop - flat.start,), start=flat.start)
        positions = dtensor_positions(parameter) if is_dtensor(parameter) else None
        return Rounding(seed, self.partition.blocks.shape, positions)


@dataclass(frozen=True)
class _Change:
    """A parameter that was replaced, or has another shape, dtype, device or placement.

    Args:
        old: The parameter as the optimizer knows it.
        new: The parameter as it is; the same tensor if it was not replaced.
        known: What the optimizer knows of it from now on.
        capturable: Whether its group is.
    """

    old: Tensor
    new: Tensor
    known: KnownParameter
    capturable: bool


class ParameterTable:
    """All that the optimizer knows of its parameters, by parameter and in the order of the model.

    Args:
        module: The model; None where the optimizer got parameters alone.
        exp_avg_dtype: As for `AdamMini`.
        stochastic_rounding: As for `AdamMini`.
    """

    def __init__(
        self, module: nn.Module | None, *, exp_avg_dtype: torch.dtype | None, stochastic_rounding: bool
    ) -> None:
        self.exp_avg_dtype = exp_avg_dtype
        self.stochastic_rounding = stochastic_rounding
        self.known: dict[Tensor, KnownParameter] = {}
        self.names: list[list[str]] = []
        """Names of the parameters of each group, by place."""
        self._module: Callable[[], nn.Module | None] = _no_module if module is None else weakref.ref(module)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles look at their parameters anew."""
        known = {p: replace(k, form=None, shard=None, rounding=None) for p, k in self.known.items()}
        return {**self.__dict__, "known": known, "_module": _no_module}

    def __contains__(self, parameter: Tensor) -> bool:
        """Whether the optimizer knows a tensor."""
        return parameter in self.known

    def __getitem__(self, parameter: Tensor) -> KnownParameter:
        """What the optimizer knows of a parameter, with its shard.

        Raises:
            ValueError: The optimizer does not know it.
        """
        known = self.known.get(parameter)
        if known is None:
            raise ValueError(_unknown(parameter))
        if known.shard is None:
            known = self.known[parameter] = replace(known, shard=known.make_shard(parameter))
        return known

    @property
    def has_flat_ranges(self) -> bool:
        """Whether states are saved as FSDP1 knows them, which has flattened a parameter."""
        return any(known.flat_range is not None and known.flat_range.is_expanded for known in self.known.values())

    def partitions(self) -> list[ParameterPartition]:
        """The partitions of all parameters in the order of the model, frozen ones included."""
        return [known.partition for known in self.known.values()]

    def add(
        self,
        named: Mapping[str, Tensor],
        partitions: Mapping[str, ParameterPartition],
        ranges: Mapping[Tensor, FlatRange],
    ) -> None:
        """Add parameters by name."""
        module = self._module()
        plain = {} if module is None else plain_names(module)
        for name, parameter in named.items():
            partition = partitions[name]
            plain_name = plain.get(name, partition.name)
            self.known[parameter] = KnownParameter(partition, plain_name, ranges.get(parameter))

    def add_group(self, parameters: Iterable[Tensor]) -> None:
        """Note the parameters of a new group, in their order."""
        names = []
        for parameter in parameters:
            known = self[parameter]
            self.known[parameter] = replace(known, form=form_of(parameter))
            names.append(known.partition.name)
        self.names.append(names)

    def rounding(self, parameter: Tensor) -> Rounding:
        """The random bits of a parameter."""
        known = self[parameter]
        if known.rounding is None:
            known = self.known[parameter] = replace(known, rounding=known.make_rounding(parameter))
        assert known.rounding is not None
        return known.rounding

    def fresh_state(self, parameter: Tensor, known: KnownParameter, *, capturable: bool) -> dict[str, Tensor]:
        """The state of a parameter before its first step."""
        blocks, dtype = known.partition.blocks, self.exp_avg_dtype
        return init_state(parameter, blocks, known.shard, exp_avg_dtype=dtype, capturable=capturable)

    def signatures(self, parameters: Iterable[Tensor], states: States | None = None) -> str:
        """The signatures of parameters, which a saved state must agree with; with `states`, of those with one alone."""
        return "; ".join(
            self[p].partition.blocks.signature if states is None or states.get(p) else NO_STATE for p in parameters
        )

    def flat_states(self, groups: Groups, states: States, *, to_load: bool = False) -> list[FlatState]:
        """Parameters of FSDP1 whose second moments have another shape than this rank's part."""
        found = []
        for number, parameter in enumerate(p for group in groups for p in group["params"]):
            known, state = self[parameter], states.get(parameter) or None
            assert known.shard is not None
            if known.flat_range is not None and known.shard.boxes is not None and (to_load or state):
                found.append(FlatState(number, parameter, known.partition, known.shard, state))
        return found

    def flat_numbers(self, groups: Groups, states: States) -> list[int]:
        """Numbers, in a saved state, of the parameters with a state that FSDP1 has flattened."""
        parameters = enumerate(p for group in groups for p in group["params"])
        return [number for number, p in parameters if self[p].flat_range is not None and states.get(p)]

    # Changes

    def replace_by_parts(self, parts: Mapping[Tensor, tuple[Tensor, FlatRange]]) -> None:
        """Put this rank's parts in the places of parameters that were flattened, which have no state yet.

        Args:
            parts: By parameter, a tensor of one dimension and the elements that it holds.
        """
        known = dict[Tensor, KnownParameter]()
        for parameter, whole in self.known.items():
            part, flat_range = parts.get(parameter, (parameter, whole.flat_range))
            known[part] = replace(whole, flat_range=flat_range, form=None, shard=None, rounding=None)
        self.known = known

    def is_current(self, parameter: Tensor) -> bool:
        """Whether a parameter is as it was when it was last looked at."""
        known = self.known.get(parameter)
        return known is not None and known.form == form_of(parameter)

    def follow(self, groups: Groups, states: States, *, has_gradients: bool = True, keeps_state: bool = True) -> None:
        """Look at all parameters anew: follow what has changed, or refuse it and leave everything as it was.

        Args:
            groups: Parameter groups of the optimizer.
            states: Its state.
            has_gradients: Whether a step comes next, which takes their gradients.
            keeps_state: Whether their state goes on; else one is loaded next.

        Raises:
            ValueError: A parameter that this optimizer does not know, that has another shape than its state, or whose
                gradient it cannot use.
        """
        places = [
            (number, place, parameter)
            for number, group in enumerate(groups)
            for place, parameter in enumerate(group["params"])
        ]
        unknown = [(*place, p) for *place, p in places if p not in self.known]
        replaced = self._find_replaced(unknown, groups) if unknown else {}
        changes = {}
        for number, _, new in places:
            if not self.is_current(new):
                old = replaced.get(new, new)
                known = self._known_now(old, new, states, keeps_state=keeps_state)
                changes[new] = _Change(old, new, known, groups[number]["capturable"])
        with_gradient = [p for *_, p in places if p.grad is not None] if has_gradients else []
        for parameter in with_gradient:
            self.check_gradient(parameter, states, changes[parameter].known if parameter in changes else None)
        if changes:
            self._apply(changes.values(), groups, states)
        if has_gradients and not with_gradient:
            self._check_against_module(groups)
        self.names = [[self.known[parameter].partition.name for parameter in group["params"]] for group in groups]

    def follow_replaced(self, groups: Groups, states: States) -> None:
        """Follow parameters that were replaced in their groups, if there are any."""
        if any(parameter not in self.known for group in groups for parameter in group["params"]):
            self.follow(groups, states, has_gradients=False)

    def check_gradient(self, parameter: Tensor, states: States, known: KnownParameter | None = None) -> None:
        """Raise where a step cannot take the gradient of a parameter, or not make its state."""
        partition = (known or self[parameter]).partition
        assert parameter.grad is not None
        check_gradient(partition.name, parameter, parameter.grad)
        if not states.get(parameter):
            self.check_trained(parameter, partition)

    def check_trained(self, parameter: Tensor, partition: ParameterPartition) -> None:
        """Raise where a parameter cannot be trained, or does not support the formats that are asked for."""
        check_parameter(partition.name, parameter)
        check_format(
            partition.name,
            parameter,
            partition.blocks.shape,
            exp_avg_dtype=self.exp_avg_dtype,
            stochastic_rounding=self.stochastic_rounding,
        )

    def _find_replaced(self, unknown: Iterable[tuple[int, int, Tensor]], groups: Groups) -> dict[Tensor, Tensor]:
        """The old parameters that new tensors have replaced: these have their names in the model, or their shapes.

        Args:
            unknown: Group number and place of tensors that the optimizer does not know.
            groups: Parameter groups of the optimizer.

        Raises:
            ValueError: One of them is in no known place, or it is another parameter of the model.
        """
        module = self._module()
        names: dict[Tensor, str] = {p: n for n, p in module.named_parameters()} if module is not None else {}
        plain = plain_names(module) if module is not None else {}
        present = {plain[name] for name in names.values()}
        members = {parameter for group in groups for parameter in group["params"]}
        gone = {known.partition.name: p for p, known in self.known.items() if p not in members}
        found: dict[Tensor, Tensor] = {}
        for number, place, parameter in unknown:
            in_group = self.names[number] if number < len(self.names) else []
            old = gone.get(in_group[place]) if len(in_group) == len(groups[number]["params"]) else None
            if old is None:
                raise ValueError(_unknown(parameter))
            known, own = self.known[old], names.get(parameter)
            if own is None or plain[own] != known.plain_name:
                if own is not None and known.plain_name in present:
                    raise ValueError(
                        f"{own} of the model is in the place of {known.plain_name} in param_groups: put it in its own "
                        "place, or build a new AdamMini"
                    )
                if is_flattened(parameter) or tuple(parameter.shape) != known.partition.blocks.shape:
                    raise ValueError(_unknown(parameter))
            found[parameter] = old
        return found

    def _known_now(self, old: Tensor, new: Tensor, states: States, *, keeps_state: bool) -> KnownParameter:
        """What the optimizer knows of a parameter that has changed.

        Raises:
            ValueError: It has another shape than its state, or cannot be stored or partitioned as asked.
        """
        known, shape, state = self[old], tuple(new.shape), states.get(old)
        partition, flat = known.partition, known.flat_range
        if flat is not None:
            if shape != (flat.stop - flat.start,):
                raise ValueError(
                    f"{partition.name}: FSDP shows the shape {shape}, but this rank keeps the state of "
                    f"{flat.stop - flat.start} elements: step while the parameters are sharded"
                )
        elif shape != partition.blocks.shape:
            if keeps_state and (steps := steps_taken(state or {})):
                raise ValueError(
                    f"{partition.name} had the shape {partition.blocks.shape} in {steps} steps and has {shape} now, "
                    "which its state does not fit: build a new AdamMini after changing a parameter, or start this one "
                    "afresh with optimizer.state.pop(parameter). Nothing has changed"
                )
            partition = recut(partition, shape)
        known = replace(known, partition=partition, form=form_of(new), rounding=None)
        if state:
            self.check_trained(new, partition)
        return replace(known, shard=known.make_shard(new))

    def _apply(self, changes: Iterable[_Change], groups: Groups, states: States) -> None:
        """Take changes over; the state of a parameter goes on in its new layout, or starts afresh in a new shape."""
        by_old = {change.old: change for change in changes}
        new_states: States = {}
        for old, change in by_old.items():
            state = states.get(old)
            is_same = change.known.partition is self.known[old].partition
            if state and not (change.new is old and is_same and is_sharded_as(state, old)):
                fresh = self.fresh_state(change.new, change.known, capturable=change.capturable)
                if is_same and not state["exp_avg"].is_meta:
                    restore_state(fresh, state)
                new_states[change.new] = fresh
        # Nothing is refused from here on. The order of the parameters stays that of the model.
        pairs = ((by_old[p].new, by_old[p].known) if p in by_old else (p, known) for p, known in self.known.items())
        self.known = dict(pairs)
        for old, change in by_old.items():
            if change.new is not old:
                states.pop(old, None)
        states.update(new_states)
        for group in groups:
            group["partition"] = self.signatures(group["params"])

    def _check_against_module(self, groups: Groups) -> None:
        """Raise where a step would do nothing because the model's parameters, which have gradients, were replaced."""
        module = self._module()
        mine = {self[p].partition.name for group in groups for p in group["params"]}
        for name, parameter in module.named_parameters() if module is not None else ():
            if parameter.grad is not None and parameter not in self.known and name in mine:
                raise ValueError(
                    f"{name}: the model has another parameter than when the optimizer was built, and no parameter of "
                    "the optimizer has a gradient; build AdamMini after fully_shard or whatever replaces parameters"
                )


def _unknown(parameter: Tensor) -> str:
    """The message about a tensor that the optimizer does not know."""
    return (
        f"AdamMini met a parameter of shape {tuple(parameter.shape)} that does not belong to the model it was built "
        "from; build the optimizer after wrapping or replacing parameters, add it with add_param_group, or, where "
        "DeepSpeed has flattened them, use ZeroAdamMini of lightning_adam_mini.integrations.deepspeed"
    )


def _no_module() -> None:
    """Stands in for the reference to the model, where there is none."""
