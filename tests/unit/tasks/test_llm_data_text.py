"""Text, JSON, parquet and arrow: what is read, how it is split, how it is cached, and what is refused."""

import json
import multiprocessing
import os
import random
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_adam_mini.tasks.llm.data import HFText, TextFiles, text_module
from lightning_adam_mini.tasks.llm.data.tokenizer import END_OF_TEXT, load_tokenizer

WORDS = ["alpha", "beta", "gamma", "delta", "épsilon", "ζeta", "one", "two", "three", "four", "five\n"]
SHORT = {"context_length": 8, "batch_size": 4}


def make_documents(count, *, seed=0):
    source = random.Random(seed)
    return [f"document {index}: " + " ".join(source.choices(WORDS, k=30)) for index in range(count)]


DOCUMENTS = make_documents(60)
RECORDS = [{"text": text, "title": "x"} for text in DOCUMENTS]


def write_text(folder):
    (folder / "corpus.txt").write_text(f"\n{END_OF_TEXT}\n".join(DOCUMENTS), "utf-8")
    return TextFiles, {"path": str(folder / "corpus.txt")}


def write_jsonl(folder):
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    (folder / "corpus.jsonl").write_text(lines + "\n", "utf-8")
    return TextFiles, {"path": str(folder / "corpus.jsonl")}


def write_json(folder):
    (folder / "corpus.json").write_text(json.dumps(RECORDS), "utf-8")
    return TextFiles, {"path": str(folder / "corpus.json")}


def write_jsonl_folder(folder):
    (folder / "many").mkdir()
    for name, records in {"a": RECORDS[:20], "b": RECORDS[20:]}.items():
        (folder / "many" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)), "utf-8")
    return TextFiles, {"path": str(folder / "many"), "pattern": "*.jsonl"}


def write_parquet(folder):
    pq.write_table(pa.Table.from_pylist(RECORDS), folder / "corpus.parquet")
    return HFText, {"path": str(folder / "corpus.parquet")}


def write_parquet_folder(folder):
    (folder / "parts").mkdir()
    for name, records in {"part-0": RECORDS[:20], "part-1": RECORDS[20:]}.items():
        pq.write_table(pa.Table.from_pylist(records), folder / "parts" / f"{name}.parquet")
    return HFText, {"path": str(folder / "parts")}


def write_arrow(folder):
    datasets.Dataset.from_list(RECORDS).save_to_disk(folder / "saved")
    return HFText, {"path": str(folder / "saved")}


SHAPES = [write_text, write_jsonl, write_json, write_jsonl_folder, write_parquet, write_parquet_folder, write_arrow]


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory, cache_dir):
    """A tokenizer that fits the documents, so that most tests need not train one."""
    data = TextFiles(
        **write_text(tmp_path_factory.mktemp("text"))[1], cache_dir=str(cache_dir), vocab_size=300, **SHORT
    )
    data.setup()
    folder = tmp_path_factory.mktemp("tokenizer")
    data.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def opened(kind, settings, cache_dir):
    data = kind(**(SHORT | settings), cache_dir=str(cache_dir))
    data.prepare_data()
    data.setup()
    return data


def documents_of(data, stream):
    text = data.tokenizer.decode(stream.read(0, len(stream)), skip_special_tokens=False)
    assert text.endswith(END_OF_TEXT)
    return text.split(END_OF_TEXT)[:-1]


def parts_of(data):
    return documents_of(data, data.train_dataloader().dataset.stream), documents_of(
        data, data.val_dataloader().dataset.stream
    )


@pytest.mark.parametrize("write", SHAPES)
def test_every_document_lands_in_one_part_whatever_the_format(tmp_path, cache_dir, tokenizer_json, write):
    kind, settings = write(tmp_path)
    data = opened(kind, settings | {"tokenizer": tokenizer_json}, cache_dir)
    train, val = parts_of(data)
    documents = [text.strip("\n") for text in DOCUMENTS] if write is write_text else DOCUMENTS
    assert sorted(train + val) == sorted(documents)
    assert 1 <= len(val) <= 14
    if write is not write_text:
        # The part is decided by the text alone.
        assert sorted(val) == sorted(parts_of(opened(*_with(write_json, tmp_path, tokenizer_json), cache_dir))[1])
    assert data.bytes_per_token == pytest.approx(sum(len(text.encode()) for text in val) / data.num_val_tokens)


