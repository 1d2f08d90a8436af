"""The base of all factories: shared options, parameter groups, and checks before the first step.

Also the base of optimizers that this package implements itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adam_mini.hints import require_package
from lightning_adam_mini.optim.distributed import is_dtensor, is_flattened
from lightning_adam_mini.optim.params import WeightDecayPolicy, decay_groups
from lightning_adam_mini.partition import ParameterPartition, partition_module

__all__ = ["OptimizerFactory", "RuleOptimizer", "TensorwiseOptimizer", "from_pytorch_optimizer", "require"]


@dataclass(frozen=True, kw_only=True)
class OptimizerFactory(ABC):
    """Options that all optimizers share.

    Args:
        lr: Peak learning rate, which the schedule scales.
        weight_decay: Weight decay coefficient.
        weight_decay_policy: `matrices` leaves out biases, norm scales and other vectors; `all` decays everything.
    """

    lr: float = 3e-4
    weight_decay: float = 0.1
    weight_decay_policy: WeightDecayPolicy = "matrices"

    decoupled_weight_decay: ClassVar[bool] = True
    """Whether a step shrinks a weight by about `lr * weight_decay`, as in AdamW, so that AdamW's value fits."""
    elementwise: ClassVar[bool] = False
    """Whether the update of an element depends on no other, so that complex and sharded parameters work."""
    num_betas: ClassVar[int] = 2
    """How many decay rates `betas` has, where there is such an option."""

    def __post_init__(self) -> None:
        """Reject values that every optimizer would reject, before any model is built.

        Raises:
            ValueError: An option out of its range.
        """
        for option in ("lr", "weight_decay", "eps", "eps1", "eps2"):
            value = getattr(self, option, 0.0)
            require(0.0 <= value < float("inf"), option, "a finite number of at least 0", value)
        betas = tuple(getattr(self, "betas", (0.0,) * self.num_betas))
        if len(betas) != self.num_betas:
            raise ValueError(f"betas must be {self.num_betas} numbers, not {betas}")
        require(all(0.0 <= beta < 1.0 for beta in betas), "betas", "in [0, 1)", betas)
        for option in ("momentum", "beta1"):
            value = getattr(self, option, None)
            require(value is None or 0.0 <= value < 1.0, option, "in [0, 1)", value)

    @abstractmethod
    def build(self, module: nn.Module) -> Optimizer:
        """Build the optimizer over the parameters of `module`, in a group with weight decay and one without.

        Frozen parameters are in the groups too, so that they train once they are unfrozen; until then they have no
        state.

        Raises:
            ValueError: The options do not fit the module, or the optimizer cannot train one of its parameters.
        """

    def predict_state_bytes(self, module: nn.Module) -> int | None:
        """Bytes of the optimizer's state once every trainable parameter has had a gradient; None if unknown.

        Nothing is allocated, so the module may be on the meta device.
        """
        return None

    def groups(self, module: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups of a module, for all optimizers but Adam-mini.

        Raises:
            ValueError: Nothing to train, or a parameter that the optimizer cannot train.
        """
        return self.grouped(self.members(module))

    def grouped(self, members: list[tuple[nn.Parameter, ParameterPartition]]) -> list[dict[str, Any]]:
        """A group of parameters with weight decay and one without; an empty one is left out."""
        return decay_groups(members, weight_decay=self.weight_decay, policy=self.weight_decay_policy)

    def members(self, module: nn.Module) -> list[tuple[nn.Parameter, ParameterPartition]]:
        """The parameters of the module, frozen ones too, each with its role in an element-wise partition.

        Raises:
            ValueError: Nothing to train, or a parameter that the optimizer cannot train.
        """
        optimizer = type(self).__name__
        partition = partition_module(module, "element")
        self.refuse_frozen(module)
        for name, parameter in module.named_parameters():
            if self.elementwise or not parameter.requires_grad:
                continue
            if parameter.is_complex():
                raise ValueError(
                    f"{name}: {optimizer} does not train complex parameters; train torch.view_as_real of it instead, "
                    "or use AdamW, Adam, SGD or Lion"
                )
            if is_dtensor(parameter) or is_flattened(parameter):
                raise ValueError(
                    f"{name}: {optimizer} needs whole tensors, and this one is sharded (FSDP, tensor parallelism); "
                    "train with strategy 'ddp' or on one device, or use AdamW, Adam, SGD or Lion"
                )
        self.refuse_sparse_gradients(module)
        return [(parameter, partition[name]) for name, parameter in module.named_parameters()]

    def refuse_frozen(self, module: nn.Module) -> None:
        """Refuse a module with nothing to train, before training starts.

        Raises:
            ValueError: All parameters are frozen.
        """
        if not self.parameters(module):
            raise ValueError("no parameter requires a gradient: all are frozen")

    def refuse_sparse_gradients(self, module: nn.Module) -> None:
        """Refuse sparse gradients before training starts, where the first step would fail.

        Raises:
            ValueError: A trainable embedding has sparse gradients.
        """
        for name, child in module.named_modules():
            if isinstance(child, nn.Embedding | nn.EmbeddingBag) and child.sparse and child.weight.requires_grad:
                raise ValueError(
                    f"{name or type(child).__name__}: {type(self).__name__} does not take sparse gradients; make the "
                    "embedding with sparse=False"
                )

    def parameters(self, module: nn.Module) -> list[nn.Parameter]:
        """The trainable parameters alone, for predictions of memory."""
        return [parameter for parameter in module.parameters() if parameter.requires_grad]


def require(holds: bool, option: str, expected: str, value: object) -> None:
    """Check an option.

    Raises:
        ValueError: The condition does not hold.
    """
    if not holds:
        raise ValueError(f"{option} must be {expected}, not {value}")


def from_pytorch_optimizer(name: str) -> Callable[..., Optimizer]:
    """A class of the package pytorch-optimizer.

    Raises:
        ValueError: The package is not installed.
    """
    require_package("pytorch_optimizer", name, package="pytorch-optimizer")
    return getattr(import_module("pytorch_optimizer"), name)


class RuleOptimizer(Optimizer):
    """An optimizer whose subclasses write the update of all parameters; the step with its closure is here."""

    @abstractmethod
    def update_all_(self) -> None:
        """Update every parameter that has a gradient; called without autograd."""

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
            The loss that the closure returned, if any.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update_all_()
        return loss


class TensorwiseOptimizer(RuleOptimizer):
    """An optimizer whose subclasses write the update of one tensor.

    Each parameter counts its own steps, as `state["step"]` (float32, on the CPU).
    """

    @abstractmethod
    def update_(self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Update a parameter and its state in place; the gradient must not change.

        Args:
            param: The parameter.
            grad: Its gradient, of the same shape.
            state: Its state; at its first step only `step`, which is 1.
            group: The options of its group.
        """

    def update_all_(self) -> None:
        """See `RuleOptimizer.update_all_`."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None or not param.numel():
                    continue
                state = self.state[param]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
                state["step"] += 1
                self.update_(param, param.grad, state, group)
