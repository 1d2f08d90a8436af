"""What the sources of models share: packages that may be missing, code that talks or fails, and configurations."""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["Source", "building", "config_file", "is_subclass", "near", "package", "quiet", "read_json"]


@dataclass(frozen=True)
class Source:
    """A model on the meta device, and how it is to be cut.

    Args:
        model: The model.
        partition: Name of the partition.
        overrides: Its overrides.
        layouts: Layouts for its classes.
        exp_avg_dtype: Dtype of the first moment.
        warnings: What may differ from the model that the user means.
        runnable: Builds the model again with random weights on the CPU, with fewer layers where it is large; with what
            was left out, one sentence each.
    """

    model: nn.Module
    partition: str = "auto"
    overrides: Mapping[str, str] = field(default_factory=dict)
    layouts: Mapping[str, str] = field(default_factory=dict)
    exp_avg_dtype: torch.dtype | None = None
    warnings: tuple[str, ...] = ()
    runnable: Callable[[], tuple[nn.Module, list[str]]] | None = None


def package(name: str, option: str, extra: str) -> Any:
    """A package that an extra installs.

    Raises:
        ValueError: It is not there; with what to install.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{option} needs the package {error.name}; install it with pip install 'lightning-adam-mini[{extra}]'"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries log, warn and print while they load and build."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def building(what: str, remedy: str = "") -> Iterator[None]:
    """Tell in one line what other people's code could not build: any configuration may reach it."""
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # A configuration that checks itself tells the place first, and what is wrong last, with an error's name.
        is_checked = len(lines) > 1 and "validation" in lines[0].lower()
        cause = lines[-1] if is_checked else f"{type(error).__name__}: {next(iter(lines), '')}"
        missing = isinstance(error, ImportError)  # which no other configuration mends
        raise ValueError(f"{what}: cannot be built: {cause[:200]}{'' if missing else remedy}") from error


def config_file(option: str, name: str) -> Path | None:
    """The `config.json` that a path means; None for what is no path.

    Raises:
        ValueError: A folder without one, or a path that does not exist.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise ValueError(f"{option} {name}: the folder has no config.json")
    if path.is_file():
        return path
    if path.suffix == ".json" or name.startswith((".", "/", "~")):
        raise ValueError(f"{option} {name}: no such file")
    return None


def read_json(option: str, source: Path | str) -> dict[str, Any]:
    """The content of a configuration.

    Args:
        option: The option that names it, for messages.
        source: The file, or the content itself.

    Raises:
        ValueError: It is no JSON object, or nested deeper than can be read.
    """
    try:
        options = json.loads(source if isinstance(source, str) else source.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{option} {source}: this is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{option} {source}: this is nested too deeply for a configuration") from error
    if not isinstance(options, dict):
        raise ValueError(f"{option} {source}: a configuration is a JSON object, not a {type(options).__name__}")
    return options


def is_subclass(cls: Any, base: type) -> bool:
    """Whether this is a class below `base`, and not `base` itself; names that a package exports may be anything."""
    return isinstance(cls, type) and issubclass(cls, base) and cls is not base


def near(name: str, known: Iterable[str]) -> str:
    """A question after the other names that come near, for the end of a message; empty where none does."""
    near = difflib.get_close_matches(name, [other for other in known if other != name], n=3, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else ""
