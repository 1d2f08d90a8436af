"""One clear line from what a parser, which tries every type in turn, has to say."""

from __future__ import annotations

import difflib
import pkgutil
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from inspect import Parameter, isabstract, signature
from types import NoneType
from typing import Any, Literal, get_args, get_origin

__all__ = ["failed_import", "is_about_a_class", "load_domains", "must_be", "near_option", "one_line", "type_of"]

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
_PLACE = re.compile(r"(\A|[._])(path|dir|root|folder|init_from|tokenizer)\Z")
"""Options that name a file or a folder: an empty text would be the working directory to Python."""

_OWN = {
    "Task": "derive it from lightning_adam_mini.tasks.base.Task, which gives it optimizer, schedule and checkpoints",
    "LightningDataModule": "derive it from lightning.pytorch.LightningDataModule",
}
"""What a class of the user's has to be, by the base that the command line asks for."""
_OF_A_CLASS = re.compile(
    r"Expected a dot import path string|Import path \S*\s*does not correspond|class_path '[^']+':\s+(?:No module named|"
    r"module '\S+' has no attribute)|\.help: "
)


def one_line(message: str) -> str:
    """The innermost cause in a message of jsonargparse, behind the option's name; any other message on one line."""
    if match := re.match(r"Caught \w+ in DataLoader worker process.*\n[\w.]+: (.*)", message, re.DOTALL):
        message = match[1]  # of a reading process, whose traceback comes as text
    if message.startswith("the following arguments are required") and "model" in message:
        return f"{message}; give a recipe: --config llm/gpt2_tiny.yaml (`adam-mini recipes` lists them)"
    if match := re.match(r"Unexpected config: ?(.{,40})", message):
        return f"a configuration holds options such as `trainer: ...`, not {match[1]!r}"
    if match := re.match(
        r"--([\w.]+)\.help: (?:Expected a dot import path string: |\"|No module named ')([\w.]*)", message
    ):
        return _unknown_class(match[1], match[2], message)
    option = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message)))
    if match := re.search(r"class_path '([\w.]+)':\s+(?:Option|Key|key) '(\w+)' is not (?:accepted|expected)", message):
        return _unknown_option(*match.groups())
    if match := re.search(r"class_path '([\w.]+)':\s+the following arguments are required: (\w+)", message):
        return f"{option}.{match[2]} must be {_words(type_of(*match.groups()))}: it is missing, or null"
    if match := re.search(r"class_path '([^']+)':\s+(?:No module named|module '\S+' has no attribute)", message):
        return _unknown_class(option, match[1], message)
    if (match := re.search(r"given class_path '([^']+)':\s+cannot import name", message)) and (
        reason := _find_class(match[1])[1]
    ):
        return f"{option}: {reason}"
    if re.search(r"Expected a dot import path string|Import path does not correspond to a subclass", message):
        return _unknown_class(option, _given(message), message)
    if option and (match := re.search(r"NestedArg\(key='([\w.]+)'", _given(message))):
        return f"{option} has no options of its own, such as {match[1]}"
    if option and re.search(r"Expected a (?!<class 'NoneType'>|path)|Not a valid subclass", message):
        return _wrong_type(option, _given(message), message)
    if option and (match := re.search(r"Unable to load config ['\"](.*?)['\"]", message)):
        return f"{option} holds options, such as --{option}.NAME VALUE, or is a file of them, not {match[1]}"
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    told = [line for line in lines if not line.startswith(_NOISE)] if "Subtypes:" in message or option else lines
    text = " ".join(" ".join(told or lines).split())
    return f"{option}: {text}" if option and told else text


def must_be(option: str, value: Any, hint: Any) -> str | None:
    """What an option must be whose value is null or empty; None where that is a value, or where it has another one.

    Args:
        option: Its name, such as `optimizer.lr`.
        value: What was given.
        hint: Its type.
    """
    if value is None:
        return None if _holds_none(hint) else f"{option} must be {_words(hint)}, not null"
    if isinstance(value, str) and not value.strip() and _PLACE.search(option):
        return f"{option} must be a file or a folder, not an empty text; `.` is the working directory"
    return None


