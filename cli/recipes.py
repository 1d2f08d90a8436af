"""The packaged recipes. Importing this imports neither torch nor lightning."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

__all__ = ["find_recipe", "list_recipes", "resolve_configs"]


def list_recipes() -> dict[str, str]:
    """Names of the recipes, such as `llm/gpt2_tiny.yaml`, with the first line of their headers; not of studies."""
    root = _root()
    names = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*.yaml"))}
    return {name: _title(path) for name, path in names.items() if not name.startswith("studies/")}


def find_recipe(name: str, *, given_as: str = "--config") -> Path:
    """The file of a `--config` value: a path that exists, else a packaged recipe with or without `.yaml`.

    Args:
        name: The value.
        given_as: What the message calls it.

    Raises:
        ValueError: Neither exists; with the recipes whose names come near.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    for candidate in (name, f"{name}.yaml"):
        if candidate in list_recipes():
            return _root() / candidate
    recipes = list(list_recipes())
    by_stem = [recipe for recipe in recipes if Path(recipe).stem == Path(name).stem]
    near = by_stem or difflib.get_close_matches(name, recipes, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "`adam-mini recipes` lists the packaged ones"
    raise ValueError(f"{given_as} {name}: no such file, and no recipe of that name; {hint}")


def resolve_configs(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """Replace recipe names after `--config` or `-c` by files.

    Returns:
        The arguments, and the stem of the first configuration, which names the run.

    Raises:
        ValueError: As `find_recipe`.
    """
    resolved: list[str] = []
    first: str | None = None
    expects_value = False
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if expects_value or (equals and option in ("--config", "-c")):
            path = find_recipe(argument if expects_value else value)
            first = first or path.stem
            resolved.append(str(path) if expects_value else f"{option}={path}")
            expects_value = False
        else:
            resolved.append(argument)
            expects_value = argument in ("--config", "-c")
    return resolved, first


def _root() -> Path:
    return Path(str(files("lightning_adam_mini.configs")))


def _title(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()
