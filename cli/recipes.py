"""Recipes: where they are, and how their YAML is read. Importing this imports neither torch nor Lightning."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lightning_adam_mini.hints import did_you_mean

from .arguments import UsageError

__all__ = ["check_keys", "find_recipe", "list_recipes", "name_of", "read_yaml", "resolve_configs"]

SECTIONS = ("model", "data", "optimizer", "schedule", "trainer", "checkpoint", "performance")
"""Sections of a recipe, which are never null."""
FILES = (".yaml", ".yml")


def list_recipes() -> dict[str, str]:
    """Names of the recipes, such as `llm/gpt2_tiny.yaml`, with the first line of their headers; without studies."""
    root = _root()
    names = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*.yaml"))}
    return {name: _title(path) for name, path in names.items() if not name.startswith("studies/")}


def find_recipe(name: str, *, given_as: str = "--config") -> Path:
    """The file of a recipe: an existing path, else a packaged recipe with or without `.yaml`.

    Args:
        name: Path or name.
        given_as: What the message calls it.

    Raises:
        UsageError: Neither exists; the message suggests recipes with similar names.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    for candidate in (name, f"{name}.yaml"):
        if candidate in list_recipes():
            return _root() / candidate
    recipes = list(list_recipes())
    same_stem = [recipe for recipe in recipes if Path(recipe).stem == Path(name).stem]  # of another domain
    nothing_near = "; `adam-mini recipes` lists the packaged ones"
    hint = did_you_mean(name, recipes, otherwise=nothing_near, cutoff=0.5)
    if same_stem:
        hint = f"; did you mean {' or '.join(same_stem)}?"
    raise UsageError(f"{given_as} {name}: no such file, and no recipe of that name{hint}")


def name_of(recipe: Path) -> str:
    """The name of what a recipe makes: that of its file, or for the `config.yaml` of a run, that of its folder."""
    of_run = re.fullmatch(r"config(\.\d+)?", recipe.stem)
    return (recipe.absolute().parent.name if of_run else "") or recipe.stem


def resolve_configs(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """Resolve the recipes in the arguments of a trainer command: the first argument, and values of `--config`.

    Returns:
        The arguments with `--config FILE` for each recipe, and the name of the first one, which names the run.

    Raises:
        UsageError: There is no such recipe, or a file is no recipe.
    """
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    resolved: list[str] = []
    first: str | None = None
    expects_value = False
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if expects_value or (equals and option in ("--config", "-c")):
            path = find_recipe(name := argument if expects_value else value)
            _check_file(path, f"--config {name}", is_recipe=True)
            first = first or name_of(path)
            resolved.append(str(path) if expects_value else f"{option}={path}")
            expects_value = False
        else:
            if (value := value or argument).endswith(FILES) and Path(value).is_file():
                _check_file(Path(value), value)
            resolved.append(argument)
            expects_value = argument in ("--config", "-c")
    return resolved, first


def read_yaml(path: Path, name: str | None = None) -> dict[str, Any]:
    """The options in a file of YAML, in which each key stands once and no section is blank.

    Args:
        path: The file.
        name: What messages call it; its path by default.

    Raises:
        ValueError: It is no recipe; the message has the file and, if possible, the line.
    """
    import yaml

    name = name or str(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
        content = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: this is not UTF-8: {error}") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).replace(' in "<unicode string>",', ",").split())
        raise ValueError(f"{name}: this is not YAML: {reason[:300]}") from error
    except RecursionError as error:
        raise ValueError(f"{name}: this is nested too deeply for a recipe") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name}: a recipe holds options such as `model: ...`, not a {type(content).__name__}")
    check_keys(text, name, path.parent)
    for section in SECTIONS:
        if section in content and content[section] is None:
            raise ValueError(f"{name}: `{section}:` is blank; give its options below it, or remove the line")
    return content


def _check_file(path: Path, name: str, *, is_recipe: bool = False) -> None:
    """Check a file of the command line; a file that is no recipe may hold anything, and its own parser reads it.

    Raises:
        UsageError: It is no recipe, or has a key twice.
    """
    try:
        if is_recipe:
            read_yaml(path, name)
        else:
            check_keys(path.read_text("utf-8-sig", errors="replace"), name, path.parent)
    except ValueError as error:
        raise UsageError(str(error)) from error


def check_keys(text: str, name: str, folder: Path | None = None) -> None:
    """Reject duplicate keys: YAML would silently take the last one.

    Args:
        text: A document of YAML.
        name: What messages call it.
        folder: Its folder, if it is a file: other files that it names are checked as well.

    Raises:
        ValueError: A key is a duplicate, or `class_path` or `init_args` is blank; the message has the line.
    """
    import yaml

    waiting: list[tuple[Any, str, Path | None]] = [(text, name, folder)]
    seen: set[int | Path] = set()
    while waiting:
        node, name, folder = waiting.pop()
        if isinstance(node, str):
            with contextlib.suppress(yaml.YAMLError):  # its own parser reports that
                waiting.append((yaml.compose(node, yaml.SafeLoader), name, folder))
            continue
        if isinstance(node, yaml.ScalarNode):
            path = folder / node.value if folder is not None and node.value.endswith(FILES) else None
            if path is not None and path.is_file() and path.resolve() not in seen:
                seen.add(path.resolve())
                waiting.append((path.read_text("utf-8-sig", errors="replace"), node.value, path.parent))
            continue
        if node is None or id(node) in seen:  # an alias is a node that was seen
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += [(each, name, folder) for each in node.value]
            continue
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            waiting += [(key, name, None), (value, name, folder)]
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if first := lines.get((key.tag, key.value)):
                where = "" if first == line else f", first in line {first}"
                raise ValueError(f"{name}, line {line}: duplicate key {key.value!r}{where}; keep one of them")
            lines[key.tag, key.value] = line
            if key.value in ("class_path", "init_args") and value.tag == "tag:yaml.org,2002:null":
                raise ValueError(f"{name}, line {line}: `{key.value}:` is blank; give it a value, or remove the line")


def _root() -> Path:
    return Path(str(files("lightning_adam_mini.configs")))


def _title(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()
