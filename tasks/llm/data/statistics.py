"""What a row of tokens says of itself: the loss of guessing tokens by their frequency, and a hash."""

import hashlib

import numpy as np
import numpy.typing as npt

from .token_stream import TokenStream

MAX_COUNTED_TOKENS = 50_000_000
_HASHED_TOKENS = 2**22


def count_tokens(
    stream: TokenStream, *, vocab_size: int, max_tokens: int = MAX_COUNTED_TOKENS
) -> npt.NDArray[np.int64]:
    """Count each token, in pieces spread evenly over the stream where it is longer than ``max_tokens``.

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
    """Nats per validation token of the training tokens' frequencies, each count plus one.

    Args:
        train: Tokens whose frequencies are the model.
        val: Tokens that it is scored on.
        vocab_size: Possible tokens.
        max_tokens: Tokens of each stream that are looked at, at most.
    """
    smoothed = count_tokens(train, vocab_size=vocab_size, max_tokens=max_tokens) + 1
    val_counts = count_tokens(val, vocab_size=vocab_size, max_tokens=max_tokens)
    return float(-(val_counts * np.log(smoothed / smoothed.sum())).sum() / val_counts.sum())


def hash_tokens(stream: TokenStream) -> str:
    """SHA-256 of the tokens, or of pieces spread evenly over the stream where it is longer than four million."""
    total = hashlib.sha256(str(len(stream)).encode())
    for chunk in stream.chunks(max_tokens=_HASHED_TOKENS, chunk_tokens=_HASHED_TOKENS // 64):
        total.update(chunk.astype("<u4").tobytes())
    return total.hexdigest()
