"""Tests that tables of the documentation name as evidence exist."""

import ast
import re

import pytest

from checkout import ROOT

NAME = re.compile(r"`(test_\w+)`")
# Pages with tables of evidence: how many there are, and what the first column of one is called.
PAGES = {"distributed.md": (3, "layout"), "integrations.md": (1, "framework")}
# What a cell of a table of evidence says where there is nothing to show; an error is quoted with its class.
WITHOUT_TEST = (
    "no such option",
    "built whole on each rank",
    "Lightning's own option, not run",
    "not run",
    "as the Trainer",
)


def functions():
    trees = (ast.parse(path.read_text("utf-8")) for path in (ROOT / "tests").rglob("test_*.py"))
    return {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}


def unnamed_cells(markdown, column):
    """Cells of tables of evidence that name no test, and do not say why."""
    tables = re.findall(rf"^\| {column} \|.*\n\|[-|]+\n((?:\|.*\n)+)", markdown, re.MULTILINE)
    rows = [row.strip("|").split(" | ") for table in tables for row in table.splitlines()]
    return [cell for _, *cells in rows for cell in cells if not NAME.search(cell) and cell.strip() not in WITHOUT_TEST]


@pytest.mark.parametrize("page", PAGES)
def test_named_tests_exist(page):
    missing = set(NAME.findall((ROOT / "docs" / page).read_text("utf-8"))) - functions()
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_each_row_has_its_tests(page):
    text = (ROOT / "docs" / page).read_text("utf-8")
    count, column = PAGES[page]
    assert text.count(f"| {column} |") == count
    assert not unnamed_cells(text, column)


def test_the_guard_finds_a_cell_without_a_test():
    assert unnamed_cells("| layout | a | b |\n|---|---|---|\n| ddp | `test_x` | surely |\n", "layout") == ["surely "]
