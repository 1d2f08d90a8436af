"""`adam-mini compare`, from the command line to the report, and `adam-mini report`."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning_adam_mini.hints import require_package

from ..arguments import Parser, check_place
from .analysis import load_comparison
from .check import first_error
from .grid import Grid, Run, copy_recipe, format_lr, grid_of
from .launchers import ClusterLauncher, LocalLauncher, launcher_of
from .notes import settings_of
from .process import on_signals
from .runner import GridRunner, say
from .spec import parse_options, write_plan
from .status import FINISHED, LOST, read_status

__all__ = ["main", "report"]

LOCK_NAME = ".compare.lock"


def main(arguments: Sequence[str]) -> int:
    """Run the grid and write the report.

    Returns:
        The exit code: 0; 1 if a run failed or did not finish; 128 plus the signal's number after a stop.

    Raises:
        ArgumentError: The command line is wrong.
        ValueError: The grid cannot run as asked, or does not fit what is in its folder.
    """
    options = parse_options(arguments)
    out = Path(options.out).expanduser().resolve()
    grid = grid_of(options, out)
    launcher = launcher_of(options, grid, out)
    _print_plan(grid, out, launcher)
    _require_packages()
    _check_out(out)
    _check_commands(grid, out)
    if options.dry_run:
        _print_commands(grid, out)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    with _only_one(out):
        grid = grid_of(options, out)  # another start may have changed it in the meantime
        for recipe in grid.recipes.values():
            copy_recipe(recipe, out)
        write_plan(grid.plan, out)
        runner = GridRunner(
            grid=grid,
            out=out,
            launcher=launcher,
            timeout=options.timeout,
            facts={
                "num_jobs": launcher.num_jobs,
                "launcher": options.launcher,
                "commit": checkout_commit(Path(__file__)),
            },
        )
        with on_signals() as interruption:
            statuses = runner.train(interruption)
        if interruption.received:
            say(f"Stopped. Continue with: adam-mini compare --out {shlex.quote(options.out)}")
            return 128 + interruption.received[0]
        # A run whose folder another process holds is lost in this start, although its status.json does not say so.
        return report([str(out)]) or int(not set(statuses).isdisjoint(LOST))


def report(arguments: Sequence[str]) -> int:
    """Write the report of a folder, also while a comparison runs there.

    Args:
        arguments: The folder.

    Returns:
        The exit code: 1 if a run that was started has no result.

    Raises:
        ArgumentError: The command line is wrong.
        ValueError: The folder holds no comparison.
    """
    from .report import write_report

    parser = Parser(prog="adam-mini report", description="Write the report of a comparison again.", allow_abbrev=False)
    parser.add_argument("out", metavar="DIR", help="The folder that `adam-mini compare --out` was given.")
    out = Path(parser.parse_args(arguments).out).expanduser().resolve()
    comparison = load_comparison(out)
    write_report(comparison, out)
    say(f"report: {out / 'report.html'}, report.md, report.csv")
    counts = comparison.statuses
    missing = {status: count for status, count in counts.items() if status not in FINISHED}
    if missing:
        listed = ", ".join(f"{count} {status}" for status, count in missing.items())
        total = sum(counts.values())
        say(f"{sum(missing.values())} of {total} runs have no result: {listed}. The same command tries again.")
    return 1 if missing.keys() & set(LOST) else 0


def _print_plan(grid: Grid, out: Path, launcher: ClusterLauncher | LocalLauncher) -> None:
    """Print the number of runs, their learning rates, and what else a user must know about them."""
    plan, tuning = grid.plan, grid.tuning_runs()
    num_final = len(plan.final_seeds) * len(grid.lrs)
    done = sum(read_status(out / grid.folder(run))["status"] in FINISHED for run in tuning)
    num_lrs = len(next(iter(grid.lrs.values())))
    say(
        f"{len(grid.recipes)} recipe(s) x {len(grid.optimizers)} optimizer(s) x {num_lrs} learning rate(s) x "
        f"{len(plan.tuning_seeds)} tuning seed(s): {len(tuning)} runs, {done} of them finished"
    )
    if num_final:
        say(
            f"then {len(plan.final_seeds)} more seed(s) at each best learning rate: {num_final} runs; "
            f"{len(tuning) + num_final} in all"
        )
    for name in grid.recipes:
        by_lrs: dict[str, list[str]] = {}
        for label in grid.optimizers:
            by_lrs.setdefault(" ".join(map(format_lr, grid.lrs[name, label])), []).append(label)
        say(f"  {name}: " + "; ".join(f"lr {lrs} for {', '.join(labels)}" for lrs, labels in by_lrs.items()))
    say(f"reference {grid.reference}; seeds {' '.join(map(str, plan.seeds))}")
    if plan.common:
        say(f"all runs: {' '.join(plan.common)}")
    for note in settings_of(grid):
        say(f"note: {note}")
    at_a_time = "all at once" if launcher.num_jobs is None else f"{launcher.num_jobs} at a time"
    each = "the threads of its job" if launcher.threads is None else f"{launcher.threads} thread(s)"
    say(f"{at_a_time}, each with {each}, in {out}")


def _print_commands(grid: Grid, out: Path) -> None:
    """Print the command of each run."""
    for run in grid.tuning_runs():
        say(shlex.join(["adam-mini", *grid.arguments(run, out)]))
    if grid.plan.final_seeds:
        say("and, once the best learning rates are known, the same with the other seeds")


def _require_packages() -> None:
    for name in ("filelock", "scipy"):
        require_package(name, "compare")


def _check_out(out: Path) -> None:
    """Refuse a folder that cannot be made, or where another comparison runs."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: this is a file; give a folder")
    check_place(out)
    if (out / LOCK_NAME).exists():
        with _only_one(out):
            pass


def _check_commands(grid: Grid, out: Path) -> None:
    """Refuse a command that could not run, before any does."""
    runs = [Run(recipe, label, lrs[0], grid.plan.seeds[0]) for (recipe, label), lrs in grid.lrs.items()]
    if found := first_error([grid.arguments(run, out) for run in runs], Path(grid.plan.folder)):
        number, error = found
        raise ValueError(f"{runs[number].recipe} with {runs[number].optimizer}: {error}")


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(out / LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{out}: another `adam-mini compare` runs there; wait for it, or choose another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


def checkout_commit(file: Path) -> str | None:
    """The commit of the checkout that tracks a file of this package; None if the package is installed otherwise.

    Args:
        file: The file.

    Returns:
        40 hexadecimal digits, with `-dirty` if files differ from the commit.
    """
    file = file.resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True, env=environment)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # an environment may lie in the checkout of another project
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None
