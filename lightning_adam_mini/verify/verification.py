"""Verify a partition by the forward pass of the model itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_adam_mini.partition import (
    CutParameter,
    Layouts,
    ModuleLayout,
    Role,
    Strategy,
    partition_module,
    resolve_strategy,
)
from lightning_adam_mini.partition.inference import infer_roles
from lightning_adam_mini.partition.module_layout import qualified_name
from lightning_adam_mini.partition.strategies import STRATEGIES, Cut
from lightning_adam_mini.partition.tree import plain_names, walk
from lightning_adam_mini.verify.judging import Claim, Sight, Status, VerifiedParameter, judge
from lightning_adam_mini.verify.running import traced
from lightning_adam_mini.verify.suggesting import as_python, layout_of
from lightning_adam_mini.verify.tracing import Operand, Tracer

__all__ = ["Verification", "verify_partition"]

Overrides = Mapping[str, str]


@dataclass(frozen=True)
class Verification:
    """What the forward pass of a model says of its partition. Printed, it lists what is not confirmed, and the remedy.

    Args:
        partition: Name of the partition that was verified.
        parameters: The verdict on each parameter, by name; frozen ones too.
        num_attention_calls: Attention calls that were seen.
        layouts: Layouts to pass as `partition_layouts`: those that were given, and those that would be right.
        overrides: The same for `partition_overrides`, where no layout has the words.
        is_changed: Whether these are other than what was given.
        notes: What else there is to say.
    """

    partition: str
    parameters: Mapping[str, VerifiedParameter]
    num_attention_calls: int
    layouts: Mapping[str, str | ModuleLayout]
    overrides: Mapping[str, str]
    is_changed: bool = False
    notes: tuple[str, ...] = ()

    def of_status(self, status: Status | str) -> tuple[VerifiedParameter, ...]:
        """The verdicts of one kind: `confirmed`, `contradicted` or `not seen`."""
        return tuple(verdict for verdict in self.parameters.values() if verdict.status == status)

    @property
    def contradicted(self) -> tuple[VerifiedParameter, ...]:
        """The verdicts on parameters that are cut otherwise than the model uses them."""
        return self.of_status(Status.CONTRADICTED)

    @property
    def remedy(self) -> str:
        """The same, where it is other than what was given, else empty."""
        return self.as_python() if self.is_changed else ""

    def as_python(self) -> str:
        """The arguments of `AdamMini` that would be right, as one would write them."""
        layouts = ", ".join(f"{name!r}: {as_python(layout)}" for name, layout in self.layouts.items())
        lines = [f"partition_layouts={{{layouts}}}"] if self.layouts else []
        lines += [f"partition_overrides={dict(self.overrides)!r}"] if self.overrides else []
        return ",\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """All of it in what JSON can hold."""
        return {
            "partition": self.partition,
            "parameters": {
                name: {"status": verdict.status.value, "reason": verdict.reason}
                for name, verdict in self.parameters.items()
            },
            "attention_calls": self.num_attention_calls,
            "layouts": {
                name: layout if isinstance(layout, str) else as_python(layout) for name, layout in self.layouts.items()
            },
            "overrides": dict(self.overrides),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        counts = ", ".join(f"{len(self.of_status(status))} {status}" for status in Status)
        lines = [f"{self.partition}: {counts}; {self.num_attention_calls} attention calls", *self.notes]
        for status in (Status.CONTRADICTED, Status.NOT_SEEN):
            lines += [f"{verdict.name}: {status}: {verdict.reason}" for verdict in self.of_status(status)]
        if self.remedy:
            lines += ["right would be:", self.remedy]
        return "\n".join(lines)


def verify_partition(
    model: nn.Module,
    *inputs: Any,
    partition: str | Strategy = "auto",
    partition_overrides: Overrides | None = None,
    partition_layouts: Layouts | None = None,
    **keyword_inputs: Any,
) -> Verification:
    """Run the model's forward pass once, and compare how it uses each parameter with how `AdamMini` would cut it.

    The model runs in eval mode on copies of its weights and buffers, which takes their memory again. Afterwards it is
    as it was, random numbers too.

    Args:
        model: The model, with weights; random ones will do.
        *inputs: Positional arguments of its forward pass.
        partition: As for `AdamMini`.
        partition_overrides: As for `AdamMini`.
        partition_layouts: As for `AdamMini`.
        **keyword_inputs: Keyword arguments of its forward pass.

    Returns:
        A verdict on each parameter, and the layouts that would be right.

    Raises:
        ValueError: The model has no weights, its forward pass does not take the input, or the arguments of the
            partition are wrong in themselves.

    Example:
        >>> model = nn.TransformerEncoderLayer(16, nhead=4)
        >>> print(verify_partition(model, torch.randn(5, 2, 16)).parameters["self_attn.in_proj_weight"].status)
        confirmed
    """
    tracer = traced(model, inputs, keyword_inputs)
    case = _Case(model, tracer)
    overrides, layouts = dict(partition_overrides or {}), dict(partition_layouts or {})
    strategy, notes = resolve_strategy(partition, model, layouts), []
    if not tracer.calls:
        notes.append("no attention was seen: the forward pass multiplies no queries and keys that the tracer knows")
    judged = case.judge(strategy, overrides, layouts)
    if partition == "auto" and strategy.name == "default" and judged.uncovered:
        notes.append("auto takes default, since no layout knows the attention of this model; judged as transformer")
        strategy = STRATEGIES["transformer"]
        judged = case.judge(strategy, overrides, layouts)
    notes += judged.made_elsewhere()
    remedy = case.remedy(judged)
    return Verification(
        strategy.name,
        judged.verdicts,
        len(tracer.calls),
        remedy.layouts,
        remedy.overrides,
        is_changed=remedy is not judged,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Judged:
    """A partition and the verdict on it.

    Args:
        strategy: The strategy.
        overrides: Its overrides.
        layouts: Its layouts.
        cuts: How it cuts each parameter; by element what it refuses.
        verdicts: The verdicts by name.
        uncovered: Parameters by the attention call and operand that come from them, and from none of their role.
    """

    strategy: Strategy
    overrides: dict[str, str]
    layouts: dict[str, str | ModuleLayout]
    cuts: Mapping[str, CutParameter]
    verdicts: Mapping[str, VerifiedParameter]
    uncovered: Mapping[tuple[int, Operand], set[str]]

    @property
    def contradicted(self) -> set[str]:
        """Names of parameters that are cut otherwise than the model uses them."""
        return {name for name, verdict in self.verdicts.items() if verdict.status is Status.CONTRADICTED}

    def unknown(self, names: Iterable[str]) -> set[str]:
        """Those parameters whose role no rule knows, and no override cuts."""
        cuts = (self.cuts[name] for name in names if name in self.cuts)
        return {cut.name for cut in cuts if not cut.role.known and cut.why == cut.role.why}

    def made_elsewhere(self) -> list[str]:
        """A sentence for each operand of attention that comes from parameters of other roles alone."""
        told = {(operand, tuple(sorted(names))): None for (_, operand), names in self.uncovered.items()}
        return [f"attention takes a {operand} from {', '.join(names)}, of no such role" for operand, names in told]


class _Case:
    """A model with what its forward pass showed.

    Args:
        model: The model.
        tracer: What was seen.
    """

    def __init__(self, model: nn.Module, tracer: Tracer) -> None:
        self._model, self._tracer = model, tracer
        self._parameters = dict(model.named_parameters())
        self.sights = {
            name: Sight.of(tuple(parameter.shape), tracer.outputs.get(name, ()), tracer.heads.get(name, ()))
            for name, parameter in self._parameters.items()
        }
        self._names = {id(module): name for name, module in model.named_modules()}
        self._owners = self._owners_of_feeders()

    def judge(
        self, strategy: Strategy, overrides: Mapping[str, str], layouts: Mapping[str, str | ModuleLayout]
    ) -> _Judged:
        """The verdict on a partition.

        Raises:
            ValueError: What is asked for is wrong in itself.
        """
        cuts, problems = self._cuts(strategy, overrides, layouts)
        wants_heads = strategy.cut(Role.QUERY) is Cut.HEAD
        uncovered = self._uncovered(cuts)
        found = {}
        for name, sight in self.sights.items():
            cut = cuts.get(name)
            if cut is None:  # frozen, and without a cut
                continue
            claim = Claim(
                cut,
                problems.get(name, ""),
                is_own=cut.why != cut.role.why and name not in problems,
                wants_heads=wants_heads,
                is_in_attention=name in self._owners and any(name in names for names in uncovered.values()),
            )
            found[name] = judge(claim, sight)
        return _Judged(strategy, dict(overrides), dict(layouts), cuts, found, uncovered)

    def _uncovered(self, cuts: Mapping[str, CutParameter]) -> dict[tuple[int, Operand], set[str]]:
        """The parameters from which operands of attention come that come from none of their role.

        An adapter adds to what the projection gives, which alone is cut by head.
        """
        feeders: dict[tuple[int, Operand], set[str]] = {}
        for name, seen in self._tracer.heads.items():
            for heads in seen:
                feeders.setdefault((heads.call, heads.operand), set()).add(name)
        return {
            (call, operand): names
            for (call, operand), names in feeders.items()
            if operand is not Operand.SCORE
            and not any(name in cuts and operand.value in cuts[name].role.roles for name in names)
        }

    def _cuts(
        self, strategy: Strategy, overrides: Overrides, layouts: Layouts
    ) -> tuple[dict[str, CutParameter], dict[str, str]]:
        """The partition, and why it refuses parameters; those are cut by element here.

        Raises:
            ValueError: What the user asks for is wrong in itself.
        """
        problems: dict[str, str] = {}
        while True:
            extra = dict.fromkeys(problems, Cut.ELEMENT.value)
            try:
                return partition_module(self._model, strategy, {**overrides, **extra}, layouts), problems
            except ValueError as error:
                roles = infer_roles(self._model, layouts)
                refused = {name: role.problem for name, role in roles.items() if role.problem and name not in problems}
                named = {name: problem for name, problem in refused.items() if name in str(error)}
                if not refused:
                    raise
                problems |= named or refused

    # The remedy

    def remedy(self, judged: _Judged) -> _Judged:
        """A partition of which nothing is contradicted, as far as there is one: all that is advised is tried here."""
        wrong = judged.contradicted | judged.unknown(self._owners)
        if not wrong:
            return judged
        best = judged
        for class_name, layout in self._suggested(wrong, judged).items():
            layouts = {class_name: layout, **{key: own for key, own in best.layouts.items() if key != class_name}}
            best = self._better(best, best.overrides, layouts)
        for name in sorted(best.contradicted | best.unknown(self._owners)):
            for cut in (Cut.ROW, Cut.ELEMENT):
                if name in best.contradicted | best.unknown(self._owners):
                    overrides = {name: cut.value, **{key: own for key, own in best.overrides.items() if key != name}}
                    best = self._better(best, overrides, best.layouts)
        return best

    def _better(
        self, judged: _Judged, overrides: Mapping[str, str], layouts: Mapping[str, str | ModuleLayout]
    ) -> _Judged:
        """Another partition if less of it is contradicted or unknown, and nothing anew; else the same."""
        try:
            other = self.judge(judged.strategy, overrides, layouts)
        except ValueError:
            return judged
        known = len(other.unknown(other.cuts)) < len(judged.unknown(judged.cuts))
        is_better = other.contradicted < judged.contradicted or (known and other.contradicted <= judged.contradicted)
        return other if is_better else judged

    def _suggested(self, wrong: set[str], judged: _Judged) -> dict[str, str | ModuleLayout]:
        """Layouts by class: first for modules that attend, then for others that hold a wrong parameter."""
        plain = plain_names(self._model)
        nodes = {id(node.module): node for node in walk(self._model)}
        by_module: dict[int, dict[str, tuple[Sight, Role]]] = {}
        modules: dict[int, nn.Module] = {}
        settled: set[str] = set()
        attending = {id(owner) for name, owner in self._owners.items() if name in wrong}
        for name, owner in self._owners.items():
            if id(owner) in attending and id(owner) in nodes:
                modules[id(owner)] = owner
                by_module.setdefault(id(owner), {})[_relative(plain[name], nodes[id(owner)].plain_name)] = (
                    self.sights[name],
                    Role.LINEAR,
                )
                settled.add(name)
        layers = {node.plain_name: node.module for node in nodes.values()}
        for name in sorted(wrong - settled):
            layer_name, _, own_name = plain[name].rpartition(".")
            layer = layers.get(layer_name)
            if layer is None or not self.sights[name].axes:
                continue
            modules[id(layer)] = layer
            role = judged.cuts[name].role.roles[0]
            is_matrix = len(judged.cuts[name].role.roles) == 1 and role in (
                Role.ATTENTION_OUTPUT,
                Role.MLP,
                Role.EXPERT,
            )
            by_module.setdefault(id(layer), {})[own_name] = (self.sights[name], role if is_matrix else Role.LINEAR)
        by_class: dict[type, list[int]] = {}
        for key, module in modules.items():
            by_class.setdefault(type(module), []).append(key)
        found = {}
        for cls, keys in by_class.items():
            class_name = self._class_name(cls)
            layout = layout_of(class_name, [(modules[key], by_module[key]) for key in keys])
            if layout is not None:
                found[class_name] = layout
        return found

    def _class_name(self, cls: type) -> str:
        """The bare name of a class, or the qualified one where another class of the model has the same."""
        same = {type(module) for module in self._model.modules() if type(module).__name__ == cls.__name__}
        return cls.__name__ if len(same) == 1 else qualified_name(cls)

    def _owners_of_feeders(self) -> dict[str, nn.Module]:
        """The module that attends, by the parameters in it that make its queries, keys and values.

        It is the innermost module that was running and holds any of them; what lies outside was made for others too.
        """
        feeders: dict[int, set[str]] = {}
        for name, seen in self._tracer.heads.items():
            for heads in seen:
                feeders.setdefault(heads.call, set()).add(name)
        owners: dict[str, nn.Module] = {}
        for number, names in feeders.items():
            depths = {name: self._depth(name, self._tracer.calls[number].modules) for name in names}
            deepest = max(depths.values())
            for name, depth in depths.items():
                if depth == deepest and depth >= 0 and name in self.sights:
                    owners.setdefault(name, self._tracer.calls[number].modules[depth])
        return {name: owners[name] for name in self.sights if name in owners}

    def _depth(self, parameter: str, modules: tuple[nn.Module, ...]) -> int:
        """Place of the innermost of some modules, one within the other, that holds a parameter."""
        holding = [
            place
            for place, module in enumerate(modules)
            if (prefix := self._names.get(id(module))) is not None
            and (not prefix or parameter.startswith(f"{prefix}."))
        ]
        return max(holding, default=-1)


def _relative(name: str, prefix: str) -> str:
    return name.removeprefix(f"{prefix}.") if prefix else name
