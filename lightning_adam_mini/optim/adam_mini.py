"""AdamMini: AdamW with one second moment a block."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.optim.dispatch import Implementation, Stepper, options_of
from lightning_adam_mini.optim.distributed import (
    is_dtensor,
    is_flattened,
    laid_out_as,
    local,
    shard_dtensor,
    share_square_sums,
)
from lightning_adam_mini.optim.entries import Form, form_of, listed, named_parameters, parameter_of
from lightning_adam_mini.optim.fingerprint import NO_STATE
from lightning_adam_mini.optim.flat_state import FlatState, compress_state, expand_state
from lightning_adam_mini.optim.formats import check_exp_avg_dtype, check_format, check_rounds_something
from lightning_adam_mini.optim.fsdp1 import FlatRange, flat_ranges, whole_shapes
from lightning_adam_mini.optim.groups import WeightDecayPolicy, decay_groups
from lightning_adam_mini.optim.parameter_view import ParameterView, check_memory
from lightning_adam_mini.optim.params import check_gradient, check_group, check_not_flat, check_parameter, warn_user
from lightning_adam_mini.optim.shards import Shard
from lightning_adam_mini.optim.state import (
    check_is_state,
    check_state,
    fits_parameter,
    init_state,
    is_laid_out_as,
    restore_state,
    steps_taken,
)
from lightning_adam_mini.optim.stochastic_rounding import MAX_STEP, UNCOUNTED, Rounding, dtensor_positions, name_seed
from lightning_adam_mini.partition import (
    Layouts,
    ParameterPartition,
    Role,
    Strategy,
    doubts,
    partition_module,
    partition_tensors,
    recut,
    resolve_strategy,
)
from lightning_adam_mini.partition.tree import plain_names

__all__ = ["AdamMini", "Params"]

Params = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


@dataclass(frozen=True)
class _Change:
    """A parameter that is another tensor than it was, or has another shape, dtype, device or layout on ranks.

    Args:
        old: The parameter as the optimizer knows it.
        new: The parameter as it is; the same tensor where only what it holds has changed.
        cut: How it is cut now.
        shard: This rank's part of it.
        group: Number of its group.
    """

    old: Tensor
    new: Tensor
    cut: ParameterPartition
    shard: Shard
    group: int


# What looks at addresses and identities, calls C, and takes another way in the next step is not compiled, whatever is
# compiled around it. The decorator is the one of torch's optimizers: it loads the compiler with the first of them.
class AdamMini(Optimizer):
    r"""AdamW with one second moment for each block of parameters: half of AdamW's memory.

    .. math::
        v_b \leftarrow \beta_2 v_b + (1-\beta_2)\,\mathrm{mean}_b(g \odot g), \qquad
        p \leftarrow p - \eta\lambda p - \eta\,\hat m / (\sqrt{\hat v_b} + \epsilon)

    (Zhang et al. 2024, "Adam-mini: Use Fewer Learning Rates To Gain More", Algorithm 1). Blocks follow from the model:
    an attention head's rows of query and key, an output neuron, a token's row, or a whole tensor.

    Args:
        params: The model; or parameters, `named_parameters()` or parameter groups, as for any optimizer. Only a model,
            here or as `module`, tells the role of each parameter.
        lr: Learning rate.
        betas: Decay rates of the first and second moment, in [0, 1).
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay coefficient.
        module: The model, where `params` are parameters or groups of it.
        partition: How parameters are cut: `auto`, `transformer`, `transformer_early`, `factored`,
            `default`, `element`, or a `Strategy`.
        partition_overrides: Cuts by role, name or `re:` pattern; the first that matches wins.
        partition_layouts: Layouts for classes of the model, as in `partition_module`.
        weight_decay_policy: `matrices` spares vectors (biases, norm scales); `all` spares nothing. It applies where
            this class makes the groups; groups that you make decay as they say, or by `weight_decay`.
        exp_avg_dtype: Dtype of the first moment; None for the parameter's. `torch.uint8` keeps matrices of 4096
            elements or more as 8-bit codes with a scale for each 128, and smaller tensors in the parameter's dtype. The
            second moment is float32, or float64 for float64 parameters.
        stochastic_rounding: Round what is stored in bfloat16, parameters and first moments, up or down at random, right
            on average; the arithmetic is float32. Random bits depend on the parameter's name, the step and the element
            alone, so that resumed and sharded runs are the same runs. All parameters are float32 or bfloat16 then.
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
        Until its first step a parameter may change its shape. One that was replaced in `param_groups`, as by its
        shards, is known by its place.

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
        self._stepper = Stepper(implementation)
        self.exp_avg_dtype = exp_avg_dtype
        self.stochastic_rounding = stochastic_rounding
        self._module: Callable[[], nn.Module | None] = _no_module
        self._cuts: dict[Tensor, ParameterPartition] = {}
        self._forms: dict[Tensor, Form] = {}
        self._names: list[list[str]] = []
        self._shards: dict[Tensor, Shard] = {}
        self._plain_names: dict[Tensor, str] = {}
        self._roundings: dict[Tensor, Rounding] = {}

        if isinstance(params, nn.Module):
            if module is not None:
                raise ValueError("give the model once: as the first argument, or as module= beside parameter groups")
            module, entries = params, []
        else:
            entries = listed(params)
            if not entries:
                raise ValueError("AdamMini got an empty parameter list")

        named = dict(module.named_parameters()) if module is not None else named_parameters(entries)
        self._ranges: dict[Tensor, FlatRange] = {} if module is None else flat_ranges(module)
        if module is not None:
            with whole_shapes(self._ranges):
                strategy = resolve_strategy(partition, module, partition_layouts)
                cuts = partition_module(module, strategy, partition_overrides, partition_layouts)
            trained = [cuts[name] for name, parameter in named.items() if parameter.requires_grad]
            for doubt in doubts(trained, strategy, is_auto=partition == "auto"):
                warn_user(doubt)
        else:
            if partition_layouts:
                raise ValueError("partition_layouts need the model: AdamMini(model, ...), or module= beside parameters")
            check_not_flat(named)
            strategy = resolve_strategy(partition, None)
            shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
            cuts = partition_tensors(shapes, strategy, partition_overrides)
            if partition == "auto":
                warn_user(
                    "AdamMini got parameters without their model, so each tensor is one block, as for models that are "
                    "no Transformers. Pass the model, AdamMini(model, ...), or AdamMini(params, ..., module=model); "
                    "partition='default' says that this is meant."
                )
        self._strategy_of_unknown = Strategy(strategy.name, {}, otherwise=strategy.structure(Role.OTHER))
        self._cuts = {parameter: cuts[name] for name, parameter in named.items()}
        if module is not None:
            self._module = weakref.ref(module)
            self._plain_names = {named[name]: plain for name, plain in plain_names(module).items()}

        if not (entries and isinstance(entries[0], dict)):
            flat = [parameter_of(entry) for entry in entries] if entries else list(named.values())
            members = [(parameter, self._cut(parameter)) for parameter in flat]
            entries = decay_groups(members, weight_decay=weight_decay, policy=weight_decay_policy)
        super().__init__(entries, defaults)
        if stochastic_rounding and self.state:
            check_rounds_something(d for p, state in self.state.items() for d in (p.dtype, state["exp_avg"].dtype))

    @property
    def implementation(self) -> Implementation:
        """What takes the steps: of the first parameter, where several devices differ."""
        group = next(group for group in self.param_groups if group["params"])
        return self._stepper.on(group["params"][0], capturable=group["capturable"])

    @property
    def partition(self) -> dict[str, ParameterPartition]:
        """Parameters of all groups by name, with their roles and blocks."""
        self._follow_replaced()
        cuts = (self._cut(parameter) for group in self.param_groups for parameter in group["params"])
        return {cut.name: cut for cut in cuts}

    @_disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; the state of parameters that require a gradient is made at once.

        Parameters that neither the model nor an earlier group knows are cut as `Role.OTHER` is, and a warning says so.

        Args:
            param_group: Parameters (or pairs of name and parameter) under `params`, and options that differ.

        Raises:
            ValueError: As for the constructor.
        """
        (group,) = listed([param_group])
        self._follow_replaced()
        named = named_parameters(group["params"], offset=len(self._cuts))
        unknown = {name: tuple(p.shape) for name, p in named.items() if p not in self._cuts}
        if unknown:
            check_not_flat({name: named[name] for name in unknown})
            if taken := unknown.keys() & {cut.name for cut in self._cuts.values()}:
                raise ValueError(f"two parameters have the name {min(taken)!r}; give each a name of its own")
            strategy = self._strategy_of_unknown
            cuts = partition_tensors(unknown, strategy)
            warn_user(f"AdamMini was not told what {', '.join(unknown)} do: they are cut {strategy.otherwise}")
            self._cuts.update({named[name]: cut for name, cut in cuts.items()})
        group["params"] = list(named.values())
        check_group({**self.defaults, **group})
        trained = [parameter for parameter in group["params"] if parameter.requires_grad]
        self._stepper.check(trained, capturable={**self.defaults, **group}["capturable"])
        for parameter in trained:
            self._check_trained(parameter, self._cut(parameter))
        group["partition"] = self._signatures(group["params"])
        if self.stochastic_rounding:
            group.setdefault(UNCOUNTED, 0)
        super().add_param_group(group)
        group = self.param_groups[-1]
        self._forms.update({parameter: form_of(parameter) for parameter in group["params"]})
        self._names.append([self._cut(parameter).name for parameter in group["params"]])
        for parameter in trained:
            self._init_state(parameter, capturable=group["capturable"])

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
        _check_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        numbered = enumerate(self.param_groups) if self.stochastic_rounding else ()
        uncounted = {number for number, group in numbered if self._is_past_counting(group)}
        ready = self._stepper.ready(self.param_groups, self.state, apart_from=uncounted)
        # All that may be refused comes before the first write: the options and tensors of every group too.
        options = {number: options_of(self.param_groups[number]) for number in ready}
        anew: dict[int, list[ParameterView]] = {}
        if None in ready.values():
            with self._unchanged_if_refused():
                self._follow_parameters()
                for number in (number for number, grads in ready.items() if grads is None):
                    group = self.param_groups[number]
                    anew[number] = [
                        self._cut_tensor(p, group) for p in group["params"] if p.grad is not None or self._shares(p)
                    ]
                everything = [tensor for tensors in anew.values() for tensor in tensors]
                share_square_sums(everything, self._stepper.square_sums)
        for number, grads in ready.items():
            group = self.param_groups[number]
            if grads is not None:
                self._stepper.repeat(number, options[number], grads)
                continue
            with_grad = [tensor for tensor in anew[number] if tensor.grad is not None]
            self._stepper.take(with_grad, group, number=None if number in uncounted else number, state=self.state)
            if number in uncounted:
                group[UNCOUNTED] = group.get(UNCOUNTED, 0) + 1
        return loss

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
        with self._unchanged_if_refused():
            if self._forms.get(parameter) != form_of(parameter):
                self._follow_parameters(check_gradients=False)
            cut = self._cut(parameter)
            if self._shares(parameter):
                raise ValueError(
                    f"{cut.name} lies on several ranks, which step together: call step() for all parameters"
                )
            if parameter.grad is None:
                raise ValueError(f"{cut.name} has no gradient to take a step with")
            self._check_gradient(parameter)
            group = next(group for group in self.param_groups if any(p is parameter for p in group["params"]))
            tensor = self._cut_tensor(parameter, group)
        self._stepper.take([tensor], group)
        if self._is_past_counting({**group, "params": [parameter]}):
            group[UNCOUNTED] = group.get(UNCOUNTED, 0) + 1

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """The state as torch's optimizers save it.

        Parameters that the first FSDP has flattened have their second moments expanded to one value an element, since
        its checkpoints know nothing else.
        """
        self._follow_replaced()
        state_dict = super().state_dict()
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            saved["partition"] = self._signatures(group["params"], with_state_alone=True)
        return expand_state(state_dict, self._flat_states()) if self._ranges else state_dict

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that this class saved with the same partition.

        Args:
            state_dict: What `state_dict()` returned.

        Raises:
            ValueError: The state of another optimizer, model or partition, or one that is damaged: numbers that are
                missing, not finite, or out of their range. Nothing is changed then.
        """
        check_is_state(state_dict, is_wrapped=not self._ranges)
        with self._unchanged_if_refused():
            self._load(state_dict)

    def _load(self, state_dict: dict[str, Any]) -> None:
        loaded: dict[str, Any] = {}
        self._follow_parameters(check_gradients=False, keeps_state=False)
        if self._ranges:
            state_dict = compress_state(state_dict, self._flat_states(to_load=True))

        def check(_: Optimizer, state_dict: dict[str, Any]) -> None:
            check_state(state_dict, self.param_groups, self._cuts, self.defaults, saved_blocks=self._saved_blocks)
            loaded.update(state_dict)

        # Last of the hooks, so that it sees the state as hooks of the user or of a strategy leave it.
        handle = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for group, saved in zip(self.param_groups, loaded["param_groups"], strict=True):
            group["partition"] = self._signatures(group["params"])  # older states have none
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
        """What copies and pickles keep beside torch's own."""
        own = ("_stepper", "exp_avg_dtype", "stochastic_rounding", "_cuts", "_names", "_ranges", "_plain_names")
        kept = {name: self.__dict__[name] for name in (*own, "_strategy_of_unknown")}
        made_anew = {"_forms": {}, "_shards": {}, "_roundings": {}, "_module": _no_module}
        return {**super().__getstate__(), **kept, **made_anew}

    @contextmanager
    def _unchanged_if_refused(self) -> Iterator[None]:
        """Let what follows parameters be undone where something is refused: states that are replaced are kept aside.

        Within, a new state takes the place of an old one, and nothing is written into one that was there before.
        """
        state, groups = self.state, self.param_groups
        followed = ("_cuts", "_forms", "_shards", "_roundings", "_plain_names")
        kept = {name: dict(getattr(self, name)) for name in followed}
        states, names, entries = dict(state), self._names, [dict(group) for group in groups]
        try:
            yield
        except BaseException:
            state.clear()
            state.update(states)
            for group, before in zip(groups, entries, strict=True):
                group.clear()
                group.update(before)
            self.__dict__.update(kept, state=state, param_groups=groups, _names=names)
            raise

    def _follow_replaced(self) -> None:
        """Find parameters that were replaced in their groups, and nothing else."""
        if any(parameter not in self._cuts for group in self.param_groups for parameter in group["params"]):
            self._follow_parameters(check_gradients=False)

    def _follow_parameters(self, *, check_gradients: bool = True, keeps_state: bool = True) -> None:
        """Look at all parameters anew: follow what has changed, or refuse it and leave everything as it was.

        Args:
            check_gradients: Whether a step comes next, which takes their gradients.
            keeps_state: Whether the state that they have goes on; else one is loaded next.

        Raises:
            ValueError: A parameter that this optimizer does not know, that has another shape than its state, or whose
                gradient it cannot use.
        """
        places = [
            (number, place, parameter)
            for number, group in enumerate(self.param_groups)
            for place, parameter in enumerate(group["params"])
        ]
        replaced = self._find_replaced([(*place, p) for *place, p in places if p not in self._cuts])
        changes = {
            parameter: self._change(replaced.get(parameter, parameter), parameter, number, keeps_state=keeps_state)
            for number, _, parameter in places
            if self._forms.get(parameter) != form_of(parameter)
        }
        if check_gradients:
            with_gradient = [parameter for *_, parameter in places if parameter.grad is not None]
            for parameter in with_gradient:
                self._check_gradient(parameter, changes.get(parameter))
        if changes:
            self._apply(changes.values())
        if check_gradients and not with_gradient:
            self._check_against_module()
        self._names = [[self._cuts[parameter].name for parameter in group["params"]] for group in self.param_groups]

    def _find_replaced(self, unknown: list[tuple[int, int, Tensor]]) -> dict[Tensor, Tensor]:
        """The parameters in whose places others stand now: those have their names in the model, or their shapes.

        Args:
            unknown: Numbers of group and place of tensors that the optimizer does not know.

        Raises:
            ValueError: One of them stands in no known place, or it is another parameter of the model.
        """
        if not unknown:
            return {}
        module = self._module()
        names: dict[Tensor, str] = {p: n for n, p in module.named_parameters()} if module is not None else {}
        plain = plain_names(module) if module is not None else {}
        present = {plain[name] for name in names.values()}
        members = {parameter for group in self.param_groups for parameter in group["params"]}
        gone = {cut.name: parameter for parameter, cut in self._cuts.items() if parameter not in members}
        found: dict[Tensor, Tensor] = {}
        for number, place, parameter in unknown:
            known = self._names[number] if number < len(self._names) else []
            old = gone.get(known[place]) if len(known) == len(self.param_groups[number]["params"]) else None
            if old is None:
                raise ValueError(_unknown(parameter))
            name, own = self._plain_names.get(old, self._cuts[old].name), names.get(parameter)
            if own is None or plain[own] != name:
                if own is not None and name in present:
                    raise ValueError(
                        f"{own} of the model stands in the place of {name} in param_groups: put it in its own place, "
                        "or build a new AdamMini"
                    )
                if is_flattened(parameter) or tuple(parameter.shape) != self._cuts[old].blocks.shape:
                    raise ValueError(_unknown(parameter))
            found[parameter] = old
        return found

    def _change(self, old: Tensor, new: Tensor, group: int, *, keeps_state: bool) -> _Change:
        """What has happened to a parameter since it was last looked at.

        Raises:
            ValueError: It has another shape than its state, or cannot be stored or cut as asked.
        """
        cut, shape = self._cuts[old], tuple(new.shape)
        if old in self._ranges:
            flat = self._ranges[old]
            if shape != (flat.stop - flat.start,):
                raise ValueError(
                    f"{cut.name}: FSDP shows the shape {shape}, but this rank keeps the state of "
                    f"{flat.stop - flat.start} elements: step while the parameters are sharded"
                )
        elif shape != cut.blocks.shape:
            if keeps_state and (steps := steps_taken(self.state.get(old, {}))):
                raise ValueError(
                    f"{cut.name} had the shape {cut.blocks.shape} in {steps} steps and has {shape} now, which its "
                    "state does not fit: build a new AdamMini after changing a parameter, or begin this one anew with "
                    "optimizer.state.pop(parameter). Nothing has moved"
                )
            cut = recut(cut, shape)
        shard = self._make_shard(new, cut)
        if self.state.get(old):
            self._check_trained(new, cut)
        return _Change(old, new, cut, shard, group)

    def _apply(self, changes: Iterable[_Change]) -> None:
        """Take changes over; the state of a parameter goes on in its new layout, unless it begins anew."""
        by_old = {change.old: change for change in changes}
        states: dict[Tensor, dict[str, Tensor]] = {}
        for old, change in by_old.items():
            state = self.state.get(old)
            if state and not (change.new is old and change.cut is self._cuts[old] and is_laid_out_as(state, old)):
                capturable = self.param_groups[change.group]["capturable"]
                fresh = self._fresh_state(change.new, change.cut, change.shard, capturable=capturable)
                if change.cut is self._cuts[old] and not state["exp_avg"].is_meta:
                    restore_state(fresh, state)
                states[change.new] = fresh
        # Nothing is refused any more. The order of the parameters stays, which is that of the model.
        now = {old: change.new for old, change in by_old.items()}
        cuts = ((p, by_old[p].cut if p in by_old else cut) for p, cut in self._cuts.items())
        self._cuts = {now.get(p, p): cut for p, cut in cuts}
        self._plain_names = {now.get(p, p): name for p, name in self._plain_names.items()}
        for old, change in by_old.items():
            for known in (self._forms, self._shards, self._roundings):
                known.pop(old, None)
            if change.new is not old:
                self.state.pop(old, None)
            self._forms[change.new], self._shards[change.new] = form_of(change.new), change.shard
        self.state.update(states)
        for group in self.param_groups:
            group["partition"] = self._signatures(group["params"])

    def _check_against_module(self) -> None:
        """Raise where a step would do nothing, since the model has got other parameters, which have the gradients."""
        module = self._module()
        mine = {self._cut(p).name for group in self.param_groups for p in group["params"]}
        for name, parameter in module.named_parameters() if module is not None else ():
            if parameter.grad is not None and parameter not in self._cuts and name in mine:
                raise ValueError(
                    f"{name}: the model has another parameter than when the optimizer was built, and no parameter of "
                    "the optimizer has a gradient; build AdamMini after fully_shard or whatever replaces parameters"
                )

    def _check_gradient(self, parameter: Tensor, change: _Change | None = None) -> None:
        """Raise where a step cannot take the gradient of a parameter, or not make its state."""
        cut = self._cut(parameter) if change is None else change.cut
        assert parameter.grad is not None
        check_gradient(cut.name, parameter, parameter.grad)
        if not self.state.get(parameter):
            self._check_trained(parameter, cut)

    def _check_trained(self, parameter: Tensor, cut: ParameterPartition) -> None:
        """Raise where a parameter cannot be trained, or does not go with the formats that are asked for."""
        check_parameter(cut.name, parameter)
        check_format(
            cut.name,
            parameter,
            cut.blocks.shape,
            exp_avg_dtype=self.exp_avg_dtype,
            stochastic_rounding=self.stochastic_rounding,
        )

    def _cut(self, parameter: Tensor) -> ParameterPartition:
        cut = self._cuts.get(parameter)
        if cut is None:
            raise ValueError(_unknown(parameter))
        return cut

    def _signatures(self, parameters: Iterable[Tensor], *, with_state_alone: bool = False) -> str:
        """The cuts of parameters, which a saved state must agree with; of those without a state it has none."""
        return "; ".join(
            self._cut(p).blocks.signature if self.state.get(p) or not with_state_alone else NO_STATE for p in parameters
        )

    def _shard(self, parameter: Tensor) -> Shard:
        """How this rank's part of a parameter is cut."""
        shard = self._shards.get(parameter)
        if shard is None:
            shard = self._shards[parameter] = self._make_shard(parameter, self._cut(parameter))
        return shard

    def _make_shard(self, parameter: Tensor, cut: ParameterPartition) -> Shard:
        if parameter in self._ranges:
            return self._ranges[parameter].shard(cut.blocks, parameter.device.type)
        if is_dtensor(parameter):
            return shard_dtensor(cut.name, parameter, cut.blocks)
        return Shard(cut.blocks)

    def _is_past_counting(self, group: Mapping[str, Any]) -> bool:
        """Whether some step of a group is one that float32 cannot count past, so that it does not tell steps apart."""
        if not self.stochastic_rounding or group["capturable"]:
            return False
        return any(steps_taken(self.state.get(parameter, {})) >= MAX_STEP for parameter in group["params"])

    def _rounding(self, parameter: Tensor, group: Mapping[str, Any]) -> Rounding | None:
        """The random bits of a parameter, where something of it is stored in bfloat16."""
        state = self.state[parameter]
        if not self.stochastic_rounding or torch.bfloat16 not in (parameter.dtype, state["exp_avg"].dtype):
            return None
        cut = self._cut(parameter)
        name = self._plain_names.get(parameter, cut.name)
        rounding = self._roundings.get(parameter)
        if rounding is None:
            seed = name_seed(name)
            if parameter in self._ranges:
                flat = self._ranges[parameter]
                rounding = Rounding(seed, (flat.stop - flat.start,), start=flat.start)
            elif is_dtensor(parameter):
                rounding = Rounding(seed, cut.blocks.shape, dtensor_positions(parameter))
            else:
                rounding = Rounding(seed, cut.blocks.shape)
            self._roundings[parameter] = rounding
        if not group["capturable"] and steps_taken(state) >= MAX_STEP:
            return replace(rounding, seed=name_seed(name, group.get(UNCOUNTED, 0)))
        return rounding

    def _saved_blocks(self, parameter: Tensor) -> Blocks:
        """How the second moments in a state dict are cut: DTensors are whole, flattened parameters are this rank's."""
        return self._shard(parameter).local_blocks if parameter in self._ranges else self._cut(parameter).blocks

    def _shares(self, parameter: Tensor) -> bool:
        """Whether other ranks wait for this one's part of the sums of squares, also where it has no gradient."""
        return parameter.requires_grad and bool(self._shard(parameter).groups)

    def _flat_states(self, *, to_load: bool = False) -> list[FlatState]:
        """Flattened parameters whose second moments have another shape than this rank's part."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        return [
            FlatState(number, p, self._cut(p), self._shard(p), self.state.get(p) or None)
            for number, p in enumerate(parameters)
            if p in self._ranges and self._shard(p).boxes is not None and (to_load or self.state.get(p))
        ]

    def _init_state(self, parameter: Tensor, *, capturable: bool) -> None:
        cut = self._cut(parameter)
        if cut.problem and not self.state.get(parameter):
            warn_user(
                f"{cut.name} was frozen when AdamMini was built, and is trained as by AdamW now, since it cannot be "
                f"cut: {cut.problem.removeprefix(f'{cut.name}: ')}"
            )
        self.state[parameter] = self._fresh_state(parameter, cut, self._shard(parameter), capturable=capturable)

    def _fresh_state(
        self, parameter: Tensor, cut: ParameterPartition, shard: Shard, *, capturable: bool
    ) -> dict[str, Tensor]:
        return init_state(parameter, cut.blocks, shard, exp_avg_dtype=self.exp_avg_dtype, capturable=capturable)

    def _cut_tensor(self, parameter: Tensor, group: Mapping[str, Any]) -> ParameterView:
        """A parameter with its gradient and state; the state follows a parameter that changed its device or dtype."""
        cut = self._cut(parameter)
        grad = parameter.grad
        if grad is not None:
            grad = local(laid_out_as(parameter, grad))
        check_memory(cut.name, local(parameter), grad)
        state = self.state[parameter]
        if not state or not fits_parameter(state, parameter, shape=cut.blocks.shape, exp_avg_dtype=self.exp_avg_dtype):
            self._check_trained(parameter, cut)
            self._init_state(parameter, capturable=group["capturable"])
            if state and not state["exp_avg"].is_meta:
                restore_state(self.state[parameter], state)
            state = self.state[parameter]
        moments = tuple(local(state[key]) for key in cut.blocks.state_shapes)
        shard = self._shard(parameter)
        exact = self._stepper.on(parameter, capturable=group["capturable"]) == "reference"
        scale = state.get("exp_avg_scale")
        return ParameterView(
            local(parameter),
            grad,
            shard,
            state["step"],
            local(state["exp_avg"]),
            moments,
            exact,
            exp_avg_scale=None if scale is None else local(scale),
            rounding=self._rounding(parameter, group),
            name=cut.name,
        )


def _unknown(parameter: Tensor) -> str:
    """The message about a tensor that the optimizer does not know."""
    return (
        f"AdamMini met a parameter of shape {tuple(parameter.shape)} that does not belong to the model it was built "
        "from; build the optimizer after wrapping or replacing parameters (DeepSpeed's flattened parameters are not "
        "supported), or add it with add_param_group"
    )


def _no_module() -> None:
    """In the place of the reference to the model, where there is none."""


def _check_capture(optimizer: Optimizer) -> None:
    """Torch's check that a step in a captured graph is capturable; torch renamed it, and warns about the old name."""
    check = getattr(optimizer, "_accelerator_graph_capture_health_check", None)
    (check or optimizer._cuda_graph_capture_health_check)()
