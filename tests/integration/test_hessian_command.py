"""`adam-mini hessian` as a user types it, on a recipe that takes a second."""

import base64
import json
import math
import re
import shutil

import pytest
import torch

from lightning_adam_mini.cli.hessian.command import main as hessian
from lightning_adam_mini.cli.hessian.options import parse
from lightning_adam_mini.cli.main import main as command

FUSED = "transformer.h.0.attn.c_attn.weight"
"""Heads of 4 rows of 8 in queries and keys: blocks of 32 elements."""


def run(name, *options):
    assert hessian([name, "tiny.yaml", "--batches", "1", *map(str, options)]) == 0


def result(folder, name):
    return json.loads((folder / name).read_text())


@pytest.mark.slow
def test_js_writes_spectra_pictures_and_a_page(small, caplog):
    run("js", "--steps", 8, "--probes", 2, "--sigma", 0.01, "--whole", "--blocks", "*attn*weight", "*c_fc.weight")
    out = small / "runs/hessian/tiny/js"
    found = result(out, "spectra.json")
    assert sorted(path.name for path in out.iterdir()) == [
        "js.png",
        "report.html",
        "spectra.json",
        "spectra_linear.png",
        "spectra_log.png",
    ]
    names = found["js"]["names"]
    assert names == [name for name in found["blocks"] if name != "the whole model"]
    assert f"model.{FUSED}" in names
    assert found["blocks"]["the whole model"]["parameters"] == found["parameters"]
    assert all(len(start["nodes"]) == 8 for block in found["blocks"].values() for start in block["starts"])
    assert 0 < found["js"]["js0"] < math.log(2)
    assert found["js"]["js0_unnormalized"] == pytest.approx(found["js"]["js0"] / found["js"]["spacing"])
    assert found["hardware"]["threads"] == torch.get_num_threads()
    assert {"recipe", "weights", "seed", "versions", "hardware", "precision", "command"} <= found.keys()
    page = (out / "report.html").read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(picture) for picture in pictures] == [
        (out / f"{name}.png").read_bytes() for name in ("spectra_linear", "spectra_log", "js")
    ]
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "mean divergence" in caplog.text


@pytest.mark.slow
def test_the_spectrum_of_a_head_is_that_of_its_dense_hessian(small):
    run("exact", "--blocks", f"{FUSED}[0]", "--out", "dense")
    run("spectrum", "--blocks", f"{FUSED}[0]", "--steps", 32, "--probes", 1, "--precision", "float64", "--out", "slq")
    dense = torch.load(small / "dense/hessians.pt")[f"model.{FUSED}[0]"]
    values = result(small / "dense", "exact.json")["blocks"][f"model.{FUSED}[0]"]
    (start,) = result(small / "slq", "spectra.json")["blocks"][f"model.{FUSED}[0]"]["starts"]
    eigenvalues = torch.linalg.eigvalsh(dense)
    assert dense.shape == (32, 32)
    assert values["eigenvalues"] == pytest.approx(eigenvalues.tolist(), abs=1e-12)
    # The task's own loss casts logits to float32.
    scale = eigenvalues.abs().max().item()
    assert start["nodes"][-1] == pytest.approx(eigenvalues[-1].item(), abs=1e-4 * scale)
    assert start["nodes"][0] == pytest.approx(eigenvalues[0].item(), abs=1e-4 * scale)
    assert values["asymmetry"] < 1e-6


def test_exact_scores_matrices(small):
    run("exact", "--blocks", "*attn.c_proj.weight", "--out", "dense")
    ((name, found),) = result(small / "dense", "exact.json")["blocks"].items()
    assert name.endswith("c_proj.weight")
    assert found["scores"]["whole"]["share"] == 1
    assert found["scores"]["element"]["blocks"] == 64
    assert found["scores"]["columns x 4"]["expected"] == 0.5


@pytest.mark.slow
def test_a_checkpoint_has_another_spectrum(small, monkeypatch):
    from lightning_adam_mini.tasks.checkpoints.saving import AtomicCheckpointIO

    assert command(["fit", "--config", "tiny.yaml", "--trainer.max_steps", "5"]) == 0
    options = ("--blocks", "*c_fc.weight", "--steps", 4, "--probes", 1, "--out")
    run("spectrum", *options, "fresh")
    run("spectrum", *options, "last", "--ckpt_path", "last")
    run("spectrum", *options, "path", "--ckpt_path", small / "runs/tiny/checkpoints/last.ckpt", "--seed", 1)
    fresh, last, path = (result(small / name, "spectra.json") for name in ("fresh", "last", "path"))
    assert fresh["weights"].startswith("fresh weights, seed 0")
    assert last["weights"] == "weights of step 5, runs/tiny/checkpoints/last.ckpt"
    (block,) = last["blocks"]
    traces = [found["blocks"][block]["trace"] for found in (fresh, last, path)]
    assert len(set(traces)) == 3
    load, averaged = AtomicCheckpointIO.load_checkpoint, {"current_model_state": {}}
    monkeypatch.setattr(AtomicCheckpointIO, "load_checkpoint", lambda *a, **k: load(*a, **k) | averaged)
    run("spectrum", *options, "averaged", "--ckpt_path", "last")
    weights = result(small / "averaged", "spectra.json")["weights"]
    assert weights == "averaged weights of step 5, runs/tiny/checkpoints/last.ckpt"


