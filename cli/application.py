"""LightningCLI with one optimizer factory, one schedule and one run folder for every task."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
import warnings
from argparse import ArgumentError
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, cast

import yaml
from jsonargparse import Namespace, get_loader, set_loader
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_warn

from lightning_adam_mini.factory import OptimizerFactory
from lightning_adam_mini.schedule import Schedule

from ..tasks.base import Task
from ..tasks.callbacks import (
    GracefulInterrupt,
    MonitorCheck,
    PerformanceMonitor,
    PredictionFile,
    RunCheckpoint,
    RunReport,
    StopOnDivergence,
)
from ..tasks.callbacks.checkpoint import PRIMARY_METRIC
from ..tasks.checkpoints.saving import AtomicCheckpointIO
from ..tasks.data.module import SampledDataModule
from ..tasks.errors import cannot_write
from ..tasks.metrics import MetricsFile
from .messages import (
    PATIENCE,
    failed_import,
    is_about_a_class,
    is_for_users,
    load_domains,
    must_be,
    near_option,
    type_of,
)
from .recipes import check_keys
from .run_folder import RUN_DIR, choose_run_dir, forget_run_dir, holds_run, lock_for_run, resolve_checkpoint

__all__ = ["Application"]

_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ProgressBar(RichProgressBar):
    """Lightning's rich progress bar, with the right total where `max_steps` ends the run within an epoch.

    The bar counts batches of an epoch, and Lightning compares them with the remaining optimizer steps.
    """

    @property
    def total_train_batches(self) -> int | float:
        """Batches of this epoch that will run before the run ends."""
        trainer = self.trainer
        in_epoch, steps = trainer.num_training_batches, trainer.max_steps
        if trainer.max_epochs != -1 or steps < 0:
            return in_epoch
        seen = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        seen = 0 if seen >= in_epoch else seen  # a new epoch begins
        per_step = trainer.accumulate_grad_batches
        return min(in_epoch, (seen // per_step + steps - trainer.global_step) * per_step)

    def _get_train_description(self, current_epoch: int) -> str:
        epochs = self.trainer.max_epochs or 0
        description = f"Epoch {current_epoch}/{epochs - 1}" if epochs > 0 else f"Epoch {current_epoch}"
        return description.ljust(len(self.validation_description))


class SaveRunConfig(SaveConfigCallback):
    """Saves `config.yaml` for `fit` only; that of an earlier start is kept under a number."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the configuration of this start."""
        if stage != "fit":
            return
        config = Path(trainer.default_root_dir) / self.config_filename
        if trainer.is_global_zero and config.exists() and holds_run(config.parent):
            number = 1 + sum(1 for _ in config.parent.glob(f"{config.stem}.*{config.suffix}"))
            config.rename(config.with_name(f"{config.stem}.{number}{config.suffix}"))
        self.overwrite = True  # an old file is of a start that failed before its first step
        self.config = self.config.clone()
        for of_this_start in ("run_dir", "ckpt_path"):  # the file is a recipe: used again, it starts a new run
            if of_this_start in self.config:
                self.config[of_this_start] = None
        self.config["allow_changed_data"] = False
        super().setup(trainer, pl_module, stage)


