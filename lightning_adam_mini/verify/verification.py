"""Verify a partition against the forward pass of the model, and find the layouts and overrides that would be right."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_adam_mini.partition import (
    Layouts,
    ModuleLayout,
    ParameterPartition,
    Role,
    Strategy,
    resolve_strategy,
)
from lightning_adam_mini.partition.inference import infer_roles
from lightning_adam_mini.partition.layouts import ORDERS
from lightning_adam_mini.partition.partition import partition_parameters
from lightning_adam_mini.partition.strategies import STRATEGIES, Overrides, Structure
from lightning_adam_mini.partition.tree import Node, Tree, plain_names
from lightning_adam_mini.verify.observations import Observation, Status, VerifiedParameter, as_python, judge, layout_of
from lightning_adam_mini.verify.running import traced
from lightning_adam_mini.verify.tracing import Operand, Tracer

__all__ = ["Verification", "verify_partition"]

_MATRICES = frozenset({Role.ATTENTION_OUTPUT, Role.MLP, Role.EXPERT})
"""Roles that a remedy keeps; other matrices outside of attention become `Role.LINEAR` there."""


@dataclass(frozen=True)
class Verification:
    """The result of `verify_partition`. Printed, it lists what is not confirmed, and the remedy.

    Args:
        partition: Name of the partition.
        parameters: The verdict on each parameter by name, frozen ones too.
        num_attention_calls: Number of attention calls in the forward pass.
        layouts: Layouts to pass as `partition_layouts`: the given ones, corrected.
        overrides: Overrides to pass as `partition_overrides`, also for orders that no layout can describe.
        is_changed: Whether layouts or overrides differ from the given ones.
        notes: Further remarks.
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
        """The verdicts on parameters whose blocks contradict the forward pass."""
        return self.of_status(Status.CONTRADICTED)

    @property
    def remedy(self) -> str:
        """The arguments of `AdamMini` that would be right; empty if the given ones are."""
        return self.as_python() if self.is_changed else ""

    def as_python(self) -> str:
        """Layouts and overrides as arguments of `AdamMini`, in Python."""
        layouts = ", ".join(f"{name!r}: {as_python(layout)}" for name, layout in self.layouts.items())
        lines = [f"partition_layouts={{{layouts}}}"] if self.layouts else []
        lines += [f"partition_overrides={dict(self.overrides)!r}"] if self.overrides else []
        return ",\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The verification as data for JSON."""
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
            lines += ["correct arguments:", self.remedy]
        return "\n".join(lines)


