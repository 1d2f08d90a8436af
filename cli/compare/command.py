"""`adam-mini compare` and `adam-mini report`: from the command line to the report."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from ..arguments import Parser
from .announcement import tell_commands, tell_plan
from .assemble import best_learning_rates, load_comparison
from .check import first_error
from .grid import Grid, Run, expand
from .job import Interruption, Job
from .launchers import Launcher, Local, Submitit, local_gpus
from .options import parse
from .plan import Plan, merge, read_plan, write_plan
from .progress import Progress, say
from .recipe import read_recipe
from .status import FINISHED, read_status

__all__ = ["main", "report"]

DEFAULTS = Plan(optimizers=("AdamW", "AdamMini"), lrs=("x0.333", "x1", "x3"), seeds=(0, 1, 2))


def main(arguments: Sequence[str]) -> int:
    """Run the grid and write the report.

    Returns:
        The exit code: 0; 1 where a run failed or did not end in time; 128 plus the signal's number after a stop.

    Raises:
        ArgumentError: The command line is wrong.
        ValueError: The grid cannot run as asked, or does not fit what is in its folder.
    """
    options = parse(arguments)
    out = Path(options.out).expanduser().resolve()
    if options.report_only:
        return report([str(out)])
    grid = _grid(options, out, arguments)
    num_jobs, threads, gpus = _resources(options, grid)
    tell_plan(grid, out, num_jobs, threads)
    if options.dry_run:
        tell_commands(grid, out)
        return 0
    _require_packages()
    _check_commands(grid, out)
    out.mkdir(parents=True, exist_ok=True)
    with _only_one(out):
        grid = _grid(options, out, arguments)  # another start may have changed it until now
        write_plan(grid.plan, out)
        launcher: Launcher = Local(num_jobs, gpus)
        if options.launcher == "submitit":
            limit = options.jobs or (None if _is_cluster(options) else num_jobs)
            launcher = Submitit(out / "jobs", limit, threads, options.launcher_options)
            launcher.executor()  # its options may be wrong
        signum = _train(grid, out, launcher, threads, options.timeout)
        if signum:
            say(f"Stopped. Continue with: adam-mini compare --out {shlex.quote(options.out)}")
            return 128 + signum
        return report([str(out)])


def report(arguments: Sequence[str]) -> int:
    """Write the report of what a folder holds.

    Args:
        arguments: The folder.
    """
    parser = Parser(prog="adam-mini report", description="Write the report of a comparison again.", allow_abbrev=False)
    parser.add_argument("out", metavar="DIR", help="The folder that `adam-mini compare --out` was given.")
    out = Path(parser.parse_args(arguments).out).expanduser().resolve()
    comparison = load_comparison(out)
    from .report import write_report

    write_report(comparison, out)
    say(f"report: {out / 'report.html'}, report.md, report.csv")
    counts = comparison.statuses
    lost = {status: count for status, count in counts.items() if status not in FINISHED}
    if lost:
        told = ", ".join(f"{count} {status}" for status, count in lost.items())
        say(
            f"{sum(lost.values())} of {sum(counts.values())} runs have no result: {told}. The same command tries again."
        )
    return 1 if lost.keys() & {"failed", "timeout"} else 0


def _grid(options: Namespace, out: Path, arguments: Sequence[str]) -> Grid:
    """The grid of this command and of what its folder holds already."""
    old = read_plan(out)
    if old is None and not options.recipes:
        raise ValueError(f"{out} holds no comparison to continue: give recipes (`adam-mini recipes` lists them)")
    recipes = [read_recipe(name) for name in dict.fromkeys(options.recipes)]
    plan = Plan(
        recipes=tuple(recipe.name for recipe in recipes),
        digests={recipe.name: recipe.digest for recipe in recipes},
        optimizers=tuple(options.optimizers),
        lrs=tuple(options.lr),
        lrs_of=options.lrs_of,
        seeds=options.seeds,
        num_tuning_seeds=options.tuning_seeds,
        common=tuple(options.common),
        reference=options.reference,
        folder=str(Path.cwd()),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=("adam-mini", "compare", *arguments),
    )
    if old is None:
        plan = replace(
            plan,
            optimizers=plan.optimizers or DEFAULTS.optimizers,
            lrs=plan.lrs or DEFAULTS.lrs,
            seeds=plan.seeds or DEFAULTS.seeds,
        )
        return expand(plan)
    # What this command does not name may have changed as well.
    digests = {name: read_recipe(name).digest for name in old.recipes}
    merged = merge(old, replace(plan, digests={**digests, **plan.digests}))
    extends = options.recipes or options.optimizers or options.lr or options.lrs_of or options.seeds
    return expand(merged if extends else replace(merged, command=old.command))


def _resources(options: Namespace, grid: Grid) -> tuple[int, int, tuple[str, ...]]:
    """Runs at a time, threads of each, and the GPUs to deal out."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    one_device = all(recipe.devices in (1, "1") for recipe in grid.recipes.values())
    devices_are_set = any(option.startswith("trainer.devices") for option in grid.plan.common)
    gpus = local_gpus() if options.launcher == "local" else ()
    told = os.environ.get("OMP_NUM_THREADS", "")
    threads = options.threads or (int(told) if told.isdecimal() and int(told) else None)
    per_gpu = len(gpus) if one_device and not devices_are_set else 1
    default = per_gpu if gpus else max(1, cores // (threads or 1))
    num_jobs = options.jobs or default
    return num_jobs, threads or max(1, cores // num_jobs), gpus


def _require_packages() -> None:
    missing = [name for name in ("filelock", "scipy") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"compare needs the package {missing[0]}; install it with pip install 'lightning-adam-mini[app]'"
        )


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

    lock = FileLock(out / ".compare.lock")
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


def _train(grid: Grid, out: Path, launcher: Launcher, threads: int, timeout: float | None) -> signal.Signals | None:
    """Train what is not finished, in two stages; the signal that stopped it, if any."""

    def jobs(runs: Sequence[Run]) -> list[Job]:
        left = [run for run in runs if read_status(out / grid.folder(run))["status"] not in FINISHED]
        return [
            Job(
                run=run,
                arguments=tuple(grid.arguments(run, out)),
                folder=out / grid.folder(run),
                working_folder=Path(grid.plan.folder),
                threads=threads,
                timeout=timeout,
            )
            for run in left
        ]

    with _signals() as (interruption, received):
        tuning = jobs(grid.tuning_runs())
        num_final = (len(grid.plan.seeds) - len(grid.plan.tuning_seeds)) * len(grid.lrs)
        progress = Progress(len(tuning) + num_final)
        launcher.train(tuning, interruption, progress.started, progress.ended)
        if not received:
            final = jobs(grid.final_runs(best_learning_rates(grid, out)))
            progress.expect(len(tuning) + len(final))
            launcher.train(final, interruption, progress.started, progress.ended)
    return received[0] if received else None


@contextmanager
def _signals() -> Iterator[tuple[Interruption, list[signal.Signals]]]:
    """Ctrl-C and SIGTERM ask all runs to save and stop; a second one kills them."""
    interruption, received = Interruption(), list[signal.Signals]()

    def stop(signum: int, frame: FrameType | None) -> None:
        if received:
            interruption.kill.set()
        else:
            sys.stderr.write("stopping: the runs save their checkpoints; once more kills them\n")
        received.append(signal.Signals(signum))
        interruption.stop.set()

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interruption, received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _is_cluster(options: Namespace) -> bool:
    return options.launcher_options.get("cluster", "slurm") not in ("local", "debug")
