"""Sharded runs of the command: they train as one process does, and their checkpoints are those of one process."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from lightning_adam_mini.tasks.metrics import read_metrics
from tiny_runs import RECIPE, checkpoint, error_line, run, start

# As in test_ddp: each rank has dropout of its own, and the gradient of a key's bias is rounding that Adam enlarges.
SAME = [f"--model.config.{name}=0.0" for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")]
SAME += ["--trainer.precision", "64-true"]
LLAMA = RECIPE["model"] | {
    "init_args": RECIPE["model"]["init_args"]
    | {
        "architecture": "llama",
        "config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        },
    }
}
FSDP2 = "lightning_adam_mini.tasks.parallel.FSDP2"


def fit(run_dir, *options, config="tiny.yaml"):
    """Run `fit` in processes of its own; its output."""
    process = start("fit", "--config", config, "--run_dir", run_dir, *options)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def write(name, **sections):
    Path(name).write_text(yaml.safe_dump(RECIPE | sections), "utf-8")


def assert_same_weights(one, other, tolerance):
    assert one["state_dict"].keys() == other["state_dict"].keys()
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][name], weight, rtol=tolerance, atol=tolerance)


def assert_same_optimizer(one, other, tolerance):
    """The same groups, numbers and moments: another strategy can go on with it."""
    (own,), (others,) = one["optimizer_states"], other["optimizer_states"]
    assert others["param_groups"] == own["param_groups"]
    assert others["state"].keys() == own["state"].keys()
    for number, state in own["state"].items():
        for key, tensor in state.items():
            assert others["state"][number][key].dtype == tensor.dtype
            torch.testing.assert_close(others["state"][number][key], tensor, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_two_ranks_train_as_one(work_dir):
    """GPT-2, tied, clipped, accumulating; then one process goes on with the checkpoint. Measured 2e-14."""
    both = [*SAME, "--trainer.accumulate_grad_batches", 2, "--trainer.val_check_interval", 4]
    out = fit("two", *both, "--trainer.strategy", "fsdp2", "--trainer.devices", 2, "--data.batch_size", 4)
    assert run("fit", "--run_dir", "one", *both, "--data.batch_size", 8) == 0
    assert out.count("optimizer state") == 1, "one report"
    assert "sample" in out
    one, two = checkpoint("one"), checkpoint("two")
    assert_same_weights(one, two, 1e-11)
    assert_same_optimizer(one, two, 1e-11)
    losses = {name: read_metrics(name)["val_loss"] for name in ("one", "two")}
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-6)
    assert (work_dir / "two/samples.txt").read_text("utf-8") == (work_dir / "one/samples.txt").read_text("utf-8")

    more = [*both, "--data.batch_size", 8, "--trainer.max_steps", 12, "--ckpt_path", "last"]
    assert run("fit", "--run_dir", "two", *more) == 0
    assert run("fit", "--run_dir", "one", *more) == 0
    assert_same_weights(checkpoint("one"), checkpoint("two"), 1e-11)


TWO = ["--trainer.strategy", "fsdp2", "--trainer.devices", 2]


@pytest.mark.slow
def test_an_image_classifier_is_sharded(tmp_path, monkeypatch):
    """With the statistics of batch norm, which are each rank's own, and an average of the weights."""
    pytest.importorskip("torchvision")
    from tiny_images import write_image_recipe, write_tree

    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path / "images", {"train": dict.fromkeys("abc", 4), "val": {"a": 3, "b": 1, "c": 1}})
    write_image_recipe(tmp_path)
    fit("two", *TWO, "--model.ema_decay", 0.9)
    seen = read_metrics("two")
    assert run("validate", "--run_dir", "two", "--ckpt_path", "last", "--model.ema_decay", 0.9) == 0
    after = read_metrics("two")
    last = max(seen["val_top1"])
    assert after["val_top1"][last] == pytest.approx(seen["val_top1"][last])
    assert after["val_loss"][last] == pytest.approx(seen["val_loss"][last], rel=1e-4)
    assert (tmp_path / "two/confusion_matrix.png").exists()