def _with(write, folder, tokenizer_json):
    kind, settings = write(folder)
    return kind, settings | {"tokenizer": tokenizer_json}


def test_folder_is_split_by_file_and_reads_only_the_pattern(tmp_path, cache_dir, tokenizer_json):
    (tmp_path / "corpus" / "deep").mkdir(parents=True)
    (tmp_path / "corpus" / ".hidden").mkdir()
    for index, text in enumerate(DOCUMENTS[:6]):
        (tmp_path / "corpus" / "deep" / f"{index}.txt").write_text(text, "utf-8")
    for name in ("notes.rst", ".hidden/a.txt"):
        (tmp_path / "corpus" / name).write_text("must not be read", "utf-8")
    train, val = parts_of(opened(TextFiles, {"path": str(tmp_path / "corpus"), "tokenizer": tokenizer_json}, cache_dir))
    assert sorted(train + val) == DOCUMENTS[:6]
    assert train
    assert val


def test_end_of_a_single_document_is_for_validation(tmp_path, cache_dir, tokenizer_json):
    lines = [f"{index} {text}" for index, text in enumerate("line of text\n" for _ in range(100))]
    (tmp_path / "book.txt").write_text("".join(lines), "utf-8")
    data = opened(TextFiles, {"path": str(tmp_path / "book.txt"), "tokenizer": tokenizer_json}, cache_dir)
    train, val = parts_of(data)
    assert [train, val] == [["".join(lines[:90])], ["".join(lines[90:])]]


def test_validation_text_of_its_own(tmp_path, cache_dir, tokenizer_json):
    (tmp_path / "a.txt").write_text(DOCUMENTS[0], "utf-8")
    (tmp_path / "b.txt").write_text(DOCUMENTS[1], "utf-8")
    settings = {"path": str(tmp_path / "a.txt"), "val_path": str(tmp_path / "b.txt"), "tokenizer": tokenizer_json}
    assert parts_of(opened(TextFiles, settings, cache_dir)) == ([DOCUMENTS[0]], [DOCUMENTS[1]])
    with pytest.raises(ValueError, match=r"b\.txt is in `path` and in `val_path`"):
        opened(TextFiles, settings | {"path": str(tmp_path)}, cache_dir)


def test_named_parts_of_a_data_set(tmp_path, cache_dir, tokenizer_json):
    train, val, test = (datasets.Dataset.from_list(RECORDS[start : start + 5]) for start in (0, 5, 10))
    datasets.DatasetDict({"train": train, "validation": val, "test": test}).save_to_disk(tmp_path / "three")
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "two")
    (tmp_path / "files").mkdir()
    for name, part in {"train-00000-of-00001": train, "validation-00000-of-00001": val}.items():
        part.to_parquet(tmp_path / "files" / f"{name}.parquet")
    for name, start in {"three": 5, "two": 10, "files": 5}.items():
        data = opened(HFText, {"path": str(tmp_path / name), "tokenizer": tokenizer_json}, cache_dir)
        assert parts_of(data) == (DOCUMENTS[:5], DOCUMENTS[start : start + 5])
    both = {"path": str(tmp_path / "two"), "val_path": str(tmp_path / "three"), "tokenizer": tokenizer_json}
    assert parts_of(opened(HFText, both, cache_dir)) == (DOCUMENTS[:5], DOCUMENTS[5:10])


def test_long_documents_are_encoded_in_pieces_with_the_same_tokens(tmp_path, tokenizer_json, monkeypatch):
    kind, settings = _with(write_text, tmp_path, tokenizer_json)
    whole = opened(kind, settings, tmp_path / "whole")
    monkeypatch.setattr("lightning_adam_mini.tasks.llm.data.text_module._BATCH_CHARACTERS", 60)
    pieces = opened(kind, settings, tmp_path / "pieces")
    for name in ("train.bin", "val.bin"):
        assert (
            next((tmp_path / "pieces").rglob(name)).read_bytes() == next((tmp_path / "whole").rglob(name)).read_bytes()
        )
    assert parts_of(whole) == parts_of(pieces)


