"""Short names of the tasks."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePath
from typing import TYPE_CHECKING

from .wording import plain

if TYPE_CHECKING:
    from ..comparison import Comparison

__all__ = ["task_names"]


def task_names(comparison: Comparison) -> dict[str, str]:
    """Recipe -> its name for readers: without its ending and its folders, as far as those are needed by no other."""
    recipes = [task.recipe for task in comparison.tasks]
    short = {recipe: _short(recipe) for recipe in recipes}
    taken = Counter(short.values())
    return {recipe: plain(name if taken[name] == 1 and name else recipe) for recipe, name in short.items()}


def _short(recipe: str) -> str:
    name = PurePath(recipe).name if recipe.startswith(("/", ".", "~")) else recipe  # a packaged one keeps its domain
    return name.removesuffix(".yaml").removesuffix(".yml")
