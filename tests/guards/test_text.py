"""Texts and prints that must not slip into the project."""

import ast
import re
from pathlib import Path

import pytest

from checkout import PACKAGE, ROOT, project_files

THIS_FILE = Path(__file__).resolve().relative_to(ROOT)

# A project file holds for every machine and every reader: no path of one computer, no number of a private tracker.
ANYWHERE = {
    "a path of one machine": r"(?<![\w.$}])/(?:work|home/\w+|root|Users/\w+|tmp/\w+)/",
    "working notes": r"\bshared/(?:facts|prototypes|design|style)\b",
    "a bare issue number": r"(?i)(?<![\w/])issues? #?\d+",
    "an unfinished merge": r"^(?:<{7}|>{7}) ",
}
# Where to install from is the user's business, and the machine's configuration.
IN_BUILD_FILES = {
    "a registry": r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|--(?:extra-)?index-url|--find-links"
}
BUILD_FILES = {".toml", ".cfg", ".ini", ".lock", ".txt", ".sh", ".mk"}
BUILD_NAMES = {"Makefile", "setup.py", "run"}


def find_texts(text: str, rules: dict[str, str]) -> list[str]:
    """`line: what: match` for every match of a rule."""
    return [
        f"{text.count(chr(10), 0, match.start()) + 1}: {what}: {match.group()}"
        for what, pattern in rules.items()
        for match in re.finditer(pattern, text, re.MULTILINE)
    ]


def find_prints(source: str) -> list[int]:
    """Lines that call `print`; docstrings and comments do not count."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def readable_files():
    for name in project_files():
        if name != THIS_FILE:
            try:
                yield name, (ROOT / name).read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a picture


def test_no_file_mentions_what_concerns_one_machine_or_tracker():
    found = [f"{name}:{hit}" for name, text in readable_files() for hit in find_texts(text, ANYWHERE)]
    assert not found, "\n".join(found)


def test_no_build_file_names_a_registry():
    found = [
        f"{name}:{hit}"
        for name, text in readable_files()
        if name.suffix in BUILD_FILES or name.name in BUILD_NAMES
        for hit in find_texts(text, IN_BUILD_FILES)
    ]
    assert not found, "\n".join(found)


def test_library_and_tasks_do_not_print():
    found = [
        f"{name}:{line}"
        for name, text in readable_files()
        if name.suffix == ".py" and name.parts[0] in {PACKAGE, "tasks"}
        for line in find_prints(text)
    ]
    assert not found, f"return it, log it or warn: {found}"


@pytest.mark.parametrize(
    "text",
    [
        "see /work/notes.md",
        "(/home/me/data)",
        "'/tmp/run3/last.ckpt'",
        "shared/facts/speed.md",
        "fixes issue #12",
        "Issue 7",
    ],
)
def test_the_guard_finds(text):
    assert find_texts(f"first line\n{text}", ANYWHERE)[0].startswith("2: ")


@pytest.mark.parametrize(
    "text",
    ["pytorch/pytorch#12", "https://example.org/work/", "$HOME/work/x", "framework/", "the issue, 3 of 4", "/tmp/"],
)
def test_the_guard_allows(text):
    assert find_texts(text, ANYWHERE) == []


def test_the_guard_finds_registries_and_prints():
    assert find_texts("https://pypi.org/simple", IN_BUILD_FILES)
    assert find_prints('def f():\n    """print(1)"""\n    print(2)  # print(3)') == [3]
