"""Find the parts of a Hugging Face data set on disk and read a text column of them."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

Column = Callable[[], Iterator[str]]

# How data sets call what is for validation, best first.
VAL_NAMES = ("validation", "valid", "val", "dev", "test")
# The name of the only part of a data set that has no named ones.
UNNAMED = ""

_PART_OF_FILE = re.compile(rf"(train|{'|'.join(VAL_NAMES)})(?![a-z])")
_ROWS = 1000


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
    files = sorted(path.rglob("*.arrow" if _is_saved(path) else "*.parquet"))
    if not files:
        raise FileNotFoundError(
            f"{path} holds neither a data set written by `save_to_disk` nor parquet files: check the path."
        )
    return files


def named_columns(path: Path, *, column: str) -> dict[str, list[Column]]:
    """The text column of each part of a data set, to be read when called.

    Args:
        path: As for `data_files`.
        column: Name of the column.

    Raises:
        ValueError: If the column does not exist, or parquet files with and without a part's name lie together.
    """
    if _is_saved(path):
        return _saved_columns(path, column)
    parts: dict[str, list[Column]] = {}
    for file in data_files(path):
        found = _PART_OF_FILE.match(file.stem.lower())
        name = found.group(1) if found else UNNAMED
        parts.setdefault(name, []).append(partial(_read_parquet, file, column))
    if UNNAMED in parts and len(parts) > 1:
        known = ", ".join(sorted(filter(None, parts)))
        raise ValueError(
            f"Some parquet files in {path} are called {known}, others not: name all of them, or use `val_path`."
        )
    return parts


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _saved_columns(path: Path, column: str) -> dict[str, list[Column]]:
    from datasets import DatasetDict, load_from_disk

    loaded = load_from_disk(str(path))
    parts = loaded if isinstance(loaded, DatasetDict) else {UNNAMED: loaded}
    for dataset in parts.values():
        _check_column(column, dataset.column_names, path)
    return {name.lower(): [partial(_read_saved, dataset, column, path)] for name, dataset in parts.items()}


def _read_saved(dataset: "Dataset", column: str, path: Path) -> Iterator[str]:
    for batch in dataset.select_columns([column]).iter(batch_size=_ROWS):
        yield from _checked_texts(batch[column], column, path)


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(path) as file:
            _check_column(column, file.schema_arrow.names, path)
            for batch in file.iter_batches(batch_size=_ROWS, columns=[column]):
                yield from _checked_texts(batch.column(0).to_pylist(), column, path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"Cannot read {path} ({error}): it is damaged or not parquet, fetch or write it again."
        ) from error


def _check_column(column: str, columns: list[str], path: Path) -> None:
    if column not in columns:
        raise ValueError(
            f"{path} has no column {column!r}: set `text_column` to one of {', '.join(map(repr, columns))}."
        )


def _checked_texts(texts: list[Any], column: str, path: Path) -> Iterator[str]:
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(
                f"The column {column!r} of {path} holds a {type(text).__name__}, not only text: filter those rows, or"
                " set `text_column`."
            )
        yield text
