"""Text of one's own: a file, or a folder of files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ...data.cache import hash_files, remember
from ...data.splits import Split, check_val_fraction, choose_parts, named_parts, split_names, split_of
from ...data.standard_library import library_files
from .text_module import TextDataModule
from .tokenizer import END_OF_TEXT

_REMEDY = "name all of them, narrow `pattern`, use `val_path`, or set `named_splits` to false to split them by hash"
DEFAULT_PATTERNS = ("*.txt", "*.md", "*.py")


class TextFiles(TextDataModule):
    r"""Token windows of text files, JSON or JSON lines.

    Names of folders and files in a folder say what is for training and what is held out, as `datasets` reads them:
    `train/a.txt`, `validation/a.txt`, `corpus_train.jsonl`, `corpus-test.jsonl`. The validation part, or else the test
    part, validates, and neither trains. Without such names and without a `val_path`, validation is a share of the
    files, by a hash of their names. Where there is one file, or the files hold records, it is a share of the documents,
    by a hash of their text; and of a file that is one document, the end.

    Args:
        path: A text file (in which `<|endoftext|>` separates documents), a `.json` file with a list of records, a
            `.jsonl` file with a record per line, or a folder of such files.
        val_path: File or folder of the validation text.
        val_fraction: Share of the data for validation, where there is no `val_path`.
        named_splits: Read parts from names of folders and files; false takes all files for one part, as in a folder of
            sources with a `test_x.py`.
        pattern: Names of the files that are taken from a folder: one or a list; by default `*.txt`, `*.md`, `*.py`.
        text_field: Where a JSON record has its text.
        tokenizer: A local `tokenizer.json`, or a local folder with one. By default the one of the checkpoint or of
            `model.init_from`; else a byte-level BPE is trained on the training part.
        vocab_size: Tokens of the BPE that is trained, 2048 by default. With a `tokenizer` the size of the model's
            vocabulary, where that is padded beyond the tokenizer's.
        kwargs: Settings of every token source, see `TokenDataModule`.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        *,
        path: str,
        val_path: str | None = None,
        val_fraction: float = 0.1,
        named_splits: bool = True,
        pattern: str | list[str] | None = None,
        text_field: str = "text",
        tokenizer: str | None = None,
        vocab_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer=tokenizer, vocab_size=vocab_size, **kwargs)
        check_val_fraction(val_fraction)
        self.path = Path(path).expanduser()
        self.val_path = None if val_path is None else Path(val_path).expanduser()
        self.val_fraction = val_fraction
        self.named_splits = named_splits
        self.patterns: Sequence[str] = [pattern] if isinstance(pattern, str) else pattern or DEFAULT_PATTERNS
        self.text_field = text_field

    def describe(self) -> str:
        """The path, for messages."""
        return str(self.path) if self.val_path is None else f"{self.path} and {self.val_path}"

    def hash_corpus(self) -> str:
        """SHA-256 of all files; a set of files that did not change is not read again."""
        hashes = []
        for path in filter(None, (self.path, self.val_path)):
            files = find_files(path, patterns=self.patterns)
            root = path if path.is_dir() else path.parent
            hashes.append(remember(self.cache_dir, "sha256", files, partial(hash_files, files, root=root)))
        return "-".join(hashes)

    def split_settings(self) -> dict[str, Any]:
        """What decides about the documents and their parts."""
        return {
            "val_fraction": self.val_fraction if self.val_path is None else None,
            "text_field": self.text_field,
            "named_splits": self.named_splits,
        }

    def documents(self) -> Iterator[tuple[Split, str]]:
        """Every document, the files sorted by path."""
        files, val_files = self._parts(self.path)
        if self.val_path is not None:
            unnamed, named = self._parts(self.val_path, is_validation=True)
            val_files = named or unnamed
        if val_files:
            if both := {file.resolve() for file in files} & {file.resolve() for file in val_files}:
                raise ValueError(
                    f"{min(both)} is in `path` and in `val_path`: a model must not be judged by what it was shown."
                )
            yield from (("train", text) for file in files for text in self._read(file))
            yield from (("val", text) for file in val_files for text in self._read(file))
        elif len(files) > 1 and not any(file.suffix in RECORD_SUFFIXES for file in files):
            names = {file: file.relative_to(self.path).as_posix() for file in files}
            splits = split_names(list(names.values()), val_fraction=self.val_fraction)
            yield from ((splits[names[file]], text) for file in files for text in self._read(file))
        else:
            yield from self._split_documents(files)

    def _parts(self, path: Path, *, is_validation: bool = False) -> tuple[list[Path], list[Path]]:
        """Files of the training part, or all where names say no parts, and of the part for validation."""
        files = find_files(path, patterns=self.patterns)
        parts = named_parts(files, path, "files", remedy=_REMEDY) if self.named_splits and path.is_dir() else {}
        if not parts:
            return files, []
        chosen = choose_parts(list(parts), path, is_validation=is_validation)
        train, val = ([file for name in chosen[use] for file in parts[name]] for use in ("train", "validation"))
        return train, val

    def _split_documents(self, files: Sequence[Path]) -> Iterator[tuple[Split, str]]:
        documents = (text for file in files for text in self._read(file))
        first, second = next(documents, None), next(documents, None)
        if first is not None and second is None:
            cut = int(len(first) * (1 - self.val_fraction))
            # At the end of a line, where there is one.
            cut = first.rfind("\n", 0, cut) + 1 or cut
            yield "train", first[:cut]
            yield "val", first[cut:]
            return
        for text in filter(None, (first, second)):
            yield split_of(text, val_fraction=self.val_fraction), text
        yield from ((split_of(text, val_fraction=self.val_fraction), text) for text in documents)

    def _read(self, file: Path) -> Iterator[str]:
        return read_documents(file, text_field=self.text_field)


