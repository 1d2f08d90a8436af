"""What names of folders and files say about parts: as `datasets` reads them, and what is held out never trains."""

import random
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.data_files import DataFilesDict, get_data_patterns

from lightning_adam_mini.tasks.data.splits import choose_parts, named_parts, part_of_name
from lightning_adam_mini.tasks.llm.data import HFText, TextFiles
from lightning_adam_mini.tasks.llm.data.hf_text import named_columns

WORDS = ["train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"]
OTHERS = ["data", "more", "trained", "latest", "value", "device", "my", "0000", "en"]


def write(root, *names, content=b"x"):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return sorted(file for file in root.rglob("*") if file.is_file())


def parts_by_datasets(root):
    """Parts of each file, which may be several or none."""
    found = {}
    for part, files in DataFilesDict.from_patterns(get_data_patterns(str(root)), base_path=str(root)).items():
        for file in files:
            found.setdefault(Path(file), set()).add(str(part))
    return found


def random_names(draw):
    """Names of a tree in which a word may be a folder, or part of the name of a folder or file."""

    def piece():
        words = draw.choices([*WORDS, *OTHERS], k=draw.choice([1, 1, 2]))
        return draw.choice("-_. 1").join(words)

    folders = ["", *(f"{piece()}/" for _ in range(draw.choice([0, 2, 3])))]
    return {f"{draw.choice(folders)}{piece()}.{draw.choice(['txt', 'parquet'])}" for _ in range(4)}


@pytest.mark.parametrize("seed", range(16))
def test_parts_are_those_of_datasets(tmp_path, seed):
    names = random_names(random.Random(seed))
    files = write(tmp_path, *names)
    theirs = parts_by_datasets(tmp_path)
    try:
        parts = named_parts(files, tmp_path, "files", remedy="")
    except ValueError:
        # `datasets` passes over what has no part.
        assert set(theirs) < set(files)
        return
    ours = {file: part for part, own in parts.items() for file in own}
    expected = {file: known for file, known in theirs.items() if known != {"train"}}
    assert {file: part for file, part in ours.items() if part != "train"}.keys() == expected.keys()
    assert all(part in expected[file] or len(expected[file]) > 1 for file, part in ours.items() if part != "train")


@pytest.mark.parametrize(
    ("names", "train", "held_out"),
    [
        (
            [
                "data/train-00000-of-00002.parquet",
                "data/train-00001-of-00002.parquet",
                "data/test-00000-of-00001.parquet",
            ],
            2,
            1,
        ),
        (["data/train-00000-of-00001.parquet", "data/random-00000-of-00001.parquet"], 1, 0),
        (["data/train_sft-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet"], 1, 1),
        (["train/0000.parquet", "validation/0000.parquet", "test/0000.parquet"], 1, 1),
        (["en/train.parquet", "de/train.parquet", "en/dev.parquet"], 2, 1),
        (["Train/0.parquet", "Test/0.parquet"], 1, 1),
        (["train/my_test.parquet", "test/train.parquet"], 1, 1),
        (["my_train_file.parquet", "train_test.parquet", "README.md"], 1, 1),
        (["latest.parquet", "trained.parquet"], 0, 0),
    ],
)
def test_layouts_of_the_hub(tmp_path, names, train, held_out):
    parts = named_parts(write(tmp_path, *names), tmp_path, "files", remedy="")
    chosen = choose_parts(list(parts), tmp_path) if parts else {"train": [], "validation": []}
    counts = [sum(len(parts[name]) for name in chosen[use]) for use in ("train", "validation")]
    assert counts == [train, held_out]


def test_a_name_of_two_parts_is_held_out():
    assert part_of_name("train_test") == "test"
    assert part_of_name("test-train") == "test"
    assert choose_parts(["train", "train_extra", "validation_matched", "test"], Path("x")) == {
        "train": ["train"],
        "validation": ["validation_matched"],
        "test": ["test"],
    }


def texts(data):
    train, val = ([text for part, text in data.documents() if part == wanted] for wanted in ("train", "val"))
    return train, val


def write_parquet(root, name, *rows):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": list(rows)}), root / name)


def test_no_held_out_row_trains(tmp_path):
    parts = {name: [f"{name} {row}" for row in range(40)] for name in ("train", "validation", "test")}
    for name, rows in parts.items():
        write_parquet(tmp_path, f"{name}/0000.parquet", *rows)
    assert texts(HFText(path=str(tmp_path))) == (parts["train"], parts["validation"])
    (tmp_path / "validation/0000.parquet").unlink()
    assert texts(HFText(path=str(tmp_path))) == (parts["train"], parts["test"])
    everything = texts(HFText(path=str(tmp_path), named_splits=False))
    assert sorted(everything[0] + everything[1]) == sorted(parts["train"] + parts["test"])


def test_validation_data_of_their_own_leave_the_named_ones_out(tmp_path):
    for name in ("a/train", "a/test", "b/train", "b/dev"):
        write_parquet(tmp_path, f"{name}.parquet", name)
        (tmp_path / f"{name}.txt").write_text(name, "utf-8")
    for kind in (HFText, TextFiles):
        own = {"path": str(tmp_path / "a"), "val_path": str(tmp_path / "b")}
        assert texts(kind(**own)) == (["a/train"], ["b/dev"])


def test_the_head_of_a_readme_decides(tmp_path):
    for name in ("a", "b", "c", "train"):
        write_parquet(tmp_path, f"{name}.parquet", name)
    splits = "".join(f"  - split: {part}\n    path: {name}.parquet\n" for part, name in (("train", "a"), ("test", "b")))
    head = f"configs:\n- config_name: default\n  data_files:\n{splits}"
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n{head}---\n# Title\n", "utf-8")
    assert texts(HFText(path=str(tmp_path))) == (["a"], ["b"])
    (tmp_path / "README.md").write_text(
        f"---\n{head.replace('default', 'x')}{head[9:].replace('default', 'y')}---\n", "utf-8"
    )
    with pytest.raises(ValueError, match=r"Cannot read the configuration in .*README\.md .*give the folder of one"):
        texts(HFText(path=str(tmp_path)))


def test_splits_of_a_saved_data_set(tmp_path):
    part = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "validation_matched", "Test")}
    datasets.DatasetDict(part).save_to_disk(tmp_path)
    assert texts(HFText(path=str(tmp_path))) == (["train"], ["validation_matched"])
    assert list(named_columns(tmp_path, column="text")) == ["train", "validation_matched", "Test"]


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json"])
def test_text_files(tmp_path, suffix):
    for name in ("corpus_train", "corpus_val", "corpus_test"):
        rows = {"txt": name, "jsonl": f'{{"text": "{name}"}}', "json": f'[{{"text": "{name}"}}]'}
        (tmp_path / f"{name}.{suffix}").write_text(rows[suffix], "utf-8")
    data = TextFiles(path=str(tmp_path), pattern=f"*.{suffix}")
    assert texts(data) == (["corpus_train"], ["corpus_val"])
    (tmp_path / f"corpus.{suffix}").write_text(rows[suffix], "utf-8")
    told = (
        rf"are called .*train.*others not, such as corpus\.{suffix}: name all of them, .* set `named_splits` to false"
    )
    with pytest.raises(ValueError, match=told):
        texts(data)
    (tmp_path / f"corpus_train.{suffix}").unlink()
    (tmp_path / f"corpus.{suffix}").unlink()
    with pytest.raises(ValueError, match="has the parts test, validation, and none is called train: rename one"):
        texts(data)
