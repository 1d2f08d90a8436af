"""Runs of `adam-mini` that take a second: their text, their recipe, and what they leave in their folder."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

WORDS = ("the cat", "a dog", "one bird", "saw", "ate", "likes", "a mouse", "the fish", "some corn", "today", "again")

RECIPE = {
    "seed_everything": 0,
    "model": {
        "class_path": "lightning_adam_mini.tasks.llm.LanguageModel",
        "init_args": {
            "architecture": "gpt2",
            "config": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": 64,
            },
            "sample_prompt": "the cat",
            "sample_tokens": 4,
        },
    },
    "data": {
        "class_path": "lightning_adam_mini.tasks.llm.data.TextFiles",
        "init_args": {"path": "text.txt", "vocab_size": 280, "context_length": 16, "batch_size": 4, "val_tokens": 320},
    },
    "optimizer": {"class_path": "lightning_adam_mini.factory.AdamMini", "init_args": {"lr": 1.0e-2}},
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 10,
        "val_check_interval": 5,
        "check_val_every_n_epoch": None,
        "gradient_clip_val": 1.0,
        "log_every_n_steps": 2,
        "enable_progress_bar": False,
    },
}


def write_text(path, num_sentences=600):
    """Sentences over a few words, in lines of one sentence: a model learns them in a few steps."""
    draw = random.Random(0)
    path.write_text("".join(" ".join(draw.choices(WORDS, k=5)) + ".\n" for _ in range(num_sentences)), "utf-8")
    return path


def write_recipe(folder, **sections):
    """`tiny.yaml` in a folder, with sections of the recipe replaced, and its text beside it."""
    if not (folder / "text.txt").exists():
        write_text(folder / "text.txt")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(RECIPE | sections), "utf-8")


def run(command, *options, config="tiny.yaml"):
    """The exit code of `adam-mini COMMAND --config tiny.yaml OPTIONS` in this process; options may be numbers."""
    from lightning_adam_mini.cli.main import main

    return main([command, "--config", config, *map(str, options)])


def start(*arguments, **options):
    """`adam-mini ARGUMENTS` as a process of its own."""
    command = [sys.executable, "-m", "lightning_adam_mini.cli.main", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def interrupt_in_training(process, run_dir):
    """Send Ctrl-C to a process of `start` once it has logged a step; what it printed, by the time it has ended."""
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    return process.communicate(timeout=60)


def checkpoint(run_dir, name="last"):
    from lightning_adam_mini.tasks import base  # noqa: F401 - names the classes that checkpoints hold

    return torch.load(Path(run_dir) / "checkpoints" / f"{name}.ckpt", weights_only=True)


def assert_same_state(one, other):
    """Weights, optimizer state, schedule and step of two checkpoints are equal to the last bit."""
    assert one["global_step"] == other["global_step"]
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        _assert_equal(one[part], other[part], part)


def _assert_equal(one, other, where):
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            _assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            _assert_equal(a, b, f"{where}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def error_line(capsys):
    """The one line that tells an error; there must be no traceback."""
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("adam-mini: error: ")]
    assert "Traceback" not in err, err
    return line
