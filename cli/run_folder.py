"""One folder a run: where it lies, and what may be written into it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..tasks.in_place import recover

__all__ = [
    "CLAIM_NAME",
    "choose_run_dir",
    "forget_run_dir",
    "holds_run",
    "last_checkpoint",
    "resolve_checkpoint",
]

CLAIM_NAME = ".claim"
"""File by which a process takes a folder, before its run leaves a trace there."""

_INHERITED = "ADAM_MINI_RUN_DIR"
"""Processes that Lightning starts for other ranks take the folder of the first."""


def choose_run_dir(run_dir: str | None, recipe: str | None, *, starts_anew: bool, root: str = "runs") -> Path:
    """The folder of a run.

    Args:
        run_dir: What the user asked for.
        recipe: Stem of the recipe, which names the folder where the user did not.
        starts_anew: Whether the run begins from its first step; then it gets a folder without a run.
        root: Folder of all runs that are not named.

    Returns:
        `run_dir`; or `runs/RECIPE`, `runs/RECIPE-2`, ...: the first free one for a new run, the newest otherwise.

    Raises:
        ValueError: `run_dir` holds a run already, and the new one does not continue it.
    """
    if "LOCAL_RANK" in os.environ and _INHERITED in os.environ:
        return Path(os.environ[_INHERITED])
    if run_dir is not None:
        folder = Path(run_dir).expanduser()
        if starts_anew and not _claim(folder):
            raise ValueError(
                f"{folder} holds a run already; continue it with --ckpt_path last, or choose another --run_dir"
            )
    else:
        name = recipe or "run"
        numbered = {number: path for number, path in _numbered(Path(root), name).items() if holds_run(path)}
        if starts_anew:
            number = max(numbered, default=0) + 1
            while not _claim(folder := Path(root) / (name if number == 1 else f"{name}-{number}")):
                number += 1
        else:
            folder = numbered[max(numbered)] if numbered else Path(root) / name
    os.environ[_INHERITED] = str(folder)
    return folder


def _claim(folder: Path) -> bool:
    """Take a folder for a new run; False where it holds a run, or another process has taken it and is still alive.

    A run leaves its first traces seconds after its start, when a second one may have chosen the same folder. Ranks that
    a launcher started together take the same folder, and no claim.
    """
    if holds_run(folder):
        return False
    if {"RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"} & os.environ.keys():
        return True
    folder.mkdir(parents=True, exist_ok=True)
    claim = folder / CLAIM_NAME
    for _ in range(2):
        try:
            with claim.open("x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            if _is_alive(claim.read_text()):
                return False
            claim.unlink(missing_ok=True)
        else:
            return True
    return False


def _is_alive(pid: str) -> bool:
    """Whether another process of this machine has the number."""
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return int(pid) != os.getpid()


def forget_run_dir() -> None:
    """Let the next run of this process choose a folder of its own."""
    os.environ.pop(_INHERITED, None)


def resolve_checkpoint(checkpoint: str, run_dir: Path, *, may_start: bool) -> str | None:
    """The file or folder of a `--ckpt_path` value.

    Args:
        checkpoint: A path, `last`, `best`, or a keyword of Lightning.
        run_dir: The run folder, in which `last` and `best` are looked for.
        may_start: Whether a missing `last` means the first start of a run, as in jobs that are requeued.

    Returns:
        The path, the keyword, or None to start anew.

    Raises:
        ValueError: There is no such checkpoint.
    """
    if checkpoint == "best":
        return str(_best_checkpoint(run_dir))
    if checkpoint != "last":
        if checkpoint in ("hpc", "registry"):
            return checkpoint
        path = Path(checkpoint).expanduser()
        if not recover(path):
            raise ValueError(
                f"--ckpt_path {checkpoint}: no such file; `last` takes the newest checkpoint of the run folder"
            )
        if path.is_dir() and not (path / ".metadata").exists():
            raise ValueError(
                f"--ckpt_path {checkpoint} is a folder, but no checkpoint: it has no .metadata; give a .ckpt in it, or "
                "--run_dir with --ckpt_path last"
            )
        return checkpoint
    newest = last_checkpoint(run_dir)
    if newest is not None:
        return str(newest)
    if may_start and not _others(run_dir):
        from lightning.pytorch.utilities import rank_zero_warn  # seconds, which light commands do not have

        rank_zero_warn(f"--ckpt_path last: {run_dir} holds no checkpoint yet, so the run starts from its first step")
        return None
    raise ValueError(f"--ckpt_path last: no checkpoint in {run_dir / 'checkpoints'}; name the run with --run_dir")


def last_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint for resuming: `last.ckpt`, or what a SLURM requeue saved after it; files or folders."""
    candidates = [run_dir / "checkpoints" / "last.ckpt", *run_dir.glob("hpc_ckpt_*.ckpt")]
    existing = [path for path in candidates if recover(path)]
    return max(existing, key=lambda path: path.stat().st_mtime, default=None)


def _best_checkpoint(run_dir: Path) -> Path:
    """The one checkpoint beside `last.ckpt`."""
    others = _others(run_dir)
    if len(others) != 1:
        names = ", ".join(path.name for path in others) or "none"
        raise ValueError(f"--ckpt_path best: give a path, for {run_dir / 'checkpoints'} holds beside the last: {names}")
    return others[0]


def _others(run_dir: Path) -> list[Path]:
    """Checkpoints that are not the newest."""
    return sorted(path for path in (run_dir / "checkpoints").glob("*.ckpt") if path.name != "last.ckpt")


def holds_run(folder: Path) -> bool:
    """Whether a run has begun there: it has metrics or checkpoints."""
    return any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints"))


def _numbered(root: Path, name: str) -> dict[int, Path]:
    """Folders `NAME` (1) and `NAME-2`, `NAME-3`, ... by number."""
    found = {}
    for path in root.glob(f"{name}*"):
        match = re.fullmatch(rf"{re.escape(name)}(?:-(\d+))?", path.name)
        if match and path.is_dir():
            found[int(match[1] or 1)] = path
    return found
