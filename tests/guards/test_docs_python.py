"""The Python examples of the README and of `docs/` run, each page from top to bottom."""

import re

import pytest
from torch import nn

from checkout import ROOT
from lightning_adam_mini.partition import layouts

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = {
    page.name: re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for page in PAGES
}


@pytest.mark.parametrize("page", [page for page, examples in EXAMPLES.items() if examples])
def test_python_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(layouts, "REGISTERED", [])
    names = {"__name__": "__main__", "model": nn.TransformerEncoderLayer(16, nhead=4)}  # the reader's own model
    for example in EXAMPLES[page]:
        exec(compile(example, page, "exec"), names)


def test_there_are_examples():
    assert EXAMPLES["README.md"]