def _holds_none(hint: Any) -> bool:
    """Whether None is a value of a type; of one that is not known, it may be."""
    if hint in (None, NoneType, Any, object, Parameter.empty):
        return True
    if get_origin(hint) is Literal:
        return None in get_args(hint)
    if isinstance(hint, type):
        return False
    arguments = get_args(hint)
    is_union = "Union" in str(get_origin(hint))
    return any(map(_holds_none, arguments)) if is_union else get_origin(hint) is None


def _words(hint: Any) -> str:
    """A type in words."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if "Union" in str(get_origin(hint)):
        return " or ".join(dict.fromkeys(_words(each) for each in get_args(hint) if each is not NoneType))
    name = getattr(get_origin(hint) or hint, "__name__", "")
    if name in ("list", "Sequence", "Iterable", "set"):
        return "a list"
    return _WORDS.get(name) or (_a(name) if name else "given")


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "AEIOU" else f"a {name}"


def type_of(class_path: str, parameter: str) -> Any:
    """The type of a parameter of a class, or of the base that it hands it on to.

    None where nobody says it, and where None is the default: then it is a value, whatever the annotation says.
    """
    found, _ = _find_class(class_path)
    for base in getattr(found, "__mro__", ()):
        given = signature(base.__init__).parameters.get(parameter)
        if given is not None and given.default is None:
            return None
        hint = getattr(base.__init__, "__annotations__", {}).get(parameter)
        if isinstance(hint, str):
            hint = _evaluated(hint, vars(sys.modules[base.__module__]))
        if hint is not None:
            return hint
    return None


def _evaluated(annotation: str, names: dict[str, Any]) -> Any:
    """The type that an annotation means in its module; None where it names what is imported for checkers alone."""
    try:
        return eval(annotation, names)
    except (NameError, AttributeError, TypeError):
        return None


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
        if value == "None":
            return f"{option} must be one of {', '.join(choices)}, not null"
        return f"{option}: {value!r} is not one of {', '.join(choices)}{_did_you_mean(value, choices)}"
    types = re.findall(r"Expected a <class '(?:[\w.]+\.)?(\w+)'>", message)
    expected = list(dict.fromkeys(_WORDS.get(name, _a(name)) for name in types if name != "NoneType"))
    if match := re.search(r"Expected a (tuple with \d+ elements)", message):
        expected = [f"a {match[1]}"]
    expected = expected or [_a(name) for name in re.findall(r"Not a valid subclass of (\w+)", message)[:1]]
    if value == "None":
        return f"{option} must be {' or '.join(expected)}, not null"
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


def is_about_a_class(message: str) -> bool:
    """Whether the parser knows no class of a name; the domains may, once they are loaded."""
    return _OF_A_CLASS.search(message) is not None


@cache
def load_domains() -> None:
    """Import the tasks and the data of every domain whose packages are installed, so that all classes are known."""
    tasks = f"{__name__.partition('.')[0]}.tasks"
    for found in pkgutil.iter_modules(import_module(tasks).__path__, f"{tasks}."):
        if found.ispkg:
            for name in (found.name, f"{found.name}.data"):
                with suppress(ImportError):
                    import_module(name)


def failed_import(error: BaseException | None) -> str | None:
    """Where a module of the user's failed while the parser imported it, and why; None for any other error."""
    while error is not None:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
        names = [frame.name for frame in frames]
        if "import_object" in names and (names[-1] != "import_object" or isinstance(error, SyntaxError)):
            return _told_import(error)
        error = error.__cause__ or error.__context__
    return None


