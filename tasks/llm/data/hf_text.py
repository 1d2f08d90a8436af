"""Text columns of Hugging Face data sets on disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ...data.splits import Split, named_parts, split_of
from ...errors import error_line
from .text_files import checked_text
from .text_module import UNNAMED, LocalText

if TYPE_CHECKING:
    from datasets import Dataset

Column = Callable[[], Iterator[str]]

_ROWS = 1000
_REMEDY = "name all of them, use `val_path`, or set `named_splits` to false"


class HFText(LocalText):
    """Token windows of a data set in arrow or parquet files.

    Parts are those that `datasets` finds: the splits of a `DatasetDict`; those that the head of a `README.md`
    configures; or those in names of folders and files: `validation/0000.parquet`,
    `data/train-00000-of-00002.parquet`, `my_test.parquet`. The training part trains; the validation part validates, or
    else the test part; other parts are not read. Without such names and without a `val_path`, a hash of their text
    selects a fraction of the documents for validation.

    Args:
        path: A folder written by `save_to_disk`, a parquet file, or a folder of parquet files.
        text_column: The column with the text.
        kwargs: See `LocalText`.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, *, path: str, text_column: str = "text", **kwargs: Any) -> None:
        super().__init__(path=path, **kwargs)
        self.text_column = text_column

    def split_settings(self) -> dict[str, Any]:
        """See `TextDataModule.split_settings`."""
        return {
            "val_fraction": self.val_fraction,
            "text_column": self.text_column,
            "named_splits": self.named_splits,
        }

    def find_files(self, path: Path) -> list[Path]:
        """See `LocalText.find_files`."""
        return data_files(path)

    def named_parts(self, path: Path) -> dict[str, list[Column]]:
        """See `LocalText.named_parts`: text columns."""
        return named_columns(path, column=self.text_column, named_splits=self.named_splits)

    def documents(self) -> Iterator[tuple[Split, str]]:
        """Every document, in the order of the rows."""
        train, val = self.train_and_val()
        if not val:
            yield from ((split_of(text, val_fraction=self.val_fraction), text) for read in train for text in read())
            return
        yield from (("train", text) for read in train for text in read())
        yield from (("val", text) for read in val for text in read())


def data_files(path: Path) -> list[Path]:
    """Every file with rows, sorted.

    Args:
        path: A folder written by `save_to_disk`, a parquet file, or a folder of parquet files.

    Raises:
        FileNotFoundError: If there is no such path, as for a name on the Hub, or no such file in it.
        ValueError: If the file is not parquet.
    """
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(
                f"{path} does not end in .parquet: give a parquet file, or use TextFiles for JSON and text."
            )
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(
            f"There is no file or folder {path}, and nothing is downloaded: give a folder written by `save_to_disk`, or"
            " parquet files."
        )
    kind = "*.arrow" if _is_saved(path) else "*.parquet"
    files = sorted(
        file for file in path.rglob(kind) if not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise FileNotFoundError(
            f"{path} contains neither a data set written by `save_to_disk` nor parquet files: check the path."
        )
    return files


def named_columns(path: Path, *, column: str, named_splits: bool = True) -> dict[str, list[Column]]:
    """The text column of each part of a data set, as functions that read it.

    Args:
        path: See `data_files`.
        column: Name of the column.
        named_splits: Whether parts are read from names of folders and files, and from a configuration in `README.md`;
            those of a `DatasetDict` always are.

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
    """Files by part as the head of a `README.md` configures them, read by `datasets`; empty without a configuration."""
    readme = path / "README.md"
    head = readme.read_text("utf-8-sig", errors="replace") if readme.is_file() else ""
    if not re.match(r"---\r?\n(.*\n)*?configs:", head.partition("\n---")[0]):
        return {}
    from datasets import load_dataset_builder

    with TemporaryDirectory() as folder:  # the builder leaves a lock file in its cache
        try:
            found = load_dataset_builder(str(path.resolve()), cache_dir=folder).config.data_files
        except Exception as error:  # of many types, for example of the YAML parser
            raise ValueError(
                f"Cannot read the configuration in {readme} ({error_line(error)}): give the folder of one configuration"
                " as `path`, or fix the file."
            ) from error
    return {str(name): [Path(file) for file in files] for name, files in (found or {}).items()}


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _saved_columns(path: Path, column: str) -> dict[str, list[Column]]:
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except Exception as error:  # from pyarrow, JSON or the file system
        raise _cannot_read(path, error) from error
    parts = loaded if isinstance(loaded, DatasetDict) else {UNNAMED: loaded}
    for dataset in parts.values():
        _check_column(column, dataset.column_names, path)
    return {name: [partial(_read_saved, dataset, column, path)] for name, dataset in parts.items()}


def _read_saved(dataset: Dataset, column: str, path: Path) -> Iterator[str]:
    batches = dataset.select_columns([column]).with_format("arrow").iter(batch_size=_ROWS)
    yield from _texts((batch.column(0) for batch in batches), column, path)


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        file = pq.ParquetFile(path)
    except Exception as error:  # from pyarrow, which has a dozen types, or the file system
        raise _cannot_read(path, error) from error
    with file:
        _check_column(column, file.schema_arrow.names, path)
        batches = file.iter_batches(batch_size=_ROWS, columns=[column])
        yield from _texts((batch.column(0) for batch in batches), column, path)


def _cannot_read(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"Cannot read {path} ({error_line(error)}): it is damaged or not a data set, fetch or write it again."
    )


def _check_column(column: str, columns: list[str], path: Path) -> None:
    if column not in columns:
        raise ValueError(
            f"{path} has no column {column!r}: set `text_column` to one of {', '.join(map(repr, columns))}."
        )


def _texts(chunks: Iterator[Any], column: str, path: Path) -> Iterator[str]:
    """The texts of consecutive arrow arrays."""
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
                raise ValueError(f"The {where} is not UTF-8 text ({error}): fix or remove it.") from error
            if not isinstance(text, str):
                raise ValueError(
                    f"The column {column!r} of {path} contains a {type(text).__name__}, not only text (row {row}):"
                    " filter those rows, or set `text_column`."
                )
            yield checked_text(text, where)
