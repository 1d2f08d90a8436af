"""One long row of token ids that lies in one or several files on disk."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

TokenType = Literal["uint16", "uint32"]

# Token files are little-endian on every machine.
STORAGE: dict[TokenType, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass(frozen=True, kw_only=True)
class TokenPart:
    """The tokens of one file.

    Args:
        path: The file.
        token_type: How a token is stored.
        offset: Bytes before the first token.
        num_tokens: Tokens in the file.
    """

    path: Path
    token_type: TokenType
    offset: int
    num_tokens: int


class TokenStream:
    """Read-only tokens of several files, as if they were one array. Nothing is held in memory.

    A window may begin in one file and end in the next. Copies sent to other processes carry paths, not tokens: a
    pickled memory map would carry the whole file.

    Args:
        parts: The files, in the order of the tokens.
    """

    def __init__(self, parts: Sequence[TokenPart]) -> None:
        self.parts = tuple(parts)
        self._ends = np.cumsum([part.num_tokens for part in self.parts], dtype=np.int64)
        self._maps: dict[int, np.memmap[Any, Any]] = {}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens ``start`` to ``stop``, which is clipped to the end of the stream.

        Args:
            start: Position of the first token, not negative.
            stop: Position after the last token.

        Returns:
            Token ids of shape ``(stop - start,)``, a copy.
        """
        stop = min(stop, len(self))
        if start >= stop:
            return np.empty(0, dtype=np.int64)
        pieces = []
        index = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            part_end = int(self._ends[index])
            part_start = part_end - self.parts[index].num_tokens
            piece_stop = min(stop, part_end)
            pieces.append(self._map(index)[start - part_start : piece_stop - part_start].astype(np.int64))
            start, index = piece_stop, index + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def chunks(self, *, max_tokens: int | None = None, chunk_tokens: int = 2**22) -> Iterator[npt.NDArray[np.int64]]:
        """The stream in pieces, or evenly spaced pieces of it.

        Args:
            max_tokens: Where the stream is longer than this, pieces of about so many tokens in all, spread evenly.
            chunk_tokens: Tokens in a piece.

        Yields:
            Token ids of shape ``(at most chunk_tokens,)``.
        """
        total = len(self)
        if max_tokens is None or total <= max_tokens:
            starts = range(0, total, chunk_tokens)
        else:
            chunk_tokens = min(chunk_tokens, max_tokens)
            num_chunks = max_tokens // chunk_tokens
            starts = range(0, num_chunks * (total // num_chunks), total // num_chunks)
        for start in starts:
            yield self.read(start, start + chunk_tokens)

    def _map(self, index: int) -> "np.memmap[Any, Any]":
        if index not in self._maps:
            part = self.parts[index]
            storage = STORAGE[part.token_type]
            self._maps[index] = np.memmap(part.path, storage, "r", offset=part.offset, shape=(part.num_tokens,))
        return self._maps[index]
