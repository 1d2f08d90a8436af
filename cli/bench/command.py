"""`adam-mini bench`: starts measurements in a process whose threads are set before torch is loaded."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence

from ..arguments import check_place
from .options import parse_step, parse_throughput

__all__ = ["main"]


def main(arguments: Sequence[str]) -> int:
    """Measure steps, or predict and measure batches.

    Returns:
        The exit code.

    Raises:
        ArgumentError: The command line is wrong.
        ValueError: There is no such model or optimizer, a package is missing, or memory does not do.
        OSError: The results cannot be written.
    """
    is_throughput = arguments[:1] == ["throughput"]
    options = parse_throughput(arguments[1:]) if is_throughput else parse_step(arguments)
    options.command = shlex.join(["adam-mini", "bench", *arguments])
    if options.out is not None:
        check_place(options.out)
    settings = _settings(options)
    if "torch" not in sys.modules and settings:
        again = [sys.executable, "-m", "lightning_adam_mini.cli.main", "bench", *arguments]
        return subprocess.call(again, env={**os.environ, **settings})
    if is_throughput:
        from .throughput import run as run_throughput

        run_throughput(options)
    else:
        from .steps import run as run_steps

        run_steps(options)
    return 0


def _settings(options: Namespace) -> dict[str, str]:
    """Variables that OpenMP and torch read once, when they are loaded, where they are not as they should be.

    Threads that wait must not spin: their CPU time would count as the step's. A choice of the user's stays.
    """
    wanted = {
        "OMP_NUM_THREADS": str(options.threads),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "KINETO_LOG_LEVEL": os.environ.get("KINETO_LOG_LEVEL", "99"),  # torch's profiler is talkative
    }
    return {name: value for name, value in wanted.items() if os.environ.get(name) != value}
