"""The base of the sources that are text: tokenised once, then read as token files."""

import logging
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from ...data.cache import digest, hash_files
from ...data.module import TOKENIZER
from ...data.splits import Split
from .module import TokenDataModule, TokenSource
from .text_cache import TRAINED_TOKENIZER, prepare_text
from .tokenizer import MIN_VOCAB_SIZE, keep_tokenizer, load_tokenizer, tokenizer_files, tokenizer_texts

_say = rank_zero_only(logging.getLogger(__name__).info)

DEFAULT_BPE_VOCAB_SIZE = 2048


class TextDataModule(TokenDataModule):
    """Token windows of documents, which are encoded once and cached.

    The end-of-text token follows each document. What is cached is found again by a hash of the text, the tokenizer
    and the settings.

    Args:
        tokenizer: A local `tokenizer.json`, or a local folder with one. By default the one of the checkpoint or of
            `model.init_from`; else a byte-level BPE is trained on the training part.
        vocab_size: Tokens of the BPE that is trained, 2048 by default. With a `tokenizer` the size of the model's
            vocabulary, where that is padded beyond the tokenizer's.
        kwargs: Settings of every token source, see `TokenDataModule`.

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
        self._told = False

    @property
    def planned_vocab_size(self) -> int:
        """See `TokenDataModule.planned_vocab_size`."""
        if self.wanted_vocab_size is not None:
            return self.wanted_vocab_size
        return DEFAULT_BPE_VOCAB_SIZE if self.tokenizer_spec is None else len(load_tokenizer(self.tokenizer_spec))

    @property
    def trains_tokenizer(self) -> bool:
        """See `TokenDataModule.trains_tokenizer`."""
        return self.tokenizer_spec is None

    @abstractmethod
    def hash_corpus(self) -> str:
        """Hash of all text; it must be quick, since every start of a run asks for it."""

    @abstractmethod
    def documents(self) -> Iterator[tuple[Split, str]]:
        """Every document with the part that it belongs to, in the same order each time."""

    def split_settings(self) -> dict[str, Any]:
        """What else decides about the documents and their parts, as JSON values."""
        return {}

    def open_source(self) -> TokenSource:
        """Encode the text where that has not been done."""
        bpe_vocab_size = self.wanted_vocab_size or DEFAULT_BPE_VOCAB_SIZE
        self.corpus_hash = self.hash_corpus()
        spec, kept = self.tokenizer_spec, self.kept.get(TOKENIZER)
        folder = self._folder(bpe_vocab_size if spec is None else _hash_tokenizer(spec))
        if spec is None and kept is not None and not _was_trained(folder, kept):
            spec = keep_tokenizer(kept, self.cache_dir)
            folder = self._folder(_hash_tokenizer(spec))
        prepared = prepare_text(folder, self.documents, tokenizer=spec, bpe_vocab_size=bpe_vocab_size)
        vocab_size = prepared.vocab_size
        if self.tokenizer_spec is None and spec is not None:
            vocab_size = max(vocab_size, self.kept.get("data.vocab_size", self.wanted_vocab_size or 0))
            if not self._told:  # a trainer prepares, and then sets up
                _say(
                    "the text is encoded by the run's tokenizer of %d tokens; none is trained on it",
                    prepared.vocab_size,
                )
            self._told = True
        elif spec is not None and self.wanted_vocab_size is not None:
            if self.wanted_vocab_size < vocab_size:
                raise ValueError(
                    f"`vocab_size` {self.wanted_vocab_size} is smaller than the {vocab_size} tokens of the tokenizer"
                    f" {self.tokenizer_spec}: leave it out, or give at least that many."
                )
            vocab_size = self.wanted_vocab_size
        return TokenSource(
            train=prepared.train,
            val=prepared.val,
            vocab_size=vocab_size,
            tokenizer=spec or str(folder / TRAINED_TOKENIZER),
            val_bytes=prepared.val_bytes,
        )

    def samples(self) -> dict[str, Any]:
        """See `SampledDataModule.samples`: the text and its parts, whatever encodes it."""
        settings = {f"data.{name}": value for name, value in self.split_settings().items()}
        return {"text": self.corpus_hash, **settings}

    def _folder(self, tokenizer: str | int) -> Path:
        """The folder of this text, these parts and a tokenizer: its hash, or the size of a trained one."""
        key = {"corpus": self.corpus_hash, "split": self.split_settings(), "tokenizer": tokenizer}
        return self.cache_dir / f"{type(self).__name__.lower()}-{digest(key)}"


def _hash_tokenizer(spec: str) -> str:
    files = tokenizer_files(spec)
    return hash_files(files, root=files[0].parent)


def _was_trained(folder: Path, kept: dict[str, str]) -> bool:
    """Whether a prepared folder has the tokenizer that a run kept."""
    trained = folder / TRAINED_TOKENIZER
    return trained.is_file() and tokenizer_texts(str(trained)) == kept
