"""One clear line from what a parser, which tries every type in turn, has to say."""

from __future__ import annotations

import difflib
import re
from dataclasses import fields, is_dataclass
from importlib import import_module
from inspect import Parameter, signature

__all__ = ["one_line"]


def one_line(message: str) -> str:
    """The innermost cause in a message of jsonargparse; any other message on one line."""
    if match := re.search(
        r"class_path '([\w.]+)':.*?(?:Option|Key|key)\s+'(\w+)' is not (?:accepted|expected)", message, re.S
    ):
        return _unknown_option(match[1], match[2])
    if match := re.search(r'Parser key "optimizer".*Expected a dot import path string: (\S+)', message, re.S):
        return _unknown_optimizer(match[1])
    if match := re.search(r'.*Parser key "([\w.]+)":\s+(Expected a [^\n]+ Got value: [^\n]*)', message, re.S):
        return f"{match[1]}: {match[2]}".replace("typing.Literal", "one of ")
    if message.startswith("the following arguments are required") and "model" in message:
        return f"{message}; give a recipe: --config llm/gpt2_tiny.yaml (`adam-mini recipes` lists them)"
    causes = [line.strip().removeprefix("- ") for line in message.splitlines()]
    if "Does not validate against any of the Union subtypes" in message:
        told = [line for line in causes if line and not line.startswith(_NOISE)]
        causes = told or causes
    return " ".join(" ".join(causes).split())


_NOISE = (
    "Parser key",
    "Does not validate against any of the Union subtypes",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Expected a dot import path string",
    "Given value",
    "Problem with given class_path",
)


def _unknown_option(class_path: str, option: str) -> str:
    """That a class has no such option, and which it has."""
    module, _, name = class_path.rpartition(".")
    cls = getattr(import_module(module), name)
    options = _options(cls)
    near = difflib.get_close_matches(option, options, n=2)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{name} has no option {option!r}; {hint}It has: {', '.join(options)}"


def _options(cls: type) -> list[str]:
    """The options of a class, with those that it hands on to its bases as keywords."""
    if is_dataclass(cls):
        return [field.name for field in fields(cls)]
    options: dict[str, None] = {}
    for base in cls.__mro__:
        parameters = list(signature(base).parameters.values())
        named = [parameter for parameter in parameters if parameter.kind is not Parameter.VAR_KEYWORD]
        options |= dict.fromkeys(parameter.name for parameter in named)
        if named == parameters:
            break
    return list(options)


def _unknown_optimizer(name: str) -> str:
    """That there is no such optimizer, and which there are."""
    from lightning_adam_mini import factory

    known = [name for name in factory.__all__ if name != "OptimizerFactory"]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"there is no optimizer {name!r}; {hint}Choose from: {', '.join(known)}"
