"""What a comparison has to know of a recipe before it runs, read from its YAML alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..recipes import find_recipe, list_recipes

__all__ = ["Recipe", "read_recipe"]


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


def read_recipe(name: str) -> Recipe:
    """Find and read a recipe.

    Args:
        name: Name of a packaged recipe, with or without `.yaml`, or a path.

    Raises:
        ValueError: There is none, or it is no configuration of a run.
    """
    path = find_recipe(name, given_as="recipe").resolve()
    raw = path.read_bytes()
    text = raw.decode("utf-8")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {name}: it is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or "model" not in content:
        raise ValueError(f"recipe {name}: it has no section `model`, so it is no configuration of a run")
    optimizer, options = _class_of(content.get("optimizer"), "AdamMini")
    data, _ = _class_of(content.get("data"), "")
    trainer = content.get("trainer")
    return Recipe(
        name=_packaged_name(path) or str(path),
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
