"""The studies by name, and the recipes of configs/studies that give their sizes."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from .outcome import Outcome

__all__ = ["STUDIES", "Study", "find_study", "list_studies", "load_study"]

STUDIES = (
    "three_block_quadratic",
    "quadratic_cases",
    "diagonal_preconditioner",
    "blockwise_gd",
    "leave_x_out",
    "trajectories",
    "sensitivity",
    "heterogeneous_mlp",
    "heterogeneity",
    "transformer_hessian",
    "mlp_hessian",
)
"""Modules of this package. Each has a frozen dataclass `Settings` without defaults, and `run(settings) -> Outcome`."""


@dataclass(frozen=True)
class Study:
    """A study with its sizes.

    Args:
        name: Stem of the recipe.
        settings: An object of its `Settings`.
        run: Makes the outcome of settings.
    """

    name: str
    settings: Any
    run: Callable[[Any], Outcome]


def list_studies() -> dict[str, str]:
    """Names of the packaged recipes with the first line of their headers."""
    return {
        path.stem: path.read_text("utf-8").partition("\n")[0].lstrip("# ") for path in sorted(_root().glob("*.yaml"))
    }


def find_study(name: str) -> Path:
    """The file of a packaged recipe, with or without `.yaml`, or of a path.

    Raises:
        ValueError: There is neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = list_studies()
    stem = name.removeprefix("studies/").removesuffix(".yaml")
    if stem in known:
        return _root() / f"{stem}.yaml"
    near = difflib.get_close_matches(stem, known, n=2, cutoff=0.5) or list(known)
    raise ValueError(f"{name}: no such file, and no study of that name; did you mean {', '.join(near)}?")


def load_study(name: str, changes: Sequence[str] = ()) -> Study:
    """Read a recipe and check its settings before anything is computed.

    Args:
        name: A packaged recipe, or a path.
        changes: `key=value` each, in place of what the recipe says; values are YAML.

    Raises:
        ValueError: No such recipe, study or setting, a setting is missing, or its value is wrong.
    """
    path = find_study(name)
    recipe = _read(path)
    module = importlib.import_module(f".{recipe['study']}", __package__)
    values = dict(recipe["settings"])
    known = [field.name for field in fields(module.Settings)]
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"--set {change}: give KEY=VALUE, such as seeds=[0,1]")
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {change}: the value is no YAML: {' '.join(str(error).split())}") from error
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=2, cutoff=0.5) or known
            raise ValueError(f"{recipe['study']} has no setting {key!r}; did you mean {', '.join(near)}?")
    if missing := [key for key in known if key not in values]:
        raise ValueError(f"{path}: settings lack {', '.join(missing)}; give them there or with --set")
    return Study(path.stem, _build(module.Settings, values), module.run)


def _root() -> Path:
    return Path(str(files("lightning_adam_mini.configs"))) / "studies"


def _read(path: Path) -> dict[str, Any]:
    """The two keys of a recipe."""
    try:
        recipe = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict) or set(recipe) != {"study", "settings"} or not isinstance(recipe["settings"], dict):
        raise ValueError(f"{path}: a study has the keys `study` (a name) and `settings` (sizes and seeds), no others")
    if recipe["study"] not in STUDIES:
        raise ValueError(f"{path}: there is no study {recipe['study']!r}; studies are {', '.join(STUDIES)}")
    return recipe


def _build(settings_class: type, values: dict[str, Any]) -> Any:
    """The settings, each value checked against its annotation."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(settings_class, "settings")
    for key, value in values.items():
        if isinstance(value, list) and not value:
            raise ValueError(f"{key} is empty: give at least one value")
        if isinstance(value, list) and any(value.count(one) > 1 for one in value):
            raise ValueError(f"{key} = {value}: give each value once")
    try:
        return settings_class(**parser.parse_object({"settings": values}).settings.as_dict())
    except ArgumentError as error:
        told = re.sub(r"^.*?(?=Parser key)", "", " ".join(str(error).split())).replace("settings.", "")
        raise ValueError(f"wrong setting: {told}") from error
