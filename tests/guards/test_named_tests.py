"""Tests that the page of distributed training names as evidence exist."""

import ast
import re

from checkout import ROOT

NAME = re.compile(r"`(test_\w+)`")
PAGE = (ROOT / "docs" / "distributed.md").read_text("utf-8")
# What a cell of a table of evidence says where there is nothing to show.
WITHOUT_TEST = ("no such option", "built whole on each rank", "Lightning's own option, not run")


def functions():
    trees = (ast.parse(path.read_text("utf-8")) for path in (ROOT / "tests").rglob("test_*.py"))
    return {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}


def unnamed_cells(markdown):
    """Cells of tables by layout that name no test, and do not say why."""
    tables = re.findall(r"^\| layout \|.*\n\|[-|]+\n((?:\|.*\n)+)", markdown, re.MULTILINE)
    rows = [row.strip("|").split(" | ") for table in tables for row in table.splitlines()]
    return [cell for _, *cells in rows for cell in cells if not NAME.search(cell) and cell.strip() not in WITHOUT_TEST]


def test_named_tests_exist():
    missing = set(NAME.findall(PAGE)) - functions()
    assert not missing


def test_each_layout_has_its_tests():
    assert PAGE.count("| layout |") == 3
    assert not unnamed_cells(PAGE)


def test_the_guard_finds_a_cell_without_a_test():
    assert unnamed_cells("| layout | a | b |\n|---|---|---|\n| ddp | `test_x` | surely |\n") == ["surely "]
