"""AdamMini: AdamW with one second moment a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload
from warnings import warn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.optim.cut_tensor import CutTensor
from lightning_adam_mini.optim.entries import listed, named_parameters, parameter_of
from lightning_adam_mini.optim.flat_state import FlatState, compress_state, expand_state
from lightning_adam_mini.optim.formats import check_exp_avg_dtype, check_format, check_rounds_something
from lightning_adam_mini.optim.fsdp1 import FlatRange, flat_ranges, whole_shapes
from lightning_adam_mini.optim.groups import WeightDecayPolicy, decay_groups
from lightning_adam_mini.optim.implementation import Implementation, Stepper
from lightning_adam_mini.optim.sharding import is_dtensor, laid_out_as, local, shard_dtensor, share_square_sums
from lightning_adam_mini.optim.shards import Shard
from lightning_adam_mini.optim.state import check_state, fits_parameter, init_state, restore_state
from lightning_adam_mini.optim.stochastic_rounding import Rounding, dtensor_positions, name_seed
from lightning_adam_mini.optim.validation import check_gradient, check_group, check_not_flat, check_parameter
from lightning_adam_mini.partition import (
    CutParameter,
    Layouts,
    Role,
    Strategy,
    doubts,
    partition_module,
    partition_tensors,
    resolve_strategy,
)
from lightning_adam_mini.partition.tree import plain_names

__all__ = ["AdamMini", "Params"]

Params = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


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
        partition: How parameters are cut: `auto`, `transformer`, `transformer_early`, `transformer_rank_one`,
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
            stochastic rounding of other dtypes or where nothing is bfloat16, an implementation that cannot run here, or
            nothing to train.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> optimizer = AdamMini(model, lr=1e-3, partition="default")
        >>> optimizer.state[model.weight]["exp_avg_sq"].shape
        torch.Size([1, 1])
    """

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
        self._cuts: dict[Tensor, CutParameter] = {}
        self._shards: dict[Tensor, Shard] = {}
        self._ranges: dict[Tensor, FlatRange] = {}
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
        strategy = resolve_strategy(partition, module, partition_layouts)
        self._strategy_of_unknown = Strategy(strategy.name, {}, otherwise=strategy.cut(Role.OTHER))
        if module is not None:
            self._ranges = flat_ranges(module)
            with whole_shapes(self._ranges):
                cuts = partition_module(module, strategy, partition_overrides, partition_layouts)
            for doubt in doubts(
                (cuts[name] for name, p in named.items() if p.requires_grad and name in cuts), strategy
            ):
                warn(doubt, stacklevel=2)
        else:
            if partition_layouts:
                raise ValueError("partition_layouts need the model: AdamMini(model, ...), or module= beside parameters")
            check_not_flat(named)
            shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
            cuts = partition_tensors(shapes, strategy, partition_overrides)
            if partition == "auto":
                warn(
                    "AdamMini got parameters without their model, so each tensor is one block, as for models that are "
                    "no Transformers. Pass the model, AdamMini(model, ...), or AdamMini(params, ..., module=model); "
                    "partition='default' says that this is meant.",
                    stacklevel=2,
                )
        self._cuts = {parameter: cuts[name] for name, parameter in named.items() if name in cuts}
        if module is not None:
            self._plain_names = {named[name]: plain for name, plain in plain_names(module).items()}

        if not (entries and isinstance(entries[0], dict)):
            flat = [parameter_of(entry) for entry in entries] if entries else list(named.values())
            trainable = [(parameter, self._cut(parameter)) for parameter in flat if parameter.requires_grad]
            if not trainable:
                raise ValueError("AdamMini got no parameter that requires a gradient: all are frozen")
            entries = decay_groups(trainable, weight_decay=weight_decay, policy=weight_decay_policy)
        super().__init__(entries, defaults)
        if stochastic_rounding:
            check_rounds_something(d for p, state in self.state.items() for d in (p.dtype, state["exp_avg"].dtype))

    @property
    def implementation(self) -> Implementation:
        """What takes the steps: of the first parameter, where several devices differ."""
        group = next(group for group in self.param_groups if group["params"])
        return self._stepper.on(group["params"][0], capturable=group["capturable"])

    @property
    def partition(self) -> dict[str, CutParameter]:
        """Parameters of all groups by name, with their roles and blocks."""
        cuts = (self._cuts[parameter] for group in self.param_groups for parameter in group["params"])
        return {cut.name: cut for cut in cuts}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its state is made at once.

        Parameters that neither the model nor an earlier group knows are cut as `Role.OTHER` is, and a warning says so.

        Args:
            param_group: Parameters (or pairs of name and parameter) under `params`, and options that differ.

        Raises:
            ValueError: As for the constructor.
        """
        (group,) = listed([param_group])
        named = named_parameters(group["params"], offset=len(self._cuts))
        unknown = {name: tuple(p.shape) for name, p in named.items() if p not in self._cuts}
        if unknown:
            check_not_flat({name: named[name] for name in unknown})
            strategy = self._strategy_of_unknown
            cuts = partition_tensors(unknown, strategy)
            warn(f"AdamMini was not told what {', '.join(unknown)} do: they are cut {strategy.otherwise}", stacklevel=2)
            self._cuts.update({named[name]: cut for name, cut in cuts.items()})
        group["params"] = list(named.values())
        check_group({**self.defaults, **group})
        self._stepper.check(group["params"], capturable={**self.defaults, **group}["capturable"])
        for parameter in group["params"]:
            check_parameter(self._cut(parameter).name, parameter)
            self._check_format(parameter)
        group["partition"] = self._signatures(group["params"])
        super().add_param_group(group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.requires_grad:
                self._init_state(parameter, capturable=self.param_groups[-1]["capturable"])

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            ValueError: A sparse gradient, or a parameter that was replaced after construction.
        """
        _check_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        anew = {
            number: [self._cut_tensor(p, group) for p in group["params"] if p.grad is not None or self._shares(p)]
            for number, group in enumerate(self.param_groups)
            if not self._stepper.repeat(number, group, self.state)
        }
        everything = [tensor for tensors in anew.values() for tensor in tensors]
        share_square_sums(everything, self._stepper.square_sums)
        for number, tensors in anew.items():
            with_grad = [tensor for tensor in tensors if tensor.grad is not None]
            self._stepper.take(with_grad, self.param_groups[number], number=number, state=self.state)
        return loss

    @torch.no_grad()
    def step_parameter(self, parameter: Tensor) -> None:
        """Take one step on one parameter alone, as soon as its gradient is there.

        Args:
            parameter: A parameter of this optimizer, with its gradient.

        Raises:
            ValueError: A parameter that other ranks hold parts of, whose blocks all ranks sum together; one without a
                gradient; or a sparse gradient.
        """
        cut = self._cut(parameter)
        if self._shares(parameter):
            raise ValueError(f"{cut.name} lies on several ranks, which step together: call step() for all parameters")
        if parameter.grad is None:
            raise ValueError(f"{cut.name} has no gradient to take a step with")
        group = next(group for group in self.param_groups if any(p is parameter for p in group["params"]))
        self._stepper.take([self._cut_tensor(parameter, group)], group)

    def state_dict(self) -> dict[str, Any]:
        """The state as torch's optimizers save it.

        Parameters that the first FSDP has flattened have their second moments expanded to one value an element, since
        its checkpoints know nothing else.
        """
        state_dict = super().state_dict()
        return expand_state(state_dict, self._flat_states()) if self._ranges else state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that this class saved with the same partition.

        Args:
            state_dict: What `state_dict()` returned.

        Raises:
            ValueError: The state of another optimizer, model or partition; nothing is changed then.
        """
        loaded: dict[str, Any] = {}
        if self._ranges:
            state_dict = compress_state(state_dict, self._flat_states())

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
            for parameter, number in zip(group["params"], saved["params"], strict=True):
                if number in loaded["state"]:
                    # torch has cast all of it to the parameter's dtype, which would lose the float32 second moment.
                    self._init_state(parameter, capturable=group["capturable"])
                    restore_state(self.state[parameter], loaded["state"][number])
                else:
                    self.state.pop(parameter, None)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles keep beside torch's own."""
        own = ("_stepper", "exp_avg_dtype", "stochastic_rounding", "_cuts", "_ranges", "_plain_names")
        kept = {name: self.__dict__[name] for name in (*own, "_strategy_of_unknown")}
        return {**super().__getstate__(), **kept, "_shards": {}, "_roundings": {}}

    def _cut(self, parameter: Tensor) -> CutParameter:
        cut = self._cuts.get(parameter)
        if cut is None:
            raise ValueError(
                f"AdamMini met a parameter of shape {tuple(parameter.shape)} that does not belong to the model it was "
                "built from; build the optimizer after wrapping or replacing parameters (DeepSpeed's flattened "
                "parameters are not supported)"
            )
        return cut

    def _signatures(self, parameters: Iterable[Tensor]) -> str:
        """The cuts of parameters, which a saved state must agree with."""
        return "; ".join(self._cut(parameter).blocks.signature for parameter in parameters)

    def _shard(self, parameter: Tensor) -> Shard:
        """How this rank's part of a parameter is cut."""
        shard = self._shards.get(parameter)
        if shard is None:
            cut = self._cut(parameter)
            if parameter in self._ranges:
                shard = self._ranges[parameter].shard(cut.blocks, parameter.device.type)
            elif is_dtensor(parameter):
                shard = shard_dtensor(cut.name, parameter, cut.blocks)
            else:
                shard = Shard(cut.blocks)
            self._shards[parameter] = shard
        return shard

    def _rounding(self, parameter: Tensor) -> Rounding | None:
        """The random bits of a parameter, where something of it is stored in bfloat16."""
        exp_avg_dtype = self.state[parameter]["exp_avg"].dtype
        if not self.stochastic_rounding or torch.bfloat16 not in (parameter.dtype, exp_avg_dtype):
            return None
        rounding = self._roundings.get(parameter)
        if rounding is None:
            cut = self._cut(parameter)
            seed = name_seed(self._plain_names.get(parameter, cut.name))
            if parameter in self._ranges:
                flat = self._ranges[parameter]
                rounding = Rounding(seed, (flat.stop - flat.start,), start=flat.start)
            elif is_dtensor(parameter):
                rounding = Rounding(seed, cut.blocks.shape, dtensor_positions(parameter))
            else:
                rounding = Rounding(seed, cut.blocks.shape)
            self._roundings[parameter] = rounding
        return rounding

    def _saved_blocks(self, parameter: Tensor) -> Blocks:
        """How the second moments in a state dict are cut: DTensors are whole, flattened parameters are this rank's."""
        return self._shard(parameter).frame if parameter in self._ranges else self._cut(parameter).blocks

    def _shares(self, parameter: Tensor) -> bool:
        """Whether other ranks wait for this one's part of the sums of squares, also where it has no gradient."""
        return parameter.requires_grad and bool(self._shard(parameter).groups)

    def _flat_states(self) -> list[FlatState]:
        """Flattened parameters whose second moments have another shape than this rank's part."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        return [
            FlatState(number, p, self._cut(p), self._shard(p), self.state[p])
            for number, p in enumerate(parameters)
            if p in self._ranges and p.requires_grad and self._shard(p).boxes is not None
        ]

    def _init_state(self, parameter: Tensor, *, capturable: bool) -> None:
        self.state[parameter] = init_state(
            parameter,
            self._cut(parameter).blocks,
            self._shard(parameter),
            exp_avg_dtype=self.exp_avg_dtype,
            capturable=capturable,
        )

    def _check_format(self, parameter: Tensor) -> None:
        """Raise where a parameter does not go with the formats that are asked for."""
        cut = self._cut(parameter)
        check_format(
            cut.name,
            parameter,
            cut.blocks.shape,
            exp_avg_dtype=self.exp_avg_dtype,
            stochastic_rounding=self.stochastic_rounding,
        )

    def _cut_tensor(self, parameter: Tensor, group: Mapping[str, Any]) -> CutTensor:
        """A parameter with its gradient and state; the state follows a parameter that changed its device or dtype."""
        cut = self._cut(parameter)
        grad = parameter.grad
        if grad is not None:
            check_gradient(cut.name, grad)
            grad = local(laid_out_as(parameter, grad))
        state = self.state[parameter]
        if not state or not fits_parameter(state, parameter, shape=cut.blocks.shape, exp_avg_dtype=self.exp_avg_dtype):
            self._check_format(parameter)
            self._init_state(parameter, capturable=group["capturable"])
            if state and not state["exp_avg"].is_meta:
                restore_state(self.state[parameter], state)
            state = self.state[parameter]
        moments = tuple(local(state[key]) for key in cut.blocks.state_shapes)
        shard = self._shard(parameter)
        exact = self._stepper.on(parameter, capturable=group["capturable"]) == "reference"
        scale = state.get("exp_avg_scale")
        return CutTensor(
            local(parameter),
            grad,
            shard,
            state["step"],
            local(state["exp_avg"]),
            moments,
            exact,
            exp_avg_scale=None if scale is None else local(scale),
            rounding=self._rounding(parameter),
        )


def _check_capture(optimizer: Optimizer) -> None:
    """Torch's check that a step in a captured graph is capturable; torch renamed it, and warns about the old name."""
    check = getattr(optimizer, "_accelerator_graph_capture_health_check", None)
    (check or optimizer._cuda_graph_capture_health_check)()
