"""`adam-mini fit`: what a run leaves in its folder, with each optimizer and each option that changes training."""

import json
import math

import pytest
import torch

from lightning_adam_mini import factory
from lightning_adam_mini.measure import adamw_state_bytes
from lightning_adam_mini.tasks.llm import LanguageModel
from lightning_adam_mini.tasks.metrics import read_metrics
from tiny_runs import assert_same_state, checkpoint, run

OPTIMIZERS = sorted(set(factory.__all__) - {"OptimizerFactory"})
PERFORMANCE = {
    "tokens_per_second",
    "mfu",
    "step_milliseconds",
    "optimizer_milliseconds",
    "optimizer_state_bytes",
    "peak_memory_bytes",
}


def config_of(**options):
    return [part for name, value in options.items() for part in (f"--model.config.{name}", value)]


def test_a_run_leaves_all_its_files(work_dir, capsys):
    assert run("fit", "--trainer.max_steps", 40, "--trainer.val_check_interval", 20) == 0
    folder = work_dir / "runs" / "tiny"
    metrics = read_metrics(folder)
    assert set(metrics) >= {"train_loss", "val_loss", "val_perplexity", *PERFORMANCE}
    for name in ("train_loss", *PERFORMANCE):
        assert list(metrics[name]) == list(range(2, 41, 2)), name
    assert list(metrics["val_loss"]) == [20, 40]
    assert metrics["val_loss"][40] < metrics["val_loss"][20] < math.log(280)
    assert metrics["val_perplexity"][40] == pytest.approx(math.exp(metrics["val_loss"][40]))
    assert all(value > 0 for name in PERFORMANCE for value in metrics[name].values())
    assert metrics["mfu"][40] < 1

    assert (folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    assert (folder / "config.yaml").is_file()
    assert (folder / "samples.txt").read_text("utf-8").count("the cat") >= 2
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["best-step=40.ckpt", "last.ckpt"]
    assert not list(folder.rglob("*.tmp"))

    report = (folder / "report.md").read_text("utf-8")
    facts = ("nats a token", "perplexity", "unigram", "AdamW's for this model", "sample", "loss_curve.png", "40")
    for fact in (*facts, "recommended partition**: factored"):
        assert fact in report, fact
    assert "optimizer state" in capsys.readouterr().out


def test_loss_curve_can_be_read(work_dir):
    assert run("fit", "--run_dir", "run") == 0
    image = pytest.importorskip("matplotlib.image").imread("run/loss_curve.png")
    assert image.shape[:2] == (504, 840)
    assert image.std() > 0, "an empty picture"


@pytest.mark.slow
def test_state_bytes_are_the_optimizers_own(work_dir):
    assert run("fit", "--run_dir", "run") == 0
    assert run("fit", "--run_dir", "adamw", "--optimizer", "AdamW") == 0
    own, adamw = (read_metrics(name)["optimizer_state_bytes"][10] for name in ("run", "adamw"))
    weights = [torch.nn.Parameter(tensor) for tensor in checkpoint("adamw")["state_dict"].values()]
    tied = weights[-1].numel()  # the output head shares the embedding's
    assert adamw == adamw_state_bytes(weights) - 8 * tied - 4
    assert 0.5 * adamw < own < 0.56 * adamw


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains(work_dir, name):
    lr = {"SGD": 0.3, "Lion": 2e-3, "LAMB": 0.1}.get(name, 1e-2)
    assert run("fit", "--run_dir", "run", "--optimizer", name, "--optimizer.lr", lr, "--trainer.max_steps", 20) == 0
    losses = read_metrics("run")["val_loss"]
    assert losses[20] < losses[5] - 0.05
    assert f"optimizer**: {name}" in (work_dir / "run" / "report.md").read_text("utf-8")


def test_the_same_seed_gives_the_same_bits(work_dir):
    for name, seed in {"one": 0, "two": 0, "other": 1}.items():
        assert run("fit", "--run_dir", name, "--seed_everything", seed) == 0
    assert_same_state(checkpoint("one"), checkpoint("two"))
    assert read_metrics("one")["train_loss"] == read_metrics("two")["train_loss"]
    with pytest.raises(AssertionError):
        assert_same_state(checkpoint("one"), checkpoint("other"))


@pytest.mark.slow
def test_two_runs_in_a_row_take_two_folders(work_dir):
    assert run("fit") == run("fit") == 0
    assert sorted(path.name for path in (work_dir / "runs").iterdir()) == ["tiny", "tiny-2"]
    assert len(read_metrics("runs/tiny")["val_loss"]) == len(read_metrics("runs/tiny-2")["val_loss"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--trainer.precision", "bf16-mixed"], id="bf16-mixed"),
        pytest.param(["--trainer.precision", "bf16-true", "--trainer.gradient_clip_val", "null"], id="bf16-true"),
        pytest.param(["--trainer.accumulate_grad_batches", 2], id="accumulation"),
        pytest.param(["--trainer.gradient_clip_algorithm", "value"], id="clipping by value"),
        pytest.param(["--trainer.enable_progress_bar", "true"], id="progress bar"),
        pytest.param(["--data.num_workers", 1], id="worker"),
        pytest.param(["--schedule.shape", "wsd", "--schedule.warmup", 3], id="schedule"),
        pytest.param(["--trainer.max_steps", -1, "--trainer.max_epochs", 1, "--data.epoch_samples", 24], id="epochs"),
        pytest.param(
            ["--model.architecture", "llama", *config_of(num_key_value_heads=2, intermediate_size=48)],
            id="llama with grouped queries",
        ),
    ],
)
def test_other_ways_to_train(work_dir, options):
    assert run("fit", "--run_dir", "run", *options) == 0
    saved = checkpoint("run")
    assert saved["global_step"] == (6 if "--trainer.max_epochs" in options else 10)
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())


