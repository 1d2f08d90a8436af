"""LLaMA-Factory's `use_adam_mini: true` with our class in place of the authors'."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("llamafactory")
transformers = pytest.importorskip("transformers")

from checkout import ROOT  # noqa: E402
from lightning_adam_mini import AdamMini  # noqa: E402
from pages import read_page  # noqa: E402

pytestmark = pytest.mark.slow
PAGE = read_page((ROOT / "docs" / "use" / "llamafactory.md").read_text("utf-8"))


def call(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def folder(tmp_path):
    for name, text in PAGE.files.items():
        (tmp_path / name).write_text(text, "utf-8")
    call(tmp_path, "prepare.py")
    return tmp_path


def train(folder, out, *options):
    call(folder, "train.py", "config.yaml", f"output_dir={out}", "save_strategy=epoch", *options)
    saved = sorted((folder / out).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))[-1]
    model = transformers.LlamaForCausalLM.from_pretrained(saved)
    return model, torch.load(saved / "optimizer.pt", weights_only=True)


def test_llamafactory_trains_with_the_partition_of_the_model_and_resumes(folder):
    model, state = train(folder, "whole")
    kept = sum(each["exp_avg_sq"].numel() for each in state["state"].values())
    assert kept == sum(found.blocks.num_values for found in AdamMini(model).partition.values())
    assert {each["step"].item() for each in state["state"].values()} == {10}

    half = ("num_train_epochs=2", "max_steps=10")
    train(folder, "parts", *half)
    (folder / "parts" / "checkpoint-10").rename(folder / "gone")
    resumed, again = train(folder, "parts", *half, "resume_from_checkpoint=parts/checkpoint-5")
    assert {each["step"].item() for each in again["state"].values()} == {10}
    for (name, one), other in zip(model.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_adapters_of_queries_train(folder):
    out = ("output_dir=adapters", "finetuning_type=lora", "save_strategy=epoch", "max_steps=1")
    call(folder, "train.py", "config.yaml", *out)
    state = torch.load(folder / "adapters" / "checkpoint-1" / "optimizer.pt", weights_only=True)["state"]
    # One second moment an output neuron, of ranks and of outputs.
    assert all(each["exp_avg_sq"].shape == (each["exp_avg"].shape[0], 1) for each in state.values())
    assert state
