"""The items of `--optimizers`: `NAME`, `NAME:option=value,option=value` or `LABEL=NAME:...`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from importlib import import_module
from inspect import isabstract
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_adam_mini.factory import OptimizerFactory

__all__ = ["OptimizerChoice", "did_you_mean", "label_of", "own_weight_decay", "parse_optimizers", "slug"]


@dataclass(frozen=True)
class OptimizerChoice:
    """One optimizer of a comparison.

    Args:
        label: How it is called in the report.
        name: Class of the factory.
        options: Pairs of option and value, as on the command line.
    """

    label: str
    name: str
    options: tuple[tuple[str, str], ...] = ()

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return slug(self.label)

    @property
    def arguments(self) -> tuple[str, ...]:
        """The options of `adam-mini fit`, without the learning rate."""
        return ("--optimizer", self.name, *(f"--optimizer.{option}={value}" for option, value in self.options))


def parse_optimizers(items: Sequence[str]) -> tuple[OptimizerChoice, ...]:
    """Read the items and check them against the factories.

    Raises:
        ValueError: An item is malformed, there is no such optimizer or option, or a label stands twice.
    """
    choices = tuple(_parse(item) for item in items)
    for choice in choices:
        _check(choice)
    folders: dict[str, str] = {}
    for choice in choices:
        if (other := folders.setdefault(choice.folder.casefold(), choice.label)) != choice.label:
            raise ValueError(
                f"--optimizers: {other} and {choice.label} would share a folder; write OTHER={choice.name}"
            )
    labels = [choice.label for choice in choices]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"--optimizers: {twice[0]} stands twice; give one of them a label: OTHER={twice[0]}")
    return choices


def own_weight_decay(choice: OptimizerChoice, recipe_optimizer: str) -> float | None:
    """The weight decay that an optimizer keeps where the recipe's is of the other kind; else None.

    A coefficient of decoupled decay (Loshchilov and Hutter 2019) is far too large for an L2 term of the gradient, as
    SGD and Adam have it.

    Args:
        choice: The optimizer.
        recipe_optimizer: The optimizer that the recipe is written for.
    """
    if any(option == "weight_decay" for option, _ in choice.options):
        return None
    own, meant = _factory(choice.name), _factory(recipe_optimizer)
    if getattr(own, "decoupled_weight_decay", True) == getattr(meant, "decoupled_weight_decay", True):
        return None
    default = next(field.default for field in fields(own) if field.name == "weight_decay")
    return None if default is MISSING else float(default)


def label_of(item: str) -> str:
    """How an item is called in the report.

    Raises:
        ValueError: It is malformed.
    """
    return _parse(item).label


def slug(text: str) -> str:
    """A text as the name of a folder."""
    return re.sub(r"[^\w.=+-]+", "_", text).strip("_")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The names that come near, as the end of a message."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=2) or [
        other for other in known if other.casefold() == name.casefold()
    ]
    return f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(known)}"


def _parse(item: str) -> OptimizerChoice:
    head, colon, rest = item.partition(":")
    label, equals, name = head.partition("=")
    if not equals:
        label, name = item, head
    if not name or not label or (colon and not rest):
        raise ValueError(f"--optimizers {item}: write NAME, NAME:option=value,option=value or LABEL=NAME:option=value")
    options = []
    for part in _split(rest):
        option, equals, value = part.partition("=")
        if not (option and equals):
            raise ValueError(f"--optimizers {item}: {part!r} is not of the form option=value")
        if option == "lr":
            raise ValueError(f"--optimizers {item}: learning rates are given by --lr, or --lr-of {label} LR LR ...")
        options.append((option, value))
    return OptimizerChoice(label, name, tuple(options))


def _split(text: str) -> list[str]:
    """Parts between commas that lie in no bracket and no quotes: a value may be JSON."""
    parts, depth, quote, start = [], 0, "", 0
    for position, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    return [*parts, text[start:]] if text else []


def _check(choice: OptimizerChoice) -> None:
    known = [field.name for field in fields(_factory(choice.name))]
    for option, _ in choice.options:
        name = option.partition(".")[0]
        if name not in known:
            hint = did_you_mean(name, known)
            raise ValueError(f"--optimizers {choice.label}: {choice.name} has no option {name!r}; {hint}")


def _factory(name: str) -> type[OptimizerFactory]:
    """The factory of a name, or of the dotted path of a class outside this package."""
    from lightning_adam_mini import factory

    module, _, cls_name = name.rpartition(".")
    known = [name for name in factory.__all__ if _is_concrete(getattr(factory, name))]
    if module in ("", factory.__name__):
        if cls_name not in known:
            raise ValueError(f"--optimizers {name}: there is no such optimizer; {did_you_mean(name, known)}")
        cls = getattr(factory, cls_name)
    else:
        try:
            cls = getattr(import_module(module), cls_name)
        except (ImportError, AttributeError):
            raise ValueError(f"--optimizers {name}: there is no such class; {did_you_mean(cls_name, known)}") from None
        if not _is_concrete(cls):
            raise ValueError(f"--optimizers {name}: it is no OptimizerFactory; choose from {', '.join(known)}")
    chosen: type[OptimizerFactory] = cls
    return chosen


def _is_concrete(cls: object) -> bool:
    from lightning_adam_mini.factory import OptimizerFactory

    return isinstance(cls, type) and issubclass(cls, OptimizerFactory) and not isabstract(cls)
