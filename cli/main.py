"""Entry point of `adam-mini`: light commands answer at once, the others load Lightning."""

from __future__ import annotations

import logging
import os
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from importlib import import_module

from lightning_adam_mini import __version__
from lightning_adam_mini.hints import did_you_mean

from .arguments import Parser
from .messages import report_error, report_once, show
from .recipes import list_recipes, resolve_configs

__all__ = ["main"]

USAGE = f"""adam-mini {__version__}: train with Adam-mini and its peers

  adam-mini fit      RECIPE [options]              train; --ckpt_path last continues
  adam-mini validate RECIPE --ckpt_path last
  adam-mini test     RECIPE --ckpt_path last
  adam-mini predict  RECIPE --ckpt_path last
  adam-mini export   RUN_DIR [--out FOLDER]        a language or diffusion model for from_pretrained
  adam-mini convert  SOURCE --out TARGET           a checkpoint for another optimizer, partition or layout
  adam-mini explain  RECIPE | --hf CONFIG.json     blocks and memory of a model, before any training
  adam-mini compare  RECIPE... --optimizers ...    several optimizers, learning rates and seeds, with a report
  adam-mini report   DIR                           write the report of a comparison again
  adam-mini bench    RECIPE | --hf CONFIG.json     step time of AdamMini and other optimizers
  adam-mini bench throughput RECIPE --memory SIZE  the largest batch that fits, with AdamW and with Adam-mini
  adam-mini advise   RECIPE [--source hessian]     which second moments each matrix needs, measured, as overrides
  adam-mini hessian  spectrum|js|exact RECIPE      spectra of the Hessian block by block
  adam-mini study    NAME                          a claim of the papers, with a table and a figure
  adam-mini recipes                                list the packaged recipes
  adam-mini --version

RECIPE is the name of a packaged recipe or a path; --config RECIPE is the same. `adam-mini fit --help` lists the
options, `adam-mini fit --optimizer.help AdamMini` those of an optimizer."""

COMMANDS = {
    "export": "export",
    "convert": "convert",
    "explain": "explain",
    "compare": "compare.command",
    "report": "compare.command:report",
    "bench": "bench.command",
    "advise": "advise.command",
    "hessian": "hessian.command",
    "study": "studies.command",
}
"""Module of each command that trains nothing, and its function if that is not `main`."""
PRINTING_COMMANDS = ("explain", "compare", "report")
"""Commands that print their output themselves, and nothing of the log."""
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The command line without the program's name; `sys.argv` by default.

    Returns:
        The exit code: 0; 2 if the command line is wrong, 3 if training diverged, 130 after Ctrl-C, 1 after any other
        error. An error is one line on standard error; `ADAM_MINI_TRACEBACK=1` shows where it arose.
    """
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if "" not in sys.path and not sys.flags.safe_path:
        sys.path.append("")  # for the user's own classes; last, so that none of their files hides a package
    with report_once():
        return _run(command, rest)


def _run(command: str, rest: list[str]) -> int:
    """Run a command and report errors; the exit code."""
    try:
        if "ADAM_MINI_COMPARE_PIPE" in os.environ:  # a run of a comparison
            from .compare.process import guard

            guard()
        return _dispatch(command, rest)
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning ends a run so after Ctrl-C
            return 130
        raise
    except Exception as error:
        if os.environ.get("ADAM_MINI_TRACEBACK") or not report_error(error):
            raise
        return getattr(error, "exit_code", 2 if isinstance(error, ArgumentError) else 1)


def _dispatch(command: str, rest: list[str]) -> int:
    if command in ("-h", "--help"):
        show(USAGE)
    elif command == "--version":
        show(f"adam-mini {__version__}")
    elif command == "recipes":
        _list_recipes(rest)
    elif command in COMMANDS:
        if command not in PRINTING_COMMANDS:
            _show_log()
        module, _, function = COMMANDS[command].partition(":")
        run = getattr(import_module(f".{module}", __package__), function or "main")
        return int(run(rest) or 0)
    elif command in TRAINER_COMMANDS:
        _show_log()
        resolved, recipe = resolve_configs(rest)
        from .application import Application

        Application([command, *resolved], recipe=recipe)
    else:
        hint = did_you_mean(command, [*COMMANDS, *TRAINER_COMMANDS, "recipes"])
        sys.stderr.write(f"adam-mini: error: unknown command {command!r}{hint}\n\n{USAGE}\n")
        return 2
    return 0


def _list_recipes(arguments: Sequence[str]) -> None:
    parser = Parser(prog="adam-mini recipes", description="List the packaged recipes, each with its title.")
    parser.parse_args(arguments)
    recipes = list_recipes()
    width = max(map(len, recipes), default=0)  # no table of rich, which takes longer than all the rest
    show("\n".join(f"{name:<{width}}  {title}" for name, title in recipes.items()))


def _show_log() -> None:
    """Print the project's own log on standard output, without prefixes: it is the output of the commands."""
    logger = logging.getLogger("lightning_adam_mini")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]  # only of this call: standard output may have been another stream before
    logger.setLevel(logging.INFO)
    logger.propagate = False


if __name__ == "__main__":
    sys.exit(main())
