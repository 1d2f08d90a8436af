"""What a comparison has to know of a recipe before it runs, read from its YAML alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...tasks.atomic_files import replacing
from ..recipes import find_recipe, list_recipes, read_yaml

__all__ = ["Recipe", "copy_of", "copy_recipe", "read_recipe"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe of a comparison.

    Args:
        name: Name of a packaged recipe without `.yaml`; path of another one.
        path: The file.
        digest: SHA-256 of the file, in hexadecimal digits.
        title: Its first line.
        optimizer: The optimizer that it is written for.
        lr: Its own learning rate; None where it has none.
        weight_decay: Its own weight decay; None where it has none.
        seeds_data: Whether its data module takes a `seed`, as all of this package do.
        devices: `trainer.devices`.
    """

    name: str
    path: Path
    digest: str
    title: str
    optimizer: str
    lr: float | None
    weight_decay: float | None
    seeds_data: bool
    devices: Any

    @property
    def folder(self) -> str:
        """Name of its folder."""
        name = Path(self.name)
        return (name.stem if name.is_absolute() else self.name).replace("/", "__")


def read_recipe(name: str, out: Path | None = None) -> Recipe:
    """Find and read a recipe.

    Args:
        name: Name of a packaged recipe, with or without `.yaml`, or a path.
        out: Folder of a comparison whose copy is read, where it holds one.

    Raises:
        ValueError: There is none, or it is no configuration of a run.
    """
    if out is not None and (copy := copy_of(name, out)).exists():
        return _read(copy, name)
    path = find_recipe(name, given_as="recipe").resolve()
    return _read(path, _packaged_name(path) or str(path))


def copy_of(name: str, out: Path) -> Path:
    """Where a comparison keeps its copy of a recipe.

    Args:
        name: `Recipe.name`.
        out: Folder of the comparison.
    """
    path = Path(name)
    return out / "recipes" / (f"{path.stem}.yaml" if path.is_absolute() else f"{name}.yaml")


def copy_recipe(recipe: Recipe, out: Path) -> None:
    """Keep a copy of a recipe, which all runs read: the recipe itself may change while they wait.

    Raises:
        ValueError: The recipe has changed since it was read, or the copy since it was made.
    """
    copy = copy_of(recipe.name, out)
    if not copy.exists():
        raw = recipe.path.read_bytes()
        _check_digest(raw, recipe, recipe.path)
        with replacing(copy) as beside:
            beside.write_bytes(raw)
    _check_digest(copy.read_bytes(), recipe, copy)


def _check_digest(raw: bytes, recipe: Recipe, path: Path) -> None:
    if hashlib.sha256(raw).hexdigest() != recipe.digest:
        raise ValueError(
            f"{path} is not the recipe that this comparison began with; restore it, or choose another --out"
        )


def _read(path: Path, name: str) -> Recipe:
    raw, content = path.read_bytes(), read_yaml(path, f"recipe {name}")
    text = raw.decode("utf-8-sig")
    if "model" not in content:
        raise ValueError(f"recipe {name}: it has no section `model`, so it is no configuration of a run")
    included = [value for value in content.values() if isinstance(value, str) and value.endswith((".yaml", ".yml"))]
    if included:  # the digest would not cover it
        raise ValueError(f"recipe {name}: it includes {included[0]}; write its content into the recipe")
    optimizer, options = _class_of(content.get("optimizer"), "AdamMini")
    data, _ = _class_of(content.get("data"), "")
    trainer = content.get("trainer")
    return Recipe(
        name=name,
        path=path,
        digest=hashlib.sha256(raw).hexdigest(),
        title=text.splitlines()[0].lstrip("# ").strip() if text.startswith("#") else path.stem,
        optimizer=optimizer.removeprefix("lightning_adam_mini.factory."),
        lr=_number(name, options, "lr"),
        weight_decay=_number(name, options, "weight_decay"),
        seeds_data=data.startswith("lightning_adam_mini."),
        devices=trainer.get("devices", "auto") if isinstance(trainer, dict) else "auto",
    )


def _packaged_name(path: Path) -> str | None:
    for name in list_recipes():
        if path == find_recipe(name).resolve() and str(path).endswith(f"/{name}"):
            return name.removesuffix(".yaml")
    return None


def _class_of(section: Any, default: str) -> tuple[str, dict[str, Any]]:
    """The class of a section and its options, both of which may be missing."""
    if isinstance(section, str):
        return section, {}
    if not isinstance(section, dict):
        return default, {}
    options = section.get("init_args")
    return str(section.get("class_path", default)), options if isinstance(options, dict) else {}


def _number(recipe: str, options: dict[str, Any], name: str) -> float | None:
    """An option as a number; YAML 1.1 takes `1e-3` for a text."""
    value = options.get(name)
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        raise ValueError(f"recipe {recipe}: optimizer.{name} is no number: {value!r}") from None
