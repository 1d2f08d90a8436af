"""The optimizer in a checkpoint: its state by numbers or names, its options, and both for another optimizer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from lightning_adam_mini.convert.conversion import Conversion
    from lightning_adam_mini.factory import OptimizerFactory

__all__ = ["KEPT", "build", "check_groups", "continued_factory", "converted_state", "named"]

KEPT = ("lr", "betas", "eps", "weight_decay")
"""Options that the checkpoint decides: `fit --ckpt_path` continues with its values too."""

log = logging.getLogger(__name__)


def continued_factory(
    factory: OptimizerFactory, checkpoint: Mapping[str, Any], state: Mapping[str, Any], passed: Sequence[str]
) -> OptimizerFactory:
    """The factory with the values that the checkpoint decides: the next run finds the same ones and says nothing."""
    saved = checkpoint.get("optimizer_factory")
    if saved is None:  # of another program
        groups = state["param_groups"]
        saved = {key: groups[0][key] for key in ("betas", "eps") if key in groups[0]}
        saved["lr"] = max(float(group.get("initial_lr", group["lr"])) for group in groups)
        saved["weight_decay"] = max(group.get("weight_decay", 0.0) for group in groups)
    given = {option.partition("=")[0] for option in passed}
    policy = () if "--optimizer.weight_decay_policy" in given else ("weight_decay_policy",)
    known = asdict(factory)
    kept = {key: saved[key] for key in (*KEPT, *policy) if key in saved and key in known}
    if "betas" in kept:
        kept["betas"] = tuple(kept["betas"])
    return replace(factory, **kept)


def build(factory: OptimizerFactory, task: nn.Module) -> tuple[Any, list[str]]:
    """The optimizer over the model without memory, and the names of its parameters in the order of its state."""
    optimizer = factory.build(task)
    names = {parameter: name for name, parameter in task.named_parameters()}
    for group in optimizer.param_groups:
        group["param_names"] = [names[parameter] for parameter in group["params"]]
    return optimizer, [name for group in optimizer.param_groups for name in group["param_names"]]


def converted_state(
    checkpoint: dict[str, Any], state: dict[str, Any], optimizer: Any, factory: OptimizerFactory
) -> dict[str, Any]:
    """The state for another optimizer; what else names the optimizer in the checkpoint is brought in line."""
    from lightning_adam_mini.convert.conversion import convert

    saved = checkpoint.get("optimizer_factory")
    if saved is not None and saved["name"] not in ("AdamW", "Adam", "AdamMini"):
        raise ValueError(
            f"the checkpoint was saved with {saved['name']}; states of AdamW, Adam and AdamMini are converted"
        )
    conversion = convert(state, optimizer, keep_hyperparameters=True)
    name = type(factory).__name__
    checkpoint["optimizer_factory"] = {"name": name, **asdict(factory)}
    if "optimizer" in checkpoint.get("hyper_parameters", {}):
        checkpoint["hyper_parameters"]["optimizer"] = factory
    for schedule in checkpoint.get("lr_schedulers", []):
        _regroup(schedule, len(state["param_groups"]), conversion)
    before, after = _num_bytes(state), _num_bytes(conversion.state)
    source = saved["name"] if saved else conversion.source
    log.info("%s", f"{source} -> {name}: {before:,} bytes of optimizer state -> {after:,}")
    return conversion.state


def _regroup(schedule: dict[str, Any], num_groups: int, conversion: Conversion) -> None:
    """Keep one entry a group in what a schedule keeps for each group."""
    for key in ("base_lrs", "_last_lr", "lr_lambdas"):
        values = schedule.get(key)
        if isinstance(values, list) and len(values) == num_groups:
            schedule[key] = [values[numbers[0] if numbers else 0] for numbers in conversion.group_sources]


def check_groups(state: Mapping[str, Any], optimizer: Any) -> None:
    """Check that a state, which has no names, is of the groups that the configuration makes."""
    sizes = [len(group["params"]) for group in state["param_groups"]]
    own = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != own:
        raise ValueError(
            f"the checkpoint has optimizer groups of {sizes} parameters, the configuration makes {own}: it belongs to "
            "another model or optimizer; give --recipe, what it was trained with"
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    for parameter, number in zip(parameters, numbers, strict=True):
        saved = state["state"].get(number, {}).get("exp_avg")
        if saved is not None and saved.shape != parameter.shape:
            raise ValueError(
                f"the optimizer state has a parameter of shape {tuple(saved.shape)} where the configuration has one of "
                f"shape {tuple(parameter.shape)}; give --recipe, what it was trained with"
            )


def named(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A numbered state keyed by names, as torch.distributed takes it."""
    groups = [{**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[number]: value for number, value in state["state"].items()}, "param_groups": groups}


def _num_bytes(state: Mapping[str, Any]) -> int:
    """Bytes of the tensors of a state."""
    values = (value for entry in state["state"].values() for value in entry.values())
    return sum(value.nbytes for value in values if hasattr(value, "nbytes"))
