"""Text columns of Hugging Face data sets that lie on disk."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ...data.cache import hash_files, remember
from ...data.splits import Split, check_val_fraction, choose_parts, split_of
from .hf_reading import UNNAMED, Column, data_files, named_columns
from .text_module import TextDataModule


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
