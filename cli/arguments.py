"""The one grammar of the commands that train nothing. Importing this imports neither torch nor Lightning."""

from __future__ import annotations

import argparse
import re
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from lightning_adam_mini.hints import did_you_mean

__all__ = ["Parser", "UsageError", "check_place", "cpu_threads", "make_folder", "unknown_option"]

MODEL_SOURCES = {
    "hf": (
        "NAME_OR_CONFIG",
        "Model of transformers: its config.json, a folder with one, a name in the local cache of the hub, or the "
        """content of a config.json, such as '{"model_type": "gpt2"}'.""",
    ),
    "timm": ("NAME", "Model of timm, such as vit_base_patch16_224."),
    "diffusers": (
        "CLASS_OR_CONFIG.json",
        "Model of diffusers: a class, such as UNet2DConditionModel, with its defaults, or a config.json.",
    ),
}
"""Where a model comes from that no recipe describes, by option: metavar and help."""
_WITHOUT_EFFECT = re.compile(r"--(trainer|schedule|checkpoint|performance)\b")
_DECIMAL = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
_UNITS = {"": 1, "b": 1, **_DECIMAL, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


class UsageError(ValueError):
    """The command line names something that does not exist."""

    exit_code = 2


def unknown_option(name: str, known: Iterable[str], command: str) -> str:
    """The message about an option that does not exist."""
    return f"there is no option {name}{did_you_mean(name, known, count=1) or '.'} `{command} --help` lists all"


class Parser(argparse.ArgumentParser):
    """A parser that raises errors, suggests options, and takes RECIPE by position or by `--config`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})
        self._takes_recipe = False

    def error(self, message: str) -> NoReturn:
        """Raise the error; argparse would print it and exit."""
        if found := re.match(r"unrecognized arguments: (-[^\s=]+)", message):
            message = unknown_option(found[1], self._option_string_actions, self.prog)
        raise argparse.ArgumentError(None, message)

    def add_recipe(self, dest: str = "recipe", **options: Any) -> None:
        """Take RECIPE by position or by `--config`.

        Args:
            dest: Attribute for the value.
            options: Options of `add_argument`, such as `nargs`.
        """
        self._takes_recipe = True
        help_text = options.pop("help", "Packaged recipe, or path of one.")
        self.add_argument(dest, **{"metavar": "RECIPE", **options}, help=f"{help_text} --config RECIPE is the same.")

    def add_model(self, *sources: str) -> None:
        """Take the model of a recipe, or of one of `sources`, keys of `MODEL_SOURCES`; see `check_model`."""
        self.add_recipe(nargs="?")
        for name in sources:
            metavar, help_text = MODEL_SOURCES[name]
            self.add_argument(f"--{name}", metavar=metavar, help=help_text)

    def check_model(self, options: Namespace) -> None:
        """Check that exactly one model is given; `options.source` becomes its source, `options.model` its name."""
        sources = {"recipe": "RECIPE", **{name: f"--{name}" for name in MODEL_SOURCES if name in options}}
        given = [name for name in sources if getattr(options, name) is not None]
        if len(given) != 1:
            *names, last = sources.values()
            self.error(f"give exactly one of {', '.join(names)} and {last}")
        options.source, options.model = given[0], getattr(options, given[0])
        if not options.model:
            self.error(f"{sources[given[0]]} is empty: give a name")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        """As argparse, with the recipe of `--config` as the positional argument."""
        if self._takes_recipe and args is not None:
            args = self.recipe_first(args)
        return super().parse_known_args(args, namespace)

    def recipe_first(self, arguments: Sequence[str]) -> list[str]:
        """Arguments with the value of each `--config` moved to the front, as a positional RECIPE."""
        recipes, others = [], []
        remaining = iter(arguments)
        for argument in remaining:
            option, equals, value = argument.partition("=")
            if option not in ("--config", "-c"):
                others.append(argument)
                continue
            if not equals and (value := next(remaining, "-")).startswith("-"):
                self.error(f"{option}: expected one argument")
            recipes.append(value)
        return [*recipes, *others]

    def parse_with_recipe(self, arguments: Sequence[str], sections: Sequence[str]) -> Namespace:
        """Parse options of a command, and leave those of `fit` that change the recipe in `recipe_options`.

        Args:
            arguments: The command line after the command.
            sections: Sections of `fit` whose options are passed on.

        Raises:
            ArgumentError: There is no recipe, an option stands before it, or is unknown.
        """
        passed_on = re.compile(rf"--({'|'.join(sections)})(\.|=|$)|--seed_everything(=|$)")
        arguments = self.recipe_first(arguments)
        if passed_on.match(first := "".join(arguments[:1])) and "=" not in first:
            self.error(f"{first} stands before RECIPE, and its value would be read as one: give RECIPE first")
        options, rest = self.parse_known_args(arguments)
        if not options.recipe:
            self.error("RECIPE is empty: give a name; `adam-mini recipes` lists them")
        given = [text for text in rest if re.match(r"-+[^\d.]", text)]  # not the negative number that one is set to
        wrong = next((text for text in given if not passed_on.match(text)), None)
        if wrong is not None and _WITHOUT_EFFECT.match(wrong):
            self.error(f"{wrong} changes nothing here: leave it out")
        if wrong is None and rest and rest[0] not in given:
            wrong = rest[0]
        if wrong is not None:
            self.error(f"unrecognized arguments: {wrong}")
        options.recipe_options = list(rest)
        return options

    def check_least(self, options: Namespace, **least: int) -> None:
        """Check that given options are at least as large as these numbers."""
        for name, number in least.items():
            if (given := getattr(options, name)) is not None and given < number:
                self.error(f"--{name} {given}: at least {number}")

    def folder(self, out: Path) -> Path:
        """The folder of `--out`, which need not exist yet; a file, or a folder below one, is an error."""
        out = out.expanduser()
        if not (nearest := _nearest(out)).is_dir():
            self.error(f"--out {out}: {'this' if nearest == out else nearest} is a file; give a folder")
        return out

    def memory(self, text: str, *, least: int) -> int:
        """The bytes of `--memory`.

        Args:
            text: A number with a unit, such as 80GB (1e9) or 2GiB (2**30); without a unit, bytes.
            least: The least number of bytes that makes sense.
        """
        found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]*)", text.strip().lower())
        if found is None or found[2] not in _UNITS:
            self.error(f"--memory {text}: give a number with a unit, such as 80GB, 80GiB or 500MB")
        size = int(float(found[1]) * _UNITS[found[2]])
        if size < least:
            self.error(f"--memory {text}: more than nothing")
        return size


def check_place(out: Path) -> None:
    """Check that a file or a folder can be created at `--out`, before the work; nothing is left there.

    Raises:
        ValueError: It, or the folder that it would be created in, is not writable.
    """
    import tempfile

    nearest = _nearest(out := out.expanduser())
    folder = nearest.parent if nearest.is_file() and nearest == out else nearest
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"--out {out}: {folder} cannot be written to ({reason}); choose another place") from error


def _nearest(path: Path) -> Path:
    """The part of a path that exists: itself, or the folder that it would be created in."""
    return next((place for place in (path, *path.parents) if place.exists()), Path())


def make_folder(out: Path) -> None:
    """Create the folder of `--out` before the work.

    Raises:
        ValueError: It cannot be created or written to.
        OSError: It is a file.
    """
    check_place(out)
    out.mkdir(parents=True, exist_ok=True)


@contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """Set torch's number of CPU threads for the duration of a command; None leaves it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(before if number is None else number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
