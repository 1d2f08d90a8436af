"""A recipe, or a run's configuration, without what belongs to training alone."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from ..application import Application
from ..messages import quiet
from ..models import trainer_options, without_start
from ..recipes import read_yaml
from ..run_folder import holds_run, resolve_checkpoint

__all__ = ["build_application", "find_checkpoint"]


def build_application(recipe: Path, options: Namespace) -> Application:
    """The recipe's model, data and trainer on one CPU, with the options of the command line that change them.

    Args:
        recipe: The recipe, or a run's `config.yaml`.
        options: Of the command line.
    """
    of_run = [] if options.run_dir is None else [f"--run_dir={options.run_dir}"]
    with TemporaryDirectory() as folder, quiet():
        plain = _without_start(recipe, Path(folder))
        return Application(
            ["--config", str(plain), *options.recipe_options, *trainer_options(), *of_run],
            recipe=recipe.stem,
            run=False,
        )


def _without_start(recipe: Path, folder: Path) -> Path:
    """The recipe, or a copy of a run's configuration without the options that only its subcommand takes."""
    content = read_yaml(recipe)
    if (alone := without_start(content)) == content:
        return recipe
    plain = folder / recipe.name
    plain.write_text(yaml.safe_dump(alone), "utf-8")
    return plain


def find_checkpoint(recipe: Path, application: Application, options: Namespace) -> str | None:
    """The checkpoint of `--ckpt_path`; None without it.

    Args:
        recipe: The recipe, or a run's `config.yaml`, which names its run.
        application: Knows the recipe's newest run, or that of `--run_dir`.
        options: Of the command line.

    Raises:
        ValueError: There is no such checkpoint.
    """
    if options.ckpt_path is None:
        return None
    own = options.run_dir is None and holds_run(recipe.parent)
    run_dir = recipe.parent if own else Path(application.config.run_dir)
    checkpoint = resolve_checkpoint(options.ckpt_path, run_dir, may_start=False)
    if checkpoint is None or checkpoint in ("hpc", "registry"):
        raise ValueError(f"--ckpt_path {options.ckpt_path}: give a path, last or best")
    return checkpoint
