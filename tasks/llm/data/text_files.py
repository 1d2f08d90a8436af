"""Text on disk: Python's standard library, and files of the user."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ...data.sources import library_files
from ...data.splits import Split, named_parts, split_names, split_of
from .text_module import UNNAMED, LocalText, TextDataModule
from .tokenizer import END_OF_TEXT

DEFAULT_PATTERNS = ("*.txt", "*.md", "*.py")
RECORD_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson"})

_REMEDY = "name all of them, narrow `pattern`, use `val_path`, or set `named_splits` to false to split them by hash"
_BETWEEN = re.compile(r"[\s,]*")  # between two records of a list
_NUL = "contains a NUL character, which no text has: it may be binary or UTF-16; convert, repair or remove it"
# The rest of `encodings` are a hundred generated tables.
_ENCODINGS = frozenset({"__init__.py", "idna.py", "punycode.py"})
# Of a thousand.
_VALIDATION_BUCKETS = 100


class StdlibText(TextDataModule):
    """Source text of Python's standard library: 453 files, 9.6 MB on Python 3.11 (licence PSF-2.0).

    A hash of its name selects a file for validation (10 %). The text depends on the Python version, and `corpus_hash`
    identifies it. Small runs fit this text; a bigram model has 4.65 nats a token, a unigram model 6.53.

    Args:
        vocab_size: Tokens of the BPE that is trained on the training part, special ones included.
        kwargs: See `TokenDataModule`.
    """

    default_prompts = ("def read_file(path):\n", "import os\n", "class ")

    def __init__(self, *, vocab_size: int = 2048, **kwargs: Any) -> None:
        super().__init__(vocab_size=vocab_size, **kwargs)

    def documents(self) -> Iterator[tuple[Split, str]]:
        """Every file, sorted by path."""
        for name, text in self._texts:
            # Any stable hash would do; published results were made with SHA-1.
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
        named = ((path.relative_to(root).as_posix(), path) for path in files)
        return tuple((name, path.read_text("utf-8", errors="replace")) for name, path in named if _is_text(name))


def _is_text(name: str) -> bool:
    """Whether a person wrote the file of this name below the library's folder."""
    folder, _, rest = name.partition("/")
    return folder != "encodings" or rest in _ENCODINGS


