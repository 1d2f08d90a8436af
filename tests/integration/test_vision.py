"""Image classifiers through the command: what a run leaves, how it resumes, and what several processes count."""

import json
import os
import signal

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("timm")

from lightning_adam_mini.tasks.metrics import read_metrics
from lightning_adam_mini.tasks.vision import ImageClassifier
from tiny_images import write_image_recipe, write_tree
from tiny_runs import assert_same_state, checkpoint, error_line, run, start

MIXED = ["--model.mixup_alpha", 0.4, "--model.cutmix_alpha", 1.0, "--model.mix_probability", 0.7]
MIXED += ["--model.ema_decay", 0.9, "--model.label_smoothing", 0.1]
EVERY_STEP = ["--checkpoint.every_n_train_steps", 1, "--checkpoint.save_top_k", -1, "--checkpoint.monitor", "null"]
EVERY_STEP += ["--checkpoint.filename", "{step}"]
SEVEN = list("abcdefg")
VAL = {"a": 1, "b": 2, "c": 3, "d": 4, "e": 3, "f": 1, "g": 1}


@pytest.fixture(autouse=True)
def images(tmp_path, monkeypatch):
    """A folder with `tiny.yaml` and seven classes: 21 training images, 15 validation images."""
    write_tree(tmp_path / "images", {"train": dict.fromkeys(SEVEN, 3), "val": VAL})
    write_image_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_leaves_its_figures_and_pictures(images, capsys):
    assert run("fit", "--run_dir", "run") == 0
    metrics = read_metrics("run")
    assert list(metrics["val_top1"]) == list(metrics["val_top5"]) == list(metrics["val_loss"]) == [4, 8]
    assert all(value * 15 == pytest.approx(round(value * 15), abs=1e-5) for value in metrics["val_top1"].values())
    assert metrics["images_per_second"][8] > 0
    for name in ("accuracy.png", "confusion_matrix.png", "loss_curve.png"):
        assert (images / "run" / name).read_bytes().startswith(b"\x89PNG"), name
    report = (images / "run" / "report.md").read_text("utf-8")
    assert f"**validation top-1**: {metrics['val_top1'][8]:.2%}" in report
    assert "**baseline**: 6.67% top-1 by the largest class" in report
    result = json.loads((images / "run" / "result.json").read_text("utf-8"))
    assert result["primary_metric"]["metric"] == "val_top1"
    assert result["primary_metric"]["value"] == pytest.approx(metrics["val_top1"][8])


@pytest.mark.slow
def test_colours_are_learnt(images):
    """Each class has a colour of its own: a classifier that sees labels and images together finds all of them."""
    plain = ["--data.transforms.policy", "none", "--data.transforms.erasing", 0, "--trainer.max_steps", 60]
    assert run("fit", "--run_dir", "run", "--trainer.val_check_interval", 30, *plain) == 0
    assert read_metrics("run")["val_top1"][60] > 0.6, "the largest class holds 0.27"


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        pytest.param(MIXED, [1, 6], id="mixed and averaged", marks=pytest.mark.slow),
        pytest.param(["--trainer.accumulate_grad_batches", 2, *MIXED], [3], id="accumulation", marks=pytest.mark.slow),
        pytest.param(["--data.num_workers", 1, *MIXED], [6], id="worker", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_equals_the_one_that_never_stopped(images, options, steps):
    """With augmentation, mixup, cutmix, an average of the weights, and an end of an epoch in between."""
    assert run("fit", "--run_dir", "whole", *EVERY_STEP, *options) == 0
    whole, metrics = checkpoint("whole"), read_metrics("whole")
    for step in steps:
        start_of = f"whole/checkpoints/step={step}.ckpt"
        assert run("fit", "--run_dir", f"from-{step}", "--ckpt_path", start_of, *options) == 0
        resumed, losses = checkpoint(f"from-{step}"), read_metrics(f"from-{step}")
        assert_same_state(resumed, whole)
        for name, weight in whole["current_model_state"].items():
            assert torch.equal(resumed["current_model_state"][name], weight), name
        for name in ("train_loss", "val_top1", "val_loss"):
            expected = {at: value for at, value in metrics[name].items() if at > step}
            assert {at: losses[name][at] for at in expected} == expected
    difference = (whole["state_dict"][name] - whole["current_model_state"][name] for name in whole["state_dict"])
    assert any(float(values.abs().max()) > 0 for values in difference), "else nothing is averaged"


@pytest.mark.slow
def test_an_average_is_resumed_at_the_end_of_a_run(images):
    assert run("fit", "--run_dir", "whole", *MIXED) == 0
    options = ["--schedule.horizon", 8, *MIXED]
    assert run("fit", "--run_dir", "parts", "--trainer.max_steps", 4, *options) == 0
    assert run("fit", "--run_dir", "parts", "--ckpt_path", "last", *options) == 0
    assert_same_state(checkpoint("parts"), checkpoint("whole"))


@pytest.mark.slow
def test_an_average_is_resumed_after_an_interrupt(images, monkeypatch):
    """The step in which the signal comes is averaged too, before the checkpoint is saved."""
    assert run("fit", "--run_dir", "whole", *MIXED) == 0
    step = ImageClassifier.training_step

    def interrupted(task, *args):
        if task.trainer.global_step == 4:  # the fifth step, in between two validations
            os.kill(os.getpid(), signal.SIGINT)
        return step(task, *args)

    monkeypatch.setattr(ImageClassifier, "training_step", interrupted)
    with pytest.raises(SystemExit, match="130"):
        run("fit", "--run_dir", "parts", *MIXED)
    monkeypatch.setattr(ImageClassifier, "training_step", step)
    assert checkpoint("parts")["global_step"] == 5
    assert run("fit", "--run_dir", "parts", "--ckpt_path", "last", *MIXED) == 0
    assert_same_state(checkpoint("parts"), checkpoint("whole"))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [7, 4])