@pytest.mark.slow
def test_a_diffusion_model_is_sharded(tmp_path, monkeypatch):
    """Each image has noise of its own in validation, so the checkpoint has the same loss in one process."""
    pytest.importorskip("diffusers")
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    network = {
        "block_out_channels": [8, 8],
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    options = {"config": network, "num_train_timesteps": 4, "sample_steps": 4, "num_samples": 3, "ema_decay": 0.5}
    model = {"class_path": "lightning_adam_mini.tasks.diffusion.DiffusionModel", "init_args": options}
    data = {
        "class_path": "lightning_adam_mini.tasks.diffusion.data.DigitImages",
        "init_args": {"batch_size": 8, "val_images": 20, "num_images": 3},
    }
    write("tiny.yaml", model=model, data=data, trainer=RECIPE["trainer"] | {"max_steps": 4, "val_check_interval": 2})
    fit("two", *TWO)
    seen = read_metrics("two")["val_loss"]
    assert (tmp_path / "two/samples/step_000004.png").exists()
    assert run("validate", "--run_dir", "two", "--ckpt_path", "last") == 0
    assert read_metrics("two")["val_loss"][4] == pytest.approx(seen[4], rel=1e-5)


@pytest.mark.slow
def test_a_graph_network_is_sharded(tmp_path, monkeypatch):
    pytest.importorskip("torch_geometric")
    from tiny_graphs import write_ogb, write_recipe

    monkeypatch.chdir(tmp_path)
    write_ogb(tmp_path / "data")
    write_recipe(tmp_path, data={"sampling": "parts", "num_parts": 4}, model={"batch_norm": False})
    fit("two", *TWO)
    seen = read_metrics("two")["val_loss"]
    assert run("validate", "--run_dir", "two", "--ckpt_path", "last") == 0
    assert read_metrics("two")["val_loss"][8] == pytest.approx(seen[8], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "options"),
    [
        (2, ["--trainer.strategy", FSDP2, "--trainer.strategy.tensor_parallel_size", 2]),
        (4, ["--trainer.strategy", FSDP2, "--trainer.strategy.tensor_parallel_size", 2]),
        (4, ["--trainer.strategy", "lightning_adam_mini.tasks.parallel.HSDP", "--trainer.strategy.replicate_size", 2]),
    ],
    ids=["tensor", "fsdp2-tensor", "hsdp"],
)
def test_every_layout_trains_as_one(work_dir, devices, options):
    """In float32, as Lightning allows it; ranks that compute together read the same data. Measured 1e-6."""
    write("llama.yaml", model=LLAMA)
    readers = devices // 2 if "tensor_parallel_size" in options[2] else devices
    fit("many", *options, "--trainer.devices", devices, "--data.batch_size", 8 // readers, config="llama.yaml")
    assert run("fit", "--run_dir", "one", "--data.batch_size", 8, config="llama.yaml") == 0
    one, many = checkpoint("one"), checkpoint("many")
    assert_same_weights(one, many, 1e-5)
    assert_same_optimizer(one, many, 1e-5)
    assert read_metrics("many")["val_loss"] == pytest.approx(read_metrics("one")["val_loss"], rel=1e-5)
    # And on, in one process.
    assert run("fit", "--run_dir", "many", "--ckpt_path", "last", "--trainer.max_steps", 12, config="llama.yaml") == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.precision", "bf16-mixed"],
        ["--trainer.precision", "bf16-true"],
        ["--trainer.strategy.param_dtype", "bfloat16", "--trainer.strategy.reduce_dtype", "float32"],
        ["--trainer.gradient_clip_algorithm", "value"],
        ["--trainer.strategy.reshard_after_forward", "false"],
        ["--trainer.strategy.activation_checkpointing", "true"],
        ["--trainer.strategy.defer_gradient_sync", "true", "--trainer.accumulate_grad_batches", 2],
    ],
    ids=lambda options: options[0].split(".")[-1] + "-" + options[1],
)
def test_options_train_as_in_one_process(work_dir, options):
    """To the accuracy of the precision; strategies' own options change nothing. Llama has no dropout."""
    write("llama.yaml", model=LLAMA)
    two = ["--trainer.strategy.class_path", FSDP2, "--trainer.devices", 2, "--data.batch_size", 4]
    fit("two", *two, *options, config="llama.yaml")
    own = [
        option for at in range(0, len(options), 2) for option in options[at : at + 2] if "strategy" not in options[at]
    ]
    assert run("fit", "--run_dir", "one", "--data.batch_size", 8, *own, config="llama.yaml") == 0
    tolerance = 0.02 if any("bf" in str(option) for option in options) else 1e-4
    assert read_metrics("two")["val_loss"] == pytest.approx(read_metrics("one")["val_loss"], rel=tolerance)


