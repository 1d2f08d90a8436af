"""`adam-mini compare`: from the command line to the report."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from ..arguments import check_place
from .announcement import tell_commands, tell_plan
from .check import first_error
from .grid import Grid, Run
from .interruption import on_signals
from .options import parse
from .plan import write_plan
from .planning import grid_of
from .progress import say
from .recipe import copy_recipe
from .reporting import report
from .reproduce import checkout_commit
from .resources import resources_of
from .runner import Stages
from .status import LOST

__all__ = ["main"]

LOCK_NAME = ".compare.lock"


def main(arguments: Sequence[str]) -> int:
    """Run the grid and write the report.

    Returns:
        The exit code: 0; 1 where a run failed or did not come to its end; 128 plus the signal's number after a stop.

    Raises:
        ArgumentError: The command line is wrong.
        ValueError: The grid cannot run as asked, or does not fit what is in its folder.
    """
    options = parse(arguments)
    out = Path(options.out).expanduser().resolve()
    grid = grid_of(options, out)
    resources = resources_of(options, grid, out)
    tell_plan(grid, out, resources.num_jobs, resources.threads)
    _require_packages()
    _check_place(out)
    _check_commands(grid, out)
    if options.dry_run:
        tell_commands(grid, out)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    with _only_one(out):
        grid = grid_of(options, out)  # another start may have changed it until now
        for recipe in grid.recipes.values():
            copy_recipe(recipe, out)
        write_plan(grid.plan, out)
        stages = Stages(
            grid=grid,
            out=out,
            launcher=resources.launcher,
            threads=resources.threads,
            timeout=options.timeout,
            facts={
                "num_jobs": resources.num_jobs,
                "launcher": options.launcher,
                "commit": checkout_commit(Path(__file__)),
            },
        )
        with on_signals() as interruption:
            statuses = stages.train(interruption)
        if interruption.received:
            say(f"Stopped. Continue with: adam-mini compare --out {shlex.quote(options.out)}")
            return 128 + interruption.received[0]
        # A run whose folder another process holds is lost in this start, though its status.json does not say so.
        return report([str(out)]) or int(not set(statuses).isdisjoint(LOST))


def _require_packages() -> None:
    missing = [name for name in ("filelock", "scipy") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"compare needs the package {missing[0]}; install it with pip install 'lightning-adam-mini[app]'"
        )


def _check_place(out: Path) -> None:
    """Refuse a folder that cannot be made, or where another comparison runs."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: this is a file; give a folder")
    check_place(out)
    if (out / LOCK_NAME).exists():
        with _only_one(out):
            pass


def _check_commands(grid: Grid, out: Path) -> None:
    """Refuse a command that could not run, before any does."""
    lr = {case: lrs[0] for case, lrs in grid.lrs.items()}
    runs = [Run(recipe, label, lr[recipe, label], grid.plan.seeds[0]) for recipe, label in grid.lrs]
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
