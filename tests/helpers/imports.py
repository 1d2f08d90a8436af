"""Who may import whom, read from the source alone.

A room is a part of the library (`blocks`, `partition`, ...) or a mapped folder (`tasks`, `cli`, `configs`).
Imports inside functions and under `TYPE_CHECKING` count like all others: they are dependencies too.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from checkout import MAPPED_FOLDERS, PACKAGE

BARE_NAMES = {*MAPPED_FOLDERS, "tests"}

# From below to above. A room of the library that is not here yet is reported, so that it gets its place.
_LIBRARY = {
    "hints": set(),
    "blocks": {"hints"},
    "partition": {"hints", "blocks"},
    "optim": {"hints", "blocks", "partition"},
    "convert": {"hints", "blocks", "partition", "optim"},
    "hessian": {"hints", "blocks", "partition"},
    "verify": {"hints", "blocks", "partition"},
    "measure": {"hints", "blocks", "partition", "optim"},
    "schedule": set(),
    "factory": {"hints", "blocks", "partition", "optim", "measure", "schedule"},
}
ROOMS = {
    **_LIBRARY,
    "configs": set(),
    "tasks": {PACKAGE, *_LIBRARY},
    "integrations": {*_LIBRARY, "tasks"},
    "cli": {PACKAGE, *_LIBRARY, "tasks", "configs"},
    # The package itself re-exports the library.
    PACKAGE: set(_LIBRARY),
}

# The library needs torch alone (Triton comes with it). The factory builds what others implement, if it is installed.
THIRD_PARTY = {"torch", "triton"}
THIRD_PARTY_OF_ROOM = {"factory": {"adam_mini", "pytorch_optimizer"}}
# A module of integrations is named after the framework that it serves, and imports no other.
PARSERS = {"lightning": {"jsonargparse"}}
DOMAINS = {"llm", "vision", "diffusion", "graph"}


@dataclass(frozen=True)
class Import:
    """One imported module, by its absolute name; `level` counts the dots in front of a relative import."""

    name: str
    line: int
    level: int = 0


def find_imports(source: str, module: str, *, is_package: bool = False) -> Iterator[Import]:
    """Every import of a file, also `importlib.import_module("name")`; `from a import b` counts as `a.b`."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                yield from (Import(alias.name, node.lineno) for alias in node.names)
            case ast.ImportFrom():
                above = package[: len(package) + 1 - node.level] if node.level else []
                base = [*above, node.module] if node.module else above
                yield from (Import(".".join([*base, alias.name]), node.lineno, node.level) for alias in node.names)
            case ast.Call(func=ast.Name(function) | ast.Attribute(attr=function), args=[ast.Constant(str(name)), *_]):
                if function in {"import_module", "__import__"} and not name.startswith("."):
                    yield Import(name, node.lineno)


def find_violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What a file of the shipped folders imports and must not, one sentence each.

    Args:
        source: text of the file.
        module: its dotted name, from `lightning_adam_mini` on.
        is_package: whether the file is an `__init__.py`, which relative imports start from.
    """
    room = _room(module)
    if room not in ROOMS:
        return [f"{module}: give the room {room!r} its place in {__name__}.ROOMS"]
    in_library = room not in MAPPED_FOLDERS
    found = []
    for imported in find_imports(source, module, is_package=is_package):
        head = imported.name.split(".")[0]
        if head in BARE_NAMES:
            problem = f"write {PACKAGE}.{head}" if head != "tests" else "tests are not part of the package"
        elif head == PACKAGE:
            problem = _inner_problem(room, module, imported)
        elif in_library and head not in sys.stdlib_module_names | THIRD_PARTY | _own_packages(room, module):
            problem = "the library needs torch alone"
        else:
            problem = None
        if problem:
            found.append(f"{module}:{imported.line}: imports {imported.name}: {problem}")
    return found


def _own_packages(room: str, module: str) -> set[str]:
    """What a module of the library may import besides torch."""
    if room == "integrations":
        framework = module.rsplit(".", maxsplit=1)[-1]
        return {framework, *PARSERS.get(framework, set())}
    return THIRD_PARTY_OF_ROOM.get(room, set())


def _inner_problem(room: str, module: str, imported: Import) -> str | None:
    target = _room(imported.name)
    if target not in ROOMS:
        target = PACKAGE  # a name that the package re-exports
    if target != room and target not in ROOMS[room]:
        return f"{room} is not above {target}"
    if room in MAPPED_FOLDERS and target in MAPPED_FOLDERS and not imported.level:
        return "write a relative import between mapped folders"
    if room in MAPPED_FOLDERS and target not in MAPPED_FOLDERS and imported.level:
        return "import the library by its full name"
    if room == target == "tasks":
        own, other = _domain(module), _domain(imported.name)
        if other and own != other:
            return f"{f'tasks/{own}' if own else 'what all tasks share'} must not know tasks/{other}"
    return None


def _room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else name


def _domain(name: str) -> str | None:
    parts = name.split(".")
    return parts[2] if len(parts) > 2 and parts[2] in DOMAINS else None
