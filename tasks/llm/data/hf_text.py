"""Text columns of Hugging Face data sets that lie on disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ...data.cache import hash_files, remember
from ...data.splits import Split, check_val_fraction, choose_parts, named_parts, split_of
from ...run_files import error_line
from .text_files import checked_text
from .text_module import TextDataModule

if TYPE_CHECKING:
    from datasets import Dataset


class HFText(TextDataModule):
    """Token windows of a data set in arrow or parquet files.

    Parts are those that `datasets` finds: the splits of a `DatasetDict`; those that the head of a `README.md`
    configures; or what names of folders and files say: `validation/0000.parquet`, `data/train-00000-of-00002.parquet`,
    `my_test.parquet`. The training part trains; the validation part, or else the test part, validates; others are not
    read. Without such names and without a `val_path`, validation is a share of the documents, by a hash of their text.

    Args:
        path: A folder written by `save_to_disk`, a parquet file, or a folder of parquet files.
        val_path: The same for validation. Parts for validation in `path` are then not used.
        val_fraction: Share of the documents for validation, where nothing else says it.
        text_column: The column with the text.
        named_splits: Read parts from names of folders and files; false takes all files for one part.
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
        text_column: str = "text",
        named_splits: bool = True,
        tokenizer: str | None = None,
        vocab_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer=tokenizer, vocab_size=vocab_size, **kwargs)
        check_val_fraction(val_fraction)
        self.path = Path(path).expanduser()
        self.val_path = None if val_path is None else Path(val_path).expanduser()
        self.val_fraction = val_fraction
        self.text_column = text_column
        self.named_splits = named_splits

    def describe(self) -> str:
        """The path, for messages."""
        return str(self.path) if self.val_path is None else f"{self.path} and {self.val_path}"

    def hash_corpus(self) -> str:
        """SHA-256 of all files; a set of files that did not change is not read again."""
        hashes = []
        for path in filter(None, (self.path, self.val_path)):
            files = data_files(path)
            root = path if path.is_dir() else path.parent
            hashes.append(remember(self.cache_dir, "sha256", files, partial(hash_files, files, root=root)))
        return "-".join(hashes)

    def split_settings(self) -> dict[str, Any]:
        """What decides about the documents and their parts."""
        return {
            "val_fraction": self.val_fraction,
            "text_column": self.text_column,
            "named_splits": self.named_splits,
        }

    def documents(self) -> Iterator[tuple[Split, str]]:
        """Every document, in the order of the rows."""
        train, val = self._columns(self.path)
        if self.val_path is not None:
            unnamed, val = self._columns(self.val_path, is_validation=True)
            val = val or unnamed
        if not val:
            yield from ((split_of(text, val_fraction=self.val_fraction), text) for read in train for text in read())
            return
        yield from (("train", text) for read in train for text in read())
        yield from (("val", text) for read in val for text in read())

    def _columns(self, path: Path, *, is_validation: bool = False) -> tuple[list[Column], list[Column]]:
        """Columns of the training part, or of the one without a name, and of the part for validation."""
        parts = named_columns(path, column=self.text_column, named_splits=self.named_splits)
        if UNNAMED in parts:
            return parts[UNNAMED], []
        chosen = choose_parts(list(parts), path, is_validation=is_validation)
        train, val = ([read for name in chosen[use] for read in parts[name]] for use in ("train", "validation"))
        return train, val


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


def _read_saved(dataset: Dataset, column: str, path: Path) -> Iterator[str]:
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
