"""Dense features from counts of words, with torch alone."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["word_features"]

_BUCKETS = 4096


def word_features(texts: Sequence[Counter[str]], num_features: int) -> Tensor:
    """Hashed words, weighted by tf-idf, and projected on their largest singular directions: `(N, F)`.

    Each text has unit length in tf-idf; rows of the result have the length of the square root of F.

    Args:
        texts: Words and how often each occurs, N texts.
        num_features: F, at most the texts and the 4,096 buckets that words are hashed to.
    """
    rows: list[int] = []
    columns: list[int] = []
    counts: list[int] = []
    for number, words in enumerate(texts):
        buckets: Counter[int] = Counter()
        for word, count in words.items():
            buckets[zlib.crc32(word.encode()) % _BUCKETS] += count
        rows.extend([number] * len(buckets))
        columns.extend(buckets.keys())
        counts.extend(buckets.values())
    row, column = torch.tensor(rows, dtype=torch.int64), torch.tensor(columns, dtype=torch.int64)
    texts_with = column.bincount(minlength=_BUCKETS)
    rarity = ((1 + len(texts)) / (1 + texts_with)).log() + 1
    values = (1 + torch.tensor(counts, dtype=torch.float32).log()) * rarity[column]
    lengths = torch.zeros(len(texts)).index_add_(0, row, values.square()).sqrt()
    shape = (len(texts), _BUCKETS)
    weights = torch.sparse_coo_tensor(torch.stack([row, column]), values / lengths[row], shape, check_invariants=False)
    with torch.random.fork_rng(devices=[]):  # the projection starts from random directions
        torch.manual_seed(0)
        left, scale, _ = torch.svd_lowrank(weights.coalesce(), q=num_features, niter=4)
    return F.normalize(left * scale, dim=1) * num_features**0.5
