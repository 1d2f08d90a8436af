"""A run goes on, and is judged, with the meaning of outputs that it began with; data that disagree are refused."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from lightning_adam_mini.cli.main import main
from lightning_adam_mini.tasks.metrics import read_metrics
from tiny_graphs import RECIPE as GRAPH_RECIPE
from tiny_graphs import make_arrays, write_ogb
from tiny_images import RECIPE as IMAGE_RECIPE
from tiny_images import write_tree
from tiny_runs import checkpoint, error_line, run, start, write_text

LAST = ["--run_dir", "run", "--ckpt_path", "last"]
SHORT = ["--trainer.max_steps", 4, "--trainer.val_check_interval", 4]


def corpus(folder):
    """A recipe whose BPE is trained on a folder of texts, with validation text in a place of its own."""
    (folder / "corpus").mkdir()
    for number in range(2):
        write_text(folder / "corpus" / f"{number}.txt", 150 + number)
    write_text(folder / "held_out.txt", 100)
    recipe = yaml.safe_load((folder / "tiny.yaml").read_text("utf-8"))
    recipe["data"]["init_args"] |= {"path": "corpus", "val_path": "held_out.txt", "val_tokens": None}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe), "utf-8")


def add_a_file(folder):
    """Text whose BPE would have other merges: those of other letters come first."""
    (folder / "corpus" / "more.txt").write_text("zqx zqxy zqxyj wvk wvkk pjj " * 2000, "utf-8")


def last_loss(name="run"):
    return list(read_metrics(name)["val_loss"].values())[-1]


def tokens_of(text, vocabulary):
    return [token for token, _ in sorted(json.loads(text)["model"]["vocab"].items(), key=lambda pair: pair[1])]


@pytest.fixture
def grown(work_dir):
    """A run whose corpus has had a file more since."""
    corpus(work_dir)
    assert run("fit", "--run_dir", "run", *SHORT) == 0
    add_a_file(work_dir)
    return work_dir


@pytest.mark.slow
def test_a_file_that_is_added_changes_no_token_of_the_run(grown, capsys):
    before, kept = last_loss(), checkpoint("run")["data_record"]["meaning"]["tokenizer"]["tokenizer.json"]
    with pytest.warns(UserWarning, match=r"not quite those of the run \(text changed\): what is held out here may"):
        assert run("validate", *LAST) == 0
    assert last_loss() == before, "the same tokens of the same text"
    assert run("predict", *LAST, "--model.temperature", 0) == 0
    assert main(["export", "run"]) == 0
    exported = (grown / "run" / "hf" / "tokenizer.json").read_text("utf-8")
    for text in (exported, (grown / "run" / "tokenizer" / "tokenizer.json").read_text("utf-8")):
        assert json.loads(text)["model"]["vocab"] == json.loads(kept)["model"]["vocab"]

    # Without the checkpoint the text would have got another tokenizer: this is what the run is kept from.
    assert run("fit", "--run_dir", "new", *SHORT) == 0
    new = json.loads((grown / "new" / "tokenizer" / "tokenizer.json").read_text("utf-8"))
    assert new["model"]["vocab"] != json.loads(kept)["model"]["vocab"]
    capsys.readouterr()
    assert run("validate", *LAST, "--data.tokenizer", "new/tokenizer") == 1
    line = error_line(capsys)
    assert "tokens of the run have other ids, or none, in the data's tokenizer; set data.tokenizer to null" in line
    with pytest.warns(UserWarning, match="not quite those"):
        assert run("validate", *LAST, "--data.tokenizer", "run/tokenizer") == 0
    assert last_loss() == before


@pytest.mark.slow
def test_a_run_goes_on_with_other_text_only_where_that_is_said(grown, capsys):
    before = checkpoint("run")
    more = [*LAST, "--trainer.max_steps", 8, "--trainer.val_check_interval", 4]
    capsys.readouterr()
    assert run("fit", *more) == 1
    line = error_line(capsys)
    assert "corpus and held_out.txt changed since the run began (text changed)" in line
    assert "--allow_changed_data true" in line
    assert torch.equal(
        checkpoint("run")["state_dict"]["model.lm_head.weight"], before["state_dict"]["model.lm_head.weight"]
    )
    with pytest.warns(UserWarning, match="the run continues with other data than it began with: text changed"):
        assert run("fit", *more, "--allow_changed_data", "true") == 0
    after = checkpoint("run")
    assert after["global_step"] == 8
    assert after["data_record"]["meaning"] == before["data_record"]["meaning"]
    assert after["data_record"]["samples"] != before["data_record"]["samples"]
    assert run("fit", *LAST, "--trainer.max_steps", 12, "--trainer.val_check_interval", 4) == 0, (
        "these are now the run's"
    )
    assert not yaml.safe_load((grown / "run" / "config.yaml").read_text("utf-8"))["allow_changed_data"]


def test_what_decides_who_is_held_out_is_part_of_the_run(work_dir, capsys):
    assert run("fit", "--run_dir", "run", *SHORT) == 0
    more = ["--trainer.max_steps", 8, "--data.val_fraction", 0.3]
    capsys.readouterr()
    assert run("fit", *LAST, *more) == 1
    assert "(data.val_fraction: 0.1 in the run, 0.3 here)" in error_line(capsys)


@pytest.mark.slow
def test_a_checkpoint_of_an_older_version_is_used_with_one_warning(work_dir):
    assert run("fit", "--run_dir", "run", *SHORT) == 0
    for path in (work_dir / "run" / "checkpoints").glob("*.ckpt"):
        saved = torch.load(path, weights_only=True)
        del saved["data_record"]
        torch.save(saved, path)
    for command, options in (("validate", []), ("fit", ["--trainer.max_steps", 8])):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert run(command, *LAST, *options) == 0
        assert sum("does not say what its outputs mean" in str(one.message) for one in caught) == 1
    assert "data_record" in checkpoint("run")


@pytest.mark.slow
def test_a_new_run_from_exported_weights_reads_their_tokens(grown, capsys):
    assert main(["export", "run"]) == 0
    kept = json.loads((grown / "run" / "hf" / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    assert run("fit", "--run_dir", "next", "--model.init_from", "run/hf", *SHORT) == 0
    own = json.loads((grown / "next" / "tokenizer" / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    assert own == kept
    assert run("fit", "--run_dir", "other", *SHORT) == 0
    capsys.readouterr()
    options = ["--model.init_from", "run/hf", "--data.tokenizer", "other/tokenizer"]
    assert run("fit", "--run_dir", "third", *options, *SHORT) == 1
    assert "the data are not those of model.init_from run/hf: " in error_line(capsys)


@pytest.mark.slow
def test_ranks_refuse_together_in_one_line(grown):
    common = ["--config", "tiny.yaml", *LAST, "--trainer.strategy", "ddp", "--trainer.devices", 2]
    process = start("fit", *common, "--trainer.max_steps", 8)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 1
    (line,) = [line for line in told.splitlines() if "error" in line]
    assert line.startswith("adam-mini: error: the data corpus and held_out.txt changed since the run began")
    assert checkpoint("run")["global_step"] == 4
    before = last_loss()
    process = start("validate", *common)
    process.communicate(timeout=300)
    assert process.returncode == 0
    assert last_loss() == pytest.approx(before, abs=1e-6)


def image_run(folder):
    write_tree(folder / "images", {"train": {"ant": 6, "bee": 6, "cat": 6}, "val": {"ant": 2, "bee": 2, "cat": 2}})
    (folder / "images.yaml").write_text(yaml.safe_dump(IMAGE_RECIPE), "utf-8")
    assert run("fit", "--run_dir", "run", *SHORT, config="images.yaml") == 0


def _add(root):
    for part in ("train", "val"):
        shutil.copytree(root / part / "cat", root / part / "aardvark")


def _remove(root):
    for part in ("train", "val"):
        shutil.rmtree(root / part / "bee")


def _rename(root):
    for part in ("train", "val"):
        (root / part / "ant").rename(root / part / "wasp")


@pytest.mark.slow
def test_classes_are_those_of_the_run(work_dir, capsys):
    image_run(work_dir)
    assert checkpoint("run")["data_record"]["meaning"]["classes"] == ["ant", "bee", "cat"]
    assert json.loads((work_dir / "run" / "data.json").read_text("utf-8"))["meaning"]["classes"] == [
        "ant",
        "bee",
        "cat",
    ]
    before = last_loss()
    assert run("validate", *LAST, config="images.yaml") == 0
    assert last_loss() == before
    told = {
        _add: "train/aardvark is not a class of the run (1 such folders)",
        _remove: "train has no folder 'bee' (1 such classes of the run)",
        _rename: "train has no folder 'ant' (1 such classes of the run), and 'wasp' is not one of them",
    }
    for number, (change, line) in enumerate(told.items()):
        shutil.copytree("images", f"images{number}")
        change(Path(f"images{number}"))
        for command, options in (("validate", []), ("predict", []), ("fit", ["--trainer.max_steps", 8])):
            capsys.readouterr()
            assert run(command, *LAST, "--data.root", f"images{number}", *options, config="images.yaml") == 1
            assert line in error_line(capsys)


@pytest.mark.slow
def test_normalisation_and_images_are_those_of_the_run(work_dir, capsys):
    image_run(work_dir)
    capsys.readouterr()
    other = ["--data.transforms.mean", "[0.5, 0.5, 0.5]"]
    for command in ("validate", "predict"):
        assert run(command, *LAST, *other, config="images.yaml") == 1
        line = error_line(capsys)
        assert "data.transforms.mean: [0.5, 0.5, 0.5] here, [0.485, 0.456, 0.406] in the run; set it to that" in line
    (work_dir / "images/train/ant/000.jpg").unlink()
    assert run("fit", *LAST, "--trainer.max_steps", 8, config="images.yaml") == 1
    assert "(number of training images: 18 in the run, 17 here)" in error_line(capsys)


@pytest.mark.slow
def test_a_graph_is_that_of_the_run(work_dir, capsys):
    write_ogb(work_dir / "data")
    (work_dir / "graph.yaml").write_text(yaml.safe_dump(GRAPH_RECIPE), "utf-8")
    assert run("fit", "--run_dir", "run", *SHORT, config="graph.yaml") == 0
    arrays = make_arrays()
    write_ogb(work_dir / "data", train=arrays["test"], test=arrays["train"])
    capsys.readouterr()
    assert run("fit", *LAST, "--trainer.max_steps", 8, config="graph.yaml") == 1
    assert "(nodes for training, validation and test changed)" in error_line(capsys)
    with pytest.warns(UserWarning, match="what is held out here may have trained there"):
        assert run("validate", *LAST, config="graph.yaml") == 0
