"""Whether `adam-mini fit` understands the commands of a comparison, before any of them runs.

Run as a program, it reads a list of commands from standard input and writes a list of errors to standard output. It is
a process of its own because it imports Lightning, which the comparison then need not hold in memory.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

import yaml

__all__ = ["first_error"]


def first_error(commands: Sequence[Sequence[str]], folder: Path) -> tuple[int, str] | None:
    """The first command that `adam-mini fit` refuses, and what it says.

    Args:
        commands: Arguments of `adam-mini`, each from `fit` on.
        folder: Folder that they would be started in.

    Raises:
        ValueError: They could not be checked.
    """
    checked = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps([list(command) for command in commands]),
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )
    if checked.returncode:
        raise ValueError(f"the commands could not be checked: {(checked.stderr.strip() or 'no message')[-400:]}")
    errors: list[str] = json.loads(checked.stdout)
    return next(((number, error) for number, error in enumerate(errors) if error), None)


def _error(command: list[str]) -> str:
    """What a command is refused for; empty where it is not."""
    from ..main import main

    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code: object = main([*command, "--print_config"])
    except SystemExit as stop:
        code = stop.code
    except Exception as error:  # noqa: BLE001 - with ADAM_MINI_TRACEBACK, main raises whatever it is
        return str(error)
    if code:
        lines = [line for line in err.getvalue().splitlines() if line.strip()]
        return (lines or ["it is refused"])[-1].removeprefix("adam-mini: error: ")
    try:
        _build_factory(out.getvalue())
    except ValueError as error:
        return str(error)
    return ""


def _build_factory(config: str) -> None:
    """Build the optimizer's factory, which refuses values that are out of range."""
    section = yaml.safe_load(config)["optimizer"]
    module, _, name = section["class_path"].rpartition(".")
    getattr(import_module(module), name)(**section["init_args"])


if __name__ == "__main__":
    sys.stdout.write(json.dumps([_error(command) for command in json.load(sys.stdin)]))
