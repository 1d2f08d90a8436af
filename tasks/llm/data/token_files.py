"""Tokens that somebody else has prepared, in nanoGPT's or llm.c's files."""

import glob
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ...data.cache import remember
from ...data.module import TOKENIZER
from .bin_format import largest_token, read_part
from .module import TokenDataModule, TokenSource
from .token_stream import TokenPart, TokenStream
from .tokenizer import keep_tokenizer, load_tokenizer

# Validation tokens that are decoded to learn how many bytes a token has.
_DECODED_TOKENS = 200_000


class TokenFiles(TokenDataModule):
    """Token windows of nanoGPT's `train.bin` and `val.bin`, or of llm.c's shards.

    Each file is looked through once for tokens outside the vocabulary. Shards are one stream, in the order given;
    a pattern gives them sorted by name.

    Args:
        train: Training tokens: a file, a pattern such as `fineweb10B/fineweb_train_*.bin`, or a list of both.
        val: Validation tokens, likewise.
        dtype: How a token is stored in a file without header; `auto` looks at the file.
        vocab_size: Possible tokens, for instance 50257 (GPT-2). May be left out where a tokenizer is given.
        tokenizer: A local `tokenizer.json`, or a local folder with one, for prompts and for reading results.
        kwargs: Settings of every token source, see `TokenDataModule`.

    Raises:
        ValueError: If a number is out of range, or neither `vocab_size` nor `tokenizer` is given.
    """

    def __init__(
        self,
        *,
        train: str | list[str],
        val: str | list[str],
        dtype: Literal["auto", "uint16", "uint32"] = "auto",
        vocab_size: int | None = None,
        tokenizer: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if vocab_size is None and tokenizer is None:
            raise ValueError("Token files do not say how many tokens there are: give `vocab_size` or `tokenizer`.")
        if vocab_size is not None and vocab_size < 1:
            raise ValueError(f"`vocab_size` must be at least 1, got {vocab_size}.")
        self.train_files = [train] if isinstance(train, str) else list(train)
        self.val_files = [val] if isinstance(val, str) else list(val)
        self.dtype = dtype
        self.wanted_vocab_size = vocab_size
        self.tokenizer_spec = tokenizer

    def describe(self) -> str:
        """The files, for messages."""
        return f"{', '.join(self.train_files)} and {', '.join(self.val_files)}"

    @property
    def planned_vocab_size(self) -> int:
        """See `TokenDataModule.planned_vocab_size`."""
        if self.wanted_vocab_size is not None:
            return self.wanted_vocab_size
        assert self.tokenizer_spec is not None
        return len(load_tokenizer(self.tokenizer_spec))

    def open_source(self) -> TokenSource:
        """Check every file."""
        vocab_size, spec = self.wanted_vocab_size, self.tokenizer_spec
        if spec is None and (kept := self.kept.get(TOKENIZER)) is not None:
            spec = keep_tokenizer(kept, self.cache_dir)
        if spec is not None:
            num_known = len(load_tokenizer(spec))
            if vocab_size is not None and vocab_size < num_known:
                raise ValueError(
                    f"`vocab_size` {vocab_size} is smaller than the {num_known} tokens of the tokenizer {spec}:"
                    " leave it out, or give at least that many."
                )
            vocab_size = vocab_size or num_known
        assert vocab_size is not None
        train_paths, val_paths = expand_patterns(self.train_files), expand_patterns(self.val_files)
        if both := sorted(set(train_paths) & set(val_paths)):
            raise ValueError(f"{both[0]} is in `train` and in `val`: a model must not be judged by what it was shown.")
        return TokenSource(
            train=TokenStream(self._checked(train_paths, vocab_size)),
            val=TokenStream(self._checked(val_paths, vocab_size)),
            vocab_size=vocab_size,
            tokenizer=spec,
        )

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes behind a validation token, from a decoded part of them; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        num_tokens = num_bytes = 0
        for chunk in self._opened.val.chunks(max_tokens=_DECODED_TOKENS, chunk_tokens=_DECODED_TOKENS // 8):
            num_tokens += len(chunk)
            num_bytes += len(self.tokenizer.decode(chunk.tolist(), skip_special_tokens=True).encode())
        return num_bytes / num_tokens

    def _checked(self, paths: Sequence[Path], vocab_size: int) -> list[TokenPart]:
        parts = []
        for path in paths:
            part = read_part(path, token_type=self.dtype, vocab_size=vocab_size)
            name = f"largest-{part.token_type}-{part.offset}"
            largest = remember(self.cache_dir, name, [path], partial(largest_token, [part]))
            if largest >= vocab_size:
                raise ValueError(
                    f"{path} holds token {largest}, and the vocabulary ends at {vocab_size - 1}: give the `vocab_size`"
                    " or `tokenizer` that the file was made with, or the right `dtype`."
                )
            parts.append(part)
        return parts


def expand_patterns(patterns: Sequence[str]) -> list[Path]:
    """The files that names and patterns stand for.

    Raises:
        FileNotFoundError: If one stands for nothing.
        ValueError: If a file is named twice.
    """
    paths: list[Path] = []
    for pattern in patterns:
        text = str(Path(pattern).expanduser())
        if glob.has_magic(text) and not Path(text).exists():
            # `Path.glob` refuses absolute patterns.
            found = [Path(name) for name in sorted(glob.glob(text, recursive=True))]  # noqa: PTH207
            if not found:
                raise FileNotFoundError(f"No file matches {pattern!r}: check the folder and the pattern.")
            paths += found
        else:
            paths.append(Path(text))
    if not paths:
        raise ValueError("The list of token files is empty: name at least one file or pattern.")
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"{twice} is named twice: its tokens would count double.")
    return paths
