"""The files of the checkout that belong to the project."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "lightning_adam_mini"
MAPPED_FOLDERS = ("tasks", "cli", "configs")
SHIPPED_FOLDERS = (PACKAGE, *MAPPED_FOLDERS)
NOT_OURS = {".git", ".venv", ".venv-integrations", ".venv-llamafactory", "venv", "build", "dist", "__pycache__"}


def project_files() -> list[Path]:
    """Every file that git tracks or would, relative to the root; without git, all files outside builds and caches."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode == 0:
        names = [Path(name) for name in listing.stdout.split("\0") if name]
    else:
        names = [path.relative_to(ROOT) for path in ROOT.rglob("*") if not NOT_OURS & set(path.parts)]
    return sorted(name for name in names if (ROOT / name).is_file())


def shipped_files() -> dict[Path, str]:
    """Each file that must reach a user, and its path in the wheel."""
    return {
        name: f"{PACKAGE}/{name.as_posix()}" if name.parts[0] in MAPPED_FOLDERS else name.as_posix()
        for name in project_files()
        if name.parts[0] in SHIPPED_FOLDERS and name.suffix != ".md"
    }


def module_name(name: Path) -> str:
    """The name a file is imported by: `tasks/llm/data.py` is `lightning_adam_mini.tasks.llm.data`."""
    parts = list(name.with_suffix("").parts)
    if parts[0] in MAPPED_FOLDERS:
        parts.insert(0, PACKAGE)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
