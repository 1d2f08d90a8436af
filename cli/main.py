"""Entry point of `adam-mini`: light commands answer at once, the others load Lightning."""

from __future__ import annotations

import logging
import os
import sys
from argparse import ArgumentError
from collections.abc import Sequence

from lightning_adam_mini import __version__

from .compare.process import guard
from .recipes import list_recipes, resolve_configs
from .telling import one_teller, tell

__all__ = ["main"]

USAGE = f"""adam-mini {__version__}: train with Adam-mini and its peers

  adam-mini fit      --config RECIPE [options]     train; --ckpt_path last continues
  adam-mini validate --config RECIPE --ckpt_path last
  adam-mini test     --config RECIPE --ckpt_path last
  adam-mini predict  --config RECIPE --ckpt_path last
  adam-mini export   RUN_DIR [--out FOLDER]        a language or diffusion model for from_pretrained
  adam-mini convert  SOURCE --out TARGET           a checkpoint for another optimizer, partition or layout
  adam-mini explain  RECIPE | --hf CONFIG.json     blocks and memory of a model, before any training
  adam-mini compare  RECIPE... --optimizers ...    several optimizers, learning rates and seeds, with a report
  adam-mini report   DIR                           the report of a comparison, written again
  adam-mini bench    RECIPE | --hf CONFIG.json     time of an optimizer's step beside its peers
  adam-mini bench throughput RECIPE --memory SIZE  the largest batch that fits, with AdamW and with Adam-mini
  adam-mini hessian  spectrum|js|exact|advise RECIPE   spectra block by block, and which blocks follow from them
  adam-mini study    NAME                          a claim of the papers, with a table and a picture
  adam-mini recipes                                list the packaged recipes
  adam-mini --version

RECIPE is the name of a packaged recipe or a path. `adam-mini fit --help` lists the options,
`adam-mini fit --optimizer.help AdamMini` those of an optimizer."""

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The command line without the program's name; `sys.argv` by default.

    Returns:
        The exit code: 0; 2 where the command line is wrong, 3 where training diverged, 130 after Ctrl-C, 1 after any
        other error. An error is told in one line; `ADAM_MINI_TRACEBACK=1` shows where it arose.
    """
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if "" not in sys.path and not sys.flags.safe_path:
        sys.path.append("")  # classes of the user's lie there; last, so that none of their files hides a package
    with one_teller():
        return _run(command, rest)


def _run(command: str, rest: list[str]) -> int:
    """Run a command; its exit code, with errors told."""
    try:
        guard()
        return _dispatch(command, rest)
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning's end of a run after Ctrl-C
            return 130
        raise
    except Exception as error:
        if os.environ.get("ADAM_MINI_TRACEBACK") or not tell(error):
            raise
        return getattr(error, "exit_code", 2 if isinstance(error, ArgumentError) else 1)


def _dispatch(command: str, rest: list[str]) -> int:
    if command in ("-h", "--help") or (command == "recipes" and rest in (["-h"], ["--help"])):
        sys.stdout.write(USAGE + "\n")
        return 0
    if command == "--version":
        sys.stdout.write(f"adam-mini {__version__}\n")
        return 0
    if command == "recipes":
        if rest:
            raise ValueError(f"`adam-mini recipes` takes no options, but got {' '.join(rest)}")
        recipes = list_recipes()
        width = max(map(len, recipes), default=0)
        sys.stdout.writelines(f"{name:<{width}}  {title}\n" for name, title in recipes.items())
        return 0
    if command == "explain":
        from .explain import main as explain

        return explain(rest)
    if command == "compare":
        from .compare.command import main as compare

        return compare(rest)
    if command == "report":
        from .compare.command import report

        return report(rest)
    _show_log()
    if command == "export":
        from .export import main as export

        export(rest)
        return 0
    if command == "bench":
        from .bench.command import main as bench

        return bench(rest)
    if command == "study":
        from .studies.command import main as study

        return study(rest)
    if command == "hessian":
        from .hessian.command import main as hessian

        return hessian(rest)
    if command == "convert":
        from .convert import main as convert

        convert(rest)
        return 0
    if command in TRAINER_COMMANDS:
        resolved, recipe = resolve_configs(rest)
        from .application import Application

        Application([command, *resolved], recipe=recipe)
        return 0
    sys.stderr.write(f"adam-mini: error: unknown command {command!r}\n\n{USAGE}\n")
    return 2


def _show_log() -> None:
    """Show the project's own log on standard output, without prefixes: it is what the user asked for."""
    logger = logging.getLogger("lightning_adam_mini")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]  # of this call alone: standard output may have been another one before
    logger.setLevel(logging.INFO)
    logger.propagate = False


if __name__ == "__main__":
    sys.exit(main())
