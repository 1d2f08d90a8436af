"""The models of `tests/zoo/`: tiny instances of real classes, and what each of their parameters must be.

An entry names a class, how to make a tiny instance, an input, the partition that `auto` takes, and for patterns of
parameter names the role, the cut under `transformer` and the number of blocks, as read from the source of the class.
"""

import importlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

FOLDER = Path(__file__).parents[1] / "zoo"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
UNSEEN = FOLDER / "unseen"
"""Entries whose attention a forward pass does not tell apart."""


@dataclass(frozen=True)
class Expected:
    """What a parameter must be. `blocks` is None where every element is a block."""

    role: str
    structure: str
    blocks: int | None


@dataclass(frozen=True)
class Entry:
    """One tiny model.

    Args:
        name: Its name in the file, unique in the zoo.
        target: Dotted name of the class or function that builds it.
        arguments: Its keyword arguments; `{target: ..., arguments: ...}` as a value builds an object, as for a config.
        inputs: Arguments of `forward`; a list is positional, a mapping by keyword.
        partition: What `auto` takes, `transformer` or `default`.
        parameters: Expectations by pattern of names, the first that matches counts; `*` stands for a run of digits,
            `**` for anything.
    """

    name: str
    target: str
    arguments: dict[str, Any]
    inputs: Any
    partition: str
    parameters: dict[str, Expected]

    def build(self) -> nn.Module:
        """The model with random weights, the same each time."""
        torch.manual_seed(0)
        return _build({"target": self.target, "arguments": self.arguments})

    def loss(self, model: nn.Module) -> Tensor:
        """A scalar to take gradients of: the mean square of all floating outputs of one forward pass."""
        positional, named = self.forward_inputs()
        output = model(*positional, **named)
        return sum(tensor.float().square().mean() for tensor in _tensors(output))

    def forward_inputs(self) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments of a forward pass, the same each time."""
        torch.manual_seed(1)
        inputs = _inputs(self.inputs)
        return ([], inputs) if isinstance(inputs, dict) else (inputs, {})

    def expected(self, name: str) -> Expected:
        """What the parameter of this name must be.

        Raises:
            KeyError: No pattern matches.
        """
        for pattern, expected in self.parameters.items():
            if _matches(pattern, name):
                return expected
        raise KeyError(f"{self.name}: no pattern matches {name}")


@cache
def entries(folder: Path = FOLDER) -> dict[str, Entry]:
    """All entries of a folder's files by name."""
    found: dict[str, Entry] = {}
    for path in sorted(folder.glob("*.yaml")):
        for name, fields in (yaml.load(path.read_text(encoding="utf-8"), LOADER) or {}).items():
            assert name not in found, f"{path.name}: {name} is in the zoo twice"
            parameters = {pattern: _expected(words) for pattern, words in fields["parameters"].items()}
            found[name] = Entry(
                name,
                fields["target"],
                fields.get("arguments", {}),
                fields["inputs"],
                fields["partition"],
                parameters,
            )
    return found


def unused_patterns(entry: Entry, names: list[str]) -> list[str]:
    """Patterns of an entry that decide about no parameter."""
    used = {next(pattern for pattern in entry.parameters if _matches(pattern, name)) for name in names}
    return [pattern for pattern in entry.parameters if pattern not in used]


def _expected(words: str) -> Expected:
    """From `role cut blocks`, or `role element`."""
    role, cut, *blocks = words.split()
    assert (cut == "element") == (not blocks), words
    return Expected(role, cut, int(blocks[0]) if blocks else None)


@cache
def _pattern(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*|\*)", pattern)
    return re.compile("".join({"**": ".*", "*": r"\d+"}.get(part, re.escape(part)) for part in parts))


def _matches(pattern: str, name: str) -> bool:
    return _pattern(pattern).fullmatch(name) is not None


def _build(value: Any) -> Any:
    """Mappings with a `target` become what that class or function returns."""
    if isinstance(value, list):
        return [_build(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "target" not in value:
        return {key: _build(item) for key, item in value.items()}
    module, _, attribute = value["target"].rpartition(".")
    pytest.importorskip(module.partition(".")[0])
    function = getattr(importlib.import_module(module), attribute)
    arguments = _build(value.get("arguments", {}))
    return function(*arguments) if isinstance(arguments, list) else function(**arguments)


def _inputs(value: Any) -> Any:
    """`{ints: shape, below: n}` and `{floats: shape}` become random tensors, `{values: ...}` a tensor of them."""
    if isinstance(value, list):
        return [_inputs(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "ints" in value:
        return torch.randint(value["below"], tuple(value["ints"]))
    if "floats" in value:
        return torch.randn(tuple(value["floats"]))
    if "values" in value:
        return torch.tensor(value["values"])
    return {key: _inputs(item) for key, item in value.items()}


def _tensors(output: Any) -> list[Tensor]:
    """Floating tensors with a gradient in a nested output."""
    if isinstance(output, Tensor):
        return [output] if output.requires_grad and output.is_floating_point() else []
    if isinstance(output, dict):
        output = output.values()
    if isinstance(output, list | tuple) or hasattr(output, "__iter__"):
        return [tensor for item in output for tensor in _tensors(item)] if not isinstance(output, str) else []
    return []
