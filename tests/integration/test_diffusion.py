"""Diffusion models from the command line: a run's folder, resuming, new images, export, and wrong input."""

import json

import pytest
import torch
import yaml

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from PIL import Image

from lightning_adam_mini.cli.main import main
from lightning_adam_mini.tasks.metrics import read_metrics
from tiny_runs import assert_same_state, checkpoint, error_line, run

RECIPE = {
    "seed_everything": 0,
    "model": {
        "class_path": "lightning_adam_mini.tasks.diffusion.DiffusionModel",
        "init_args": {
            "config": {
                "block_out_channels": [8, 8],
                "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
                "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
                "layers_per_block": 1,
                "norm_num_groups": 4,
                "attention_head_dim": 4,
                "dropout": 0.1,
            },
            "num_train_timesteps": 4,
            "sample_steps": 4,
            "num_samples": 9,
        },
    },
    "data": {
        "class_path": "lightning_adam_mini.tasks.diffusion.data.DigitImages",
        "init_args": {"batch_size": 16, "val_images": 20, "num_images": 3},
    },
    "optimizer": {"class_path": "lightning_adam_mini.factory.AdamMini", "init_args": {"lr": 1.0e-2}},
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 6,
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
        "gradient_clip_val": 1.0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
    },
}
EVERY_STEP = ["--checkpoint.every_n_train_steps", 1, "--checkpoint.save_top_k", -1, "--checkpoint.monitor", "null"]
EVERY_STEP += ["--checkpoint.filename", "{step}"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the recipe, from which the command is called."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(RECIPE), "utf-8")
    return tmp_path


def size(path):
    with Image.open(path) as image:
        return image.size


def test_a_run_leaves_samples_and_figures(folder):
    assert run("fit", "--run_dir", "run", "--model.pca_features", 4, "--model.frechet_images", 10) == 0
    assert sorted(path.name for path in (folder / "run/samples").iterdir()) == ["step_000003.png", "step_000006.png"]
    assert size("run/samples/step_000006.png") == (8 * 50 + 2, 2 * 50 + 2), "9 images in rows of 8, enlarged"
    metrics = read_metrics("run")
    assert list(metrics["val_loss"]) == [3, 6]
    assert list(metrics["train_loss"]) == [1, 2, 3, 4, 5, 6]
    assert list(metrics["val_pca_frechet"]) == [6]
    report = (folder / "run/report.md").read_text("utf-8")
    assert "run/samples/step_000006.png" in report
    assert "in 4 principal components, 10 samples from the validation images; training images: " in report
    assert json.loads((folder / "run/result.json").read_text())["primary_metric"]["value"] == metrics["val_loss"][6]
    assert run("test", "--run_dir", "run", "--ckpt_path", "last", "--model.pca_features", 4) == 0
    assert list(read_metrics("run")["test_pca_frechet"]) == [6]


@pytest.mark.slow
def test_samples_are_rare_where_asked_for(folder):
    options = ["--run_dir", "run", "--trainer.val_check_interval", 1, "--model.sample_every", 4]
    assert run("fit", *options, "--trainer.max_steps", 2, "--schedule.horizon", 6) == 0
    assert run("fit", *options, "--ckpt_path", "last", "--schedule.horizon", 6) == 0
    steps = [2, 4, 6]  # at the end of each start, and in the fourth validation of both
    assert sorted(path.name for path in (folder / "run/samples").iterdir()) == [f"step_{n:06d}.png" for n in steps]
    assert run("fit", "--run_dir", "none", "--model.sample_every", 0) == 0
    assert not (folder / "none/samples").exists()


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--model.ema_decay", "null", "--model.min_snr_gamma", 5]])
def test_a_resumed_run_equals_one_that_never_stopped(folder, options):
    """Dropout, noise, timesteps, the order of images and the average of the weights, to the last bit."""
    assert run("fit", "--run_dir", "whole", *EVERY_STEP, *options) == 0
    whole, metrics = checkpoint("whole"), read_metrics("whole")
    assert ("current_model_state" in whole) == (not options)
    for step in (2, 3):
        start = f"whole/checkpoints/step={step}.ckpt"
        assert run("fit", "--run_dir", f"from-{step}", "--ckpt_path", start, *options) == 0
        resumed = checkpoint(f"from-{step}")
        assert_same_state(resumed, whole)
        for name, tensor in whole.get("current_model_state", {}).items():
            assert torch.equal(resumed["current_model_state"][name], tensor), name
        for name in ("train_loss", "val_loss"):
            expected = {at: value for at, value in metrics[name].items() if at > step}
            assert {at: read_metrics(f"from-{step}")[name][at] for at in expected} == expected


@pytest.mark.slow
def test_samples_take_nothing_from_the_training(folder):
    for name, options in {
        "with": [],
        "without": ["--model.sample_every", 0, "--trainer.val_check_interval", 6],
    }.items():
        assert run("fit", "--run_dir", name, *options) == 0
    assert_same_state(checkpoint("with"), checkpoint("without"))


@pytest.mark.slow
def test_new_images_are_those_of_their_seeds(folder):
    assert run("fit", "--run_dir", "run") == 0
    written = []
    for options in ([], ["--seed_everything", 5, "--data.batch_size", 2]):
        assert run("predict", "--run_dir", "run", "--ckpt_path", "last", *options) == 0
        rows = [json.loads(line) for line in (folder / "run/predictions.jsonl").read_text("utf-8").splitlines()]
        assert rows == [{"image": f"predictions/seed_{seed:06d}.png", "seed": seed} for seed in range(3)]
        written.append([list(Image.open(folder / "run" / row["image"]).convert("L").tobytes()) for row in rows])
    assert size("run/predictions/seed_000002.png") == (8, 8)
    first, second = (torch.tensor(each) for each in written)
    assert (first - second).abs().max() <= 1, "a batch of another size may round otherwise"
    assert not torch.equal(first[0], first[1])
    grid = torch.tensor(list(Image.open("run/samples/step_000006.png").convert("L").tobytes())).view(102, 402)
    assert (grid[2:50:6, 2:50:6].flatten() - first[0]).abs().max() <= 1, "the grid has the same images"


@pytest.mark.slow
def test_the_exported_model_is_the_averaged_one(folder, capsys):
    assert run("fit", "--run_dir", "run") == 0
    assert main(["export", "run"]) == 0
    assert "exported to run/diffusers" in capsys.readouterr().out
    pipeline = pytest.importorskip("diffusers").DDPMPipeline.from_pretrained("run/diffusers")
    saved = checkpoint("run")
    raw = saved["current_model_state"]
    for name, tensor in pipeline.unet.state_dict().items():
        assert torch.equal(tensor, saved["state_dict"][f"model.{name}"]), name
    assert any(not torch.equal(tensor, raw[f"model.{name}"]) for name, tensor in pipeline.unet.state_dict().items())
    assert pipeline(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)
    assert main(["export", "run"]) == 1
    assert "run/diffusers exists; choose another folder" in error_line(capsys)


FOLDER = ["--data", "lightning_adam_mini.tasks.diffusion.data.ImageFiles", "--data.image_size", 8, "--data.path"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--model.config.block_out_chanels", "[8]"], "did you mean block_out_channels"),
        (["--model.config.in_channels", 3], "the images have 1 channels, but model.config.in_channels is 3"),
        (["--model.config.norm_num_groups", 3], "UNet2DModel cannot be built from model.config: num_channels"),
        (["--model.beta_schedule", "cosine"], "squaredcos_cap_v2"),
        (["--model.prediction_type", "noise"], "v_prediction"),
        (["--model.num_samples", 0], "num_samples must be at least 1, not 0"),
        (["--model.sample_steps", 2], "would begin at timestep 2 of 4, where images are not noise yet"),
        (["--model.frechet_images", 9], "frechet_images is given, but pca_features is 0"),
        (["--model.pca_features", 65], "66 images of 64 numbers: lower model.pca_features"),
        (["--data.num_images", 0], "`num_images` must be at least 1"),
        ([*FOLDER, "nowhere"], "there is no folder nowhere"),
        ([*FOLDER, "empty"], "empty contains 0 images"),
        ([*FOLDER, "broken", "--data.check_files", "true"], "cannot read the image broken/1.png"),
        ([*FOLDER, "good", "--data.crop", 10], "9 x 9 pixels, fewer than the crop of 10"),
        ([*FOLDER, "good", "--data.image_size", 9], "9 x 9 pixels: this U-Net halves a square 1 times"),
    ],
)
def test_wrong_input_is_told_in_one_line_before_training(folder, capsys, options, told):
    for name in ("broken", "good", "empty"):
        (folder / name).mkdir()
    for name in ("1.png", "2.png"):
        (folder / "broken" / name).write_bytes(b"")
        Image.new("L", (9, 9)).save(folder / "good" / name)
    assert run("fit", "--run_dir", "run", *options) != 0
    assert told in error_line(capsys)
    assert not (folder / "run/metrics.jsonl").exists()
