"""AdamMini: AdamW with one second moment per block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from lightning_adam_mini.optim.dispatch import Dispatch, Implementation, StepPlan
from lightning_adam_mini.optim.distributed import laid_out_as, local, share_square_sums
from lightning_adam_mini.optim.fsdp1 import compress_state, expand_state, flat_ranges, whole_shapes
from lightning_adam_mini.optim.params import (
    WeightDecayPolicy,
    check_group,
    check_memory,
    check_not_flat,
    decay_groups,
    listed,
    named_parameters,
    parameter_of,
    warn_user,
)
from lightning_adam_mini.optim.quantized import check_exp_avg_dtype, check_rounds_something
from lightning_adam_mini.optim.state import (
    check_is_state,
    check_state,
    fits_parameter,
    restore_state,
    steps_taken,
)
from lightning_adam_mini.optim.stochastic_rounding import MAX_STEP, UNCOUNTED, Rounding, name_seed
from lightning_adam_mini.optim.tracking import ParameterTable
from lightning_adam_mini.optim.update import ParameterView, StepOptions
from lightning_adam_mini.partition import (
    Layouts,
    ParameterPartition,
    Role,
    Strategy,
    annotation_of,
    doubts,
    partition_module,
    partition_tensors,
    resolve_strategy,
)

__all__ = ["AdamMini", "Params"]

Params = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


# The methods look at addresses and identities, call C, and take another way in the next step, so torch.compile must not
# trace them, whatever is compiled around them. torch's own optimizers use the same decorator, which loads the compiler
# only with the first call.
class AdamMini(Optimizer):
    r"""AdamW with one second moment per block of parameters: half of AdamW's state.

    .. math::
        v_b \leftarrow \beta_2 v_b + (1-\beta_2)\,\mathrm{mean}_b(g \odot g), \qquad
        p \leftarrow p - \eta\lambda p - \eta\,\hat m / (\sqrt{\hat v_b} + \epsilon)

    (Zhang et al. 2024, "Adam-mini: Use Fewer Learning Rates To Gain More", Algorithm 1). Blocks follow from the model:
    an attention head's rows of query and key, an output neuron, a token's row, or a whole tensor.

    Args:
        params: The model; or parameters, `named_parameters()` or parameter groups, as for any optimizer. Only a model,
            here, as `module` or by `annotate`, tells the role of each parameter.
        lr: Learning rate.
        betas: Decay rates of the first and second moment, in [0, 1).
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay coefficient.
        module: The model, where `params` are parameters or groups of it.
        partition: Block structure of the parameters: `auto`, `transformer`, `transformer_early`, `factored`,
            `default`, `element`, or a `Strategy`.
        partition_overrides: Block structures by role, name or `re:` pattern; the first that matches wins.
        partition_layouts: Layouts for classes of the model, as in `partition_module`.
        weight_decay_policy: `matrices` excludes vectors (biases, norm scales); `all` excludes nothing. It applies where
            this class makes the groups; groups that you make decay by their own `weight_decay`, or by the default.
        exp_avg_dtype: Dtype of the first moment; None for the parameter's. `torch.uint8` keeps matrices of 4096
            elements or more as 8-bit codes with a scale per 128 elements, and smaller tensors in the parameter's dtype.
            The second moment is float32, or float64 for float64 parameters.
        stochastic_rounding: Round what is stored in bfloat16, parameters and first moments, up or down at random, so
            that it is right on average; the arithmetic is float32. Random bits depend only on the parameter's name, the
            step and the element, so that resumed and sharded runs are the same runs. All parameters must then be
            float32 or bfloat16.
        maximize: Ascend instead of descend.
        capturable: Keep all scalars on the device, so that CUDA graphs can capture a step.
        implementation: `reference` (one tensor at a time), `foreach` (lists of tensors), `fused` (kernels: in C on the
            CPU, in Triton on CUDA devices), or None to choose: `fused` on the CPU if there is a C compiler, else
            `foreach`.

    Raises:
        ValueError: A hyperparameter out of its range, an override or partition that does not fit the model, complex
            parameters, flattened ones whose wrapper is not given, shards that 8-bit first moments do not fit,
            stochastic rounding of other dtypes or where nothing is bfloat16, or an implementation that cannot run here.

    Note:
        As with AdamW, frozen parameters belong to the groups, and get their state when they first have a gradient.
        Until its first step a parameter may change its shape. One that was replaced in `param_groups`, for example by
        its shards, is identified by its place.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> optimizer = AdamMini(model, lr=1e-3, partition="default")
        >>> optimizer.state[model.weight]["exp_avg_sq"].shape
        torch.Size([1, 1])
    """

    @_disable_dynamo
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        module: nn.Module | None = None,
        partition: str | Strategy = "auto",
        partition_overrides: Mapping[str, str] | None = None,
        partition_layouts: Layouts | None = None,
        weight_decay_policy: WeightDecayPolicy = "matrices",
        exp_avg_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        implementation: Implementation | None = None,
    ) -> None:
        if weight_decay_policy not in ("matrices", "all"):
            raise ValueError(f"weight_decay_policy must be 'matrices' or 'all', not {weight_decay_policy!r}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
        }
        check_group(defaults)
        check_exp_avg_dtype(exp_avg_dtype, stochastic_rounding=stochastic_rounding)
        if isinstance(params, nn.Module):
            if module is not None:
                raise ValueError("give the model once: as the first argument, or as module= with parameter groups")
            module, entries = params, []
        else:
            entries = listed(params)
            if not entries:
                raise ValueError("AdamMini got an empty parameter list")
            if module is None and (found := annotation_of(_members(entries))):
                module = found.model
                partition = found.partition if partition == "auto" else partition
                partition_overrides = found.overrides if partition_overrides is None else partition_overrides
                partition_layouts = found.layouts if partition_layouts is None else partition_layouts
        self.exp_avg_dtype = exp_avg_dtype
        self.stochastic_rounding = stochastic_rounding
        self._dispatch = Dispatch(implementation)
        self._plan: StepPlan | None = None
        self._table = ParameterTable(module, exp_avg_dtype=exp_avg_dtype, stochastic_rounding=stochastic_rounding)

        if module is not None:
            named: dict[str, Tensor] = dict(module.named_parameters())
            ranges = flat_ranges(module)
            with whole_shapes(ranges):
                strategy = resolve_strategy(partition, module, partition_layouts)
                partitions = partition_module(module, strategy, partition_overrides, partition_layouts)
            trained = [partitions[name] for name, parameter in named.items() if parameter.requires_grad]
            for doubt in doubts(trained, strategy, is_auto=partition == "auto"):
                warn_user(doubt)
        else:
            if partition_layouts:
                raise ValueError("partition_layouts need the model: AdamMini(model, ...), or module= with parameters")
            named, ranges = named_parameters(entries), {}
            check_not_flat(named)
            strategy = resolve_strategy(partition, None)
            shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
            partitions = partition_tensors(shapes, strategy, partition_overrides)
            if partition == "auto" and sum(p.dim() > 1 for p in named.values()) > 1:
                raise ValueError(
                    "AdamMini got parameters without their model, which tells what each of them does: pass the model, "
                    "AdamMini(model, ...) or AdamMini(params, ..., module=model); or call "
                    "lightning_adam_mini.annotate(model) before, where a framework builds the optimizer. "
                    "partition='default' is one second moment a tensor"
                )
        self._strategy_of_unknown = Strategy(strategy.name, {}, otherwise=strategy.structure(Role.OTHER))
        self._table.add(named, partitions, ranges)

        if not (entries and isinstance(entries[0], dict)):
            parameters = [parameter_of(entry) for entry in entries] if entries else list(named.values())
            members = [(parameter, self._table[parameter].partition) for parameter in parameters]
            entries = decay_groups(members, weight_decay=weight_decay, policy=weight_decay_policy)
        super().__init__(entries, defaults)
        if stochastic_rounding and self.state:
            check_rounds_something(d for p, state in self.state.items() for d in (p.dtype, state["exp_avg"].dtype))

    @property
    def implementation(self) -> Implementation:
        """The implementation that takes the steps: of the first parameter, where several devices differ."""
        group = next(group for group in self.param_groups if group["params"])
        return self._dispatch.choose(group["params"][0], capturable=group["capturable"])

    @property
    def partition(self) -> dict[str, ParameterPartition]:
        """Parameters of all groups by name, with their roles and blocks."""
        self._table.follow_replaced(self.param_groups, self.state)
        members = (self._table[parameter].partition for group in self.param_groups for parameter in group["params"])
        return {partition.name: partition for partition in members}

    @_disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; the state of parameters that require a gradient is made at once.

        Parameters that neither the model nor an earlier group knows get the blocks of `Role.OTHER`, with a warning.

        Args:
            param_group: Parameters (or pairs of name and parameter) under `params`, and options that differ.

        Raises:
            ValueError: As for the constructor.
        """
        (group,) = listed([param_group])
        table = self._table
        table.follow_replaced(self.param_groups, self.state)
        named = named_parameters(group["params"], offset=len(table.known))
        if unknown := {name: p for name, p in named.items() if p not in table}:
            check_not_flat(unknown)
            if taken := unknown.keys() & {partition.name for partition in table.partitions()}:
                raise ValueError(f"two parameters have the name {min(taken)!r}; give each a name of its own")
            strategy = self._strategy_of_unknown
            partitions = partition_tensors({name: tuple(p.shape) for name, p in unknown.items()}, strategy)
            names = ", ".join(unknown)
            warn_user(f"AdamMini does not know what {names} do: their block structure is {strategy.otherwise}")
            table.add(unknown, partitions, {})
        group["params"] = list(named.values())
        options = {**self.defaults, **group}
        check_group(options)
        trained = [parameter for parameter in group["params"] if parameter.requires_grad]
        self._dispatch.check(trained, capturable=options["capturable"])
        for parameter in trained:
            table.check_trained(parameter, table[parameter].partition)
        group["partition"] = table.signatures(group["params"])
        if self.stochastic_rounding:
            group.setdefault(UNCOUNTED, 0)
        super().add_param_group(group)
        table.add_group(group["params"])
        for parameter in trained:
            self._init_state(parameter, capturable=options["capturable"])

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step, of all parameters with a gradient or, where one of them is refused, of none.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            ValueError: A gradient that is sparse, complex, or not of its parameter's shape, device and layout; a
                parameter that has changed its shape after it took steps; or one that this optimizer does not know.
        """
        plan = self._plan
        if plan is None or not plan.is_on_cpu:  # the check costs a fifth of a small step
            _check_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Whatever may be refused, in any group, comes before the first write.
        options = [StepOptions.of(group) for group in self.param_groups]
        past_counting = self._groups_past_counting() if self.stochastic_rounding else ()
        if plan is None or past_counting or not plan.holds(self.param_groups, self.state):
            plan = self._make_plan()
            is_kept = not past_counting and plan.keep(self.param_groups, self.state)
            self._plan = plan if is_kept else None
        for updates, scalars in zip(plan.updates, options, strict=True):
            for update in updates:
                update(scalars)
        plan.release()
        for group in past_counting:
            group[UNCOUNTED] = group.get(UNCOUNTED, 0) + 1
        return loss

    def _make_plan(self) -> StepPlan:
        """Look at all parameters anew; nothing is written, and a new state takes the place of one that does not fit."""
        with self._unchanged_if_refused():
            self._table.follow(self.param_groups, self.state)
            views = [
                [self._view(p, group) for p in group["params"] if p.grad is not None or self._shares(p)]
                for group in self.param_groups
            ]
            share_square_sums([view for members in views for view in members], self._dispatch.square_sums)
            updates = [
                self._dispatch.updates([v for v in members if v.grad is not None], capturable=group["capturable"])
                for members, group in zip(views, self.param_groups, strict=True)
            ]
        return StepPlan(views, updates)

    @_disable_dynamo
    @torch.no_grad()
    def step_parameter(self, parameter: Tensor) -> None:
        """Take one step on one parameter alone, as soon as its gradient is there.

        Args:
            parameter: A parameter of this optimizer, with its gradient.

        Raises:
            ValueError: A parameter that other ranks hold parts of, whose blocks all ranks sum together; one without a
                gradient; or what `step` refuses.
        """
        table = self._table
        with self._unchanged_if_refused():
            if not table.is_current(parameter):
                table.follow(self.param_groups, self.state, has_gradients=False)
            name = table[parameter].partition.name
            if self._shares(parameter):
                raise ValueError(f"{name} is sharded over ranks, which step together: call step() for all parameters")
            if parameter.grad is None:
                raise ValueError(f"{name} has no gradient to take a step with")
            table.check_gradient(parameter, self.state)
            group = next(group for group in self.param_groups if any(p is parameter for p in group["params"]))
            updates = self._dispatch.updates([self._view(parameter, group)], capturable=group["capturable"])
        options = StepOptions.of(group)
        for update in updates:
            update(options)
        if self._is_past_counting(group, [parameter]):
            group[UNCOUNTED] = group.get(UNCOUNTED, 0) + 1

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """The state as torch's optimizers save it.

        Parameters that FSDP1 has flattened have their second moments expanded to one value per element, all under the
        same keys, since its checkpoints know nothing else.
        """
        table = self._table
        table.follow_replaced(self.param_groups, self.state)
        state_dict = super().state_dict()
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            saved["partition"] = table.signatures(group["params"], self.state)
        if not table.has_flat_ranges:
            return state_dict
        groups, state = self.param_groups, self.state
        return expand_state(state_dict, table.flat_states(groups, state), table.flat_numbers(groups, state))

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that this class saved with the same partition.

        Args:
            state_dict: What `state_dict()` returned.

        Raises:
            ValueError: The state of another optimizer, model or partition, or one that is damaged: numbers that are
                missing, not finite, or out of their range. Nothing is changed then.
        """
        check_is_state(state_dict, is_wrapped=not self._table.has_flat_ranges)
        with self._unchanged_if_refused():
            self._load(state_dict)

    def _load(self, state_dict: dict[str, Any]) -> None:
        table, loaded = self._table, {}
        table.follow(self.param_groups, self.state, has_gradients=False, keeps_state=False)
        if table.has_flat_ranges:
            state_dict = compress_state(state_dict, table.flat_states(self.param_groups, self.state, to_load=True))

        def check(_: Optimizer, state_dict: dict[str, Any]) -> None:
            known = [table[parameter] for group in self.param_groups for parameter in group["params"]]
            names, blocks = [k.partition.name for k in known], [k.saved_blocks for k in known]
            check_state(state_dict, self.param_groups, names, self.defaults, saved_blocks=blocks)
            loaded.update(state_dict)

        # Last of the hooks, so that it sees the state as hooks of the user or of a strategy leave it.
        handle = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for group, saved in zip(self.param_groups, loaded["param_groups"], strict=True):
            group["partition"] = table.signatures(group["params"])  # older states have none
            if self.stochastic_rounding:
                group.setdefault(UNCOUNTED, 0)
            for parameter, number in zip(group["params"], saved["params"], strict=True):
                if number in loaded["state"]:
                    # torch has cast all of it to the parameter's dtype, which would lose the float32 second moment.
                    self._init_state(parameter, capturable=group["capturable"])
                    restore_state(self.state[parameter], loaded["state"][number])
                elif parameter.requires_grad:
                    self._init_state(parameter, capturable=group["capturable"])
                else:
                    self.state.pop(parameter, None)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles keep besides torch's own; they make their own plan."""
        kept = ("exp_avg_dtype", "stochastic_rounding", "_dispatch", "_table", "_strategy_of_unknown")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in kept}, "_plan": None}

    @contextmanager
    def _unchanged_if_refused(self) -> Iterator[None]:
        """Undo what was followed where something is refused.

        Within, a new state takes the place of an old one, and nothing is written into one that was there before.
        """
        state, groups, table = self.state, self.param_groups, self._table
        known, names, states, entries = dict(table.known), table.names, dict(state), [dict(group) for group in groups]
        try:
            yield
        except BaseException:
            state.clear()
            state.update(states)
            for group, before in zip(groups, entries, strict=True):
                group.clear()
                group.update(before)
            table.known, table.names = known, names
            self.__dict__.update(state=state, param_groups=groups)  # torch's load_state_dict replaces both
            raise

    def _shares(self, parameter: Tensor) -> bool:
        """Whether other ranks wait for this one's part of the sums of squares, also where it has no gradient."""
        shard = self._table[parameter].shard
        return parameter.requires_grad and shard is not None and bool(shard.groups)

    def _init_state(self, parameter: Tensor, *, capturable: bool) -> None:
        known = self._table[parameter]
        partition = known.partition
        if partition.problem and not self.state.get(parameter):
            warn_user(
                f"{partition.name} was frozen when AdamMini was built, and is trained as by AdamW now, since it cannot "
                f"be partitioned: {partition.problem.removeprefix(f'{partition.name}: ')}"
            )
        self.state[parameter] = self._table.fresh_state(parameter, known, capturable=capturable)

    def _view(self, parameter: Tensor, group: Mapping[str, Any]) -> ParameterView:
        """A parameter with its gradient and state; the state follows a parameter that changed its device or dtype."""
        known, grad, capturable = self._table[parameter], parameter.grad, group["capturable"]
        name, blocks = known.partition.name, known.partition.blocks
        if grad is not None:
            grad = local(laid_out_as(parameter, grad))
        check_memory(name, local(parameter), grad)
        state = self.state[parameter]
        if not state or not fits_parameter(state, parameter, shape=blocks.shape, exp_avg_dtype=self.exp_avg_dtype):
            self._table.check_trained(parameter, known.partition)
            self._init_state(parameter, capturable=capturable)
            if state and not state["exp_avg"].is_meta:
                restore_state(self.state[parameter], state)
            state = self.state[parameter]
        scale = state.get("exp_avg_scale")
        assert known.shard is not None
        return ParameterView(
            local(parameter),
            grad,
            known.shard,
            state["step"],
            local(state["exp_avg"]),
            tuple(local(state[key]) for key in blocks.state_shapes),
            exact=self._dispatch.choose(parameter, capturable=capturable) == "reference",
            exp_avg_scale=None if scale is None else local(scale),
            rounding=self._rounding(parameter, group),
            name=name,
        )

    def _rounding(self, parameter: Tensor, group: Mapping[str, Any]) -> Rounding | None:
        """The random bits of a parameter, where something of it is stored in bfloat16."""
        state = self.state[parameter]
        if not self.stochastic_rounding or torch.bfloat16 not in (parameter.dtype, state["exp_avg"].dtype):
            return None
        rounding = self._table.rounding(parameter)
        if self._is_past_counting(group, [parameter]):
            plain_name = self._table[parameter].plain_name
            return replace(rounding, seed=name_seed(plain_name, group.get(UNCOUNTED, 0)))
        return rounding

    def _groups_past_counting(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if self._is_past_counting(group, group["params"])]

    def _is_past_counting(self, group: Mapping[str, Any], parameters: Iterable[Tensor]) -> bool:
        """Whether a parameter has taken more steps than float32 counts, so that `step` no longer tells steps apart."""
        if not self.stochastic_rounding or group["capturable"]:
            return False
        return any(steps_taken(self.state.get(parameter, {})) >= MAX_STEP for parameter in parameters)


def _check_capture(optimizer: Optimizer) -> None:
    """Torch's check that a step in a captured graph is capturable; torch renamed it, and warns about the old name."""
    check = getattr(optimizer, "_accelerator_graph_capture_health_check", None)
    (check or optimizer._cuda_graph_capture_health_check)()


def _members(entries: Iterable[Any]) -> Iterator[Tensor]:
    """The parameters of checked entries."""
    for entry in entries:
        yield from _members(entry["params"]) if isinstance(entry, dict) else (parameter_of(entry),)
