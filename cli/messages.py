"""Errors for users, in one line: who of several ranks reports one, and what a parser's message comes down to."""

from __future__ import annotations

import logging
import os
import pkgutil
import re
import sys
import tempfile
import time
import traceback
import warnings
from argparse import ArgumentError
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from inspect import Parameter, isabstract, signature
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from lightning_adam_mini.hints import did_you_mean

from .arguments import unknown_option

__all__ = [
    "PATIENCE",
    "failed_import",
    "is_about_a_class",
    "is_for_users",
    "load_domains",
    "must_be",
    "near_option",
    "one_line",
    "quiet",
    "report_error",
    "report_once",
    "show",
    "type_of",
]

_REPORTED = "ADAM_MINI_REPORTED"
"""Names the file that exists once a rank has reported an error; ranks that Lightning starts inherit it."""

PATIENCE = 5.0
"""Seconds that rank zero has to report what another rank has met as well, and the other way round."""

_RANK_VARIABLES = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
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
"""Options that name a file or a folder: Python would take an empty text for the working directory."""

_OWN = {
    "Task": "derive it from lightning_adam_mini.tasks.base.Task, which gives it optimizer, schedule and checkpoints",
    "LightningDataModule": "derive it from lightning.pytorch.LightningDataModule",
}
"""How users write a class of their own, by the base class that the command line asks for."""
_OF_A_CLASS = re.compile(
    r"Expected a dot import path string|Import path \S*\s*does not correspond|class_path '[^']+':\s+(?:No module named|"
    r"module '\S+' has no attribute)|\.help: "
)


def show(text: str) -> None:
    """Print text; a reader that closes the pipe early, such as `| head`, is no error."""
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what libraries log, warn and print while they load and build."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def report_once() -> Iterator[None]:
    """Let all ranks that this process starts report an error once."""
    if _REPORTED in os.environ or _is_rank():
        yield
        return
    os.environ[_REPORTED] = str(Path(tempfile.gettempdir()) / f"adam-mini-{os.getpid()}-{time.time_ns()}")
    try:
        yield
    finally:
        Path(os.environ.pop(_REPORTED)).unlink(missing_ok=True)


def is_for_users(error: BaseException) -> bool:
    """Whether the message says what to do, or which package to install, so that nobody needs the traceback."""
    known = isinstance(error, ArgumentError | ValueError | OSError | ModuleNotFoundError)
    # Lightning's own errors, and torch's of forked processes, are of classes that may not be imported here.
    return known or type(error).__name__ == "MisconfigurationException" or _of_a_process(error) is not None


def report_error(error: Exception) -> bool:
    """Print an error in one line, unless another rank has reported why this process fails.

    Returns:
        Whether somebody has reported it; otherwise the user needs the traceback.
    """
    rank = _rank()
    if is_for_users(error):
        if rank and getattr(error, "is_on_all_ranks", False):
            return True
        if rank and _is_reported(PATIENCE):
            _await_end()
        elif _claim():
            where = f" on rank {rank}" if rank else ""
            sys.stderr.write(f"adam-mini: error{where}: {one_line(_of_a_process(error) or str(error))}\n")
        return True
    if _is_rank() and _is_reported(PATIENCE):
        _await_end()
        return True
    return False


def _of_a_process(error: BaseException) -> str | None:
    """The message for users that a process of torch has raised; it arrives as the text of its traceback."""
    if type(error).__name__ != "ProcessRaisedException":
        return None
    classes = r"(?:\w+\.)*(?:ValueError|\w*Error(?=: \[Errno)|FileNotFoundError|MisconfigurationException)"
    found = re.search(rf"\n{classes}: (.*)\Z", str(error).rstrip(), re.DOTALL)
    return found[1] if found else None


def _rank() -> int:
    """The rank of this process, from the variables that launchers set."""
    return next((int(os.environ[name]) for name in _RANK_VARIABLES if name in os.environ), 0)


def _is_rank() -> bool:
    return not os.environ.keys().isdisjoint(_RANK_VARIABLES)


def _file() -> Path:
    """The file that all ranks on this machine share; ranks of another launcher share their parent and its start."""
    start = "-".join(os.environ.get(name, "") for name in ("MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"))
    return Path(os.environ.get(_REPORTED) or Path(tempfile.gettempdir()) / f"adam-mini-{os.getppid()}-{start}")


