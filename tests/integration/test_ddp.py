"""Two processes with half of the batch each train as one process with the whole batch."""

import pytest
import torch

from lightning_adam_mini.tasks.metrics import read_metrics
from tiny_runs import checkpoint, interrupt_in_training, run, start

# Each process has random numbers of its own, so dropout would differ. In double precision, because the gradient of a
# key's bias is zero but for rounding, which Adam divides by its own size.
SAME = [f"--model.config.{name}=0.0" for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")]
SAME += ["--trainer.precision", "64-true"]
TWO = ["--trainer.strategy", "ddp", "--trainer.devices", 2, "--data.batch_size", 4]
ONE = ["--data.batch_size", 8]


@pytest.mark.slow
def test_two_processes_train_as_one(work_dir):
    """Sums of gradients come in another order, so weights agree to rounding: measured 3e-14."""
    process = start("fit", "--config", "tiny.yaml", *SAME, *TWO)
    assert run("fit", "--run_dir", "one", *SAME, *ONE) == 0
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("optimizer state") == 1, "one report"
    assert [path.name for path in (work_dir / "runs").iterdir()] == ["tiny"], "one folder"

    one, two = checkpoint("one"), checkpoint("runs/tiny")
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], weight, rtol=1e-11, atol=1e-11)
    assert two["optimizer_states"][0]["param_groups"] == one["optimizer_states"][0]["param_groups"]
    losses = {name: read_metrics(name)["val_loss"] for name in ("one", "runs/tiny")}
    assert losses["runs/tiny"] == pytest.approx(losses["one"], rel=1e-6)
    assert losses["one"][10] < losses["one"][5], "else nothing was trained"
    # The checkpoint has no trace of the two: one process goes on with it.
    assert run("fit", "--run_dir", "runs/tiny", "--ckpt_path", "last", *SAME, *ONE, "--trainer.max_steps", 12) == 0
    assert read_metrics("runs/tiny")["tokens_per_second"][12] > 0


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both(work_dir):
    options = [*TWO, "--run_dir", "run", "--trainer.max_steps", 100_000]
    process = start("fit", "--config", "tiny.yaml", *options)
    out, err = interrupt_in_training(process, work_dir / "run")
    assert process.returncode == 130, err
    assert out.count("Stopped after step") == 1
    assert "Traceback" not in err
    assert checkpoint("run")["global_step"] > 0