def test_trained_tokenizer_round_trips_any_text(tmp_path, cache_dir):
    kind, settings = write_text(tmp_path)
    data = opened(kind, settings | {"vocab_size": 300}, cache_dir)
    assert data.vocab_size == len(data.tokenizer) == 300
    for text in ("ünï 😀\x00\t \r\n", "  two  spaces , . !  ", f"a{END_OF_TEXT}b<|user|>", "中文\u200b\ufeff", ""):
        assert data.tokenizer.decode(data.tokenizer.encode(text)) == text
    special = [END_OF_TEXT, "<|pad|>", "<|user|>", "<|assistant|>"]
    assert data.tokenizer.convert_tokens_to_ids(special) == [0, 1, 2, 3]
    assert (data.tokenizer.eos_token, data.tokenizer.pad_token) == (END_OF_TEXT, "<|pad|>")


def test_prompts_are_one_batch_each(tmp_path, cache_dir, tokenizer_json):
    kind, settings = _with(write_text, tmp_path, tokenizer_json)
    data = opened(kind, settings | {"prompts": ["alpha beta", ""]}, cache_dir)
    first, empty = data.predict_dataloader()
    assert first["prompt"] == ["alpha beta"]
    assert data.tokenizer.decode(first["input_ids"][0]) == "alpha beta"
    assert empty["input_ids"].tolist() == [[data.tokenizer.eos_token_id]]
    with pytest.raises(ValueError, match="`prompts` is empty"):
        opened(kind, settings | {"prompts": []}, cache_dir).predict_dataloader()


def test_tokenizer_folder_and_padded_vocabulary(tmp_path, cache_dir, tokenizer_json):
    load_tokenizer(tokenizer_json).save_pretrained(tmp_path / "folder")
    kind, settings = write_text(tmp_path)
    plain = opened(kind, settings | {"tokenizer": tokenizer_json}, cache_dir)
    data = opened(kind, settings | {"tokenizer": str(tmp_path / "folder"), "vocab_size": 320}, cache_dir)
    assert (plain.vocab_size, data.vocab_size) == (300, 320)
    assert parts_of(data) == parts_of(plain)
    with pytest.raises(ValueError, match="`vocab_size` 299 is smaller than the 300 tokens"):
        opened(kind, settings | {"tokenizer": tokenizer_json, "vocab_size": 299}, cache_dir)


def _prepare(path, cache_dir, barrier, results):
    trained = []
    train_bpe = text_module.train_bpe
    text_module.train_bpe = lambda *args, **kwargs: trained.append(1) or train_bpe(*args, **kwargs)
    barrier.wait()
    data = opened(TextFiles, {"path": path, "vocab_size": 300}, cache_dir)
    results.put(((data.num_train_tokens, data.unigram_loss()), len(trained)))