def verify_partition(
    model: nn.Module,
    *inputs: Any,
    partition: str | Strategy = "auto",
    partition_overrides: Mapping[str, str] | None = None,
    partition_layouts: Layouts | None = None,
    **keyword_inputs: Any,
) -> Verification:
    """Run the model's forward pass once, and compare the use of each parameter with its blocks in `AdamMini`.

    The model runs in eval mode on copies of its weights and buffers, which takes their memory once more. It does not
    change, and neither does the random state.

    Args:
        model: The model, with weights; random ones are enough.
        *inputs: Positional arguments of its forward pass.
        partition: As for `AdamMini`.
        partition_overrides: As for `AdamMini`.
        partition_layouts: As for `AdamMini`.
        **keyword_inputs: Keyword arguments of its forward pass.

    Returns:
        A verdict on each parameter, and the layouts and overrides that would be right.

    Raises:
        ValueError: The model has no weights, its forward pass does not accept the inputs, or an argument of the
            partition is invalid.

    Example:
        >>> model = nn.TransformerEncoderLayer(16, nhead=4)
        >>> print(verify_partition(model, torch.randn(5, 2, 16)).parameters["self_attn.in_proj_weight"].status)
        confirmed
    """
    tracer = traced(model, inputs, keyword_inputs)
    verifier = _Verifier(model, tracer)
    overrides, layouts = dict(partition_overrides or {}), dict(partition_layouts or {})
    strategy, notes = resolve_strategy(partition, model, layouts), []
    if not tracer.calls:
        notes.append(
            "no attention was seen: the tracer knows no product in the forward pass as one of queries and keys"
        )
    trial = verifier.judge(strategy, overrides, layouts)
    if partition == "auto" and strategy.name == "default" and trial.unclaimed:
        notes.append("auto selects default, since no layout knows the attention of this model; verified as transformer")
        strategy = STRATEGIES["transformer"]
        trial = verifier.judge(strategy, overrides, layouts)
    notes += trial.notes()
    remedy = verifier.remedy(trial)
    return Verification(
        strategy.name,
        trial.verdicts,
        len(tracer.calls),
        remedy.layouts,
        remedy.overrides,
        is_changed=remedy is not trial,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Trial:
    """A partition and its verdicts.

    Args:
        strategy: The strategy.
        overrides: The overrides.
        layouts: The layouts.
        partition: The partition of each parameter; element-wise for those that it refuses.
        verdicts: The verdicts by name.
        unclaimed: For operands of attention calls that come from no parameter with their role, the parameters that they
            come from.
    """

    strategy: Strategy
    overrides: dict[str, str]
    layouts: dict[str, str | ModuleLayout]
    partition: Mapping[str, ParameterPartition]
    verdicts: Mapping[str, VerifiedParameter]
    unclaimed: Mapping[tuple[int, Operand], set[str]]

    @property
    def contradicted(self) -> set[str]:
        """Names of parameters whose blocks contradict the forward pass."""
        return self._of_status(Status.CONTRADICTED)

    def _of_status(self, status: Status) -> set[str]:
        return {name for name, verdict in self.verdicts.items() if verdict.status is status}

    def unknown(self, names: Iterable[str]) -> set[str]:
        """Those parameters without a known role or an override."""
        found = (self.partition[name] for name in names)
        return {p.name for p in found if not p.role.known and not p.is_overridden}

    def mistakes(self) -> tuple[int, int, int]:
        """Numbers of contradicted, unknown and unseen parameters, to compare partitions by."""
        return len(self.contradicted), len(self.unknown(self.partition)), len(self._of_status(Status.NOT_SEEN))

    def notes(self) -> list[str]:
        """A sentence for each operand of attention that comes only from parameters with other roles."""
        found = dict.fromkeys((operand, tuple(sorted(names))) for (_, operand), names in self.unclaimed.items())
        return [f"attention takes a {operand} from {', '.join(names)}, of another role" for operand, names in found]


class _Verifier:
    """A model with the observations of its forward pass.

    Args:
        model: The model.
        tracer: The tracer of its forward pass.
    """

    def __init__(self, model: nn.Module, tracer: Tracer) -> None:
        self._model, self._tracer = model, tracer
        self._parameters = dict(model.named_parameters())
        self._plain = plain_names(model)
        self._tree = Tree.of(model)
        self._nodes = {id(node.module): node for node in self._tree.nodes}
        self._seen = {
            name: Observation.of(tuple(parameter.shape), tracer.outputs.get(name, ()), tracer.heads.get(name, ()))
            for name, parameter in self._parameters.items()
        }
        self._feeders: dict[tuple[int, Operand], set[str]] = defaultdict(set)
        for name in self._seen:
            for heads in tracer.heads.get(name, ()):
                self._feeders[heads.call, heads.operand].add(name)
        self._attending = self._attending_modules()

    def _attending_modules(self) -> dict[str, Node]:
        """The module that attends, by the names of its parameters that produce queries, keys and values.

        It is the innermost running module with such parameters; those outside of it also serve other modules.
        """
        by_call: dict[int, set[str]] = defaultdict(set)
        for (call, _), names in self._feeders.items():
            by_call[call] |= names
        found: dict[str, Node] = {}
        for call, names in by_call.items():
            running = (self._nodes.get(id(module)) for module in reversed(self._tracer.calls[call].modules))
            inside = ((node, [name for name in names if _is_within(name, node.name)]) for node in running if node)
            node, held = next(((node, held) for node, held in inside if held), (None, []))
            if node is not None:
                found |= {name: node for name in held if name not in found}
        return {name: found[name] for name in self._seen if name in found}

    def judge(
        self, strategy: Strategy, overrides: Mapping[str, str], layouts: Mapping[str, str | ModuleLayout]
    ) -> _Trial:
        """The verdicts on a partition.

        Raises:
            ValueError: An argument is invalid.
        """
        roles = infer_roles(self._model, layouts)
        shapes = {name: seen.shape for name, seen in self._seen.items()}
        rules = Overrides(overrides, self._plain)
        partition, failed = partition_parameters(shapes, roles, strategy, rules, self._seen.keys())
        # Adapters feed operands too, but only the projection that they add to has head blocks.
        unclaimed: dict[tuple[int, Operand], set[str]] = {
            (call, operand): names
            for (call, operand), names in self._feeders.items()
            if operand is not Operand.SCORE and not any(operand.value in partition[name].role.roles for name in names)
        }
        wants_heads = strategy.structure(Role.QUERY) is Structure.HEAD
        verdicts = {
            name: judge(
                partition[name],
                seen,
                problem=failed[name].problem if name in failed and self._parameters[name].requires_grad else "",
                checks_heads=wants_heads and not partition[name].is_overridden,
                is_only_source=name in self._attending and any(name in names for names in unclaimed.values()),
            )
            for name, seen in self._seen.items()
        }
        return _Trial(strategy, dict(overrides), dict(layouts), partition, verdicts, unclaimed)

    def remedy(self, trial: _Trial) -> _Trial:
        """The best partition among common orders, layouts as observed, and overrides; each is tried on the model."""
        best = trial
        wrong = trial.contradicted | trial.unknown(self._attending)
        for class_name, layout in self._as_seen(wrong, trial).items() if wrong else ():
            others = {key: own for key, own in best.layouts.items() if key != class_name}
            candidates: list[str | ModuleLayout] = [*(order.name for order in ORDERS), layout]
            best = self._best(best, [(best.overrides, {class_name: candidate, **others}) for candidate in candidates])
        for name in sorted(best.contradicted | best.unknown(self._attending)):
            rest = {key: own for key, own in best.overrides.items() if key != name}
            single = [{name: structure.value, **rest} for structure in (Structure.ROW, Structure.ELEMENT)]
            best = self._best(best, [(overrides, best.layouts) for overrides in single])
        return best

    def _best(
        self, trial: _Trial, others: Iterable[tuple[Mapping[str, str], Mapping[str, str | ModuleLayout]]]
    ) -> _Trial:
        """The first of those overrides and layouts with the fewest mistakes and no new one; else the given trial."""
        best = trial
        for overrides, layouts in others:
            try:
                other = self.judge(trial.strategy, overrides, layouts)
            except ValueError:
                continue
            if other.contradicted <= trial.contradicted and other.mistakes()[:2] < trial.mistakes()[:2]:
                best = other if best is trial or other.mistakes() < best.mistakes() else best
        return best

    def _as_seen(self, wrong: set[str], trial: _Trial) -> dict[str, ModuleLayout]:
        """Layouts as observed, by class: of whole modules that attend, then of other contradicted layers."""
        attending = [node for node in self._nodes.values() if node in map(self._attending.get, wrong)]
        places = {name: (node, Role.LINEAR) for name, node in self._attending.items() if node in attending}
        layers = {node.plain_name: node for node in self._nodes.values()}
        unknown = trial.unknown(self._seen)
        for name, seen in self._seen.items():
            if name in places or not seen.axes or name not in wrong | unknown:
                continue
            around = [node for node in attending if _is_within(self._plain[name], node.plain_name)]
            layer = layers.get(self._plain[name].rpartition(".")[0]) if name in wrong else None
            node = around[-1] if around else layer
            if node is not None and not type(node.module).__module__.startswith("torch."):
                roles = trial.partition[name].role.roles
                places[name] = (node, roles[0] if len(roles) == 1 and roles[0] in _MATRICES else Role.LINEAR)
        by_class: dict[type, dict[int, tuple[nn.Module, dict[str, tuple[Observation, Role]]]]] = defaultdict(dict)
        for name, (node, role) in places.items():
            _, own = by_class[type(node.module)].setdefault(id(node.module), (node.module, {}))
            own[self._plain[name].removeprefix(f"{node.plain_name}.")] = (self._seen[name], role)
        named = {self._tree.class_name(cls): list(modules.values()) for cls, modules in by_class.items()}
        layouts = {name: layout_of(name, modules) for name, modules in named.items()}
        return {name: layout for name, layout in layouts.items() if layout is not None}


def _is_within(name: str, prefix: str) -> bool:
    return not prefix or name.startswith(f"{prefix}.")
