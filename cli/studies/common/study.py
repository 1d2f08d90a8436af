"""The studies by name, the recipes of configs/studies with their sizes, and checks of their settings."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from lightning_adam_mini.hints import did_you_mean

from ...arguments import UsageError
from ...recipes import read_yaml
from .outcome import Outcome

__all__ = ["STUDIES", "Study", "check_above", "check_least", "find_study", "list_studies", "load_study"]

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
"""Modules of `studies`. Each has `run(settings) -> Outcome` and a frozen dataclass `Settings`, with `seeds` among its
fields and no defaults."""


@dataclass(frozen=True)
class Study:
    """A study with its sizes.

    Args:
        name: Stem of the recipe.
        settings: An object of its `Settings`.
        run: Computes the outcome from the settings.
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
    hint = did_you_mean(stem, known, otherwise="; `adam-mini study --help` lists them", cutoff=0.5)
    raise UsageError(f"{name}: no such file, and no study of that name{hint}")


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
    module = importlib.import_module(f"..{recipe['study']}", __package__)
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
            hint = did_you_mean(key, known, otherwise=f"; it has {', '.join(known)}", cutoff=0.5)
            raise ValueError(f"{recipe['study']} has no setting {key!r}{hint}")
    if missing := [key for key in known if key not in values]:
        raise ValueError(f"{path}: settings lack {', '.join(missing)}; give them there or with --set")
    return Study(path.stem, _build(module.Settings, values), module.run)


def _root() -> Path:
    return Path(str(files("lightning_adam_mini.configs"))) / "studies"


def _read(path: Path) -> dict[str, Any]:
    """The two keys of a recipe."""
    recipe = read_yaml(path)
    if set(recipe) != {"study", "settings"} or not isinstance(recipe["settings"], dict):
        raise ValueError(f"{path}: a study has the keys `study` (a name) and `settings` (sizes and seeds), no others")
    if recipe["study"] not in STUDIES:
        raise ValueError(f"{path}: there is no study {recipe['study']!r}; studies are {', '.join(STUDIES)}")
    return recipe


def _build(settings_class: type, values: dict[str, Any]) -> Any:
    """The settings, each value checked against its annotation."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(settings_class, "settings")
    try:
        typed = parser.parse_object({"settings": values}).settings.as_dict()
    except ArgumentError as error:
        line = re.sub(r"^.*?(?=Parser key)", "", " ".join(str(error).split())).replace("settings.", "")
        raise ValueError(f"wrong setting: {line}") from error
    for key, value in typed.items():
        _check_value(key, value)
    if wrong := [seed for seed in typed["seeds"] if not 0 <= seed < 2**63]:
        raise ValueError(f"seeds must be between 0 and 2^63, not {wrong[0]}")
    return settings_class(**typed)


def _check_value(key: str, value: Any) -> None:
    """Reject what no setting may be: NaN, infinite, empty, or a list of cases that has one twice."""
    for number in _numbers(key, value):
        if not math.isfinite(number):
            raise ValueError(f"{key} is {number}: give a finite number")
    # A tuple, such as betas, may repeat a value, and so may a list of lists.
    is_cases = isinstance(value, list) and not isinstance(value[0], list)
    if is_cases and len(set(value)) < len(value):
        raise ValueError(f"{key} = {value}: give each value once")


def _numbers(key: str, value: Any) -> Iterator[float]:
    """All floats in a value and in the lists within it."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, list | tuple):
        if not value:
            raise ValueError(f"{key} is empty: give at least one value")
        for one in value:
            yield from _numbers(key, one)


def check_least(settings: object, least: float, *names: str) -> None:
    """Reject settings, numbers or lists of them, that are below a bound.

    Args:
        settings: Has the names as attributes.
        least: The smallest number that is allowed.
        names: Of settings.

    Raises:
        ValueError: One is smaller.
    """
    _check_bound(settings, names, lambda number: number >= least, f"at least {least:g}")


def check_above(settings: object, bound: float, *names: str) -> None:
    """The same for a bound that is itself not allowed."""
    _check_bound(settings, names, lambda number: number > bound, f"above {bound:g}")


def _check_bound(settings: object, names: tuple[str, ...], allows: Callable[[float], bool], words: str) -> None:
    for name in names:
        value = getattr(settings, name)
        for number in value if isinstance(value, list | tuple) else (value,):
            if not allows(number):
                raise ValueError(f"{name} must be {words}, not {number:g}")
