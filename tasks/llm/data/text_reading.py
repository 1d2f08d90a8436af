"""Find text files and read the documents in them."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .tokenizer import END_OF_TEXT

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