class Application(LightningCLI):
    """The subcommands that train and evaluate.

    Args:
        arguments: The command line without the program's name, with resolved recipes; or options as a nested dict.
        recipe: Stem of the recipe, which names the run.
        run: Whether to run the subcommand, or only to parse and instantiate.
    """

    def __init__(self, arguments: list[str] | dict[str, Any], *, recipe: str | None = None, run: bool = True) -> None:
        self.recipe = recipe
        self._command = arguments[0] if run and isinstance(arguments, list) else None
        self._created: list[Path] = []  # folders of a new run, the innermost first
        # Lightning starts other ranks with sys.argv, as the user typed it, and they resolve recipes again.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
        warnings.filterwarnings("ignore", message=".*LeafSpec", module="lightning")  # Lightning calls deprecated torch
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # of a resumed run
        warnings.filterwarnings("ignore", message="The number of training batches")  # graphs have one batch
        try:
            super().__init__(
                Task,
                LightningDataModule,
                save_config_callback=SaveRunConfig,
                trainer_defaults={"enable_model_summary": False, "use_distributed_sampler": False},
                seed_everything_default=1337,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                parser_kwargs={
                    "prog": "adam-mini",
                    "description": "Train with Adam-mini and its peers.",
                    "exit_on_error": False,
                    **{command: {"exit_on_error": False} for command in self.subcommands()},
                },
                args=arguments,
                run=run,
            )
        except Exception as error:
            self._clean_up(error)
            if isinstance(error, OSError) and error.errno in _DISK_IS_FULL and error.filename is None:
                place = f"to {os.environ.get(RUN_DIR)}"
                raise cannot_write(place, error, "free space or set another --run_dir") from error
            raise
        finally:
            forget_run_dir()

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The subcommand that runs: building a parser for each, as Lightning does, takes seconds."""
        return {name: skip for name, skip in super().subcommands().items() if self._command in (None, name)}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options besides those of model, data and trainer."""
        parser.add_subclass_arguments(OptimizerFactory, "optimizer", instantiate=False, required=True)
        parser.set_defaults({"optimizer": {"class_path": "lightning_adam_mini.factory.AdamMini"}})
        parser.add_argument("--schedule", type=Schedule, default=Schedule(), help="Learning-rate schedule.")
        parser.link_arguments("optimizer", "model.init_args.optimizer")
        parser.link_arguments("schedule", "model.init_args.schedule")
        parser.add_argument(
            "--run_dir", type=str | None, default=None, help="Folder of the run; runs/RECIPE, numbered, by default."
        )
        parser.add_argument(
            "--allow_changed_data", type=bool, default=False, help="Continue although the samples of the run changed."
        )
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.save_last": True,
                "checkpoint.monitor": PRIMARY_METRIC,
                "checkpoint.filename": "best-{step}",
                "checkpoint.save_top_k": 1,
                # Otherwise, in a folder that was moved, the next one would be `last-v1.ckpt`, which is never resumed.
                "checkpoint.enable_version_counter": False,
            }
        )
        parser.add_lightning_class_args(PerformanceMonitor, "performance")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; suggest options for unknown ones, and reject null and blank values."""
        parsers = [parser, *getattr(self, "_subcommand_parsers", {}).values()]
        try:
            try:
                super().parse_arguments(parser, args)
            except (ArgumentError, TypeError) as error:
                if not is_about_a_class(str(error)):
                    raise
                load_domains()  # takes seconds, so only the domain that the recipe names is loaded at first
                super().parse_arguments(parser, args)
        except (ArgumentError, TypeError) as error:
            if failure := failed_import(error):
                raise ArgumentError(None, failure) from error
            options = {name for own in parsers for name in own._option_string_actions}
            raise ArgumentError(None, near_option(str(error), options)) from error
        except Exception as error:
            if (failure := failed_import(error)) is None:
                raise
            raise ArgumentError(None, failure) from error
        config = self.config[command] if (command := self.config.get("subcommand")) else self.config
        for option, value, hint in _values(parsers[-1], config):
            if message := must_be(option, value, hint):
                raise ArgumentError(None, message)

    def before_instantiate_classes(self) -> None:
        """Settle the run folder and the checkpoint before anything is built."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        checkpoint, is_fit = config.get("ckpt_path"), self.subcommand == "fit"
        # A checkpoint of another run, given by its path, starts a new folder.
        continues = checkpoint in ("last", "best", "hpc", "registry") or _is_within(checkpoint, config.run_dir)
        existing = {*Path().glob("runs"), *Path("runs").glob("*")}
        if config.run_dir is not None:
            existing |= {path for path in _with_parents(config.run_dir) if path.exists()}
        run_dir = choose_run_dir(config.run_dir, self.recipe, starts_anew=is_fit and not continues)
        if is_fit and "LOCAL_RANK" not in os.environ:
            self._created = [path for path in _with_parents(run_dir) if path not in {*existing, Path()}]
        if checkpoint is not None:
            may_start = is_fit and config.run_dir is not None
            config.ckpt_path = resolve_checkpoint(checkpoint, run_dir, may_start=may_start)
        elif self.subcommand and not is_fit:
            rank_zero_warn(f"without --ckpt_path, `{self.subcommand}` uses the initial weights of training")
        if is_fit:
            lock_for_run(run_dir)
        config.run_dir = str(run_dir)
        config.trainer.default_root_dir = str(run_dir)
        strategy = config.trainer.strategy
        if isinstance(strategy, str) and "." in strategy:  # jsonargparse leaves a class without options as a string
            config.trainer.strategy = Namespace(class_path=strategy, init_args=Namespace())

    def instantiate_classes(self) -> None:
        """Build model, data and trainer, and give the data the meaning of the checkpoint's outputs before their setup.

        Raises:
            ValueError: The model takes no optimizer or schedule, or data of another kind.
        """
        config = self.config[self.subcommand] if self.subcommand else self.config
        model = config.model
        super().instantiate_classes()
        for name, kind in {"optimizer": OptimizerFactory, "schedule": Schedule}.items():
            if name not in model.get("init_args", {}):
                raise ValueError(
                    f"model: {model.class_path} has no option {name!r}, so --{name} would have no effect; let its "
                    f"__init__ take `{name}: {kind.__name__} | None = None`, and pass it to that of Task"
                )
        task = cast("Task", self.model)
        task.check_data(self.datamodule)
        if not isinstance(data := self.datamodule, SampledDataModule):
            return
        data.allow_changed = config.allow_changed_data
        checkpoint = config.get("ckpt_path")
        if checkpoint is None:
            data.kept = task.given_meaning()
        elif checkpoint not in ("hpc", "registry"):  # Lightning finds these later; they are compared then
            data.recall(checkpoint, weights_only=config.get("weights_only"))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with the callbacks, loggers and checkpoint plugin of every run."""
        config = self._get(self.config_init, "trainer")
        run_dir = self._get(self.config_init, "run_dir")
        kwargs["plugins"] = [AtomicCheckpointIO(), *_as_list(config.get("plugins"))]
        if config.get("logger") is not False:
            own = [MetricsFile(run_dir), TensorBoardLogger(run_dir, name="tensorboard", version="")]
            given = [logger for logger in _as_list(config.get("logger")) if logger is not True]
            kwargs["logger"] = [*own, *given]
        callbacks = [MonitorCheck(), *_as_list(config.get("callbacks")), StopOnDivergence(), GracefulInterrupt()]
        callbacks += [RunReport(), PredictionFile()]
        if config.get("enable_progress_bar") is not False:
            callbacks.append(ProgressBar(leave=True))
        kwargs["callbacks"] = callbacks
        try:
            return super().instantiate_trainer(**kwargs)
        except TypeError as error:  # of Lightning's own checks, such as that of `devices`
            raise ValueError(f"trainer: {error}") from error

    def _clean_up(self, error: Exception) -> None:
        """Kill the processes of other ranks, and remove the folder of a run that has not trained yet."""
        trainer = getattr(self, "trainer", None)
        launcher = getattr(getattr(trainer, "strategy", None), "launcher", None)
        processes = launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else []
        if not is_for_users(error):  # then one of them may report the cause
            end = time.monotonic() + PATIENCE
            while processes and time.monotonic() < end and all(process.poll() is None for process in processes):
                time.sleep(0.05)
        for process in processes:
            process.kill()
            process.wait()
        processes.clear()  # Lightning watches them, and would kill this process too
        if self._created and not holds_run(self._created[0]) and not getattr(trainer, "global_step", 0):
            shutil.rmtree(self._created[0], ignore_errors=True)
            for folder in self._created[1:]:
                with contextlib.suppress(OSError):  # another run is in it
                    folder.rmdir()

    def _parse_ckpt_path(self) -> None:
        """Keep the options of the command line: Lightning would silently override them by the checkpoint's."""


