"""Data modules of text: documents are encoded once, cached, and then read as token files.

The cache folder of a text has `train.bin` and `val.bin` (nanoGPT's format), `tokenizer.json` if one was trained, and
`facts.json`, which is written last and describes the other files. A token takes two bytes; `datasets.map` would store
the text too, and tokens of four bytes with offsets, six times as much.
"""

from __future__ import annotations

import logging
import re
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from ...atomic_files import atomic_file, read_json, write_json
from ...data.cache import digest, hash_files, only_one, remember
from ...data.module import TOKENIZER
from ...data.splits import Split, check_val_fraction, choose_parts
from .module import TokenDataModule, TokenSource
from .tokenizer import MIN_VOCAB_SIZE, keep_tokenizer, load_tokenizer, tokenizer_files, tokenizer_texts, train_bpe
from .tokens import STORAGE, TokenPart, TokenStream, TokenType

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)
_log = rank_zero_only(logger.info)

DEFAULT_BPE_VOCAB_SIZE = 2048
UNNAMED = ""
"""The only part of data without named parts."""
SPLITS: tuple[Split, ...] = ("train", "val")
_PART_NAMES: dict[Split, str] = {"train": "training", "val": "validation"}
Documents = Callable[[], Iterable[tuple[Split, str]]]

FACTS = "facts.json"
TRAINED_TOKENIZER = "tokenizer.json"
_FORMAT = 1
# Files up to this size are compared by checksum at every start, larger ones by their length only (bytes).
_CHECKED_BYTES = 2**26
# The training of a tokenizer reads at most this many characters; merges hardly change beyond that.
_TOKENIZER_CHARACTERS = 2**28
# Characters that are encoded together; an encoding takes some hundred bytes of memory per token.
_BATCH_CHARACTERS = 2**22
# A space between two words, and how far before the end of a batch to search for one.
_SINGLE_SPACE = re.compile(r"\S (?=\S)")
_SEARCHED_CHARACTERS = 2**12


