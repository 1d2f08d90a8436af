"""Definitions in Python's own standard library: what they are called, and what they mention."""

from __future__ import annotations

import ast
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Definition", "find_definitions"]

_WORD = re.compile(r"[A-Za-z][a-z]{2,}|[A-Z]{3,}")
_DOC_WORD = re.compile(r"[A-Za-z]{3,}")


@dataclass(kw_only=True)
class Definition:
    """A function or class.

    Args:
        name: Its own name.
        path: Its name with the module and what it is defined in.
        package: Top-level package or module.
        mentions: How often it mentions each name or attribute, what is defined within it included.
        doc: Its docstring.
    """

    name: str
    path: str
    package: str
    mentions: Counter[str] = field(default_factory=Counter)
    doc: str = ""

    def words(self) -> Counter[str]:
        """Words of the docstring and of the names that it mentions, in lower case; its own name does not count."""
        words = Counter(word.lower() for word in _DOC_WORD.findall(self.doc))
        for name, count in self.mentions.items():
            for word in _WORD.findall(name):
                words[word.lower()] += count
        return words


def find_definitions(root: Path, files: Sequence[Path]) -> list[Definition]:
    """All functions and classes of some files; a file that is no Python of this version is skipped.

    Args:
        root: Folder that modules are named from.
        files: Files below it.
    """
    found: list[Definition] = []
    for path in files:
        module = path.relative_to(root).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old escapes in the sources
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for child in ast.iter_child_nodes(tree):
            found.extend(_definitions(child, module, []))
    return found


def _definitions(node: ast.AST, module: str, inside: list[Definition]) -> Iterator[Definition]:
    """Definitions at and below a node; what it mentions counts for every definition that it stands in."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        path = f"{inside[-1].path if inside else module}.{node.name}"
        definition = Definition(name=node.name, path=path, package=module.partition(".")[0])
        definition.doc = ast.get_docstring(node) or ""
        inside = [*inside, definition]
        yield definition
    elif inside and isinstance(node, ast.Name | ast.Attribute):
        name = node.id if isinstance(node, ast.Name) else node.attr
        for definition in inside:
            definition.mentions[name] += 1
    for child in ast.iter_child_nodes(node):
        yield from _definitions(child, module, inside)
