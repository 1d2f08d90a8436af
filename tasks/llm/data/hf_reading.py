"""Find the parts of a Hugging Face data set on disk and read a text column of them."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ...data.splits import named_parts
from ...errors import error_line
from .text_reading import checked_text

if TYPE_CHECKING:
    from datasets import Dataset

Column = Callable[[], Iterator[str]]

# The name of the only part of a data set that has no named ones.
UNNAMED = ""

_ROWS = 1000
_REMEDY = "name all of them, use `val_path`, or set `named_splits` to false"


def data_files(path: Path) -> list[Path]:
    """Every file that holds rows, sorted.

    Args:
        path: A folder written by `save_to_disk`, a parquet file, or a folder of parquet files.

    Raises:
        FileNotFoundError: If there is nothing there, or nothing of the kind; a name on the hub is no path.
        ValueError: If a file is not parquet.
    """
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"{path} is not called .parquet: give a parquet file, or use TextFiles for JSON and text.")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(
            f"There is no file or folder {path}, and no download is made: give a folder written by `save_to_disk`, or"
            " parquet files."
        )
    kind = "*.arrow" if _is_saved(path) else "*.parquet"
    files = sorted(
        file for file in path.rglob(kind) if not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise FileNotFoundError(
            f"{path} holds neither a data set written by `save_to_disk` nor parquet files: check the path."
        )
    return files


def named_columns(path: Path, *, column: str, named_splits: bool = True) -> dict[str, list[Column]]:
    """The text column of each part of a data set, to be read when called.

    Args:
        path: As for `data_files`.
        column: Name of the column.
        named_splits: Whether names of folders and files say parts, and the configuration in a `README.md`; those of a
            `DatasetDict` always do.

    Raises:
        ValueError: If the column does not exist, or some files belong to a part and others to none.
    """
    if _is_saved(path):
        return _saved_columns(path, column)
    files = data_files(path)
    parts: dict[str, list[Path]] = {}
    if named_splits and path.is_dir():
        parts = _configured_parts(path) or dict(named_parts(files, path, "parquet files", remedy=_REMEDY))
    return {
        name: [partial(_read_parquet, file, column) for file in own]
        for name, own in (parts or {UNNAMED: files}).items()
    }


def _configured_parts(path: Path) -> dict[str, list[Path]]:
    """Files by part as the head of a `README.md` gives them, by the reader of `datasets`; empty where it gives none."""
    readme = path / "README.md"
    head = readme.read_text("utf-8-sig", errors="replace") if readme.is_file() else ""
    if not re.match(r"---\r?\n(.*\n)*?configs:", head.partition("\n---")[0]):
        return {}
    from datasets import load_dataset_builder

    with TemporaryDirectory() as folder:  # the builder leaves a lock in its cache
        try:
            found = load_dataset_builder(str(path.resolve()), cache_dir=folder).config.data_files
        except Exception as error:  # of many kinds, from the parser of YAML on
            raise ValueError(
                f"Cannot read the configuration in {readme} ({error_line(error)}): give the folder of one configuration"
                " as `path`, or mend the file."
            ) from error
    return {str(name): [Path(file) for file in files] for name, files in (found or {}).items()}


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _saved_columns(path: Path, column: str) -> dict[str, list[Column]]:
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except Exception as error:  # of pyarrow, of JSON, of the file system
        raise _cannot_read(path, error) from error
    parts = loaded if isinstance(loaded, DatasetDict) else {UNNAMED: loaded}
    for dataset in parts.values():
        _check_column(column, dataset.column_names, path)
    return {name: [partial(_read_saved, dataset, column, path)] for name, dataset in parts.items()}


def _read_saved(dataset: "Dataset", column: str, path: Path) -> Iterator[str]:
    batches = dataset.select_columns([column]).with_format("arrow").iter(batch_size=_ROWS)
    yield from _texts((batch.column(0) for batch in batches), column, path)


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        file = pq.ParquetFile(path)
    except Exception as error:  # of pyarrow, which has a dozen kinds, and of the file system
        raise _cannot_read(path, error) from error
    with file:
        _check_column(column, file.schema_arrow.names, path)
        batches = file.iter_batches(batch_size=_ROWS, columns=[column])
        yield from _texts((batch.column(0) for batch in batches), column, path)


def _cannot_read(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"Cannot read {path} ({error_line(error)}): it is damaged or of another kind, fetch or write it again."
    )


def _check_column(column: str, columns: list[str], path: Path) -> None:
    if column not in columns:
        raise ValueError(
            f"{path} has no column {column!r}: set `text_column` to one of {', '.join(map(repr, columns))}."
        )


def _texts(chunks: Iterator[Any], column: str, path: Path) -> Iterator[str]:
    """The texts of arrow's arrays, which are the rows one after another."""
    row = 0
    while True:
        try:
            values = next(chunks, None)
        except Exception as error:
            raise _cannot_read(path, error) from error
        if values is None:
            return
        for value in values:
            row += 1
            where = f"row {row} of {path}"
            try:
                text = value.as_py()
            except ValueError as error:
                raise ValueError(f"The {where} is not UTF-8 text ({error}): mend or remove it.") from error
            if not isinstance(text, str):
                raise ValueError(
                    f"The column {column!r} of {path} holds a {type(text).__name__}, not only text (row {row}): filter"
                    " those rows, or set `text_column`."
                )
            yield checked_text(text, where)
