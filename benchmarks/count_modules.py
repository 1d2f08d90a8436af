"""The size and the shape of the code of one or more checkouts, side by side, as JSON.

    python benchmarks/count_modules.py BEFORE AFTER

Each argument is the root of a checkout, such as a worktree of git. Lines are all lines of a file; tokens leave out
comments, docstrings and line breaks, so that formatting changes nothing.
"""

import ast
import io
import json
import re
import statistics
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

CODE = ("lightning_adam_mini", "tasks", "cli", "configs")
PACKAGE = "lightning_adam_mini"
IGNORED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}
# One example of each kind of thing that people add, and how it is named in files: what names it must be touched.
ADDITIONS = {
    "an optimizer (CAME)": r"\bCAME\b",
    "a metric (top-5 accuracy)": r"\btop5\b|_top5\b",
    "a layout (MobileViT-2)": r"MobileViTV2",
}
DOMAIN = "graph"


def python_files(root: Path, folders: tuple[str, ...]) -> list[Path]:
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def num_tokens(source: str) -> int:
    docstrings = {
        node.body[0].value.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False)
    }
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return sum(
        token.type not in IGNORED and not (token.type == tokenize.STRING and token.start[0] in docstrings)
        for token in tokens
    )


def module_name(root: Path, path: Path) -> str:
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[0] != PACKAGE:
        parts.insert(0, PACKAGE)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(name: str, is_package: bool, source: str, modules: set[str]) -> Iterator[str]:
    """Modules of the project that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if is_package else name.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, base] if base else package)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                if full in modules:
                    yield full
                elif base in modules:
                    yield base


def measure(root: Path) -> dict[str, object]:
    files = python_files(root, CODE)
    sources = {path: path.read_text("utf-8") for path in files}
    lines = {path: source.count("\n") for path, source in sources.items()}
    names = {path: module_name(root, path) for path in files}
    modules = set(names.values())
    importers: dict[str, set[str]] = {name: set() for name in modules}
    for path, source in sources.items():
        for imported in imported_modules(names[path], path.name == "__init__.py", source, modules):
            importers[imported].add(names[path])
    of_size = [path for path in files if path.name != "__init__.py"]
    own = {name: {other for other in users if other != name} for name, users in importers.items()}
    tests = sum(path.read_text("utf-8").count("\n") for path in python_files(root, ("tests",)))
    total = sum(lines.values())
    largest = max(files, key=lines.__getitem__)
    return {
        "files": len(files),
        "lines": total,
        "tokens": sum(map(num_tokens, sources.values())),
        "files a thousand lines": round(1000 * len(files) / total, 1),
        "median module": round(statistics.median(lines[path] for path in of_size)),
        "largest module": f"{lines[largest]} ({largest.relative_to(root)})",
        "modules with one importer or none": sum(len(own[names[path]]) <= 1 for path in of_size),
        "lines of tests a line of code": round(tests / total, 2),
        "files that name": {kind: naming(root, pattern) for kind, pattern in ADDITIONS.items()},
        f"files outside a domain that name it ({DOMAIN})": naming_domain(root),
    }


def naming(root: Path, pattern: str) -> int:
    return sum(bool(re.search(pattern, path.read_text("utf-8"))) for path in python_files(root, CODE[:3]))


def naming_domain(root: Path) -> int:
    """Files of code, tests and tools that would be edited for another domain, found by the name of one."""
    own = re.compile(rf"(^|/){DOMAIN}(/|$)|test_[a-z_]*{DOMAIN}|tiny_{DOMAIN}")
    named = re.compile(
        rf"\btasks[./]{DOMAIN}\b|[\"']{DOMAIN}[\"'/]|\btasks\.{DOMAIN}\b|\[.*\b{DOMAIN}\b.*\]|configs/{DOMAIN}"
    )
    tools = [root / name for name in ("pyproject.toml", "Makefile", "setup.py")]
    candidates = [*python_files(root, (*CODE, "tests", "benchmarks", "examples")), *tools]
    return sum(
        bool(named.search(path.read_text("utf-8")))
        for path in candidates
        if path.is_file() and not own.search(str(path.relative_to(root)))
    )


if __name__ == "__main__":
    print(json.dumps({root: measure(Path(root)) for root in sys.argv[1:]}, indent=1))
