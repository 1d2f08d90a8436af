"""What a measurement leaves: a table on standard output, and files that say how they were made."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from argparse import Namespace
from importlib import metadata
from typing import Any

from lightning_adam_mini.measure import describe_machine, package_versions

from ...tasks.atomic_files import write_text

__all__ = ["check_drawing", "write_results"]

log = logging.getLogger(__name__)

VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def check_drawing() -> None:
    """Tell before a measurement that its picture cannot be drawn.

    Raises:
        ValueError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--out needs matplotlib; install it with pip install 'lightning-adam-mini[app]'")


def write_results(options: Namespace, result: dict[str, Any], table: str, name: str, *, draws: bool = False) -> None:
    """Print the table; with `--out`, write NAME.json and the picture, each beside its place and then renamed.

    Args:
        options: Of the command line, with the `command` itself.
        result: Figures.
        table: The same as text.
        name: Stem of the files.
        draws: Whether there is a picture.
    """
    log.info("%s", table)
    if options.out is None:
        return
    model = {"model": getattr(options, options.source), "source": options.source}
    made = {
        "command": options.command,
        **model,
        **result,
        "hardware": describe_machine(),
        "versions": package_versions() | _more_versions(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    files = [options.out / f"{name}.json"]
    write_text(files[0], json.dumps(made, indent=1) + "\n")
    if draws:
        from .chart import draw_ratios

        files.append(options.out / f"{name}.png")
        draw_ratios(files[1], made)
    log.info("%s", f"\nwrote {' and '.join(map(str, files))}")


def _more_versions() -> dict[str, str]:
    """Versions of packages that only measurements use, where they are installed."""
    found = {}
    for name in ("torchao", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
