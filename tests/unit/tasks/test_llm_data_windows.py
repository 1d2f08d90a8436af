"""Windows and samplers: which tokens a batch holds, whatever the ranks, the workers and the files."""

import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_adam_mini.tasks.data.sampling import ResumableLoader, TrainSampler, ValidationSampler
from lightning_adam_mini.tasks.llm.data.tokens import (
    TokenPart,
    TokenStream,
    TrainWindows,
    ValidationWindows,
    collate_windows,
    unigram_loss,
)


@pytest.fixture
def make_stream(tmp_path):
    """Token ids in files of the given lengths: a stream whose token at each position is the position."""

    def make(*lengths, tokens=None):
        parts, start = [], 0
        for index, length in enumerate(lengths):
            values = np.arange(start, start + length) if tokens is None else tokens[start : start + length]
            path = tmp_path / f"{index}.bin"
            path.write_bytes(b"\0" * 4 * index + values.astype("<u4").tobytes())
            parts.append(TokenPart(path=path, token_type="uint32", offset=4 * index, num_tokens=length))
            start += length
        return TokenStream(parts)

    return make


def test_stream_reads_across_files(make_stream):
    stream = make_stream(5, 1, 7)
    assert len(stream) == 13
    for start in range(13):
        for stop in range(start, 16):
            assert stream.read(start, stop).tolist() == list(range(start, min(stop, 13)))


def test_pickled_stream_carries_paths_and_no_tokens(make_stream):
    stream = make_stream(100_000)
    stream.read(0, 10)
    pickled = pickle.dumps(stream)
    assert len(pickled) < 2000
    assert pickle.loads(pickled).read(7, 9).tolist() == [7, 8]


def test_chunks_cover_the_stream_or_spread_evenly(make_stream):
    stream = make_stream(60, 40)
    assert np.concatenate(list(stream.chunks(chunk_tokens=7))).tolist() == list(range(100))
    spread = [chunk.tolist() for chunk in stream.chunks(max_tokens=10, chunk_tokens=2)]
    assert spread == [[start, start + 1] for start in (0, 20, 40, 60, 80)]


def test_window_depends_on_seed_and_number_alone(make_stream):
    def starts(seed):
        windows = TrainWindows(make_stream(1000), context_length=8, seed=seed, num_samples=4)
        return [windows.start(index) for index in range(200)]

    assert starts(0) == starts(0)
    assert starts(0) != starts(1)
    # Written down, so that a change of the generator does not pass unseen: it would change every published figure.
    assert starts(0)[:4] == [11, 210, 654, 423]


def test_windows_reach_the_first_and_the_last_token(make_stream):
    windows = TrainWindows(make_stream(12), context_length=8, seed=0, num_samples=1)
    starts = [windows.start(index) for index in range(400)]
    assert set(starts) == {0, 1, 2, 3}
    assert all(starts.count(start) > 60 for start in range(4))
    assert windows[5].tolist() == list(range(starts[5], starts[5] + 9))


def test_labels_are_shifted_and_padded():
    batch = collate_windows([np.arange(5), np.arange(10, 12), np.empty(0, np.int64)], context_length=4)
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3], [10, 0, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3, 4], [11, -100, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_batch_of_empty_windows_keeps_one_sequence_without_labels():
    batch = collate_windows([np.empty(0, np.int64)] * 3, context_length=4)
    assert batch["input_ids"].shape == (1, 4)
    assert (batch["labels"] == -100).all()


def train_loader(stream, *, batch_size, num_replicas=1, rank=0, num_workers=0, samples_seen=0):
    windows = TrainWindows(stream, context_length=8, seed=3, num_samples=24)
    places = {"num_replicas": num_replicas, "rank": rank, "samples_seen": samples_seen}
    sampler = TrainSampler(windows, batch_size=batch_size, **places)
    collate = partial(collate_windows, context_length=8)
    settings = {"batch_size": batch_size, "num_workers": num_workers, "collate_fn": collate}
    return ResumableLoader(windows, sampler=sampler, **settings)


@pytest.mark.parametrize(("num_replicas", "num_workers"), [(1, 0), (1, 2), (2, 0), (3, 0), (6, 0)])
def test_global_batches_do_not_depend_on_ranks_or_workers(make_stream, num_replicas, num_workers):
    stream = make_stream(500, 500)
    whole = [batch["input_ids"] for batch in train_loader(stream, batch_size=6)]
    assert len(whole) == 4
    loaders = [
        train_loader(
            stream, batch_size=6 // num_replicas, num_replicas=num_replicas, rank=rank, num_workers=num_workers
        )
        for rank in range(num_replicas)
    ]
    for parts, expected in zip(zip(*loaders, strict=True), whole, strict=True):
        assert torch.equal(torch.cat([part["input_ids"] for part in parts]), expected)


def test_epochs_go_on_and_state_counts_what_was_handed_out(make_stream):
    loader = train_loader(make_stream(1000), batch_size=4)
    first, second = list(loader), list(loader)
    assert loader.state_dict() == {"samples_seen": 48}
    assert not torch.equal(first[0]["input_ids"], second[0]["input_ids"])
    resumed = train_loader(make_stream(1000), batch_size=4, num_workers=1)
    resumed.load_state_dict({"samples_seen": 24})
    iterator = iter(resumed)
    assert torch.equal(next(iterator)["input_ids"], second[0]["input_ids"])
    # The worker has read further ahead.
    assert resumed.state_dict() == {"samples_seen": 28}


@pytest.mark.parametrize("num_tokens", [9, 64, 65, 66, 700])
@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_evaluation_predicts_every_token_once_on_any_number_of_ranks(make_stream, num_tokens, num_replicas):
    windows = ValidationWindows(make_stream(num_tokens), context_length=8)
    labels, num_batches = [], set()
    for rank in range(num_replicas):
        sampler = ValidationSampler(windows, batch_size=4, num_replicas=num_replicas, rank=rank)
        collate = partial(collate_windows, context_length=8)
        batches = list(DataLoader(windows, sampler=sampler, batch_size=4, collate_fn=collate))
        labels += [label for batch in batches for label in batch["labels"].flatten().tolist() if label != -100]
        num_batches.add(len(batches))
    assert sorted(labels) == list(range(1, num_tokens))
    assert len(num_batches) == 1, "collectives need every rank to run as often as the others"


def test_evaluation_budget_is_spread_over_the_stream(make_stream):
    windows = ValidationWindows(make_stream(801), context_length=8, max_tokens=40)
    assert [windows[index][0] for index in range(len(windows))] == [0, 160, 320, 480, 640]
    assert len(ValidationWindows(make_stream(801), context_length=8, max_tokens=10**9)) == 100


def test_unigram_loss_by_hand(make_stream):
    stream = make_stream(4, tokens=np.array([0, 0, 0, 1]))
    other = make_stream(4, 2, tokens=np.array([0, 0, 0, 1, 0, 2]))
    val = TokenStream(other.parts[1:])
    # Counts plus one are 4, 2, 1 of 7; the validation tokens are 0 and 2.
    expected = -(math.log(4 / 7) + math.log(1 / 7)) / 2
    assert unigram_loss(stream, val, vocab_size=3) == pytest.approx(expected)
