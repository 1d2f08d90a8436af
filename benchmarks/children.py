"""Measurements in processes of their own, and results that say where they were made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from lightning_adam_mini.measure import describe_machine, package_versions


def measure(script: str, *arguments: object) -> dict[str, Any]:
    """What `python SCRIPT --child ARGUMENTS` tells through `tell`; ends this process where the child fails."""
    command = [sys.executable, script, "--child", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"{' '.join(map(str, arguments))} failed:\n{done.stderr[-2000:]}")
    return json.loads(lines[0].removeprefix("RESULT "))


def tell(figures: dict[str, Any]) -> None:
    """Hand a child's figures to `measure`."""
    print("RESULT", json.dumps(figures))


def save(path: Path, result: dict[str, Any]) -> None:
    """Write a result with the hardware and the versions beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({**result, "hardware": describe_machine(), "versions": package_versions()}, indent=1) + "\n"
    )