def _claim() -> bool:
    """Whether this rank is the one that reports; False if another rank is."""
    if not _is_rank():
        return True
    if _is_reported(0.0):
        return False
    try:
        _file().unlink(missing_ok=True)  # of an earlier start
        _file().touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True  # no place for temporary files: better reported twice than not at all
    return True


def _is_reported(patience: float) -> bool:
    """Whether a rank has reported an error, or does so within the next seconds."""
    end = time.monotonic() + patience
    while True:
        try:
            if time.time() - _file().stat().st_mtime < 60:
                return True
        except OSError:
            pass
        if time.monotonic() >= end:
            return False
        time.sleep(0.05)


def _await_end() -> None:
    """Wait until the parent process ends this rank: Lightning kills all ranks as soon as one exits on its own."""
    parent, end = os.getppid(), time.monotonic() + PATIENCE
    while _rank() and _REPORTED in os.environ and os.getppid() == parent and time.monotonic() < end:
        time.sleep(0.05)


def one_line(message: str) -> str:
    """Put a message on one line.

    jsonargparse tries every type of an option in turn and reports them all: of that, the innermost cause remains, after
    the option's name.
    """
    if match := re.match(r"Caught \w+ in DataLoader worker process.*\n[\w.]+: (.*)", message, re.DOTALL):
        message = match[1]  # of a worker process, whose traceback arrives as text
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
    causes = [line for line in lines if not line.startswith(_NOISE)] if "Subtypes:" in message or option else lines
    text = " ".join(" ".join(causes or lines).split())
    return f"{option}: {text}" if option and causes else text


def must_be(option: str, value: Any, hint: Any) -> str | None:
    """The message about an option that is null or empty and must not be; None for any other value.

    Args:
        option: Its name, such as `optimizer.lr`.
        value: Its value.
        hint: Its type.
    """
    if value is None:
        return None if _holds_none(hint) else f"{option} must be {_words(hint)}, not null"
    if isinstance(value, str) and not value.strip() and _PLACE.search(option):
        return f"{option} must be a file or a folder, not an empty text; `.` is the working directory"
    return None


