"""The text that every machine has: the sources of Python's standard library."""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from ...data.sources import library_files
from ...data.splits import Split
from .text_module import TextDataModule

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
        root, files = library_files()
        wanted = ((path.relative_to(root).as_posix(), path) for path in files)
        return tuple((name, path.read_text("utf-8", errors="replace")) for name, path in wanted if _is_text(name))


def _is_text(name: str) -> bool:
    """Whether somebody wrote the file of this name below the library's folder."""
    folder, _, rest = name.partition("/")
    return folder != "encodings" or rest in _ENCODINGS
