"""Lightning: a LightningCLI whose `--optimizer` knows the module, and a mix-in for whoever writes it in Python.

Lightning's own builds an optimizer from `model.parameters()` when the command starts. That tells nothing of what a
parameter does, and it is too early for parameters of `configure_model` and for those that a strategy shards. Here the
optimizer is built when Lightning asks for it, and finds the module.
"""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Iterator, Mapping
from importlib import import_module
from types import MethodType
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch import cli as lightning_cli
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from lightning_adam_mini.factory import OptimizerFactory
from lightning_adam_mini.optim import AdamMini
from lightning_adam_mini.partition import annotate
from lightning_adam_mini.tasks.base import ConfiguresOptimizer

__all__ = ["ConfiguresOptimizer", "LightningArgumentParser", "LightningCLI"]


class _FactoryByPath(metaclass=ABCMeta):  # noqa: B024 - it has only virtual subclasses
    """Factories, but for jsonargparse without names: `AdamW` is torch's, as in Lightning."""


_FactoryByPath.register(OptimizerFactory)  # type: ignore[type-abstract]  # a virtual subclass is accepted, and not listed


class LightningArgumentParser(lightning_cli.LightningArgumentParser):
    """Lightning's parser, which also takes the factories of this package as optimizers, by their class path."""

    def add_optimizer_args(
        self,
        optimizer_class: type[Optimizer] | tuple[type[Optimizer], ...] = (Optimizer,),
        nested_key: str = "optimizer",
        link_to: str = "AUTOMATIC",
    ) -> None:
        """See Lightning's; an `Optimizer` among the classes stands for factories too.

        Args:
            optimizer_class: One class, or a tuple of classes with their subclasses.
            nested_key: The option that names the optimizer.
            link_to: The option of the model that gets it; by default it is used for all parameters.
        """
        options: dict[str, Any] = {"instantiate": False, "fail_untyped": False, "skip": {"params", "module"}}
        if isinstance(optimizer_class, tuple):
            classes: tuple[type, ...] = optimizer_class
            if Optimizer in classes:  # of several with the name AdamMini, such as pytorch-optimizer's, ours is meant
                classes = (AdamMini, *classes, _FactoryByPath)
            self.add_subclass_arguments(classes, nested_key, **options)
        else:
            self.add_class_arguments(optimizer_class, nested_key, sub_configs=True, **options)
        self._optimizers[nested_key] = (optimizer_class, link_to)


class LightningCLI(lightning_cli.LightningCLI):
    """Lightning's LightningCLI, with the right partition for `--optimizer AdamMini`.

    Optimizers and schedulers are built in `configure_optimizers`, so that parameters of `configure_model` and sharded
    ones are theirs. Of several optimizers, which the module builds itself from its options, AdamMini finds the module
    too. `--trainer.strategy fsdp2` and `hsdp` are known.

    Args:
        *args: Those of Lightning's.
        **kwargs: Those of Lightning's; `parser_class` is a subclass of `LightningArgumentParser`, this package's.

    Example:
        `python train.py fit --optimizer AdamMini --optimizer.lr 1e-3 --optimizer.partition factored`
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"parser_class": LightningArgumentParser, **kwargs})

    def _add_configure_optimizers_method_to_model(self, subcommand: str | None) -> None:
        """Let the model build its optimizer when it is asked for it.

        There is no public place for that: `configure_optimizers` of LightningCLI gets the optimizer built.
        """
        parser = self._parser(subcommand)
        chosen = dict(self._chosen(parser._optimizers))
        if any(issubclass(_class_of(init), AdamMini) for init in chosen.values()):
            annotate(self.model)  # also for those that the module builds
        automatic = [key for key in chosen if parser._optimizers[key][1] == "AUTOMATIC"]
        schedulers = [key for key, (_, link_to) in parser._lr_schedulers.items() if link_to == "AUTOMATIC"]
        if not self.auto_configure_optimizers or len(automatic) != 1 or len(schedulers) > 1:
            super()._add_configure_optimizers_method_to_model(subcommand)  # nothing to build, or an error
            return
        init, scheduler = chosen[automatic[0]], dict(self._chosen(parser._lr_schedulers)).get("".join(schedulers))
        if is_overridden("configure_optimizers", self.model):
            rank_zero_warn(f"--{automatic[0]} is used instead of {type(self.model).__name__}.configure_optimizers")

        def configure_optimizers(module: LightningModule) -> Any:
            is_factory = issubclass(_class_of(init), OptimizerFactory)
            built = lightning_cli.instantiate_class(() if is_factory else module.parameters(), init)
            optimizer = built.build(module) if is_factory else built
            schedule = lightning_cli.instantiate_class(optimizer, scheduler) if scheduler else None
            return self.configure_optimizers(module, optimizer=optimizer, lr_scheduler=schedule)

        self.model.configure_optimizers = MethodType(configure_optimizers, self.model)

    def _chosen(self, register: Mapping[str, tuple[Any, str]]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The options that were given, as `class_path` and `init_args`."""
        for key, (classes, _) in register.items():
            if not (given := self._get(self.config_init, key)):
                continue
            if isinstance(classes, tuple):
                yield key, {"class_path": given.class_path, "init_args": dict(given.get("init_args") or {})}
            else:
                yield key, {"class_path": f"{classes.__module__}.{classes.__name__}", "init_args": dict(given)}


def _class_of(init: Mapping[str, Any]) -> type:
    module, _, name = init["class_path"].rpartition(".")
    found: type = getattr(import_module(module), name)
    return found