class TextDataModule(TokenDataModule):
    """Token windows of documents, which are encoded once and cached.

    The end-of-text token follows each document. The key of the cache is a hash of the text, the tokenizer and the
    settings.

    Args:
        tokenizer: A local `tokenizer.json`, or a local folder with one. By default the tokenizer of the checkpoint or
            of `model.init_from`; without these, a byte-level BPE is trained on the training part.
        vocab_size: Tokens of a BPE that is trained, 2048 by default. With a `tokenizer`, the size of the model's
            vocabulary, if that is padded beyond the tokenizer's.
        kwargs: See `TokenDataModule`.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, *, tokenizer: str | None = None, vocab_size: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if tokenizer is None and vocab_size is not None and vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(
                f"`vocab_size` must be at least {MIN_VOCAB_SIZE}, one token for each byte and special token, got"
                f" {vocab_size}."
            )
        self.tokenizer_spec = tokenizer
        self.wanted_vocab_size = vocab_size
        self.corpus_hash: str | None = None
        self._logged = False

    @property
    def planned_vocab_size(self) -> int | None:
        """See `TokenDataModule.planned_vocab_size`."""
        return super().planned_vocab_size or DEFAULT_BPE_VOCAB_SIZE

    @property
    def trains_tokenizer(self) -> bool:
        """See `TokenDataModule.trains_tokenizer`."""
        return self.tokenizer_spec is None

    @abstractmethod
    def hash_corpus(self) -> str:
        """Hash of all text; it must be fast, since every start of a run computes it."""

    @abstractmethod
    def documents(self) -> Iterator[tuple[Split, str]]:
        """Every document with its part, in the same order each time."""

    def split_settings(self) -> dict[str, Any]:
        """The settings that determine the documents and their parts, as JSON values."""
        return {}

    def open_source(self) -> TokenSource:
        """Encode the text if that has not been done."""
        bpe_vocab_size = self.wanted_vocab_size or DEFAULT_BPE_VOCAB_SIZE
        self.corpus_hash = self.hash_corpus()
        spec, kept = self.tokenizer_spec, self.kept.get(TOKENIZER)
        folder = self._folder(bpe_vocab_size if spec is None else _hash_tokenizer(spec))
        if spec is None and kept is not None and not _was_trained(folder, kept):
            spec = keep_tokenizer(kept, self.cache_dir)
            folder = self._folder(_hash_tokenizer(spec))
        source = prepare_text(folder, self.documents, tokenizer=spec, bpe_vocab_size=bpe_vocab_size)
        if self.tokenizer_spec is not None:
            return replace(source, vocab_size=self.checked_vocab_size(source.vocab_size, self.tokenizer_spec))
        if spec is None:
            return source
        if not self._logged:  # a trainer calls both prepare_data and setup
            _log("the run's tokenizer of %d tokens encodes the text; none is trained on it", source.vocab_size)
            self._logged = True
        padded = self.kept.get("data.vocab_size", self.wanted_vocab_size or 0)
        return replace(source, vocab_size=max(source.vocab_size, padded))

    def samples(self) -> dict[str, Any]:
        """See `SampledDataModule.samples`: the text and its parts, with any tokenizer."""
        settings = {f"data.{name}": value for name, value in self.split_settings().items()}
        return {"text": self.corpus_hash, **settings}

    def _folder(self, tokenizer: str | int) -> Path:
        """The cache folder of this text and a tokenizer, which is its hash, or the vocabulary size of a trained one."""
        key = {"corpus": self.corpus_hash, "split": self.split_settings(), "tokenizer": tokenizer}
        return self.cache_dir / f"{type(self).__name__.lower()}-{digest(key)}"


class LocalText(TextDataModule):
    """Base of text from paths that the user gives.

    Args:
        path: File or folder of the text.
        val_path: File or folder of the validation text.
        val_fraction: Fraction of the data for validation, if neither `val_path` nor names say it.
        named_splits: Read parts from names of folders and files; false ignores the names.
        kwargs: See `TextDataModule`.

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
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_val_fraction(val_fraction)
        self.path = Path(path).expanduser()
        self.val_path = None if val_path is None else Path(val_path).expanduser()
        self.val_fraction = val_fraction
        self.named_splits = named_splits

    @abstractmethod
    def find_files(self, path: Path) -> list[Path]:
        """The files of `path` or `val_path`, sorted."""

    @abstractmethod
    def named_parts(self, path: Path) -> dict[str, list[Any]]:
        """What to read of a path, by the name of its part; `UNNAMED` for all of it if there are no named parts."""

    def describe(self) -> str:
        """The paths, for messages."""
        return str(self.path) if self.val_path is None else f"{self.path} and {self.val_path}"

    def hash_corpus(self) -> str:
        """SHA-256 of all files; files that did not change are not read again."""
        hashes = []
        for path in filter(None, (self.path, self.val_path)):
            files = self.find_files(path)
            root = path if path.is_dir() else path.parent
            hashes.append(remember(self.cache_dir, "sha256", files, partial(hash_files, files, root=root)))
        return "-".join(hashes)

    def train_and_val(self) -> tuple[list[Any], list[Any]]:
        """What to read for training and for validation; nothing for validation if neither names nor `val_path` say."""
        train, val = self._choose_parts(self.path)
        if self.val_path is not None:
            unnamed, named = self._choose_parts(self.val_path, is_validation=True)
            val = named or unnamed
        return train, val

    def _choose_parts(self, path: Path, *, is_validation: bool = False) -> tuple[list[Any], list[Any]]:
        parts = self.named_parts(path)
        if UNNAMED in parts:
            return parts[UNNAMED], []
        chosen = choose_parts(list(parts), path, is_validation=is_validation)
        train, val = ([item for name in chosen[use] for item in parts[name]] for use in ("train", "validation"))
        return train, val


def _hash_tokenizer(spec: str) -> str:
    files = tokenizer_files(spec)
    return hash_files(files, root=files[0].parent)


def _was_trained(folder: Path, kept: dict[str, str]) -> bool:
    """Whether the tokenizer in a cache folder is the one that a run kept."""
    trained = folder / TRAINED_TOKENIZER
    return trained.is_file() and tokenizer_texts(str(trained)) == kept


def prepare_text(folder: Path, documents: Documents, *, tokenizer: str | None, bpe_vocab_size: int) -> TokenSource:
    """Open a cache folder, after filling it if it is missing, cut off or damaged.

    Args:
        folder: The folder; its name must change with the documents and the settings.
        documents: Returns every document with its part, each time it is called.
        tokenizer: A local tokenizer; None trains a BPE on the training documents.
        bpe_vocab_size: Tokens of that BPE.

    Raises:
        ValueError: If a part has no text.
    """
    if (source := _open(folder, tokenizer)) is not None:
        return source
    with only_one(folder):
        # Another process may have filled it while this one waited.
        if (source := _open(folder, tokenizer)) is None:
            logger.info("Preparing tokens in %s.", folder)
            _fill(folder, documents, tokenizer=tokenizer, bpe_vocab_size=bpe_vocab_size)
            source = _open(folder, tokenizer)
    if source is None:
        raise OSError(f"The files that were just written to {folder} are damaged: check the disk.")
    return source


