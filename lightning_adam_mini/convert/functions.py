"""The public functions: a state of one optimizer as that of another, over the same parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_adam_mini.convert.conversion import convert
from lightning_adam_mini.convert.saved import SavedBy, saved_by
from lightning_adam_mini.optim import AdamMini

__all__ = ["from_adam_mini_package", "from_adamw", "repartition", "to_adamw"]


def from_adamw(
    state_dict: dict[str, Any],
    optimizer: AdamMini,
    *,
    names: Sequence[str] | None = None,
    keep_hyperparameters: bool = False,
) -> dict[str, Any]:
    """A state of AdamW or Adam as the state of an AdamMini: the second moment becomes its means over blocks.

    The first moment and the step stay. Nothing of the input is changed, and the first moments are shared with it where
    they are not stored in 8 bits on one side alone.

    Args:
        state_dict: `state_dict()` of `torch.optim.AdamW` or `Adam`, in any groups; or the same keyed by names.
        optimizer: The AdamMini over the same model; it is not changed. Load the result into it.
        names: Names of the parameters in the order in which the other optimizer had them. Needed where the state has
            none, and groups and shapes do not tell which is which.
        keep_hyperparameters: Take learning rate, betas, eps and weight decay from the state; by default they are those
            of `optimizer`.

    Raises:
        ValueError: The state of another optimizer or model, with the parameter and both shapes; AMSGrad; or
            hyperparameters that one group cannot have.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> adamw = torch.optim.AdamW(model.parameters())
        >>> model(torch.ones(4)).sum().backward()
        >>> adamw.step()
        >>> optimizer = AdamMini(model, partition="default")
        >>> optimizer.load_state_dict(from_adamw(adamw.state_dict(), optimizer))
    """
    _require(state_dict, SavedBy.ADAMW, "from_adamw")
    return convert(state_dict, optimizer, names=names, keep_hyperparameters=keep_hyperparameters).state


def from_adam_mini_package(
    state_dict: dict[str, Any], optimizer: AdamMini, *, keep_hyperparameters: bool = False
) -> dict[str, Any]:
    """A state of the authors' package `adam-mini` 1.1.1 as the state of an AdamMini.

    The package names its parameters. Where its blocks are others (fused or transposed matrices, which it does not
    know), they are expanded to elements, and those averaged over ours.

    Args:
        state_dict: `state_dict()` of the package's `Adam_mini`.
        optimizer: The AdamMini over the same model; it is not changed.
        keep_hyperparameters: As in `from_adamw`.

    Raises:
        ValueError: As `from_adamw`.
    """
    _require(state_dict, SavedBy.PACKAGE, "from_adam_mini_package")
    return convert(state_dict, optimizer, keep_hyperparameters=keep_hyperparameters).state


def repartition(
    state_dict: dict[str, Any],
    optimizer: AdamMini,
    *,
    names: Sequence[str] | None = None,
    keep_hyperparameters: bool = False,
) -> dict[str, Any]:
    """A state of an AdamMini as the state of one with another partition.

    Blocks are expanded to elements, and those averaged over the other blocks; equal cuts stay as they are, bit by bit.

    Args:
        state_dict: `state_dict()` of an AdamMini.
        optimizer: The other AdamMini, over the same model; it is not changed.
        names: As in `from_adamw`.
        keep_hyperparameters: As in `from_adamw`.

    Raises:
        ValueError: As `from_adamw`; or a state that neither names its partition nor tells it by its shapes.
    """
    _require(state_dict, SavedBy.ADAM_MINI, "repartition")
    return convert(state_dict, optimizer, names=names, keep_hyperparameters=keep_hyperparameters).state


def to_adamw(
    state_dict: dict[str, Any],
    optimizer: Optimizer,
    *,
    names: Sequence[str] | None = None,
    keep_hyperparameters: bool = False,
) -> dict[str, Any]:
    """A state of an AdamMini as the state of AdamW: each element gets the value of its block.

    A factored second moment gives the product of its row and column. What the blocks averaged does not come back: the
    first steps of AdamW have the step sizes of Adam-mini.

    Args:
        state_dict: `state_dict()` of an AdamMini.
        optimizer: The `torch.optim.AdamW` over the same parameters; or the AdamMini that wrote the state, for an AdamW
            over the groups that it has. It is not changed.
        names: As in `from_adamw`.
        keep_hyperparameters: As in `from_adamw`.

    Raises:
        ValueError: As `repartition`.
    """
    _require(state_dict, SavedBy.ADAM_MINI, "to_adamw")
    return convert(
        state_dict, optimizer, names=names, keep_hyperparameters=keep_hyperparameters, by_elements=True
    ).state


def _require(state_dict: dict[str, Any], expected: SavedBy, function: str) -> None:
    found = saved_by(state_dict)
    if found is not expected:
        other = {
            SavedBy.ADAMW: "from_adamw",
            SavedBy.ADAM_MINI: "repartition or to_adamw",
            SavedBy.PACKAGE: "from_adam_mini_package",
        }
        raise ValueError(f"{function} takes a state of {expected}, and this is one of {found}; use {other[found]}")