def _unknown_class(option: str, name: str, message: str) -> str:
    """That an option takes no such class, and which it takes."""
    if match := re.search(r"'class_path': '([^']+)'", name):
        name = match[1]
    prefix = f"{option}: " if option else ""  # a strategy's name turned class has none
    base = _base(option, message)
    own = _OWN.get(base.__name__, "") if base is not None else ""
    if base is None or (not own and "." in option):
        near = "" if base is None else _did_you_mean(name, {cls.__name__ for cls in _below(base)})
        return f"{prefix}there is no class {name!r}{near or '; give its full name, such as package.module.Class'}"
    if own:
        load_domains()
    known = sorted({cls.__name__ for cls in _below(base) if _is_offered(cls)})
    choices = f"Choose from: {', '.join(known)}"
    found, reason = _find_class(name)
    if own and found is not None:
        kinds = [cls.__name__ for cls in getattr(found, "__mro__", ()) if cls.__name__ in ("LightningModule", "Module")]
        kind = f"a {kinds[0]}, but no" if kinds else "no"
        return f"{prefix}{name} is {kind} {base.__name__}; {own}. {choices}"
    near = _did_you_mean(name.rpartition(".")[2], known)
    if own and reason and not near:
        end = "" if reason.endswith("?") else "."
        return f"{prefix}there is no class {name!r}: {reason}{end} {choices}, or your own by package.module.Class"
    return f"{prefix}there is no class {name!r}{near or '.'} {choices}"


def _base(option: str, message: str) -> type | None:
    """The class below which an option takes classes; None where the message does not say."""
    named = re.search(r"Subtypes: \[(?:list\[|<class ')([\w.]+)\.(\w+)", message)
    if named is None:  # that of help does not
        package = __name__.partition(".")[0]
        of_options = {
            "model": (f"{package}.tasks.base", "Task"),
            "data": ("lightning.pytorch", "LightningDataModule"),
            "optimizer": (f"{package}.factory", "OptimizerFactory"),
            "trainer.callbacks": ("lightning.pytorch.callbacks", "Callback"),
        }
        module, name = of_options.get(option, ("builtins", ""))
    else:
        module, name = named.groups()
    base: type | None = getattr(import_module(module), name, None)
    return base


def _find_class(name: str) -> tuple[Any, str]:
    """What a full name leads to, else None and why it leads nowhere."""
    module, _, attribute = name.rpartition(".")
    if not module:
        return None, ""
    try:
        found = import_module(module)
    except Exception as error:  # noqa: BLE001 - a module of the user's may raise anything
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module}.".startswith(f"{missing}."):
            return None, f"no module {missing!r} is in the working directory or on Python's path"
        return None, _told_import(error)
    if (cls := getattr(found, attribute, None)) is None:
        own = [other for other, value in vars(found).items() if getattr(value, "__module__", "") == found.__name__]
        return None, f"{module} has no {attribute}{_did_you_mean(attribute, own)}"
    return cls, ""


def _told_import(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    # What fails in a function of a library, fails in the line of the module that called it.
    frame = next((frame for frame in reversed(frames) if frame.name == "<module>"), frames[-1])
    file, line, why = frame.filename, frame.lineno, str(error)
    if isinstance(error, SyntaxError) and error.filename:
        file, line, why = error.filename, error.lineno, error.msg
    return f"{file}, line {line}, cannot be imported: {type(error).__name__}: {' '.join(why.split())[:200]}"


def _below(base: type) -> Iterator[type]:
    """All classes below a base."""
    below: list[type] = base.__subclasses__()
    for cls in below:
        yield cls
        yield from _below(cls)


def _is_offered(cls: type) -> bool:
    """Whether a class is one of this package's that users choose: a package exports it."""
    places = cls.__module__.split(".")
    if places[0] != __name__.partition(".")[0] or isabstract(cls):
        return False
    packages = (sys.modules.get(".".join(places[:end])) for end in range(1, len(places)))
    return any(cls.__name__ in getattr(package, "__all__", ()) for package in packages)
