"""Graphs on disk: OGB's and Planetoid's files in their exact layout, and what is wrong with others."""

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torch_geometric")

from lightning_adam_mini.tasks.graph.data import OgbArxiv, Planetoid
from tiny_graphs import make_arrays, write_numbers, write_ogb, write_planetoid


@pytest.fixture
def arxiv(tmp_path):
    """Opens the files below `data`, after they were written and changed."""

    def open_(path="data", **options):
        module = OgbArxiv(path=str(tmp_path / path), cache_dir=str(tmp_path / "cache"), **options)
        module.setup("fit")
        return module

    return open_


@pytest.mark.parametrize(("name", "path"), [("ogbn_arxiv", "data"), ("arxiv", "data"), ("arxiv", "data/arxiv")])
def test_ogbs_files_are_read_under_both_names(name, path, arxiv, tmp_path):
    write_ogb(tmp_path / "data", name)
    module, arrays = arxiv(path, to_undirected=False), make_arrays()
    graph = module.graph
    torch.testing.assert_close(graph.x, torch.from_numpy(arrays["x"]))
    assert graph.y.tolist() == arrays["y"].tolist()
    assert graph.edge_index.T.tolist() == arrays["edges"].tolist()
    for split in ("train", "val", "test"):
        assert getattr(graph, split).tolist() == arrays[split].tolist()
    assert (module.num_features, module.num_classes) == (128, 40)
    assert (module.planned_features, module.planned_classes) == (128, 40)


def test_messages_run_in_both_directions_where_asked_for(arxiv, tmp_path):
    write_ogb(tmp_path / "data")
    pairs = set(map(tuple, arxiv().graph.edge_index.T.tolist()))
    one_way = set(map(tuple, make_arrays()["edges"].tolist()))
    assert pairs == one_way | {(b, a) for a, b in one_way}


def test_files_that_changed_are_read_again(arxiv, tmp_path):
    write_ogb(tmp_path / "data")
    before = arxiv().graph
    write_ogb(tmp_path / "data", y=make_arrays()["y"] + 10)
    assert torch.equal(arxiv().graph.y, before.y + 10)


CHANGES = {
    "label": ({"y": make_arrays()["y"][:-1]}, r"node-label\.csv\.gz has 59 lines, but there are 60 nodes"),
    "class": ({"y": np.full(60, 40)}, r"node-label\.csv\.gz, line 1: 40 is not between 0 and 39"),
    "edge": ({"edges": np.array([[0, 1], [2, 60]])}, r"edge\.csv\.gz, line 2: 60 is not between 0 and 59"),
    "split": ({"val": np.array([3, -1])}, r"valid\.csv\.gz, line 2: -1 is not between 0 and 59"),
    "columns": ({"x": np.zeros((60, 100))}, r"node-feat\.csv\.gz has 100 numbers a line, expected 128"),
    "empty": ({"test": np.array([], dtype=np.int64)}, r"the test split is empty"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_files_that_do_not_fit_together_are_named(case, arxiv, tmp_path):
    changed, told = CHANGES[case]
    write_ogb(tmp_path / "data", **changed)
    with pytest.raises(ValueError, match=told):
        arxiv()
    assert not list((tmp_path / "cache").rglob(".*.tmp"))


def test_a_count_that_is_not_the_files_is_told(arxiv, tmp_path):
    folder = write_ogb(tmp_path / "data")
    write_numbers(folder / "raw" / "num-edge-list.csv.gz", [7])
    with pytest.raises(ValueError, match=r"edge\.csv\.gz has [\d,]+ lines, but there are 7 edges: get the file"):
        arxiv()


def test_missing_files_are_counted_and_the_first_is_named(arxiv, tmp_path):
    folder = write_ogb(tmp_path / "data")
    (folder / "raw" / "edge.csv.gz").unlink()
    (folder / "split" / "time" / "test.csv.gz").unlink()
    with pytest.raises(ValueError, match=r"has no raw/edge\.csv\.gz \(2 of 9 files are missing\): unzip"):
        arxiv()
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"has neither ogbn_arxiv/raw nor arxiv/raw: unzip OGB's arxiv\.zip"):
        arxiv()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda data: data[:-12], r"node-label\.csv\.gz cannot be unpacked"),
        (lambda data: b"no archive", r"node-label\.csv\.gz cannot be unpacked"),
        (lambda data: gzip.compress(b"1\ntwo\n3\n"), r"node-label\.csv\.gz: could not convert string 'two'"),
        (lambda data: gzip.compress(b""), r"node-label\.csv\.gz has 0 lines"),
    ],
)
def test_a_damaged_file_is_named(spoil, told, arxiv, tmp_path):
    path = write_ogb(tmp_path / "data") / "raw" / "node-label.csv.gz"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=told):
        arxiv()


