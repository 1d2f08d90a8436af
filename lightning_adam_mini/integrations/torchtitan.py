"""AdamMini by its name in the groups of a torchtitan run.

torchtitan gives the factory of a named optimizer the groups of one model part, and not the part itself. So the
container annotates the parts before it builds the optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_adam_mini.optim import AdamMini
from lightning_adam_mini.optim.state import saved_signatures
from lightning_adam_mini.partition import annotate

try:
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
except ImportError as error:
    raise ImportError("this module needs torchtitan 0.3 or later: pip install 'torchtitan>=0.3'") from error

__all__ = ["AdamMiniContainer", "adam_mini"]

_NAME = "AdamMini"
_OPTIONS = {"lr", "betas", "eps", "weight_decay", "maximize", "capturable"}
_OF_TORCH = {"fused", "foreach"}
"""What torchtitan adds to all groups, for torch's own optimizers."""


class AdamMiniContainer(OptimizersContainer):
    """torchtitan's optimizers, with `AdamMini` among the names that a group of parameters may have.

    Each model part, such as a pipeline stage, has an AdamMini of its own. A saved state names each parameter and its
    blocks, so that it loads on other ranks and into other stages.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """How the model is partitioned; further options of AdamMini are `optimizer_factory_kwargs_by_name["AdamMini"]`.

        `implementation` is that of torch's optimizers; AdamMini chooses its own.

        Args:
            partition: Block structure of the parameters, as for `AdamMini`.
            partition_overrides: Block structures by role, name or `re:` pattern, as for `AdamMini`.
            partition_layouts: Layouts for classes of the model, as for `AdamMini`.
        """

        partition: str = "auto"
        partition_overrides: dict[str, str] = field(default_factory=dict)
        partition_layouts: dict[str, Any] = field(default_factory=dict)

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        """Build the optimizers of all parts.

        Args:
            config: Groups of parameters, and how the model is partitioned.
            model_parts: The model, or the stages of this rank, after they were parallelized.

        Raises:
            ValueError: No group has the name `AdamMini`, one has options that AdamMini lacks, or what `AdamMini`
                raises.
        """
        groups = [group for group in config.param_groups if group.optimizer_name == _NAME]
        if not groups:
            raise ValueError(
                f"no group of parameters has optimizer_name={_NAME!r}: use adam_mini(lr=...), or torchtitan's own "
                "OptimizersContainer.Config for a run without AdamMini"
            )
        for group in groups:
            if unknown := sorted(group.optimizer_kwargs.keys() - _OPTIONS - _OF_TORCH):
                raise ValueError(
                    f"optimizer_kwargs of the group {group.pattern!r} has {', '.join(unknown)}, but a group of "
                    f"AdamMini has {', '.join(sorted(_OPTIONS))}; options of the whole optimizer are fields of the "
                    f"config or in optimizer_factory_kwargs_by_name={{{_NAME!r}: {{...}}}}"
                )
        if config.implementation == "fused_opt_states_bf16":
            raise ValueError(
                "implementation='fused_opt_states_bf16' is for torch's Adam; use implementation='fused' and "
                f"optimizer_factory_kwargs_by_name={{{_NAME!r}: {{'exp_avg_dtype': torch.bfloat16}}}}"
            )
        for part in model_parts:
            annotate(part, config.partition, config.partition_overrides, config.partition_layouts)
        super().__init__(config, model_parts=model_parts)

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        return _build if name == _NAME else OptimizersContainer._resolve_optimizer_factory(name)

    def state_dict(self) -> dict[str, Any]:
        """The state by parameter, as torchtitan saves it, with the blocks of each parameter under its own name."""
        flat: dict[str, Any] = super().state_dict()
        for keys in self._partition_keys():
            flat.update(zip(keys, saved_signatures([{"params": keys, "partition": flat[keys[0]]}]), strict=True))
        return flat

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that this class saved, from any number of ranks and stages.

        Args:
            state_dict: What `state_dict()` returned.

        Raises:
            ValueError: The state of another optimizer, model or partition.
        """
        flat = dict(state_dict)
        for keys in self._partition_keys():
            if missing := [key for key in keys if not isinstance(flat.get(key), str)]:
                raise ValueError(
                    f"the optimizer state has no {missing[0]!r}: it comes from another optimizer or model. Continue "
                    "with the optimizer that saved it, or load the weights alone"
                )
            flat[keys[0]] = "; ".join(flat[key] for key in keys)
        super().load_state_dict(flat)

    def _partition_keys(self) -> Iterator[list[str]]:
        """The keys under which a saved state has the blocks of the parameters, for each group of AdamMini.

        torchtitan saves the options of a group under each of its parameters and reads those of the first, so the names
        of all blocks would have to belong to the same group when they are read.
        """
        for optimizer in self.optimizers:
            if isinstance(optimizer, AdamMini):
                for group in optimizer.param_groups:
                    yield [f"param_groups.{name}.partition" for name in group["param_names"]]


def adam_mini(lr: float = 8e-4, *, partition: str = "auto", **options: Any) -> AdamMiniContainer.Config:
    """The config of a run in which AdamMini trains all parameters, as torchtitan's `default_adamw` does with AdamW.

    Args:
        lr: Learning rate.
        partition: Block structure of the parameters, as for `AdamMini`.
        options: Other options of the groups: `betas` (by default 0.9 and 0.95), `eps`, `weight_decay` (0.1).

    Returns:
        The config. Its fields can be changed.
    """
    kwargs = {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, **options}
    group = ParamGroupConfig(pattern=".*", optimizer_name=_NAME, optimizer_kwargs=kwargs)
    return AdamMiniContainer.Config(param_groups=[group], partition=partition)


def _build(groups: list[dict[str, Any]], **options: Any) -> AdamMini:
    """AdamMini for the groups of one annotated model part."""
    return AdamMini([{k: v for k, v in group.items() if k not in _OF_TORCH} for group in groups], **options)
