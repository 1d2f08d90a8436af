"""Text of one's own: a file, or a folder of files."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ...data.cache import hash_files, remember
from ...data.splits import Split, check_val_fraction, choose_parts, named_parts, split_names, split_of
from .text_module import TextDataModule
from .text_reading import RECORD_SUFFIXES, find_files, read_documents

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
