"""`adam-mini compare` with runs that train: a whole grid, commands that `fit` refuses, and a kill in the middle."""

import csv
import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from lightning_adam_mini.cli.compare import check
from lightning_adam_mini.cli.compare.analysis import load_comparison
from lightning_adam_mini.cli.compare.check import first_error
from lightning_adam_mini.cli.main import main
from tiny_runs import RECIPE, assert_same_state, checkpoint, error_line, start


@pytest.mark.slow
def test_a_grid_from_the_command_to_the_report(work_dir, capsys):
    options = ["--optimizers", "AdamMini:partition_overrides.value=whole", "--lr", "x1", "1e30", "--seeds", "1"]
    assert main(["compare", "tiny.yaml", *options, "--out", "out", "--jobs", "1"]) == 0
    assert "report:" in capsys.readouterr().out
    comparison = load_comparison(Path("out"))
    ((entry,),) = [task.summaries for task in comparison.tasks]
    done, diverged = entry.runs
    assert (done.status, done.lr, diverged.status, diverged.lr) == ("done", 1e-2, "diverged", 1e30)
    assert "not finite" in diverged.message
    assert entry.best_lr == 1e-2
    assert done.value == done.curve[-1].value
    assert [point.step for point in done.curve] == [5, 10]
    assert 0 < done.curve[0].seconds < done.curve[1].seconds
    assert done.costs.optimizer_state_bytes > 0
    assert done.hardware
    assert done.versions
    config = yaml.safe_load((done.folder / "config.yaml").read_text())
    assert config["optimizer"]["init_args"]["partition_overrides"] == {"value": "whole"}
    assert config["seed_everything"] == config["data"]["init_args"]["seed"] == 0
    with Path("out/report.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2


@pytest.mark.slow
def test_what_fit_would_refuse_is_refused_before_any_run(work_dir, capsys):
    options = ["--optimizers", "AdamW", "--lr", "1e-3", "--set", "trainer.max_stepz=3"]
    assert main(["compare", "tiny.yaml", *options, "--out", "out"]) == 1
    assert "with AdamW: there is no option --trainer.max_stepz; did you mean --trainer.max_steps" in error_line(capsys)
    assert not Path("out").exists()
    fit = ["fit", "--config", "tiny.yaml", "--optimizer"]
    good = [
        [*fit, "AdamMini", "--optimizer.partition_overrides.value=whole", "--optimizer.partition_overrides.mlp=row"],
        [*fit, "AdamMini", '--optimizer.partition_overrides={"value":"whole","mlp":"row"}'],
        [*fit, "SGD", "--optimizer.weight_decay=0.0001", "--data.seed=3"],
    ]
    for bad, expected in (
        (["AdamMini", "--optimizer.partition=transfomer"], "'transfomer' is not one of auto, transformer"),
        (["AdamW", "--optimizer.weight_decay=-1"], "weight_decay must be a finite number"),
    ):
        number, error = first_error([*good, [*fit, *bad]], work_dir)
        assert number == len(good), error
        assert expected in error


REFUSED = [
    (["--trainer.max_stps=3"], "there is no option --trainer.max_stps; did you mean --trainer.max_steps?"),
    (["--trainer.max_steps=null"], "trainer.max_steps must be a whole number, not null"),
    (["--trainer.gradient_clip_algorithm=foo"], "`gradient_clip_algorithm` foo is invalid"),
    (["--data.path=nowhere"], "There is no file or folder nowhere"),
    (["--data.context_length=100000"], "too few for one window"),
    (["--model.config.vocab_size=10"], "the model's vocabulary 10"),
    (["--model.config.num_attention_heads=3"], "3 attention heads do not divide the width 32"),
    (["--optimizer.partition_overrides.vale=whole"], "'vale' matches no parameter"),
    (["--optimizer=AdamW", "--optimizer.weight_decay=-1"], "weight_decay must be a finite number"),
    (["--data=lightning_adam_mini.tasks.graph.data.CallGraph"], "LanguageModel takes token windows"),
]


@pytest.mark.slow
def test_the_check_sees_what_a_run_would_meet(work_dir):
    fit = ["fit", "--config", "tiny.yaml"]
    for options, expected in REFUSED:
        assert expected in check._error_of([*fit, *options], set()), options
    seen = set()
    assert (
        check._error_of(fit, seen)
        == check._error_of([*fit, "--optimizer=SGD", "--optimizer.weight_decay=0"], seen)
        == ""
    )
    assert seen == {"tiny.yaml"}
    assert not Path("runs").exists()


def test_an_unexpected_error_of_the_check_surfaces(work_dir, monkeypatch, capsys):
    def fail(command, seen):
        raise KeyError("lost")

    monkeypatch.setattr(check, "_set_up", fail)
    error = check._error_of(["fit", "--config", "tiny.yaml"], set())
    assert error.startswith("Traceback")
    answer = subprocess.CompletedProcess([], 0, stdout=json.dumps(["", error]), stderr="")
    monkeypatch.setattr(check.subprocess, "run", lambda *arguments, **options: answer)
    assert first_error([[], []], work_dir) == (1, "the check of its command failed with an unexpected KeyError: 'lost'")
    assert 'raise KeyError("lost")' in capsys.readouterr().err


def test_data_that_take_long_to_prepare_are_there(work_dir, monkeypatch):
    monkeypatch.setattr(check, "PATIENCE", 0.2)
    monkeypatch.setattr("lightning_adam_mini.tasks.llm.data.TextFiles.prepare_data", lambda data: time.sleep(60))
    began = time.monotonic()
    assert check._error_of(["fit", "--config", "tiny.yaml"], set()) == ""
    assert time.monotonic() - began < 50


@pytest.mark.slow
def test_a_dry_run_refuses_what_the_start_refuses(work_dir, capsys):
    options = ["--optimizers", "AdamW", "--lr", "1e-3", "--set", "data.path=nowhere", "--dry-run"]
    assert main(["compare", "tiny.yaml", *options, "--out", "out"]) == 1
    assert "with AdamW: There is no file or folder nowhere" in error_line(capsys)
    assert not Path("out").exists()


@pytest.mark.slow
def test_a_kill_in_the_middle_changes_no_result(work_dir):
    trainer = {"max_steps": 100, "val_check_interval": 50, "log_every_n_steps": 1}
    Path("tiny.yaml").write_text(yaml.safe_dump(RECIPE | {"trainer": RECIPE["trainer"] | trainer}), "utf-8")
    options = ["tiny.yaml", "--optimizers", "AdamMini", "--lr", "1e-3", "--seeds", "1", "--jobs", "1"]
    place = Path("tiny/AdamMini/lr_1e-3/seed_0")
    process = start("compare", *options, "--out", "out")
    deadline = time.monotonic() + 300
    while not (Path("out") / place / "metrics.jsonl").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (Path("out") / place / "result.json").exists(), "killed before the run was over"

    assert main(["compare", "--out", "out"]) == 0
    status = json.loads((Path("out") / place / "status.json").read_text())
    assert (status["status"], status["starts"]) == ("done", 2)
    assert "--ckpt_path=last" in status["command"], "the run has seen the end of its comparison, and saved a checkpoint"
    assert "Stopped after step" in (Path("out") / place / "log.txt").read_text()
    assert main(["compare", *options, "--out", "whole"]) == 0
    assert_same_state(checkpoint(Path("out") / place), checkpoint(Path("whole") / place))
