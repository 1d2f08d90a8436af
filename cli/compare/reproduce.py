"""What a comparison can be repeated by: its one command, and the commit of this package."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from .plan import Plan

__all__ = ["checkout_commit", "command_of"]


def command_of(plan: Plan, out: Path) -> tuple[str, ...]:
    """The one command that begins the comparison that several may have extended.

    Args:
        plan: The comparison.
        out: Its folder.
    """
    counted = plan.seeds == tuple(range(len(plan.seeds)))
    seeds = (len(plan.seeds),) if counted else plan.seeds
    folder = out.relative_to(plan.folder) if out.is_relative_to(plan.folder) else out
    return (
        *("adam-mini", "compare", *plan.recipes),
        *("--optimizers", *plan.optimizers),
        *("--lr", *plan.lrs),
        *(word for label, lrs in plan.lrs_of.items() for word in ("--lr-of", label, *lrs)),
        *("--seeds", *map(str, seeds)),
        *(() if plan.num_tuning_seeds is None else ("--tuning-seeds", str(plan.num_tuning_seeds))),
        *(word for option in plan.common for word in ("--set", option)),
        *(() if plan.reference is None else ("--reference", plan.reference)),
        *("--out", str(folder)),
    )


def checkout_commit(file: Path) -> str | None:
    """The commit of the checkout that a file of this package is kept in; None where it is installed otherwise.

    Args:
        file: The file.

    Returns:
        40 hexadecimal digits, with `-dirty` where files differ from the commit.
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
