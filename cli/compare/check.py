"""Whether `adam-mini fit` accepts the commands of a comparison, before any of them runs.

Run as a program, it reads a list of commands from standard input and writes a list of errors to standard output. It is
a separate process because it imports Lightning, which the comparison then need not hold in memory.
"""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, cast

__all__ = ["first_error"]

PATIENCE = 30.0
"""Seconds in which missing data are noticed; what takes longer is their preparation, which runs do as well."""


def first_error(commands: Sequence[Sequence[str]], folder: Path) -> tuple[int, str] | None:
    """The number of the first command that `adam-mini fit` refuses, and its error.

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
    for number, error in enumerate(errors):
        if "\n" in error:  # the traceback of an unexpected one
            sys.stderr.write(error)
            return number, f"the check of its command failed with an unexpected {error.splitlines()[-1]}"
        if error:
            return number, error
    return None


def _error_of(command: list[str], seen: set[str]) -> str:
    """The error of a command in one line, or the traceback of one that is not for users; empty if it is accepted.

    Args:
        command: Arguments of `adam-mini`, from `fit` on.
        seen: Recipes whose data were looked for; this one is added.
    """
    from ..main import main
    from ..messages import is_for_users, one_line

    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            try:
                code: object = main([*command, "--print_config"])
            except SystemExit as stop:
                code = stop.code
            if not code:
                _set_up(command, seen)
                return ""
    except Exception as error:  # noqa: BLE001 - all of them are reported
        return one_line(str(error)) if is_for_users(error) else traceback.format_exc()
    lines = [line for line in err.getvalue().splitlines() if line.strip()]
    return (lines or ["it is refused"])[-1].removeprefix("adam-mini: error: ")


def _set_up(command: list[str], seen: set[str]) -> None:
    """Build model and optimizer without memory, and look for the data as long as that is quick.

    Raises:
        ValueError: They do not fit together, or the data are missing.
    """
    import torch

    from ..application import Application
    from ..messages import quiet
    from ..models import trainer_options
    from ..recipes import resolve_configs

    options, recipe = resolve_configs(command[1:])
    with quiet():
        application = Application([*options, *trainer_options(), "--seed_everything=false"], recipe=recipe, run=False)
        task, data, trainer = cast("Any", application.model), application.datamodule, cast("Any", application.trainer)
        name = command[command.index("--config") + 1]
        if name not in seen:
            seen.add(name)
            with suppress(_PatienceError):
                with _limited_to(PATIENCE):
                    data.prepare_data()
                    data.setup("fit")
                trainer.datamodule, task.trainer = data, trainer  # as fit does
                with torch.device("meta"):
                    task.configure_model()
        if task.model is None:
            task.configure_meta_model(data)
        task.optimizer_factory.refuse_frozen(task)
        task.optimizer_factory.predict_state_bytes(task)


class _PatienceError(Exception):
    """The data are being prepared, so they are not missing."""


@contextmanager
def _limited_to(seconds: float) -> Iterator[None]:
    """Raise in a block that takes longer."""

    def stop(*_: object) -> None:
        raise _PatienceError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    seen_recipes: set[str] = set()
    sys.stdout.write(json.dumps([_error_of(each, seen_recipes) for each in json.load(sys.stdin)]))
