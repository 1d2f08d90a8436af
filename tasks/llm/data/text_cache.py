"""Turn documents into token files, once, and find them again.

A prepared folder holds `train.bin` and `val.bin` (nanoGPT's format), `tokenizer.json` where one was trained, and
`facts.json`, which is written last and says what the others must be.
"""

import logging
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ...atomic_files import atomic_file, read_json, write_json
from ...data.cache import only_one
from ...data.splits import Split
from .token_stream import STORAGE, TokenPart, TokenStream, TokenType
from .tokenizer import load_tokenizer, train_bpe

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

SPLITS: tuple[Split, ...] = ("train", "val")
_PART_NAMES: dict[Split, str] = {"train": "training", "val": "validation"}
Documents = Callable[[], Iterable[tuple[Split, str]]]

FACTS = "facts.json"
TRAINED_TOKENIZER = "tokenizer.json"
_FORMAT = 1
# A checksum of files up to this many bytes is compared at every start; of larger ones only the length.
_CHECKED_BYTES = 2**26
# A trained tokenizer sees at most so many characters; merges hardly change beyond.
_TOKENIZER_CHARACTERS = 2**28
# Characters that are encoded together; an encoding takes some hundred bytes of memory per token.
_BATCH_CHARACTERS = 2**22
# Between two words, and how far before the end of a batch it is looked for.
_SINGLE_SPACE = re.compile(r"\S (?=\S)")
_SEARCHED_CHARACTERS = 2**12


@dataclass(frozen=True, kw_only=True)
class PreparedText:
    """A prepared folder.

    Args:
        folder: Where it is.
        train: Training tokens.
        val: Validation tokens.
        vocab_size: Tokens of the tokenizer.
        val_bytes: UTF-8 bytes of the validation documents.
    """

    folder: Path
    train: TokenStream
    val: TokenStream
    vocab_size: int
    val_bytes: int


def prepare_text(folder: Path, documents: Documents, *, tokenizer: str | None, bpe_vocab_size: int) -> PreparedText:
    """Open a prepared folder, after filling it where it is missing, cut short or damaged.

    Args:
        folder: The folder, whose name must change with the documents and the settings.
        documents: Gives every document with its part, each time it is called.
        tokenizer: A local tokenizer; None trains a BPE on the training documents.
        bpe_vocab_size: Tokens of that BPE.

    Raises:
        ValueError: If a part has no text.
    """
    if (prepared := _open(folder)) is not None:
        return prepared
    with only_one(folder):
        # Another process may have filled it while this one waited.
        if (prepared := _open(folder)) is None:
            logger.info("Preparing tokens in %s.", folder)
            _fill(folder, documents, tokenizer=tokenizer, bpe_vocab_size=bpe_vocab_size)
            prepared = _open(folder)
    if prepared is None:
        raise OSError(f"The files that were just written to {folder} are not as they should be: check the disk.")
    return prepared


def _open(folder: Path) -> PreparedText | None:
    facts = read_json(folder / FACTS)
    if facts.get("format") != _FORMAT:
        return None
    for name, known in facts["files"].items():
        if _file_facts(folder / name) != known:
            logger.warning("%s is damaged or cut short: it is made again.", folder / name)
            return None
    token_type: TokenType = facts["token_type"]
    streams = {
        split: TokenStream(
            [TokenPart(path=folder / f"{split}.bin", token_type=token_type, offset=0, num_tokens=facts[split])]
        )
        for split in SPLITS
    }
    return PreparedText(folder=folder, vocab_size=facts["vocab_size"], val_bytes=facts["val_bytes"], **streams)


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
                    f"The {_PART_NAMES[split]} part has no text: give more documents, another `val_fraction`, or text"
                    " for validation in a place of its own."
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

    def __init__(self, file: BinaryIO, backend: "Tokenizer", end_of_text: int, token_type: TokenType) -> None:
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
    """Cut a very long document before single spaces, where byte-level tokenizers cut as well."""
    start = 0
    while len(text) - start > _BATCH_CHARACTERS:
        stop = start + _BATCH_CHARACTERS
        for match in _SINGLE_SPACE.finditer(text, max(start, stop - _SEARCHED_CHARACTERS), stop):
            stop = match.start() + 1
        yield text[start:stop]
        start = stop
    yield text[start:]
