"""The optimizers whose step is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any, get_args

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from lightning_adam_mini import factory
from lightning_adam_mini.hints import did_you_mean
from lightning_adam_mini.optim.adam_mini import AdamMini
from lightning_adam_mini.optim.dispatch import Implementation

from ..arguments import UsageError
from ..messages import quiet
from ..models import Source, check_partition

__all__ = ["BASELINE", "Contender", "choose"]

BASELINE = "adamw-fused"
LR, WEIGHT_DECAY = 1e-4, 0.1

Build = Callable[[Source, str], Optimizer]


@dataclass(frozen=True)
class Contender:
    """One optimizer of a measurement.

    Args:
        name: Name of `--optimizers`.
        partition: Partition of AdamMini; empty for the others.
        label: Its name in the results.
        build: Builds it for the model of a source.
    """

    name: str
    partition: str
    label: str
    build: Callable[[Source], Optimizer]


def choose(names: Sequence[str] | None, source: Source, partitions: Sequence[str]) -> list[Contender]:
    """The contenders in the order of their names, the baseline first.

    Args:
        names: Names of `--optimizers`; None for all.
        source: The model.
        partitions: Partitions of AdamMini; that of the source if empty.

    Raises:
        UsageError: There is no optimizer or partition of that name; the message lists them.
        ValueError: Partitions are given, and no implementation of AdamMini.
    """
    for name in names or ():
        if name not in _BUILDS:
            hint = did_you_mean(name, _BUILDS, count=1)
            raise UsageError(f"--optimizers {name}: choose from {', '.join(_BUILDS)}{hint}")
    chosen = [BASELINE, *(name for name in names or _BUILDS if name != BASELINE)]
    ours = list(partitions) or [source.partition]
    if partitions and not any(name in _OURS for name in chosen):
        raise ValueError("--partition is for AdamMini, and no implementation of it is among --optimizers")
    for partition in partitions:
        check_partition(partition)
    found = []
    for name in chosen:
        for partition in ours if name in _OURS else [""]:
            label = f"{name} {partition}" if partition and len(ours) > 1 else name
            found.append(Contender(name, partition, label, _bound(_BUILDS[name], partition)))
    return found


def _bound(build: Build, partition: str) -> Callable[[Source], Optimizer]:
    return lambda source: build(source, partition)


def _adamw(**options: Any) -> Build:
    return lambda source, _: AdamW(_groups(source.model), lr=LR, **options)


def _adamw_8bit(source: Source, _: str) -> Optimizer:
    optimizer: Optimizer = _installed("torchao", "torchao.optim").AdamW8bit(_groups(source.model), lr=LR)
    return optimizer


def _authors(source: Source, _: str) -> Optimizer:
    """The reference implementation, with the sizes that it asks for if the model has a configuration."""
    package = _installed("adam-mini", "adam_mini")
    configs = (getattr(module, "config", None) for module in source.model.modules())
    config: Any = next((found for found in configs if hasattr(found, "num_attention_heads")), None)
    sizes = {}
    if config is not None:
        sizes = {"dim": config.hidden_size, "n_heads": config.num_attention_heads}
        if heads := getattr(config, "num_key_value_heads", None):
            sizes["n_kv_heads"] = heads
    with quiet():
        optimizer: Optimizer = package.Adam_mini(
            source.model.named_parameters(), lr=LR, weight_decay=WEIGHT_DECAY, verbose=False, **sizes
        )
    return optimizer


def _ours(implementation: Implementation | None, *, exp_avg_dtype: torch.dtype | None = None) -> Build:
    return lambda source, partition: AdamMini(
        source.model,
        lr=LR,
        weight_decay=WEIGHT_DECAY,
        partition=partition,
        partition_overrides=source.overrides,
        partition_layouts=source.layouts,
        exp_avg_dtype=exp_avg_dtype or source.exp_avg_dtype,
        implementation=implementation,
    )


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """The groups that recipes give AdamW: vectors do not decay."""
    return factory.AdamW(weight_decay=WEIGHT_DECAY).groups(model)


def _installed(package: str, module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(f"not installed; pip install {package}") from error


_OURS: Mapping[str, Build] = MappingProxyType(
    {
        **{f"adam-mini-{name}": _ours(name) for name in get_args(Implementation)},
        "adam-mini-8bit": _ours(None, exp_avg_dtype=torch.uint8),
    }
)
_BUILDS: Mapping[str, Build] = MappingProxyType(
    {
        BASELINE: _adamw(fused=True),
        "adamw-foreach": _adamw(foreach=True, fused=False),
        "adamw-8bit": _adamw_8bit,
        "authors": _authors,
        **_OURS,
    }
)
