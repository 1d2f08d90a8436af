"""Token ids on disk: a stream over several files, its statistics, and the windows and batches that are read from it.

Shapes: B sequences in a batch, T tokens of context.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

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
    """Read-only tokens of several files as one array, memory-mapped.

    A window may begin in one file and end in the next. Copies for other processes contain paths instead of tokens,
    because a pickled memory map would contain the whole file.

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
        """The stream in chunks, or evenly spaced chunks of it.

        Args:
            max_tokens: Limit on the tokens in all chunks; for a longer stream, chunks are spread evenly over it.
            chunk_tokens: Tokens in a chunk.

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

    def _map(self, index: int) -> np.memmap[Any, Any]:
        if index not in self._maps:
            part = self.parts[index]
            storage = STORAGE[part.token_type]
            self._maps[index] = np.memmap(part.path, storage, "r", offset=part.offset, shape=(part.num_tokens,))
        return self._maps[index]


MAX_COUNTED_TOKENS = 50_000_000
_HASHED_TOKENS = 2**22


def count_tokens(
    stream: TokenStream, *, vocab_size: int, max_tokens: int = MAX_COUNTED_TOKENS
) -> npt.NDArray[np.int64]:
    """Count each token, in chunks spread evenly over the stream if it is longer than ``max_tokens``.

    Returns:
        Counts of shape ``(vocab_size,)``.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for chunk in stream.chunks(max_tokens=max_tokens):
        counts += np.bincount(chunk, minlength=vocab_size)
    return counts


def unigram_loss(
    train: TokenStream, val: TokenStream, *, vocab_size: int, max_tokens: int = MAX_COUNTED_TOKENS
) -> float:
    """Cross-entropy of a unigram model in nats per validation token, with add-one smoothing.

    Args:
        train: Tokens that the model counts.
        val: Tokens that it predicts.
        vocab_size: Number of possible tokens.
        max_tokens: Limit on the tokens that are read of each stream.
    """
    smoothed = count_tokens(train, vocab_size=vocab_size, max_tokens=max_tokens) + 1
    val_counts = count_tokens(val, vocab_size=vocab_size, max_tokens=max_tokens)
    return float(-(val_counts * np.log(smoothed / smoothed.sum())).sum() / val_counts.sum())


def hash_tokens(stream: TokenStream) -> str:
    """SHA-256 of the tokens, or of chunks spread evenly over a stream of more than four million tokens."""
    total = hashlib.sha256(str(len(stream)).encode())
    for chunk in stream.chunks(max_tokens=_HASHED_TOKENS, chunk_tokens=_HASHED_TOKENS // 64):
        total.update(chunk.astype("<u4").tobytes())
    return total.hexdigest()


IGNORED_LABEL = -100
_TWO_TO_64 = 2**64
Window = npt.NDArray[np.int64]


class TrainWindows(Dataset[Window]):
    """Windows at random positions, drawn with replacement.

    Window number ``k`` of a run depends on the seed and on ``k`` alone, by a counter-based generator (Philox, Salmon
    et al. 2011): not on the batch size, the workers, the ranks, or on earlier draws.

    Args:
        stream: The training tokens.
        context_length: T.
        seed: Determines the sequence of positions.
        num_samples: Windows in an epoch. Numbers past it are valid, because a run counts over all epochs.
    """

    def __init__(self, stream: TokenStream, *, context_length: int, seed: int, num_samples: int) -> None:
        self.stream = stream
        self.context_length = context_length
        self.seed = seed
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Window:
        start = self.start(index)
        return self.stream.read(start, start + self.context_length + 1)

    def start(self, index: int) -> int:
        """Position in the stream of the first token of window ``index``."""
        # `random_raw` is stable across NumPy's releases, `Generator.integers` is not. The index is the second word of
        # the counter, because the first word counts the draws of one index.
        word = int(np.random.Philox(key=self.seed, counter=[0, index, 0, 0]).random_raw())
        return word * (len(self.stream) - self.context_length) // _TWO_TO_64


class ValidationWindows(Dataset[Window]):
    """Consecutive windows without overlap, so that every token but the first is predicted once.

    Args:
        stream: The validation tokens.
        context_length: T.
        max_tokens: Limit on the predicted tokens; the windows are then spread evenly over the stream.
    """

    def __init__(self, stream: TokenStream, *, context_length: int, max_tokens: int | None = None) -> None:
        self.stream = stream
        self.context_length = context_length
        self.num_in_stream = -(-(len(stream) - 1) // context_length)
        wanted = self.num_in_stream if max_tokens is None else -(-max_tokens // context_length)
        self.num_windows = min(self.num_in_stream, wanted)

    def __len__(self) -> int:
        return self.num_windows

    def __getitem__(self, index: int) -> Window:
        """Window ``index``; past the last one an empty window, so that all ranks read the same number of windows."""
        if index >= self.num_windows:
            return np.empty(0, dtype=np.int64)
        start = index * self.num_in_stream // self.num_windows * self.context_length
        return self.stream.read(start, start + self.context_length + 1)


def collate_windows(windows: Sequence[Window], *, context_length: int) -> dict[str, Tensor]:
    """Stack windows into a batch whose labels are already shifted.

    Args:
        windows: Token ids of shape ``(n,)`` with ``n`` at most ``T + 1``. Empty ones are dropped, but one sequence
            always remains.
        context_length: T.

    Returns:
        ``input_ids`` and ``labels``, both ``(B, T)`` and int64: ``labels[:, t]`` follows ``input_ids[:, t]``, and is
        -100 where nothing does.
    """
    windows = [window for window in windows if len(window)] or windows[:1]
    input_ids = torch.zeros(len(windows), context_length, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    for row, window in enumerate(windows):
        if num_pairs := max(0, len(window) - 1):
            tokens = torch.from_numpy(window)
            input_ids[row, :num_pairs] = tokens[:-1]
            labels[row, :num_pairs] = tokens[1:]
    return {"input_ids": input_ids, "labels": labels}
