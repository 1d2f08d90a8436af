"""The embedded corpus, and how the command line sees it."""

import os
import sys

import jsonargparse
import pytest

from lightning_adam_mini.tasks.llm.data import StdlibText, TokenDataModule


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    # The parent folder is common to the processes of a parallel run: one trains the tokenizer, the others wait for it.
    common = tmp_path_factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else None
    return os.environ.get("LIGHTNING_ADAM_MINI_CACHE") or str(
        (common or tmp_path_factory.getbasetemp()) / "stdlib_cache"
    )


@pytest.fixture(scope="session")
def stdlib(cache_dir):
    data = StdlibText(context_length=64, batch_size=16, cache_dir=cache_dir)
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.slow
def test_corpus(stdlib):
    texts = [text for _, text in stdlib.documents()]
    num_bytes = sum(len(text.encode()) for text in texts)
    assert 400 < len(texts) < 700
    assert 8e6 < num_bytes < 14e6
    val_bytes = sum(len(text.encode()) for split, text in stdlib.documents() if split == "val")
    assert 0.05 < val_bytes / num_bytes < 0.2
    assert stdlib.bytes_per_token == pytest.approx(val_bytes / stdlib.num_val_tokens)


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the figures are those of Python 3.11's library")
def test_corpus_of_python_3_11(stdlib):
    texts = [text for _, text in stdlib.documents()]
    assert 440 < len(texts) < 460
    assert sum(len(text.encode()) for text in texts) == pytest.approx(9.56e6, rel=0.02)


@pytest.mark.slow
def test_statistics(stdlib):
    assert stdlib.vocab_size == 2048
    assert 2e6 < stdlib.num_train_tokens < 4e6
    assert 2.5 < stdlib.bytes_per_token < 4
    assert 6.4 < stdlib.unigram_loss() < 6.65


@pytest.mark.slow
def test_hash_is_stable_and_follows_the_text(stdlib, monkeypatch):
    again = StdlibText()
    assert again.hash_corpus() == stdlib.corpus_hash
    again.__dict__["_texts"] = (*again._texts[:-1], (again._texts[-1][0], again._texts[-1][1] + " "))
    assert again.hash_corpus() != stdlib.corpus_hash


@pytest.mark.slow
def test_batches_are_code(stdlib):
    text = stdlib.tokenizer.decode(next(iter(stdlib.train_dataloader()))["input_ids"].flatten())
    assert "self" in text
    assert [batch["prompt"] for batch in stdlib.predict_dataloader()] == [[prompt] for prompt in stdlib.prompts]


def test_no_sources(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match=r"no sources of the standard library in .*: give data of your own"):
        StdlibText(cache_dir=str(tmp_path)).prepare_data()


@pytest.fixture
def parser():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TokenDataModule, "data")
    return parser


def instantiate(parser, arguments):
    config = parser.parse_args(arguments)
    # Renamed in jsonargparse 4.49.
    return getattr(parser, "instantiate", parser.instantiate_classes)(config).data


def test_command_line_knows_every_argument(parser):
    arguments = ["--data=StdlibText", "--data.context_length=32", "--data.vocab_size=512", "--data.val_tokens=1000"]
    data = instantiate(parser, arguments)
    assert (data.context_length, data.wanted_vocab_size, data.val_tokens) == (32, 512, 1000)
    arguments = ["--data=TokenFiles", "--data.train=[a.bin,b.bin]", "--data.val=c.bin", "--data.vocab_size=9"]
    data = instantiate(parser, arguments)
    assert (data.train_files, data.val_files) == (["a.bin", "b.bin"], ["c.bin"])
    for kind in ("TextFiles", "HFText"):
        assert instantiate(parser, [f"--data={kind}", "--data.path=x", "--data.seed=4"]).seed == 4


def test_command_line_refuses_what_it_does_not_know(parser):
    with pytest.raises(jsonargparse.ArgumentError, match="val_batches"):
        parser.parse_args(["--data=StdlibText", "--data.val_batches=3"])


@pytest.mark.parametrize("kind", ["StdlibText", "TokenFiles", "TextFiles", "HFText"])
def test_help_describes_every_argument(parser, kind, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args([f"--data.help={kind}"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Tokens in a sequence, T." in text
    assert "Tokens that one evaluation predicts" in text
    assert "--data.kwargs" not in text