class TextFiles(LocalText):
    r"""Token windows of text files, JSON or JSON lines.

    Names of folders and files in a folder say what is for training and what is held out, as `datasets` reads them:
    `train/a.txt`, `validation/a.txt`, `corpus_train.jsonl`, `corpus-test.jsonl`. The validation part validates, or else
    the test part, and neither trains. Without such names and without a `val_path`, a hash of the files' names selects
    a fraction of the files for validation. If there is one file, or the files contain records, a hash of their text
    selects documents instead; of a file with a single document, the end is for validation.

    Args:
        path: A text file (in which `<|endoftext|>` separates documents), a `.json` file with a list of records, a
            `.jsonl` file with a record per line, or a folder of such files.
        pattern: Names of the files that are read from a folder: one or a list; by default `*.txt`, `*.md`, `*.py`.
        text_field: The field of a JSON record that has the text.
        kwargs: See `LocalText`.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self, *, path: str, pattern: str | list[str] | None = None, text_field: str = "text", **kwargs: Any
    ) -> None:
        super().__init__(path=path, **kwargs)
        self.patterns: Sequence[str] = [pattern] if isinstance(pattern, str) else pattern or DEFAULT_PATTERNS
        self.text_field = text_field

    def split_settings(self) -> dict[str, Any]:
        """See `TextDataModule.split_settings`."""
        return {
            "val_fraction": self.val_fraction if self.val_path is None else None,
            "text_field": self.text_field,
            "named_splits": self.named_splits,
        }

    def find_files(self, path: Path) -> list[Path]:
        """See `LocalText.find_files`."""
        return find_files(path, patterns=self.patterns)

    def named_parts(self, path: Path) -> dict[str, list[Path]]:
        """See `LocalText.named_parts`: files."""
        files = self.find_files(path)
        parts = named_parts(files, path, "files", remedy=_REMEDY) if self.named_splits and path.is_dir() else {}
        return parts or {UNNAMED: files}

    def documents(self) -> Iterator[tuple[Split, str]]:
        """Every document, the files sorted by path."""
        files, val_files = self.train_and_val()
        if val_files:
            if both := {file.resolve() for file in files} & {file.resolve() for file in val_files}:
                raise ValueError(
                    f"{min(both)} is in `path` and in `val_path`: validation needs text that does not train."
                )
            yield from (("train", text) for file in files for text in self._read(file))
            yield from (("val", text) for file in val_files for text in self._read(file))
        elif len(files) > 1 and not any(file.suffix in RECORD_SUFFIXES for file in files):
            names = {file: file.relative_to(self.path).as_posix() for file in files}
            splits = split_names(list(names.values()), val_fraction=self.val_fraction)
            yield from ((splits[names[file]], text) for file in files for text in self._read(file))
        else:
            yield from self._split_documents(files)

    def _split_documents(self, files: Sequence[Path]) -> Iterator[tuple[Split, str]]:
        documents = (text for file in files for text in self._read(file))
        first, second = next(documents, None), next(documents, None)
        if first is not None and second is None:
            end = int(len(first) * (1 - self.val_fraction))
            # At the end of a line, if there is one.
            end = first.rfind("\n", 0, end) + 1 or end
            yield "train", first[:end]
            yield "val", first[end:]
            return
        for text in filter(None, (first, second)):
            yield split_of(text, val_fraction=self.val_fraction), text
        yield from ((split_of(text, val_fraction=self.val_fraction), text) for text in documents)

    def _read(self, file: Path) -> Iterator[str]:
        return read_documents(file, text_field=self.text_field)


def find_files(path: Path, *, patterns: Sequence[str]) -> list[Path]:
    """A file itself, or the files of a folder and the folders in it, sorted by path.

    Hidden files and folders are skipped.

    Args:
        path: File or folder.
        patterns: Names of the files that are read from a folder.

    Raises:
        FileNotFoundError: If there is nothing at ``path``, or no file matches.
        ValueError: If the file is empty.
    """
    if path.is_file():
        if path.stat().st_size == 0:
            raise ValueError(f"The file {path} is empty: give one with text.")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"There is no file or folder {path}, and nothing is downloaded: give a local path.")
    found = {
        file
        for pattern in patterns
        for file in path.rglob(pattern)
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    }
    files = sorted(file for file in found if file.stat().st_size)
    if not files:
        raise FileNotFoundError(
            f"No file with text in {path} matches {', '.join(patterns)}: set `pattern` to the names of your files."
        )
    return files


def read_documents(path: Path, *, text_field: str) -> Iterator[str]:
    """The documents of a file.

    A JSON file has a list of records, a JSON-lines file a record per line, and any other file text, in which
    `<|endoftext|>` separates documents.

    Args:
        path: The file.
        text_field: The field of a record that has the text.

    Raises:
        ValueError: If the file is not UTF-8, not JSON, or a record has no text; with file and line.
    """
    if path.suffix == ".json":
        yield from _read_json(path, text_field)
    elif path.suffix in RECORD_SUFFIXES:
        yield from _read_lines(path, text_field)
    else:
        text = _read_text(path)
        if (at := text.find("\0")) >= 0:
            raise ValueError(f"Line {_line_of(text, at)} of {path} {_NUL}.")
        documents = text.split(END_OF_TEXT)
        # Separators usually have a line of their own.
        yield from (document.strip("\n") if len(documents) > 1 else text for document in documents if document.strip())


def checked_text(text: str, where: str) -> str:
    """Return a document after checking its characters.

    Args:
        text: The document.
        where: Its place, for messages.

    Raises:
        ValueError: It contains half of a surrogate pair, which UTF-8 cannot encode, or a NUL character.
    """
    if "\0" in text:
        raise ValueError(f"The {where} {_NUL}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The {where} contains a lone surrogate (\\u{ord(text[error.start]):04x} at character {error.start}), half"
            " of a character, which UTF-8 cannot encode: repair or remove it."
        ) from error
    return text


def _line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _decoded(content: bytes, path: Path, *, first_line: int = 1) -> str:
    """Decode UTF-8, without the byte-order mark that some editors write."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        line = first_line + before.count(b"\n")
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}) in line {line}: convert it, or leave it out by `pattern`."
        ) from error


def _read_text(path: Path) -> str:
    # Line endings as Python reads text.
    return _decoded(path.read_bytes(), path).replace("\r\n", "\n").replace("\r", "\n")


def _read_json(path: Path, text_field: str) -> Iterator[str]:
    text = _read_text(path)
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON ({error}): a file with a record per line must be called .jsonl."
        ) from error
    if not isinstance(records, list):
        raise ValueError(f"{path} contains one {type(records).__name__}: give a list of records, or a .jsonl file.")
    for number, record in enumerate(records):
        try:
            found = _text_of(record, text_field, f"record {number + 1} of {path}")
        except ValueError as error:
            raise ValueError(f"{error} It begins on line {_line_of(text, _start_of(text, number))}.") from error
        yield found


def _start_of(text: str, number: int) -> int:
    """Position of a record in the text of a JSON list, which has been parsed before."""
    decoder, at = json.JSONDecoder(), _BETWEEN.match(text, text.index("[") + 1).end()  # type: ignore[union-attr]
    for _ in range(number):
        at = _BETWEEN.match(text, decoder.raw_decode(text, at)[1]).end()  # type: ignore[union-attr]
    return at


def _read_lines(path: Path, text_field: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, content in enumerate(file, start=1):
            line = _decoded(content, path, first_line=number)
            if not line.strip():
                continue
            where = f"line {number} of {path}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"The {where} is not JSON ({error}): repair or remove it.") from error
            yield _text_of(record, text_field, where)


def _text_of(record: Any, text_field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise ValueError(
            f"The {where} is not a record but a {type(record).__name__}: write an object with {text_field!r}."
        )
    text = record.get(text_field)
    if not isinstance(text, str):
        known = ", ".join(map(repr, record)) or "none: the record is empty"
        raise ValueError(f"The {where} has no text in {text_field!r}: set `text_field` to one of {known}.")
    return checked_text(text, where)