@pytest.mark.slow
def test_a_large_model_never_stands_whole(work_dir):
    """Weights drawn in shards do not depend on the ranks; a folder that each rank writes a part of goes on anywhere."""
    sharded = ["--trainer.strategy", FSDP2, "--trainer.strategy.initialisation", "sharded"]
    sharded += ["--trainer.strategy.save_distributed_checkpoint", "true"]
    write("llama.yaml", model=LLAMA)
    fit("two", *sharded, "--trainer.devices", 2, "--data.batch_size", 4, config="llama.yaml")
    fit("one", *sharded, "--trainer.devices", 1, "--data.batch_size", 8, config="llama.yaml")
    losses = read_metrics("two")["val_loss"]
    assert losses == pytest.approx(read_metrics("one")["val_loss"], rel=1e-5)
    more = ["--data.batch_size", 8, "--ckpt_path", "last", "--trainer.max_steps", 12]
    assert run("fit", "--run_dir", "two", *more, config="llama.yaml") == 0
    fit("one", *more[2:], "--data.batch_size", 4, "--trainer.devices", 2, *TWO[:2], config="llama.yaml")
    assert read_metrics("one")["val_loss"][12] == pytest.approx(read_metrics("two")["val_loss"][12], rel=1e-5)


@pytest.mark.slow
def test_a_sharded_model_validates_and_predicts(work_dir):
    """All ranks take part in every prediction, however many tokens it takes; one file holds each prompt once."""
    two = ["--trainer.strategy", "fsdp2", "--trainer.devices", 2]
    assert run("fit", "--run_dir", "one") == 0
    prompts = ["--data.prompts", json.dumps(["the cat", "a dog saw", "one"]), "--model.temperature", 0.0]
    for where, options in (("one", []), ("two", two)):
        common = ["--config", "tiny.yaml", "--ckpt_path", (work_dir / "one/checkpoints/last.ckpt"), *options]
        for command, own in (("validate", []), ("predict", prompts)):
            process = start(command, *common, *own, "--run_dir", where)
            _, err = process.communicate(timeout=200)
            assert process.returncode == 0, err
    predicted = [json.loads(line) for line in (work_dir / "two/predictions.jsonl").read_text("utf-8").splitlines()]
    expected = [json.loads(line) for line in (work_dir / "one/predictions.jsonl").read_text("utf-8").splitlines()]
    assert predicted == expected
    assert len(predicted) == 3


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--trainer.strategy", FSDP2, "--trainer.strategy.tensor_parallel_size", 3], "set it to 1 or 2"),
        (["--trainer.strategy", FSDP2, "--trainer.strategy.timeout_minutes", 0], "timeout_minutes must be positive"),
        (["--trainer.strategy", FSDP2, "--trainer.strategy.replicate_size", 4], "replicate_size 4 does not divide 2"),
    ],
)
def test_sizes_that_do_not_fit_start_no_process(work_dir, capsys, options, told):
    assert run("fit", *options, "--trainer.devices", 2) == 1
    assert told in error_line(capsys)


def test_what_cannot_run_is_told_before_training(work_dir, capsys):
    """On one rank, so that all happens in this process; the other cases are in the unit tests."""
    assert run("fit", "--trainer.strategy", FSDP2, "--trainer.strategy.cpu_offload", "true") == 1
    assert "there is no GPU" in error_line(capsys)
