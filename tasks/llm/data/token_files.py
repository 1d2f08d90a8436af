"""Token files of nanoGPT and llm.c: the data module, and the check of what is in a file.

nanoGPT writes bare tokens. llm.c writes a header of 256 int32 values first: a magic number, a version, the number of
tokens; the magic number says how a token is stored.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...data.cache import remember
from ...data.module import TOKENIZER
from .module import TokenDataModule, TokenSource
from .tokenizer import keep_tokenizer, load_tokenizer
from .tokens import STORAGE, TokenPart, TokenStream, TokenType

# Validation tokens that are decoded to learn how many bytes a token has.
_DECODED_TOKENS = 200_000


class TokenFiles(TokenDataModule):
    """Token windows of nanoGPT's `train.bin` and `val.bin`, or of llm.c's shards.

    Each file is searched once for tokens outside the vocabulary. Shards form one stream, in the order given; the files
    of a pattern are sorted by name.

    Args:
        train: Training tokens: a file, a pattern such as `fineweb10B/fineweb_train_*.bin`, or a list of both.
        val: Validation tokens, likewise.
        dtype: How a token is stored in a file without header; `auto` looks at the file.
        vocab_size: Number of possible tokens, for instance 50257 (GPT-2). Optional with a tokenizer.
        tokenizer: A local `tokenizer.json`, or a local folder with one, for prompts and for bits per byte.
        kwargs: See `TokenDataModule`.

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

    def open_source(self) -> TokenSource:
        """Check every file."""
        vocab_size, spec = self.wanted_vocab_size, self.tokenizer_spec
        if spec is None and (kept := self.kept.get(TOKENIZER)) is not None:
            spec = keep_tokenizer(kept, self.cache_dir)
        if spec is not None:
            vocab_size = self.checked_vocab_size(len(load_tokenizer(spec)), spec)
        assert vocab_size is not None
        train_paths, val_paths = expand_patterns(self.train_files), expand_patterns(self.val_files)
        if both := sorted(set(train_paths) & set(val_paths)):
            raise ValueError(f"{both[0]} is in `train` and in `val`: validation needs text that does not train.")
        return TokenSource(
            train=TokenStream(self._checked(train_paths, vocab_size)),
            val=TokenStream(self._checked(val_paths, vocab_size)),
            vocab_size=vocab_size,
            tokenizer=spec,
        )

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes per validation token, measured by decoding some of them; None without a tokenizer."""
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
                    f"{path} contains token {largest}, but the vocabulary ends at {vocab_size - 1}: give the"
                    " `vocab_size` or `tokenizer` that the file was made with, or the right `dtype`."
                )
            parts.append(part)
        return parts


def expand_patterns(patterns: Sequence[str]) -> list[Path]:
    """The files that match names and patterns.

    Raises:
        FileNotFoundError: If a pattern matches nothing.
        ValueError: If a file is named twice.
    """
    paths: list[Path] = []
    for pattern in patterns:
        text = str(Path(pattern).expanduser())
        if glob.has_magic(text) and not Path(text).exists():
            # `Path.glob` rejects absolute patterns.
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


HEADER_BYTES = 1024
# Magic number: version, storage. 20240520 is llm.c's GPT-2 file, 20240801 its Llama-3 file.
LLMC_FORMATS: dict[int, tuple[int, TokenType]] = {20240520: (1, "uint16"), 20240801: (7, "uint32")}

_PROBE_BYTES = 2**14


def read_part(
    path: Path, *, token_type: Literal["auto", "uint16", "uint32"] = "auto", vocab_size: int | None = None
) -> TokenPart:
    """Check a token file.

    Args:
        path: The file.
        token_type: How a token is stored. With "auto", llm.c's header, the high halves of the first tokens, or
            ``vocab_size`` tell.
        vocab_size: Number of possible tokens, if known.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is empty, cut off, or not stored as ``token_type`` says.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no token file {path}: check the path, or write it with nanoGPT's prepare.py."
        )
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"The token file {path} is empty: write it again.")
    with path.open("rb") as file:
        head = file.read(_PROBE_BYTES)
    header = np.frombuffer(head[:12], dtype="<i4") if len(head) >= 12 else None
    if header is not None and int(header[0]) in LLMC_FORMATS:
        return _read_llmc(path, size, header.tolist(), token_type)
    if token_type == "auto":
        wide = _looks_wide(head) or (vocab_size is not None and vocab_size > 2**16)
        token_type = "uint32" if wide else "uint16"
    elif token_type == "uint16" and _looks_wide(head):
        raise ValueError(f"Every second number in {path} is zero: it has uint32 tokens, set `dtype` to uint32 or auto.")
    item_bytes = STORAGE[token_type].itemsize
    if size % item_bytes:
        raise ValueError(
            f"The token file {path} has {size} bytes, not a multiple of the {item_bytes} of a {token_type} token: it is"
            " cut off, or `dtype` is wrong."
        )
    return TokenPart(path=path, token_type=token_type, offset=0, num_tokens=size // item_bytes)


def largest_token(parts: Sequence[TokenPart]) -> int:
    """The largest token id in the files, which are read completely."""
    return max(int(chunk.max()) for chunk in TokenStream(parts).chunks())


def _read_llmc(path: Path, size: int, header: list[int], token_type: str) -> TokenPart:
    magic, version, num_tokens = header
    known_version, stored = LLMC_FORMATS[magic]
    if version != known_version:
        raise ValueError(
            f"{path} is an llm.c file of version {version}, but magic number {magic} has version {known_version}: write"
            " it again with llm.c's current data scripts."
        )
    if token_type not in ("auto", stored):
        raise ValueError(f"{path} is an llm.c file of {stored} tokens: set `dtype` to auto or {stored}.")
    found = (size - HEADER_BYTES) / STORAGE[stored].itemsize
    if found != num_tokens or num_tokens == 0:
        raise ValueError(
            f"The header of {path} says {num_tokens} tokens, but {max(found, 0):g} follow: the file is cut off or"
            " damaged, fetch or write it again."
        )
    return TokenPart(path=path, token_type=stored, offset=HEADER_BYTES, num_tokens=num_tokens)


def _looks_wide(head: bytes) -> bool:
    halves = np.frombuffer(head[: len(head) // 4 * 4], dtype="<u2")
    # In a 16-bit file every half is a token, and sixteen zeros in every second place would be no accident.
    return len(halves) >= 32 and not halves[1::2].any() and bool(halves.any())