def _open(folder: Path, tokenizer: str | None) -> TokenSource | None:
    facts = read_json(folder / FACTS)
    if facts.get("format") != _FORMAT:
        return None
    for name, known in facts["files"].items():
        if _file_facts(folder / name) != known:
            logger.warning("%s is damaged or cut off: it is made again.", folder / name)
            return None
    token_type: TokenType = facts["token_type"]
    streams = {
        split: TokenStream(
            [TokenPart(path=folder / f"{split}.bin", token_type=token_type, offset=0, num_tokens=facts[split])]
        )
        for split in SPLITS
    }
    return TokenSource(
        vocab_size=facts["vocab_size"],
        val_bytes=facts["val_bytes"],
        tokenizer=tokenizer or str(folder / TRAINED_TOKENIZER),
        **streams,
    )


def _file_facts(path: Path) -> dict[str, int] | None:
    if not path.is_file():
        return None
    size = path.stat().st_size
    return {"bytes": size} if size > _CHECKED_BYTES else {"bytes": size, "crc32": zlib.crc32(path.read_bytes())}


def _fill(folder: Path, documents: Documents, *, tokenizer: str | None, bpe_vocab_size: int) -> None:
    files = [f"{split}.bin" for split in SPLITS]
    if tokenizer is None:
        backend = train_bpe(_texts_to_train_on(documents), vocab_size=bpe_vocab_size)
        with atomic_file(folder / TRAINED_TOKENIZER) as file:
            file.write(backend.to_str().encode())
        tokenizer = str(folder / TRAINED_TOKENIZER)
        files.append(TRAINED_TOKENIZER)
    loaded = load_tokenizer(tokenizer)
    token_type: TokenType = "uint16" if len(loaded) <= 2**16 else "uint32"
    with atomic_file(folder / "train.bin") as train, atomic_file(folder / "val.bin") as val:
        writers: dict[Split, _Writer] = {
            "train": _Writer(train, loaded.backend_tokenizer, loaded.eos_token_id, token_type),
            "val": _Writer(val, loaded.backend_tokenizer, loaded.eos_token_id, token_type),
        }
        for split, text in documents():
            writers[split].add(text)
        for split in SPLITS:
            writers[split].flush()
            if not writers[split].num_tokens:
                raise ValueError(
                    f"The {_PART_NAMES[split]} part has no text: give more documents, another `val_fraction`, or"
                    " separate validation text."
                )
    facts: dict[str, Any] = {split: writers[split].num_tokens for split in SPLITS}
    facts |= {"format": _FORMAT, "token_type": token_type, "vocab_size": len(loaded)}
    facts |= {"val_bytes": writers["val"].num_bytes, "files": {name: _file_facts(folder / name) for name in files}}
    write_json(folder / FACTS, facts)


def _texts_to_train_on(documents: Documents) -> Iterator[str]:
    characters = 0
    for split, text in documents():
        if split == "train":
            yield text
            characters += len(text)
            if characters >= _TOKENIZER_CHARACTERS:
                logger.info("The tokenizer is trained on the first %d characters.", characters)
                return


class _Writer:
    """Encodes documents in batches and appends them to a file, each followed by the end-of-text token."""

    def __init__(self, file: BinaryIO, backend: Tokenizer, end_of_text: int, token_type: TokenType) -> None:
        self.num_tokens = self.num_bytes = 0
        self._file = file
        self._backend = backend
        self._end_of_text = end_of_text
        self._storage = STORAGE[token_type]
        self._pending: list[tuple[str, bool]] = []
        self._pending_characters = 0

    def add(self, text: str) -> None:
        self.num_bytes += len(text.encode())
        pieces = list(_pieces(text))
        for index, piece in enumerate(pieces):
            self._pending.append((piece, index == len(pieces) - 1))
            self._pending_characters += len(piece)
            if self._pending_characters >= _BATCH_CHARACTERS:
                self.flush()

    def flush(self) -> None:
        texts = [text for text, _ in self._pending]
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        for encoding, (_, is_end) in zip(encodings, self._pending, strict=True):
            ids = [*encoding.ids, self._end_of_text] if is_end else encoding.ids
            self._file.write(np.asarray(ids, dtype=self._storage).tobytes())
            self.num_tokens += len(ids)
        self._pending, self._pending_characters = [], 0


def _pieces(text: str) -> Iterator[str]:
    """Split a very long document before single spaces, where byte-level tokenizers split as well."""
    start = 0
    while len(text) - start > _BATCH_CHARACTERS:
        stop = start + _BATCH_CHARACTERS
        for match in _SINGLE_SPACE.finditer(text, max(start, stop - _SEARCHED_CHARACTERS), stop):
            stop = match.start() + 1
        yield text[start:stop]
        start = stop
    yield text[start:]
