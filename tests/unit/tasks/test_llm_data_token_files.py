"""nanoGPT's and llm.c's token files: what is read, and what is refused with which words."""

import os

import numpy as np
import pytest
import torch

from lightning_adam_mini.tasks.llm.data import TokenFiles
from lightning_adam_mini.tasks.llm.data.token_files import read_part

VOCAB_SIZE = 500
TOKENS = np.random.default_rng(0).integers(0, VOCAB_SIZE, 300)
SHORT = {"context_length": 8, "batch_size": 4}


def write_bare(path, tokens=TOKENS, dtype="<u2"):
    tokens.astype(dtype).tofile(path)
    return str(path)


def write_llmc(path, tokens=TOKENS, *, magic=20240520, version=1, promised=None, dtype="<u2"):
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if promised is None else promised
    path.write_bytes(header.tobytes() + tokens.astype(dtype).tobytes())
    return str(path)


@pytest.fixture
def make_data(tmp_path):
    def make(train=None, val=None, **settings):
        val = val or write_bare(tmp_path / "good_val.bin", TOKENS[:50])
        train = train or write_bare(tmp_path / "good_train.bin")
        settings = SHORT | {"vocab_size": VOCAB_SIZE, "cache_dir": str(tmp_path / "cache")} | settings
        return TokenFiles(train=train, val=val, **settings)

    return make


def opened(data):
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize(
    ("write", "settings", "stored"),
    [
        pytest.param(write_bare, {}, "uint16", id="nanoGPT"),
        pytest.param(write_bare, {"dtype": "<u4"}, "uint32", id="nanoGPT, wide"),
        pytest.param(write_llmc, {}, "uint16", id="llm.c, GPT-2"),
        pytest.param(write_llmc, {"magic": 20240801, "version": 7, "dtype": "<u4"}, "uint32", id="llm.c, Llama-3"),
    ],
)
def test_formats_are_recognised(tmp_path, make_data, write, settings, stored):
    path = write(tmp_path / "train.bin", **settings)
    data = opened(make_data(path))
    assert read_part(tmp_path / "train.bin").token_type == stored
    assert data.num_train_tokens == 300
    assert data.train_dataloader().dataset.stream.read(0, 300).tolist() == TOKENS.tolist()
    assert (data.vocab_size, data.tokenizer, data.bytes_per_token) == (VOCAB_SIZE, None, None)


def test_large_vocabulary_means_wide_tokens(tmp_path, make_data):
    tokens = np.array([70_000, 1, 100_000] * 20)
    paths = [write_bare(tmp_path / name, tokens, "<u4") for name in ("train.bin", "val.bin")]
    data = opened(make_data(*paths, vocab_size=100_001))
    assert data.train_dataloader().dataset.stream.read(0, 3).tolist() == [70_000, 1, 100_000]


def test_shards_by_pattern_and_list(tmp_path, make_data):
    for index in range(3):
        write_llmc(tmp_path / f"shard_{index}.bin", TOKENS[index * 100 : (index + 1) * 100])
    by_pattern = opened(make_data(str(tmp_path / "shard_*.bin")))
    by_list = opened(make_data([str(tmp_path / f"shard_{index}.bin") for index in range(3)]))
    for data in (by_pattern, by_list):
        assert data.train_dataloader().dataset.stream.read(0, 300).tolist() == TOKENS.tolist()


def test_batches(make_data):
    data = opened(make_data(epoch_samples=40))
    batches = list(data.train_dataloader())
    assert len(batches) == 10
    assert batches[0]["input_ids"].shape == (4, 8)
    for batch in batches:
        assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])
    assert sum(int((batch["labels"] != -100).sum()) for batch in data.val_dataloader()) == 49
    assert data.unigram_loss() == pytest.approx(np.log(VOCAB_SIZE), rel=0.1)
    assert len(opened(make_data()).train_dataloader()) == 300 // 8 // 4


def test_test_loader_reads_the_whole_validation_part(make_data):
    data = opened(make_data(val_tokens=16))
    assert sum(len(batch["labels"]) for batch in data.val_dataloader()) == 2
    assert sum(int((batch["labels"] != -100).sum()) for batch in data.test_dataloader()) == 49


def test_tokens_are_looked_through_once(tmp_path, make_data, monkeypatch):
    paths = [write_bare(tmp_path / name) for name in ("train.bin", "val.bin")]
    for path in paths:
        # Long ago: what has just been written may still change within the resolution of its time.
        os.utime(path, (1e9, 1e9))
    opened(make_data(*paths))
    looked_through = []

    def look_through(parts):
        looked_through.extend(part.path.name for part in parts)
        return 0

    monkeypatch.setattr("lightning_adam_mini.tasks.llm.data.token_files.largest_token", look_through)
    opened(make_data(*paths))
    assert looked_through == []
    os.utime(paths[0], (1e9, 1.1e9))
    opened(make_data(*paths))
    # Once in `prepare_data`, and remembered in `setup`.
    assert looked_through == ["train.bin"]


