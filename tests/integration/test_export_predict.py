"""`adam-mini export` and `predict`: the trained model outside of the project, and its own words."""

import json
import shutil

import pytest
import torch

import tiny_runs
from lightning_adam_mini.cli.main import main
from tiny_runs import checkpoint, error_line, run

GREEDY = ["--model.temperature", 0]
LLAMA = ["--model.architecture=llama", "--model.config.num_key_value_heads=2", "--model.config.intermediate_size=48"]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, prepared_data):
    folder = tmp_path_factory.mktemp("runs")
    tiny_runs.write_recipe(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_ADAM_MINI_CACHE", str(prepared_data))
        patch.chdir(folder)
        assert run("fit", "--run_dir", "run", "--trainer.max_steps", 30) == 0
    return folder / "run"


@pytest.fixture
def run_dir(work_dir, finished_run):
    """A finished run in the folder `run`."""
    return shutil.copytree(finished_run, work_dir / "run")


def logits(model, ids):
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


def trained(run_dir, architecture="gpt2"):
    """The model of a run, put together by hand from its checkpoint."""
    transformers = pytest.importorskip("transformers")
    saved = checkpoint(run_dir)
    options = saved["hyper_parameters"]["config"]
    weights = {name.removeprefix("model."): tensor for name, tensor in saved["state_dict"].items()}
    config = transformers.AutoConfig.for_model(architecture, vocab_size=len(weights["lm_head.weight"]), **options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_exported_model_is_the_trained_one(work_dir, request, capsys, architecture):
    transformers = pytest.importorskip("transformers")
    if architecture == "llama":
        assert run("fit", "--run_dir", "run", *LLAMA) == 0
    else:
        request.getfixturevalue("run_dir")
    assert main(["export", "run"]) == 0
    assert "exported to run/hf" in capsys.readouterr().out
    folder = work_dir / "run" / "hf"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "the cat saw a dog, Ünïcode 🐱\n"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(model, ids), logits(trained("run", architecture), ids))
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert not list(work_dir.rglob("*.tmp"))


def test_export_overwrites_nothing(work_dir, run_dir, capsys):
    (work_dir / "mine").mkdir()
    assert main(["export", "run", "--out", "mine"]) == 1
    assert "mine exists; choose another folder for the export, or remove it" in error_line(capsys)
    assert not list((work_dir / "mine").iterdir())
    assert main(["export", "run", "--out", "deep/er", "--ckpt_path", "best"]) == 0
    assert (work_dir / "deep" / "er" / "model.safetensors").is_file()


@pytest.mark.slow
def test_export_after_a_second_start_and_on_another_machine(work_dir):
    """Neither the options of that start nor its accelerator and precision belong to the model."""
    bf16 = ["--trainer.precision", "bf16-true"]
    assert run("fit", "--run_dir", "run", *bf16) == 0
    assert run("fit", "--run_dir", "run", "--ckpt_path", "last", "--trainer.max_steps", 12, *bf16) == 0
    config = work_dir / "run" / "config.yaml"
    config.write_text(config.read_text("utf-8").replace("accelerator: cpu", "accelerator: cuda"), "utf-8")
    assert main(["export", "run"]) == 0
    model = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained("run/hf")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.float(), checkpoint("run")["state_dict"][f"model.{name}"].float()), name


def test_a_run_starts_from_an_exported_model(work_dir, run_dir):
    assert main(["export", "run"]) == 0
    still = ["--optimizer", "SGD", "--optimizer.lr", 0, "--optimizer.weight_decay", 0, "--trainer.max_steps", 1]
    assert run("fit", "--run_dir", "next", "--model.init_from", "run/hf", *still) == 0
    before, after = (checkpoint(name)["state_dict"] for name in ("run", "next"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_weights_are_taken_in_the_precision_of_the_trainer(work_dir):
    assert run("fit", "--run_dir", "half", "--trainer.precision", "bf16-true") == 0
    assert main(["export", "half"]) == 0
    transformers = pytest.importorskip("transformers")
    transformers.AutoModelForCausalLM.from_pretrained("half/hf").bfloat16().save_pretrained("bf16")
    for precision, dtype in {"32-true": torch.float32, "bf16-true": torch.bfloat16}.items():
        assert run("fit", "--run_dir", precision, "--model.init_from", "bf16", "--trainer.precision", precision) == 0
        assert {tensor.dtype for tensor in checkpoint(precision)["state_dict"].values()} == {dtype}


def test_the_folder_must_fit_the_data(work_dir, run_dir, capsys):
    assert main(["export", "run"]) == 0
    options = ["--model.init_from", "run/hf", "--data.vocab_size", 300]
    assert run("fit", "--run_dir", "next", *options) == 1
    assert "the data have 300 tokens, the model's vocabulary 280" in error_line(capsys)


@pytest.mark.slow
def test_predictions(work_dir, run_dir, capsys):
    before = (work_dir / "run" / "metrics.jsonl").read_bytes()
    prompts = ["--data.prompts", '["the cat", "", "a dog likes"]', "--model.sample_tokens", 8]
    written = []
    for sampling in (GREEDY, GREEDY, ["--model.temperature", 5.0]):
        options = ["--run_dir", "run", "--ckpt_path", "last", *prompts, *sampling]
        assert run("predict", *options) == 0
        written.append((work_dir / "run" / "predictions.jsonl").read_text("utf-8"))
        (work_dir / "text.txt").unlink(missing_ok=True)  # no more is needed: the checkpoint has the tokenizer
    assert written[0] == written[1], "the most likely tokens are always the same"
    assert written[0] != written[2]
    rows = [json.loads(line) for line in written[0].splitlines()]
    assert [row["prompt"] for row in rows] == ["the cat", "", "a dog likes"]
    assert all(row["continuation"] for row in rows)
    assert " predictions: run/predictions.jsonl" in capsys.readouterr().out
    assert (work_dir / "run" / "metrics.jsonl").read_bytes() == before

    model = trained("run").eval()
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(exported(work_dir))
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    expected = model.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=0, eos_token_id=0)
    assert rows[0]["continuation"] == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)


def exported(work_dir):
    assert main(["export", "run"]) == 0
    return work_dir / "run" / "hf"


@pytest.mark.slow
def test_sampling_depends_on_the_seed_alone(work_dir, run_dir):
    written = []
    for seed in (1, 1, 2):
        assert run("predict", "--run_dir", "run", "--ckpt_path", "last", "--seed_everything", seed) == 0
        written.append((work_dir / "run" / "predictions.jsonl").read_text("utf-8"))
    assert written[0] == written[1] != written[2]


def test_prompts_longer_than_the_model(work_dir, run_dir):
    prompt = json.dumps(["the cat saw a dog " * 40])
    options = ["--data.prompts", prompt, "--model.sample_tokens", 200]
    assert run("predict", "--run_dir", "run", "--ckpt_path", "last", *options, *GREEDY) == 0
    (row,) = (work_dir / "run" / "predictions.jsonl").read_text("utf-8").splitlines()
    assert json.loads(row)["continuation"]
