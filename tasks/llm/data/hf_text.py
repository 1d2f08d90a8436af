"""Text columns of Hugging Face data sets that lie on disk."""

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ...data.cache import hash_files, remember
from .hf_reading import UNNAMED, VAL_NAMES, Column, data_files, named_columns
from .splits import check_val_fraction, split_of
from .text_cache import Split
from .text_module import TextDataModule

logger = logging.getLogger(__name__)


class HFText(TextDataModule):
    """Token windows of a data set in arrow or parquet files.

    Parts that are called train and validation (or valid, val, dev, else test) are used as such: splits of a
    `DatasetDict`, or parquet files whose names begin so. Without such names and without a `val_path`, validation is a
    share of the documents, by a hash of their text.

    Args:
        path: A folder written by `save_to_disk`, a parquet file, or a folder of parquet files.
        val_path: The same for validation. Parts for validation in `path` are then not used.
        val_fraction: Share of the documents for validation, where nothing else says it.
        text_column: The column with the text.
        tokenizer: A local `tokenizer.json`, or a local folder with one. By default a byte-level BPE is trained on the
            training part.
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
        return {"val_fraction": self.val_fraction, "text_column": self.text_column}

    def documents(self) -> Iterator[tuple[Split, str]]:
        """Every document, in the order of the rows."""
        parts = named_columns(self.path, column=self.text_column)
        train = _choose(parts, ("train",), self.path)
        if self.val_path is not None:
            val_parts = named_columns(self.val_path, column=self.text_column)
            val = _choose(val_parts, VAL_NAMES, self.val_path)
        elif any(name in parts for name in VAL_NAMES):
            val = _choose(parts, VAL_NAMES, self.path)
        else:
            yield from ((split_of(text, val_fraction=self.val_fraction), text) for read in train for text in read())
            return
        yield from (("train", text) for read in train for text in read())
        yield from (("val", text) for read in val for text in read())


def _choose(parts: dict[str, list[Column]], names: tuple[str, ...], path: Path) -> list[Column]:
    """The columns of the first part that goes by one of the names, or of the only part where none has a name."""
    for name in (*names, UNNAMED):
        if name in parts:
            logger.info("Of %s, the part %s is read.", path, name or "without a name")
            return parts[name]
    raise ValueError(f"{path} has the parts {', '.join(parts)}, and none is called {' or '.join(names)}: rename one.")
