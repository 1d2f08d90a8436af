"""The text that every machine has: the sources of Python's standard library."""

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from .text_cache import Split
from .text_module import TextDataModule

# Tests and tools that not every installation carries, and other people's packages.
_LEFT_OUT = frozenset(
    {"__pycache__", "_pyrepl", "config", "dist-packages", "ensurepip", "idle_test"}
    | {"idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo"}
)
# The rest of `encodings` is a hundred generated tables.
_ENCODINGS = frozenset({"__init__.py", "idna.py", "punycode.py"})
# Of a thousand.
_VALIDATION_BUCKETS = 100


class StdlibText(TextDataModule):
    """Source text of Python's standard library: 453 files, 9.6 MB on Python 3.11 (licence PSF-2.0).

    A file belongs to validation (10 %) by a hash of its name. The text depends on the Python version:
    `corpus_hash` tells two apart. Small runs fit this text; a bigram model has 4.65 nats a token, a unigram model 6.53.

    Args:
        vocab_size: Tokens of the BPE that is trained on the training part, special ones included.
        kwargs: Settings of every token source, see `TokenDataModule`.
    """

    default_prompts = ("def read_file(path):\n", "import os\n", "class ")

    def __init__(self, *, vocab_size: int = 2048, **kwargs: Any) -> None:
        super().__init__(vocab_size=vocab_size, **kwargs)

    def documents(self) -> Iterator[tuple[Split, str]]:
        """Every file, sorted by path."""
        for name, text in self._texts:
            # Any stable hash would do; SHA-1 is the one with which published figures were made.
            bucket = int(hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest(), 16) % 1000
            yield "val" if bucket < _VALIDATION_BUCKETS else "train", text

    def hash_corpus(self) -> str:
        """SHA-256 of all names and texts."""
        total = hashlib.sha256()
        for name, text in self._texts:
            total.update(f"{name}\0{text}\0".encode())
        return total.hexdigest()

    @cached_property
    def _texts(self) -> tuple[tuple[str, str], ...]:
        root = Path(sysconfig.get_paths()["stdlib"])
        texts = tuple(
            (path.relative_to(root).as_posix(), path.read_text("utf-8", errors="replace"))
            for path in sorted(root.rglob("*.py"))
            if _is_wanted(path.relative_to(root))
        )
        if not texts:
            raise FileNotFoundError(
                f"There are no sources of the standard library in {root}: use TextFiles with a folder of your own text."
            )
        return texts


def _is_wanted(path: Path) -> bool:
    """Whether a file, given relative to the library's folder, is part of the corpus."""
    if any(part in _LEFT_OUT or part.startswith("config-") for part in path.parts):
        return False
    if path.parts[0] == "encodings" and path.as_posix().removeprefix("encodings/") not in _ENCODINGS:
        return False
    # Also leaves out `_sysconfigdata*`, which the build generates.
    return path.parts[0].removesuffix(".py") in sys.stdlib_module_names