def test_processes_that_prepare_at_the_same_time(tmp_path):
    path = write_text(tmp_path)[1]["path"]
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_prepare, args=(path, tmp_path / "cache", barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    values, trained = zip(*[results.get(timeout=60) for _ in processes], strict=True)
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(set(values)) == 1
    assert sum(trained) == 1, "the others wait for the first"
    assert len(list((tmp_path / "cache").glob("textfiles-*"))) == 1
    assert not list((tmp_path / "cache").rglob(".*.tmp"))


def cut_in_half(file):
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.json", "facts.json"])
@pytest.mark.parametrize("damage", [cut_in_half, flip_a_bit, os.unlink])
def test_damaged_cache_is_made_again(tmp_path, cache_dir, name, damage, caplog):
    kind, settings = write_text(tmp_path)
    settings |= {"vocab_size": 300}
    good = opened(kind, settings, cache_dir)
    expected = parts_of(good)
    folder = next(file.parent for file in cache_dir.rglob("tokenizer.json"))
    contents = {file: file.read_bytes() for file in folder.glob("*.*") if file.is_file()}
    (folder / ".train.bin.abc.tmp").write_bytes(b"left by a process that was killed")
    damage(folder / name)
    if (name, damage) == ("facts.json", flip_a_bit):
        (folder / name).write_text("[]")
    assert parts_of(opened(kind, settings, cache_dir)) == expected
    assert {file: file.read_bytes() for file in folder.glob("*.*") if file.is_file()} == contents
    assert ("is damaged or cut off: it is made again" in caplog.text) == (name != "facts.json")


def test_changed_text_is_noticed_although_its_size_is_not(tmp_path, cache_dir, tokenizer_json):
    kind, settings = _with(write_text, tmp_path, tokenizer_json)
    before = parts_of(opened(kind, settings, cache_dir))
    text = (tmp_path / "corpus.txt").read_text("utf-8")
    (tmp_path / "corpus.txt").write_text(text.replace("document 7", "DOCUMENT 7"), "utf-8")
    after = parts_of(opened(kind, settings, cache_dir))
    assert sorted([*after[0], *after[1]]) != sorted([*before[0], *before[1]])


def test_ready_cache_is_only_read(tmp_path, cache_dir, monkeypatch):
    kind, settings = write_text(tmp_path)
    settings |= {"vocab_size": 300}
    opened(kind, settings, cache_dir)
    monkeypatch.setattr("lightning_adam_mini.tasks.llm.data.text_module.only_one", pytest.fail)
    opened(kind, settings, cache_dir)


def test_cache_that_cannot_be_written(tmp_path):
    kind, settings = write_text(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(
        PermissionError, match=r"Cannot write prepared data to .*set `cache_dir` or \$LIGHTNING_ADAM_MINI_CACHE"
    ):
        opened(kind, settings, tmp_path / "file")


def test_default_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("LIGHTNING_ADAM_MINI_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert TextFiles(path="x").cache_dir == tmp_path / ".cache" / "lightning-adam-mini"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert TextFiles(path="x").cache_dir == tmp_path / "xdg" / "lightning-adam-mini"
    monkeypatch.setenv("LIGHTNING_ADAM_MINI_CACHE", str(tmp_path / "own"))
    assert TextFiles(path="x").cache_dir == tmp_path / "own"
    assert TextFiles(path="x", cache_dir="~/set").cache_dir == tmp_path / "set"


def _file(name, content):
    return lambda folder: (folder / name).write_bytes(content) and None


@pytest.mark.parametrize(
    ("kind", "settings", "write", "error", "message"),
    [
        (TextFiles, {"path": "no"}, None, FileNotFoundError, "no file or folder .*no, and nothing is downloaded"),
        (TextFiles, {"path": "a.txt"}, _file("a.txt", b""), ValueError, r"a\.txt is empty"),
        (TextFiles, {"path": "."}, _file("a.rst", b"x"), FileNotFoundError, r"matches \*\.txt, \*\.md, \*\.py: set `p"),
        (TextFiles, {"path": "a.txt"}, _file("a.txt", b"ab\xff"), ValueError, r"a\.txt is not UTF-8 text \(byte 2\)"),
        (TextFiles, {"path": "a.txt"}, _file("a.txt", b"  \n"), ValueError, "The training part has no text: give more"),
        (
            TextFiles,
            {"path": "a.jsonl"},
            _file("a.jsonl", b"{}\n{"),
            ValueError,
            r"line 1 of .*a\.jsonl has no text in",
        ),
        (TextFiles, {"path": "a.jsonl"}, _file("a.jsonl", b"{"), ValueError, r"line 1 of .*a\.jsonl is not JSON"),
        (
            TextFiles,
            {"path": "a.jsonl"},
            _file("a.jsonl", b"3"),
            ValueError,
            r"line 1 of .*a\.jsonl is not a record but a",
        ),
        (
            TextFiles,
            {"path": "a.jsonl"},
            _file("a.jsonl", b'{"body": ""}'),
            ValueError,
            "`text_field` to one of 'body'",
        ),
        (TextFiles, {"path": "a.json"}, _file("a.json", b"{}"), ValueError, r"a\.json contains one dict: give a list"),
        (TextFiles, {"path": "a.json"}, _file("a.json", b"{}\n{}"), ValueError, r"a\.json is not JSON .*\.jsonl"),
        (HFText, {"path": "wikitext"}, None, FileNotFoundError, "wikitext, and nothing is downloaded: give a folder"),
        (HFText, {"path": "."}, _file("a.txt", b"x"), FileNotFoundError, "neither a data set written by"),
        (HFText, {"path": "a.csv"}, _file("a.csv", b"x"), ValueError, r"a\.csv does not end in \.parquet"),
        (HFText, {"path": "a.parquet"}, _file("a.parquet", b"xx"), ValueError, r"Cannot read .*a\.parquet .* damaged"),
    ],
)
def test_bad_text_is_named_with_the_remedy(tmp_path, cache_dir, tokenizer_json, kind, settings, write, error, message):
    if write is not None:
        write(tmp_path)
    settings = {"path": str(tmp_path / settings["path"]), "tokenizer": tokenizer_json}
    with pytest.raises(error, match=message) as caught:
        opened(kind, settings, cache_dir)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("write", [write_parquet, write_arrow])
def test_column_that_does_not_exist(tmp_path, cache_dir, tokenizer_json, write):
    kind, settings = _with(write, tmp_path, tokenizer_json)
    with pytest.raises(ValueError, match="has no column 'body': set `text_column` to one of 'text', 'title'"):
        opened(kind, settings | {"text_column": "body"}, cache_dir)


def test_column_that_is_not_text(tmp_path, cache_dir, tokenizer_json):
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet contains a NoneType, not only text"):
        opened(HFText, {"path": str(tmp_path / "a.parquet"), "tokenizer": tokenizer_json}, cache_dir)


def test_parts_that_cannot_be_told_apart(tmp_path, cache_dir, tokenizer_json):
    (tmp_path / "mixed").mkdir()
    for name in ("train-0", "more"):
        pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "mixed" / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"Some parquet files in .*mixed are called train, others not"):
        opened(HFText, {"path": str(tmp_path / "mixed"), "tokenizer": tokenizer_json}, cache_dir)
    datasets.DatasetDict({"a": datasets.Dataset.from_list(RECORDS)}).save_to_disk(tmp_path / "odd")
    with pytest.raises(ValueError, match="has the parts a, and none is called train"):
        opened(HFText, {"path": str(tmp_path / "odd"), "tokenizer": tokenizer_json}, cache_dir)


def test_documents_that_all_land_in_one_part(tmp_path, cache_dir, tokenizer_json):
    (tmp_path / "a.json").write_text(json.dumps(RECORDS[:2]), "utf-8")
    settings = {"path": str(tmp_path / "a.json"), "tokenizer": tokenizer_json, "val_fraction": 1e-6}
    with pytest.raises(
        ValueError, match="The validation part has no text: give more documents, another `val_fraction`"
    ):
        opened(TextFiles, settings, cache_dir)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (
            None,
            FileNotFoundError,
            "'gpt2' is not a local file or folder, and nothing is downloaded: give a local token",
        ),
        ("folder", FileNotFoundError, r"has no tokenizer\.json: load the tokenizer once"),
        ("{", ValueError, r"Cannot read the tokenizer .*tokenizer\.json"),
    ],
)
def test_bad_tokenizer(tmp_path, cache_dir, content, error, message):
    kind, settings = write_text(tmp_path)
    spec = "gpt2" if content is None else str(tmp_path / "tokenizer.json")
    if content == "folder":
        (tmp_path / "tokenizer.json").mkdir()
    elif content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(error, match=message):
        opened(kind, settings | {"tokenizer": spec}, cache_dir)


def test_tokenizer_without_an_end(tmp_path, cache_dir, tokenizer_json):
    content = Path(tokenizer_json).read_text("utf-8").replace(END_OF_TEXT, "<|elsewhere|>")
    (tmp_path / "tokenizer.json").write_text(content, "utf-8")
    kind, settings = write_text(tmp_path)
    with pytest.raises(ValueError, match="does not say which token ends a text: give a folder"):
        opened(kind, settings | {"tokenizer": str(tmp_path / "tokenizer.json")}, cache_dir)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 259}, "`vocab_size` must be at least 260"),
        ({"val_fraction": 0.0}, "`val_fraction` must lie between 0 and 1, got 0.0"),
        ({"val_fraction": 1.0}, "`val_fraction` must lie between 0 and 1, got 1.0"),
    ],
)
@pytest.mark.parametrize("kind", [TextFiles, HFText])
def test_bad_numbers(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(path="x", **settings)
