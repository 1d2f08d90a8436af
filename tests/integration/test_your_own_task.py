"""The guide "A task of your own" is the example in full, and the example runs."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning.pytorch")  # its log goes where errors went when it was imported: not into a test's

from checkout import ROOT
from lightning_adam_mini.cli.main import main

EXAMPLE = ROOT / "examples" / "time_series"
GUIDE = (ROOT / "docs" / "your_own_task.md").read_text("utf-8")


@pytest.fixture
def example(tmp_path, monkeypatch):
    """A copy of the example, in which the commands of the guide run."""
    monkeypatch.chdir(shutil.copytree(EXAMPLE, tmp_path / "time_series"))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield
    sys.modules.pop("forecaster", None)


def test_the_guide_shows_all_of_the_example():
    code = [block.strip() for block in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)]
    source = (EXAMPLE / "forecaster.py").read_text("utf-8")
    assert "\n\n\n".join(code) == source.partition('"""\n\n')[2].strip()
    lines = [line for line in source.splitlines()[1:] if line and not line.startswith("#")]
    assert len(lines) < 60
    (recipe,) = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
    assert (EXAMPLE / "passengers.yaml").read_text("utf-8").endswith(f"\n{recipe}")


def test_the_example_trains_and_resumes_exactly(example, capsys):
    short = [
        "--config",
        "passengers.yaml",
        "--trainer.val_check_interval",
        "7",
        "--trainer.enable_progress_bar",
        "false",
    ]
    assert main(["explain", "passengers.yaml"]) == 0
    assert "position_embedding" in capsys.readouterr().out
    assert main(["fit", *short, "--run_dir", "whole", "--trainer.max_steps", "14", "--schedule.horizon", "14"]) == 0
    assert main(["fit", *short, "--run_dir", "run", "--trainer.max_steps", "7", "--schedule.horizon", "14"]) == 0
    again = ["--run_dir", "run", "--ckpt_path", "last", "--trainer.max_steps", "14", "--schedule.horizon", "14"]
    assert main(["fit", *short, *again]) == 0
    losses = [json.loads(Path(run, "result.json").read_text())["primary_metric"]["value"] for run in ("whole", "run")]
    assert losses[0] == losses[1] < 0.1


@pytest.mark.slow
def test_the_example_is_compared(example):
    options = ["--optimizers", "AdamMini", "--lr", "3e-3", "--seeds", "1", "--set", "trainer.max_steps=4"]
    assert main(["compare", "passengers.yaml", *options, "--out", "comparison"]) == 0
    assert "AdamMini" in Path("comparison/report.md").read_text("utf-8")