def test_two_processes_count_as_one(images, batch_size):
    """15 images in batches of 7 and 4 on each of two ranks: the last ones are short, and empty on one rank."""
    assert run("fit", "--run_dir", "run", "--trainer.max_steps", 4, "--checkpoint.save_last", "true") == 0
    common = ["--config", "tiny.yaml", "--ckpt_path", "run/checkpoints/last.ckpt", "--data.batch_size", batch_size]
    two = start("validate", *common, "--run_dir", "two", "--trainer.strategy", "ddp", "--trainer.devices", 2)
    assert run("validate", *common[2:], "--run_dir", "one") == 0
    _, err = two.communicate(timeout=120)
    assert two.returncode == 0, err
    one, both = read_metrics("one"), read_metrics("two")
    for name in ("val_top1", "val_top5"):
        assert both[name] == one[name]
    assert both["val_loss"][4] == pytest.approx(one["val_loss"][4], rel=1e-6)


@pytest.mark.slow
def test_synchronised_batch_norm_on_the_cpu_is_told(images, capsys):
    """Torch would not say what to do."""
    alone = ["--trainer.strategy", "ddp", "--trainer.devices", 1]
    assert run("fit", "--trainer.fast_dev_run", 1, *alone) == 0
    assert run("fit", *alone, "--trainer.sync_batchnorm", "true") == 1
    told = "trainer.sync_batchnorm needs GPUs: torch has no SyncBatchNorm for the CPU; leave it out"
    assert told in error_line(capsys)


@pytest.mark.slow
def test_predictions_name_images_and_classes(images):
    assert run("fit", "--run_dir", "run", "--trainer.max_steps", 4) == 0
    (images / "images" / "train").rename(images / "gone")  # the checkpoint has the names of the classes
    assert run("predict", "--run_dir", "run", "--ckpt_path", "last", "--data.predict_path", "images/val/d") == 0
    rows = [json.loads(line) for line in (images / "run" / "predictions.jsonl").read_text("utf-8").splitlines()]
    assert [row["image"] for row in rows] == [f"images/val/d/{number:03}.jpg" for number in range(4)]
    for row in rows:
        assert len(row["top5"]) == 5
        assert next(iter(row["top5"])) == row["class"]
        assert row["probability"] == max(row["top5"].values())
        assert row["class"] in SEVEN


@pytest.mark.slow
def test_test_counts_the_test_images(images):
    write_tree(images / "images", {"test": dict.fromkeys(SEVEN, 1)})
    assert run("fit", "--run_dir", "run", "--trainer.max_steps", 4) == 0
    assert run("test", "--run_dir", "run", "--ckpt_path", "last") == 0
    ((step, value),) = read_metrics("run")["test_top1"].items()
    assert step == 4
    assert value * 7 == pytest.approx(round(value * 7), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--data.root", "nowhere"], "there is no folder nowhere; data.root must contain train/CLASS/*.jpg"),
        (["--model.architecture", "resnet1"], "did you mean"),
        (["--model.architecture", "vit_b_16"], "vit_b_16 cannot take images of 3x16x16"),
        (["--model.num_classes", 3], "the data have 7 classes, model.num_classes is 3"),
        (["--model.mixup_alpha", -1], "model.mixup_alpha must be a number of at least 0"),
        (["--data.transforms.crop", "centre"], "'centre' is not one of resized, padded, center"),
        (["--data.transforms.sise", 3], "sise"),
    ],
)
def test_wrong_input_is_one_line(images, options, told, capsys):
    assert run("fit", *options) != 0
    assert told in error_line(capsys)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_corrupt_image_is_one_line(images, capsys, workers):
    bad = images / "images/train/c/001.jpg"
    bad.write_bytes(b"no image")
    assert run("fit", "--data.num_workers", workers) != 0
    line = error_line(capsys)
    assert "images/train/c/001.jpg" in line
    assert "replace the file, or remove it" in line
