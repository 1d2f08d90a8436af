"""Find text files and read the documents in them."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .tokenizer import END_OF_TEXT

RECORD_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson"})


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
        ValueError: If the file is not UTF-8, not JSON, or a record has no text.
    """
    if path.suffix == ".json":
        yield from _read_json(path, text_field)
    elif path.suffix in RECORD_SUFFIXES:
        yield from _read_lines(path, text_field)
    else:
        text = _read_text(path)
        documents = text.split(END_OF_TEXT)
        # Separators usually stand on lines of their own.
        yield from (document.strip("\n") if len(documents) > 1 else text for document in documents if document.strip())


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}): convert it, or leave it out by `pattern`."
        ) from error


def _read_json(path: Path, text_field: str) -> Iterator[str]:
    try:
        records = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not JSON ({error}): a file with a record per line must be called .jsonl."
        ) from error
    if not isinstance(records, list):
        raise ValueError(f"{path} holds one {type(records).__name__}: give a list of records, or a .jsonl file.")
    for number, record in enumerate(records, start=1):
        yield _text_of(record, text_field, f"record {number} of {path}")


def _read_lines(path: Path, text_field: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"line {number} of {path}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"The {where} is not JSON ({error}): repair or remove it.") from error
            yield _text_of(record, text_field, where)


def _text_of(record: Any, text_field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise ValueError(
            f"The {where} is no record but a {type(record).__name__}: write an object with {text_field!r}."
        )
    text = record.get(text_field)
    if not isinstance(text, str):
        raise ValueError(
            f"The {where} has no text in {text_field!r}: set `text_field` to one of {', '.join(map(repr, record))}."
        )
    return text