@pytest.mark.slow
def test_the_configuration_of_a_run_names_its_run(small):
    assert command(["fit", "--config", "tiny.yaml", "--trainer.max_steps", "5", "--run_dir", "mine"]) == 0
    shutil.copy("mine/config.yaml", "copy.yaml")
    options = ("--batches", "1", "--blocks", "*c_fc.weight", "--steps", "4", "--probes", "1")
    assert hessian(["spectrum", "mine/config.yaml", "--ckpt_path", "last", *options]) == 0
    assert hessian(["spectrum", "copy.yaml", "--ckpt_path", "last", "--run_dir", "mine", *options]) == 0
    own, copied = (result(small / f"runs/hessian/{name}/spectrum", "spectra.json") for name in ("mine", "copy"))
    assert own["weights"] == copied["weights"] == "weights of step 5, mine/checkpoints/last.ckpt"
    assert own["blocks"] == copied["blocks"]


@pytest.mark.slow
def test_flash_attention_is_replaced_with_a_note(small, caplog):
    options = ("--blocks", "*c_fc.weight", "--steps", 4, "--probes", 1, "--out")
    run("spectrum", *options, "plain")
    assert "flash_attention_2" not in caplog.text
    run("spectrum", *options, "flash", "--model.attention", "flash_attention_2")
    assert "note: flash_attention_2 has no second derivatives" in caplog.text
    plain, flash = (result(small / name, "spectra.json")["blocks"] for name in ("plain", "flash"))
    assert plain == flash, "the same command finds the same"


def test_threads_are_those_asked_for_and_without_memory_the_recurrence_runs(small, caplog):
    own = torch.get_num_threads()
    options = ("--blocks", "*c_fc.weight", "--steps", 4, "--probes", 1, "--memory", "0", "--out", "found")
    run("spectrum", *options, "--threads", own + 1)
    found = result(small / "found", "spectra.json")
    assert (found["hardware"]["threads"], torch.get_num_threads()) == (own + 1, own)
    assert "three-term recurrence" in caplog.text
    assert found["memory"] == "0"


def test_less_data_than_asked_for_is_noted(small, caplog):
    options = ("--blocks", "*c_fc.weight", "--steps", "2", "--probes", "1", "--data.batch_size", "200")
    assert hessian(["spectrum", "tiny.yaml", "--batches", "1000", "--out", "found", *options]) == 0
    found = result(small / "found", "spectra.json")
    assert found["batches"] < 1000
    assert f"the training data have {found['batches']} batches, fewer than --batches 1000" in caplog.text


@pytest.mark.slow
def test_spectra_outlive_divergences_that_fail(small):
    linear = "the loss is linear in it"

    def loss(task, *_):
        weights = dict(task.named_parameters())
        return weights[f"model.{FUSED}"].sum() + weights["model.transformer.wpe.weight"].square().sum()

    with pytest.MonkeyPatch.context() as patch:
        from lightning_adam_mini.tasks.llm import LanguageModel

        patch.setattr(LanguageModel, "training_step", loss)
        options = ("--blocks", FUSED, "*wpe.weight", "--steps", 4, "--probes", 1, "--scale", "top", "--out", "found")
        with pytest.raises(ValueError, match=r"which is no unit.*; the spectra are in found/spectra\.json"):
            run("js", *options)
    found = result(small / "found", "spectra.json")
    assert found["blocks"][f"model.{FUSED}"]["trace"] == 0, linear
    assert "js" not in found


@pytest.mark.slow
def test_ctrl_c_leaves_no_half_of_a_file(small, monkeypatch):
    from lightning_adam_mini.hessian.operators import HessianOperator

    multiply, calls = HessianOperator.block_products, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return multiply(*args)

    monkeypatch.setattr(HessianOperator, "block_products", interrupted)
    assert command(["hessian", "spectrum", "tiny.yaml", "--steps", "8", "--probes", "1", "--out", "found"]) == 130
    assert len(calls) == 3
    assert list((small / "found").iterdir()) == []


