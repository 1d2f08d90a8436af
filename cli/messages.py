"""One clear line from what a parser, which tries every type in turn, has to say."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from importlib import import_module
from inspect import Parameter, isabstract, signature

__all__ = ["near_option", "one_line"]

_NOISE = (
    "Parser key",
    "Does not validate against any of the Union subtypes",
    "Subtypes:",
    "Errors:",
    "Expected a",
    "Given value",
    "Problem with given class_path",
)
_WORDS = {"float": "a number", "int": "a whole number", "bool": "true or false", "tuple": "a list", "str": "a text"}


def one_line(message: str) -> str:
    """The innermost cause in a message of jsonargparse, behind the option's name; any other message on one line."""
    if match := re.match(r"Caught \w+ in DataLoader worker process.*\n[\w.]+: (.*)", message, re.DOTALL):
        message = match[1]  # of a reading process, whose traceback comes as text
    if message.startswith("the following arguments are required") and "model" in message:
        return f"{message}; give a recipe: --config llm/gpt2_tiny.yaml (`adam-mini recipes` lists them)"
    if match := re.match(r"Unexpected config: ?(.{,40})", message):
        return f"a configuration holds options such as `trainer: ...`, not {match[1]!r}"
    option = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    if match := re.search(r"class_path '([\w.]+)':\s+(?:Option|Key|key) '(\w+)' is not (?:accepted|expected)", message):
        return _unknown_option(*match.groups())
    if match := re.search(r"class_path '([^']+)':\s+(?:No module named|module '\S+' has no attribute)", message):
        return _unknown_class(option, match[1], message)
    if re.search(r"Expected a dot import path string|Import path does not correspond to a subclass", message):
        return _unknown_class(option, _given(message), message)
    if option and "Expected a " in message:
        return _wrong_type(option, _given(message), message)
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    told = [line for line in lines if not line.startswith(_NOISE)] if "Subtypes:" in message else lines
    return " ".join(" ".join(told or lines).split())


def near_option(message: str, options: Iterable[str]) -> str:
    """A message about an option that does not exist, with those that come near.

    Args:
        message: What the parser said.
        options: The options that exist, such as `--trainer.max_steps`.
    """
    match = re.search(
        r"unrecognized arguments: (--[^\s=]+)|does not accept option '([\w.]+)'|\AOption '([\w.]+)' is not acc", message
    )
    if match is None:
        return message
    name = match[1] or f"--{match[2] or match[3]}"
    return f"there is no option {name}{_did_you_mean(name, options) or '.'} `adam-mini fit --help` lists all"


def _did_you_mean(name: str, known: Iterable[str], count: int = 1) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=count)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _given(message: str) -> str:
    """The value that was refused: the first that is printed, which is the innermost."""
    match = re.search(r"Got value: ([^\n]*)", message) or re.search(r"Given value: ([^\n]*)", message)
    return match[1] if match else ""


def _wrong_type(option: str, value: str, message: str) -> str:
    """What an option takes instead of a value."""
    literals = ", ".join(re.findall(r"Expected a typing\.Literal\[([^\n]*)\]", message))
    if literals:
        choices = list(dict.fromkeys(choice.strip("'") for choice in literals.split(", ")))
        return f"{option}: {value!r} is not one of {', '.join(choices)}{_did_you_mean(value, choices)}"
    types = re.findall(r"Expected a <class '(?:[\w.]+\.)?(\w+)'>", message)
    expected = list(dict.fromkeys(_WORDS.get(name, f"a {name}") for name in types if name != "NoneType"))
    if match := re.search(r"Expected a (tuple with \d+ elements)", message):
        expected = [f"a {match[1]}"]
    return f"{option}: expected {' or '.join(expected)}, got {value}"


def _unknown_option(class_path: str, option: str) -> str:
    """That a class has no such option, and which it has."""
    module, _, name = class_path.rpartition(".")
    cls = getattr(import_module(module), name)
    options = _options(cls)
    near = _did_you_mean(option, options, 2)
    return f"{name} has no option {option!r}{near or '.'} It has: {', '.join(options)}"


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


def _unknown_class(option: str, name: str, message: str) -> str:
    """That an option takes no such class, and which of this package it takes."""
    if match := re.search(r"'class_path': '([^']+)'", name):
        name = match[1]
    prefix = f"{option}: " if option else ""  # a strategy's name turned class has none
    base = re.search(r"Subtypes: .*?<class '([\w.]+)\.(\w+)'>", message)
    if base is None or "." in option:
        return f"{prefix}there is no class {name!r}; give its full name, such as package.module.Class"
    known = sorted(_subclasses(getattr(import_module(base[1]), base[2])))
    near = _did_you_mean(name.rpartition(".")[2], known)
    return f"{prefix}there is no class {name!r}{near or '.'} Choose from: {', '.join(known)}"


def _subclasses(base: type) -> set[str]:
    """Names of the concrete classes of this package below a base."""
    names = set()
    below: list[type] = base.__subclasses__()
    for cls in below:
        if cls.__module__.startswith(__name__.partition(".")[0]) and not isabstract(cls):
            names.add(cls.__name__)
        names |= _subclasses(cls)
    return names
