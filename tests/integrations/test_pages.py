"""Each page of `docs/use/`, run as a reader would: its files written, its commands typed."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from checkout import ROOT

PAGES = sorted((ROOT / "docs" / "use").glob("*.md"))
SECONDS = 240  # a reader's two minutes, on a busy machine
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\S+\.(?:py|yaml|json|toml|sh))\b")


@dataclass(frozen=True)
class Page:
    """What a page asks its reader to do.

    Args:
        packages: What `pip install` gets, besides this project.
        files: Each block whose first line is a comment with a file's name.
        commands: The other blocks of the shell, but for `pip install`.
    """

    packages: tuple[str, ...]
    files: dict[str, str]
    commands: tuple[str, ...]

    @property
    def missing(self):
        """The first package that is not installed here."""
        return next((name for name in self.packages if not is_installed(name)), None)


def is_installed(package):
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def read(markdown):
    """The steps of a page."""
    packages, files, commands = [], {}, []
    for language, text in BLOCK.findall(markdown):
        if language == "bash":
            lines = text.splitlines()
            installs = [line for line in lines if line.startswith("pip install ")]
            words = [word for line in installs for word in shlex.split(line)[2:] if word[0] not in "-."]
            names = [re.split(r"[^\w.-]", word)[0] for word in words]
            packages += [name for name in names if name != "lightning-adam-mini"]
            commands += ["\n".join(line for line in lines if line not in installs)]
        elif found := FILE.match(text):
            files[found.group(1)] = text
    return Page(tuple(packages), files, tuple(filter(str.strip, commands)))


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_runs_as_it_is_written(path, tmp_path):
    page = read(path.read_text("utf-8"))
    if page.missing:
        pytest.skip(f"needs {page.missing}: make test-integrations")
    for name, text in page.files.items():
        (tmp_path / name).write_text(text, "utf-8")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"PYTHONPATH": str(ROOT) if not is_installed("lightning-adam-mini") else "", "OMP_NUM_THREADS": "1"}
    for command in page.commands:
        done = subprocess.run(
            ["bash", "-euc", command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_is_whole(path):
    page = read(path.read_text("utf-8"))
    assert page.files, "a page has a program: a block whose first line is `# NAME.py`"
    for name, text in page.files.items():
        if name.endswith(".py"):
            compile(text, name, "exec")
    others = "\n".join([*page.commands, *page.files.values()])
    for name in page.files:  # a command types its name, or another file imports it
        stem = re.escape(name.removesuffix(".py"))
        assert re.search(rf"(?<!# ){re.escape(name)}|from {stem} import|import {stem}", others), f"nothing uses {name}"


def test_a_page_is_read():
    text = (
        "```bash\npip install -e '.[app]' \"trl>=1.16\" lightning-adam-mini\n```\n```python\n# a.py\nx = 1\n```\n"
        "```python\ny = 2\n```\n```bash\npython a.py\n```\n"
    )
    assert read(text) == Page(("trl",), {"a.py": "# a.py\nx = 1\n"}, ("python a.py",))