def odd(folder):
    (folder / "bad.bin").write_bytes(b"\1" * 31)


def empty(folder):
    (folder / "bad.bin").touch()


def wide(folder):
    write_bare(folder / "bad.bin", dtype="<u4")


def too_short(folder):
    write_bare(folder / "bad.bin", TOKENS[:8])


def cut_short(folder):
    write_llmc(folder / "bad.bin", promised=301)


def too_long(folder):
    write_llmc(folder / "bad.bin", promised=299)


def header_only(folder):
    (folder / "bad.bin").write_bytes(np.array([20240520, 1, 7], dtype="<i4").tobytes())


def wrong_version(folder):
    write_llmc(folder / "bad.bin", version=2)


def out_of_vocabulary(folder):
    write_bare(folder / "bad.bin", np.append(TOKENS, VOCAB_SIZE))


@pytest.mark.parametrize(
    ("write", "settings", "message"),
    [
        (odd, {}, r"bad\.bin has 31 bytes, not a multiple of the 2 of a uint16 token: it is cut off"),
        (empty, {}, r"bad\.bin is empty: write it again"),
        (wide, {"dtype": "uint16"}, r"bad\.bin is zero: it has uint32 tokens, set `dtype` to uint32 or auto"),
        (too_short, {}, r"The training part .*bad\.bin.* has 8 tokens.* context_length \+ 1 = 9: lower"),
        (cut_short, {}, r"bad\.bin says 301 tokens, but 300 follow: the file is cut off"),
        (too_long, {}, r"bad\.bin says 299 tokens, but 300 follow"),
        (header_only, {}, r"bad\.bin says 7 tokens, but 0 follow"),
        (wrong_version, {}, r"bad\.bin is an llm\.c file of version 2, but magic number 20240520 has version 1"),
        (cut_short, {"dtype": "uint32"}, r"bad\.bin is an llm\.c file of uint16 tokens: set `dtype`"),
        (out_of_vocabulary, {}, r"bad\.bin contains token 500, but the vocabulary ends at 499: give the `vocab_size`"),
    ],
)
def test_bad_files_are_named_with_the_remedy(tmp_path, make_data, write, settings, message):
    write(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        opened(make_data(str(tmp_path / "bad.bin"), **settings))
    assert "\n" not in str(caught.value)


def test_short_validation_part(tmp_path, make_data):
    with pytest.raises(ValueError, match=r"The validation part .* has 3 tokens"):
        opened(make_data(val=write_bare(tmp_path / "short.bin", TOKENS[:3])))


def test_missing_files(tmp_path, make_data):
    with pytest.raises(FileNotFoundError, match=r"no token file .*nothing\.bin: check the path"):
        opened(make_data(str(tmp_path / "nothing.bin")))
    with pytest.raises(FileNotFoundError, match=r"No file matches .*nothing_\*\.bin': check the folder"):
        opened(make_data(str(tmp_path / "nothing_*.bin")))


def test_files_that_count_double(tmp_path, make_data):
    path = write_bare(tmp_path / "train.bin")
    with pytest.raises(ValueError, match=r"train\.bin is named twice"):
        opened(make_data([path, str(tmp_path / "tra*.bin")]))
    with pytest.raises(ValueError, match=r"train\.bin is in `train` and in `val`"):
        opened(make_data(path, val=[path]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_length": 0}, "`context_length` must be at least 1, got 0"),
        ({"batch_size": -1}, "`batch_size` must be at least 1, got -1"),
        ({"val_tokens": 0}, "`val_tokens` must be at least 1, got 0"),
        ({"epoch_samples": 0}, "`epoch_samples` must be at least 1, got 0"),
        ({"num_workers": -1}, "`num_workers` must be at least 0, got -1"),
        ({"seed": -1}, "`seed` must be at least 0, got -1"),
        ({"vocab_size": 0}, "`vocab_size` must be at least 1, got 0"),
        ({"vocab_size": None}, "give `vocab_size` or `tokenizer`"),
    ],
)
def test_bad_numbers(make_data, settings, message):
    with pytest.raises(ValueError, match=message):
        make_data(**settings)


def test_prompts_need_a_tokenizer(make_data):
    with pytest.raises(ValueError, match=r"Prompts need a tokenizer, and .*good_train\.bin.* has none"):
        opened(make_data()).predict_dataloader()


def test_before_setup(make_data):
    with pytest.raises(RuntimeError, match=r"TokenFiles is not set up: call `setup\(\)` first"):
        _ = make_data().vocab_size