def test_options_of_the_recipe_change_it(small):
    run(
        "spectrum",
        "--blocks",
        "*c_fc.weight",
        "--steps",
        4,
        "--probes",
        1,
        "--model.config",
        '{"n_embd": 4, "n_head": 2, "n_layer": 1}',
    )
    ((_, found),) = result(small / "runs/hessian/tiny/spectrum", "spectra.json")["blocks"].items()
    assert found["parameters"] == 4 * 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["spectra", "tiny.yaml"], "no such command; choose from spectrum, js, exact"),
        (["advise", "tiny.yaml"], "no such command.*; for advice, adam-mini advise RECIPE --source hessian"),
        (["js", "tinny.yaml"], "no recipe of that name"),
        (["js", "tiny.yaml", "--step", "5"], "no option --step; did you mean --steps"),
        (["js", "tiny.yaml", "extra"], "unrecognized arguments: extra"),
        (["js", "tiny.yaml", "--probes", "0"], "--probes 0: at least 1"),
        (["js", "tiny.yaml", "--memory", "much"], "give a number with a unit"),
        (["js", "tiny.yaml", "--sigma", "0"], "a width is positive"),
        (["js", "tiny.yaml", "--sigma", "nan"], "a width is positive"),
        (["js", "tiny.yaml", "--sigma", "inf"], "a width is positive"),
        (["js", "tiny.yaml", "--scale", "tenth", "--steps", "9"], "--steps 10 or more, not 9"),
        (["js", "tiny.yaml", "--threads", "0"], "--threads 0: at least 1"),
        (["js", "--data.batch_size", "8", "tiny.yaml"], "--data.batch_size stands before RECIPE"),
        (["js", "tiny.yaml", "--trainer.max_steps", "3"], "--trainer.max_steps changes nothing here"),
        (["js", "tiny.yaml", "--schedule.warmup=3"], "--schedule.warmup=3 changes nothing here"),
        (["js", "tiny.yaml", "--optimizers.lr", "3"], "no option --optimizers.lr"),
        (["js", "tiny.yaml", "--out", "text.txt"], "this is a file; give a folder"),
        (["js", "tiny.yaml", "--ckpt_path", ""], "--ckpt_path is empty"),
        (["js", "tiny.yaml", "--ckpt_path", "some.ckpt", "--run_dir", "runs/tiny"], "give --ckpt_path last or best"),
        (["js", "tiny.yaml", "--run_dir", "runs/tiny"], "give --ckpt_path"),
        (["js", "tiny.yaml", "--blocks", "*c_fc.weight"], "js compares blocks"),
        (["js", "tiny.yaml", "--ckpt_path", "last"], "no checkpoint in runs/tiny/checkpoints"),
        (["js", "tiny.yaml", "--data.path", "nothing.txt"], "nothing.txt"),
        (["spectrum", "tiny.yaml", "--blocks", "h.0.attn.c_attn.wight"], "did you mean .*c_attn.weight"),
        (["spectrum", "tiny.yaml", "--blocks", "re:("], "not a regular expression"),
        (["spectrum", "tiny.yaml", "--blocks", f"{FUSED}[999]"], "there is no block 999"),
        (["spectrum", "tiny.yaml", "--blocks", f"{FUSED}[0]", "--steps", "33"], r"use at most 32"),
        (["spectrum", "tiny.yaml", "--steps", "100000"], "no matrix has 100000 elements"),
        (["exact", "tiny.yaml", "--memory", "1MB"], "--memory 1MB: a dense Hessian of model.transformer.wte.weight"),
        (["exact", "tiny.yaml", "--memory", "2.3MB", "--blocks", "*mlp.*weight"], "2 blocks take 0.00 GB together"),
    ],
)
def test_bad_input_is_one_line(small, arguments, message):
    with pytest.raises(Exception, match=message) as raised:
        hessian(arguments)
    assert type(raised.value).__name__ in ("ValueError", "ArgumentError", "UsageError")
    assert "\n" not in str(raised.value).strip()
    assert not list(small.rglob("*.json*"))


def test_options_of_the_recipe_may_be_negative():
    arguments = ["--data.seed", "-1", "--optimizer", "AdamW", "--model.config={}", "--seed_everything", "3"]
    options = parse(["js", "tiny.yaml", "--steps", "5", *arguments])
    assert options.recipe_options == arguments
    assert (options.recipe, options.steps, options.memory, options.threads) == ("tiny.yaml", 5, 2**31, None)


def test_a_task_that_steps_by_itself_has_no_hessian(small, monkeypatch):
    from lightning_adam_mini.tasks.llm import LanguageModel

    monkeypatch.setattr(LanguageModel, "automatic_optimization", False)
    with pytest.raises(ValueError, match="LanguageModel steps its optimizers in its training step"):
        run("js")


@pytest.mark.parametrize(
    ("step", "message"),
    [(lambda *_: None, "returns no loss"), (lambda *_: [].pop(), "cannot be computed outside of training: pop from")],
)
def test_a_loss_that_is_no_function_of_a_batch_is_told(small, monkeypatch, step, message):
    from lightning_adam_mini.tasks.llm import LanguageModel

    monkeypatch.setattr(LanguageModel, "training_step", step)
    with pytest.raises(ValueError, match=message):
        run("js")
