"""The base of all factories: shared options, parameter groups, and checks before the first step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from lightning_adam_mini.optim.distributed import is_dtensor, is_flattened
from lightning_adam_mini.optim.params import WeightDecayPolicy, decay_groups
from lightning_adam_mini.partition import ParameterPartition, partition_module

__all__ = ["OptimizerFactory", "from_pytorch_optimizer", "require"]


@dataclass(frozen=True, kw_only=True)
class OptimizerFactory(ABC):
    """Options that all optimizers share.

    Args:
        lr: Peak learning rate, which the schedule scales.
        weight_decay: Weight decay coefficient.
        weight_decay_policy: `matrices` spares biases, norm scales and other vectors; `all` spares nothing.
    """

    lr: float = 3e-4
    weight_decay: float = 0.1
    weight_decay_policy: WeightDecayPolicy = "matrices"

    decoupled_weight_decay: ClassVar[bool] = True
    """Whether a step shrinks a weight by about `lr * weight_decay`, as AdamW's does, so that its value can be kept."""
    elementwise: ClassVar[bool] = False
    """Whether each element is updated by itself, so that complex and sharded parameters are as good as others."""
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
        """Build the optimizer over the parameters of `module`, in a group that decays and one that does not.

        Frozen parameters are in the groups too, so that they train once they are unfrozen; they have no state until
        then.

        Raises:
            ValueError: The options do not fit the module, or the optimizer cannot train one of its parameters.
        """

    def predict_state_bytes(self, module: nn.Module) -> int | None:
        """Bytes of the optimizer's state once every trainable parameter has had a gradient; None where unknown.

        Nothing is allocated: a module on the meta device does.
        """
        return None

    def groups(self, module: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups of a module for optimizers that know no blocks.

        Raises:
            ValueError: Nothing to train, or a parameter that the optimizer cannot train.
        """
        return self.grouped(self.members(module))

    def grouped(self, members: list[tuple[nn.Parameter, ParameterPartition]]) -> list[dict[str, Any]]:
        """Parameters in a group that decays and one that does not; an empty one is left out."""
        return decay_groups(members, weight_decay=self.weight_decay, policy=self.weight_decay_policy)

    def members(self, module: nn.Module) -> list[tuple[nn.Parameter, ParameterPartition]]:
        """The parameters of the optimizer, frozen ones too, each with what it does in the module.

        Raises:
            ValueError: Nothing to train, or a parameter that the optimizer cannot train.
        """
        optimizer = type(self).__name__
        cuts = partition_module(module, "element")
        members = [(parameter, cuts[name]) for name, parameter in module.named_parameters()]
        self.refuse_frozen(module)
        for parameter, cut in members if not self.elementwise else ():
            if not parameter.requires_grad:
                continue
            if parameter.is_complex():
                raise ValueError(
                    f"{cut.name}: {optimizer} does not train complex parameters; train torch.view_as_real of it "
                    "instead, or take AdamW, Adam, SGD or Lion"
                )
            if is_dtensor(parameter) or is_flattened(parameter):
                raise ValueError(
                    f"{cut.name}: {optimizer} needs whole tensors, and this one is sharded (FSDP, tensor parallelism); "
                    "train with strategy 'ddp' or on one device, or take AdamW, Adam, SGD or Lion"
                )
        self.refuse_sparse_gradients(module)
        return members

    def refuse_frozen(self, module: nn.Module) -> None:
        """Tell before training that there is nothing to train.

        Raises:
            ValueError: All parameters are frozen.
        """
        if not self.parameters(module):
            raise ValueError("no parameter requires a gradient: all are frozen")

    def refuse_sparse_gradients(self, module: nn.Module) -> None:
        """Tell before training what the first step would.

        Raises:
            ValueError: An embedding that is trained gives sparse gradients.
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
    """Raise where an option is out of its range.

    Raises:
        ValueError: It is.
    """
    if not holds:
        raise ValueError(f"{option} must be {expected}, not {value}")


def from_pytorch_optimizer(name: str) -> Callable[..., Optimizer]:
    """A class of the package pytorch-optimizer, which extras install.

    Raises:
        ValueError: The package is not installed.
    """
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise ValueError(
            f"{name} needs the package pytorch-optimizer; install it with pip install 'lightning-adam-mini[app]'"
        ) from error
    return getattr(pytorch_optimizer, name)