@pytest.mark.slow
def test_a_check_of_the_recipe_is_no_run(work_dir):
    assert run("fit", "--run_dir", "run", "--trainer.fast_dev_run", "true") == 0
    assert not {"checkpoints", "metrics.jsonl", "report.md"} & {path.name for path in (work_dir / "run").iterdir()}
    assert run("fit", "--run_dir", "run") == 0


def test_precision_reaches_weights_and_state(work_dir):
    assert run("fit", "--run_dir", "run", "--trainer.precision", "bf16-true") == 0
    saved = checkpoint("run")
    assert {tensor.dtype for tensor in saved["state_dict"].values()} == {torch.bfloat16}
    state = saved["optimizer_states"][0]["state"]
    assert {entry["exp_avg"].dtype for entry in state.values()} == {torch.bfloat16}
    assert {entry["exp_avg_sq"].dtype for entry in state.values()} == {torch.float32}


@pytest.mark.slow
def test_activation_checkpointing_changes_nothing_but_memory(work_dir):
    for name, flag in {"plain": "false", "again": "true"}.items():
        assert run("fit", "--run_dir", name, "--model.activation_checkpointing", flag) == 0
    assert_same_state(checkpoint("plain"), checkpoint("again"))


@pytest.mark.slow
def test_compiled_model_trains(work_dir, tolerances):
    """Compilation may take a minute; names of weights stay those of the plain model."""
    for name, flag in {"plain": "false", "compiled": "true"}.items():
        config = config_of(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        assert run("fit", "--run_dir", name, "--model.compile", flag, *config) == 0
    plain, compiled = (read_metrics(name)["train_loss"] for name in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert checkpoint("plain")["state_dict"].keys() == checkpoint("compiled")["state_dict"].keys()


def test_metrics_are_json_lines(work_dir):
    assert run("fit", "--run_dir", "run") == 0
    rows = [json.loads(line) for line in (work_dir / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert all({"step", "time"} <= row.keys() for row in rows)
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)


def test_the_last_step_is_validated_whatever_the_interval(work_dir):
    assert run("fit", "--run_dir", "run", "--trainer.max_steps", 7) == 0
    assert list(read_metrics("run")["val_loss"]) == [5, 7]
    assert "validation loss" in (work_dir / "run" / "report.md").read_text()


@pytest.mark.slow
def test_a_run_without_logging_comes_to_its_end(work_dir):
    assert run("fit", "--run_dir", "run", "--trainer.log_every_n_steps", 0) == 0


@pytest.mark.slow
def test_a_picture_that_fails_costs_no_result(work_dir, monkeypatch):
    def fail(self, folder):
        raise RuntimeError("no picture")

    monkeypatch.setattr(LanguageModel, "pictures", fail)
    with pytest.raises(RuntimeError, match="no picture"):
        run("fit", "--run_dir", "run")
    assert (work_dir / "run" / "result.json").exists()
