"""Windows of a token stream, and the batch that they make.

Shapes: B sequences of a batch, T tokens of context.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .token_stream import TokenStream

IGNORED_LABEL = -100
_TWO_TO_64 = 2**64
Window = npt.NDArray[np.int64]


class TrainWindows(Dataset[Window]):
    """Windows at random positions, drawn with replacement.

    Window number ``k`` of a run depends on the seed and on ``k`` alone, by a counter-based generator (Philox, Salmon
    et al. 2011): not on the batch size, the workers, the ranks, or what was drawn before.

    Args:
        stream: The training tokens.
        context_length: T.
        seed: Picks the sequence of positions.
        num_samples: Windows in an epoch. Numbers past it are valid: a run goes on counting.
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
        # `random_raw` is stable across NumPy's releases, `Generator.integers` is not. The index sits in the second
        # word of the counter: the first one counts the words that one index draws.
        word = int(np.random.Philox(key=self.seed, counter=[0, index, 0, 0]).random_raw())
        return word * (len(self.stream) - self.context_length) // _TWO_TO_64


class ValidationWindows(Dataset[Window]):
    """Consecutive windows without overlap, so that every token but the first is predicted once.

    Args:
        stream: The validation tokens.
        context_length: T.
        max_tokens: Where given, as many windows as hold so many predicted tokens, spread evenly over the stream.
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
        """Window ``index``; past the last one an empty window, which evens out the ranks."""
        if index >= self.num_windows:
            return np.empty(0, dtype=np.int64)
        start = index * self.num_in_stream // self.num_windows * self.context_length
        return self.stream.read(start, start + self.context_length + 1)


def collate_windows(windows: Sequence[Window], *, context_length: int) -> dict[str, Tensor]:
    """Stack windows into a batch whose labels are already shifted.

    Args:
        windows: Token ids of shape ``(n,)`` with ``n`` at most ``T + 1``. Empty ones are left out, as long as one
            sequence remains.
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