@pytest.fixture
def cora(tmp_path):
    """Opens the files of Cora below `data`."""
    pytest.importorskip("scipy")

    def open_(path="data", **options):
        module = Planetoid(path=str(tmp_path / path), cache_dir=str(tmp_path / "cache"), **options)
        module.setup("fit")
        return module

    return open_


@pytest.mark.parametrize("path", ["data", "data/Cora", "data/Cora/raw"])
def test_planetoids_files_are_read_as_torch_geometric_reads_them(path, cora, tmp_path):
    features, labels = write_planetoid(tmp_path / "data")
    graph = cora(path, normalize_features=False).graph
    assert torch.equal(graph.x, torch.from_numpy(features))
    assert graph.y.tolist() == labels.tolist()
    assert graph.train.tolist() == list(range(6))
    assert graph.val.tolist() == list(range(6, 506))
    assert graph.test.tolist() == list(range(516, 526))
    ring = {(node, (node + 1) % 526) for node in range(526)}
    assert set(map(tuple, graph.edge_index.T.tolist())) == ring | {(b, a) for a, b in ring}


def test_features_are_normalised_and_all_other_nodes_train_where_asked_for(cora, tmp_path):
    features, _ = write_planetoid(tmp_path / "data")
    graph = cora(split="full").graph
    sums = torch.from_numpy(features).sum(1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(graph.x * sums, torch.from_numpy(features))
    assert graph.train.tolist() == [*range(6), *range(506, 516)]


def test_planetoids_missing_and_damaged_files_are_named(cora, tmp_path):
    with pytest.raises(ValueError, match=r"Cora/raw has no ind\.cora\.x \(8 of 8 files are missing\)"):
        cora()
    write_planetoid(tmp_path / "data")
    (tmp_path / "data" / "Cora" / "raw" / "ind.cora.tx").unlink()
    with pytest.raises(ValueError, match=r"has no ind\.cora\.tx \(1 of 8 files are missing\)"):
        cora()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"no pickle", "UnpicklingError"),
        (b"", "EOFError: Ran out of input"),
        (b"cno.such.module\nname\n.", "UnpicklingError: unsupported class no.such.module.name"),
        (b"cbuiltins\neval\n(V{}['x']\ntR.", "UnpicklingError: unsupported class builtins.eval"),
        (b"c__builtin__\neval\n(V{}['x']\ntR.", "UnpicklingError: unsupported class __builtin__.eval"),
        (
            b"\x80\x04\x8c\x05numpy\x8c\x0ef2py.os.system\x93\x8c\x04true\x85R.",
            "UnpicklingError: unsupported class numpy",
        ),
        (b"cposix\nsystem\n(Vtouch harmed\ntR.", "UnpicklingError: unsupported class posix.system"),
        (
            b"ccollections\ndefaultdict\n(cos\nsystem\ntR.",
            "UnpicklingError: unsupported class os.system",
        ),
        (b"cbuiltins\nlist\n(I1\ntR.", "TypeError"),
    ],
)
def test_pickles_that_cannot_be_read_are_told(content, told, cora, tmp_path, monkeypatch):
    """Also where the error has no text; and none of them runs code, whichever of the files it is."""
    monkeypatch.chdir(tmp_path)
    write_planetoid(tmp_path / "data")
    raw = tmp_path / "data" / "Cora" / "raw"
    for part in ("tx", "graph"):
        whole = (raw / f"ind.cora.{part}").read_bytes()
        (raw / f"ind.cora.{part}").write_bytes(content)
        with pytest.raises(ValueError, match=rf"Cora in .*: the files cannot be read \({told}.*\): get them again"):
            cora()
        (raw / f"ind.cora.{part}").write_bytes(whole)
    assert not Path("harmed").exists()