def _holds_none(hint: Any) -> bool:
    """Whether a type allows None; an unknown type does."""
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
    """The type of a parameter of a class, or of the base class that receives it.

    None if it has no annotation, and if its default is None: then None is allowed, whatever the annotation says.
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
    """The type that an annotation means in its module; None if it names something that only type checkers import."""
    try:
        return eval(annotation, names)
    except (NameError, AttributeError, TypeError):
        return None


def near_option(message: str, options: Iterable[str]) -> str:
    """Add suggestions to a message of the trainer commands about an unknown option; return any other message unchanged.

    Args:
        message: The parser's message.
        options: The options that exist, such as `--trainer.max_steps`.
    """
    if match := re.match(r"(?:error: )?[Uu]nrecognized arguments: ([^-\s]\S*)", message):
        return f"{match[1]} belongs to no option; give RECIPE first, or as --config RECIPE"
    match = re.search(
        r"unrecognized arguments: (--[^\s=]+)|does not accept option '([\w.]+)'|\AOption '([\w.]+)' is not acc", message
    )
    if match is None:
        return message
    return unknown_option(match[1] or f"--{match[2] or match[3]}", options, "adam-mini fit")


def _given(message: str) -> str:
    """The rejected value: the first one in the message, which is the innermost."""
    match = re.search(r"Got value: ([^\n]*)", message) or re.search(r"Given value: ([^\n]*)", message)
    return match[1] if match else ""


def _wrong_type(option: str, value: str, message: str) -> str:
    """The message about a value of the wrong type, with what the option takes."""
    literals = ", ".join(re.findall(r"Expected a typing\.Literal\[([^\n]*)\]", message))
    if literals:
        choices = list(dict.fromkeys(choice.strip("'") for choice in literals.split(", ")))
        if value == "None":
            return f"{option} must be one of {', '.join(choices)}, not null"
        return f"{option}: {value!r} is not one of {', '.join(choices)}{did_you_mean(value, choices, count=1)}"
    types = re.findall(r"Expected a <class '(?:[\w.]+\.)?(\w+)'>", message)
    expected = list(dict.fromkeys(_WORDS.get(name, _a(name)) for name in types if name != "NoneType"))
    if match := re.search(r"Expected a (tuple with \d+ elements)", message):
        expected = [f"a {match[1]}"]
    expected = expected or [_a(name) for name in re.findall(r"Not a valid subclass of (\w+)", message)[:1]]
    if value == "None":
        return f"{option} must be {' or '.join(expected)}, not null"
    return f"{option}: expected {' or '.join(expected)}, got {value}"


def _unknown_option(class_path: str, option: str) -> str:
    """The message about an option that a class does not have, with those that it has."""
    module, _, name = class_path.rpartition(".")
    cls = getattr(import_module(module), name)
    options = _options(cls)
    near = did_you_mean(option, options, count=2)
    return f"{name} has no option {option!r}{near or '.'} It has: {', '.join(options)}"


def _options(cls: type) -> list[str]:
    """The options of a class, including those that it passes to its base classes as keywords."""
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
    """Whether a message is about an unknown class; it may be known once the domains are loaded."""
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
    """Where and why a module of the user failed while the parser imported it; None for any other error."""
    while error is not None:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
        names = [frame.name for frame in frames]
        if "import_object" in names and (names[-1] != "import_object" or isinstance(error, SyntaxError)):
            return _import_failure(error)
        error = error.__cause__ or error.__context__
    return None


def _unknown_class(option: str, name: str, message: str) -> str:
    """The message about a class that an option does not take, with those that it takes."""
    if match := re.search(r"'class_path': '([^']+)'", name):
        name = match[1]
    prefix = f"{option}: " if option else ""  # a strategy's name turned class has none
    base = _base(option, message)
    own = _OWN.get(base.__name__, "") if base is not None else ""
    if base is None or (not own and "." in option):
        near = "" if base is None else did_you_mean(name, {cls.__name__ for cls in _below(base)}, count=1)
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
    near = did_you_mean(name.rpartition(".")[2], known, count=1)
    if own and reason and not near:
        end = "" if reason.endswith("?") else "."
        return f"{prefix}there is no class {name!r}: {reason}{end} {choices}, or your own by package.module.Class"
    return f"{prefix}there is no class {name!r}{near or '.'} {choices}"


def _base(option: str, message: str) -> type | None:
    """The base of the classes that an option takes; None if the message does not say it."""
    named = re.search(r"Subtypes: \[(?:list\[|<class ')([\w.]+)\.(\w+)", message)
    if named is None:  # messages about `--x.help` have no subtypes
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
    """The object of a full name, or None and the reason why there is none."""
    module, _, attribute = name.rpartition(".")
    if not module:
        return None, ""
    try:
        found = import_module(module)
    except Exception as error:  # noqa: BLE001 - a module of the user may raise anything
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module}.".startswith(f"{missing}."):
            return None, f"no module {missing!r} is in the working directory or on Python's path"
        return None, _import_failure(error)
    if (cls := getattr(found, attribute, None)) is None:
        own = [other for other, value in vars(found).items() if getattr(value, "__module__", "") == found.__name__]
        return None, f"{module} has no {attribute}{did_you_mean(attribute, own, count=1)}"
    return cls, ""


def _import_failure(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    # An error in a function of a library is reported at the line of the module that called it.
    frame = next((frame for frame in reversed(frames) if frame.name == "<module>"), frames[-1])
    file, line, why = frame.filename, frame.lineno, str(error)
    if isinstance(error, SyntaxError) and error.filename:
        file, line, why = error.filename, error.lineno, error.msg
    return f"{file}, line {line}, cannot be imported: {type(error).__name__}: {' '.join(why.split())[:200]}"


def _below(base: type) -> Iterator[type]:
    """All subclasses of a class, of any depth."""
    below: list[type] = base.__subclasses__()
    for cls in below:
        yield cls
        yield from _below(cls)


def _is_offered(cls: type) -> bool:
    """Whether users choose this class: one of our packages exports it."""
    places = cls.__module__.split(".")
    if places[0] != __name__.partition(".")[0] or isabstract(cls):
        return False
    packages = (sys.modules.get(".".join(places[:end])) for end in range(1, len(places)))
    return any(cls.__name__ in getattr(package, "__all__", ()) for package in packages)