RECORD_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson"})

_BETWEEN = re.compile(r"[\s,]*")  # two records of a list
_NUL = "holds a NUL character, which no text holds: it may be binary or UTF-16; convert, repair or remove it"


def find_files(path: Path, *, patterns: Sequence[str]) -> list[Path]:
    """A file itself, or the files of a folder and the folders in it, sorted by path.

    Hidden files and folders are passed over.

    Args:
        path: File or folder.
        patterns: Names that are taken from a folder.

    Raises:
        FileNotFoundError: If there is nothing at ``path``, or no file matches.
        ValueError: If the one file is empty.
    """
    if path.is_file():
        if path.stat().st_size == 0:
            raise ValueError(f"The file {path} is empty: give one with text.")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"There is no file or folder {path}, and no download is made: give a local path.")
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

    A JSON file holds a list of records, a JSON-lines file a record per line, any other file text, in which
    `<|endoftext|>` separates documents.

    Args:
        path: The file.
        text_field: Where a record has its text.

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
        # Separators usually stand on lines of their own.
        yield from (document.strip("\n") if len(documents) > 1 else text for document in documents if document.strip())


def checked_text(text: str, where: str) -> str:
    """A document, once it holds nothing that no text holds.

    Args:
        text: The document.
        where: Where it was read, for messages.

    Raises:
        ValueError: It holds half of a surrogate pair, which UTF-8 cannot encode, or a NUL character.
    """
    if "\0" in text:
        raise ValueError(f"The {where} {_NUL}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The {where} holds a lone surrogate (\\u{ord(text[error.start]):04x} at character {error.start}), half of"
            " a character, which UTF-8 cannot encode: repair or remove it."
        ) from error
    return text


def _line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _decoded(content: bytes, path: Path, *, first_line: int = 1) -> str:
    """Text in UTF-8, without the byte-order mark that some editors put before it."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        line = first_line + before.count(b"\n")
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}) in line {line}: convert it, or leave it out by `pattern`."
        ) from error


def _read_text(path: Path) -> str:
    # Line ends as Python reads text.
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
        raise ValueError(f"{path} holds one {type(records).__name__}: give a list of records, or a .jsonl file.")
    for number, record in enumerate(records):
        try:
            found = _text_of(record, text_field, f"record {number + 1} of {path}")
        except ValueError as error:
            raise ValueError(f"{error} It begins on line {_line_of(text, _start_of(text, number))}.") from error
        yield found


def _start_of(text: str, number: int) -> int:
    """Where a record of a JSON list begins; the text has been read as one before."""
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
            f"The {where} is no record but a {type(record).__name__}: write an object with {text_field!r}."
        )
    text = record.get(text_field)
    if not isinstance(text, str):
        known = ", ".join(map(repr, record)) or "none: the record is empty"
        raise ValueError(f"The {where} has no text in {text_field!r}: set `text_field` to one of {known}.")
    return checked_text(text, where)


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