def _load_yaml(text: str, path: str = "") -> Any:
    """The YAML loader of jsonargparse, which rejects duplicate keys."""
    value = _read(text)
    if isinstance(value, dict | list):
        check_keys(text, path or "YAML")
    return value


_read = get_loader("yaml")
set_loader("yaml", _load_yaml, exceptions=(yaml.YAMLError,))


def _values(parser: Any, config: Namespace) -> Iterator[tuple[str, Any, Any]]:
    """Options with their values and types; jsonargparse does not check null against the type."""
    hints = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    for option, hint in hints.items():
        if hint is not None and option in config:
            yield from _values_within(option, config[option], hint, linked=hints)


def _values_within(
    option: str, value: Any, hint: Any, *, linked: Container[str] = ()
) -> Iterator[tuple[str, Any, Any]]:
    yield option, value, hint
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, Namespace) and isinstance(options := each.get("init_args"), Namespace):
            for name, own in vars(options).items():
                if name not in linked:  # the model's optimizer is the top-level one
                    yield from _values_within(f"{option}.{name}", own, type_of(each.class_path, name))


def _with_parents(folder: str | Path) -> list[Path]:
    path = Path(folder).expanduser()
    return [path, *path.parents]


def _is_within(path: str | None, folder: str | None) -> bool:
    return path is not None and folder is not None and Path(path).resolve().is_relative_to(Path(folder).resolve())


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
