"""Each page of `docs/use/`, run as a reader would: its files written, its commands typed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from checkout import ROOT
from pages import Page, read_page

PAGES = sorted((ROOT / "docs" / "use").glob("*.md"))
SECONDS = 240  # a reader's two minutes, on a busy machine


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_runs_as_it_is_written(path, tmp_path):
    page = read_page(path.read_text("utf-8"))
    if page.missing:
        pytest.skip(f"needs {page.missing}: make test-integrations")
    for name, text in page.files.items():
        (tmp_path / name).write_text(text, "utf-8")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment["OMP_NUM_THREADS"] = "1"
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
    page = read_page(path.read_text("utf-8"))
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
    assert read_page(text) == Page(("trl",), {"a.py": "# a.py\nx = 1\n"}, ("python a.py",))
