"""From the folders of the runs to the comparison, against figures worked out by hand."""

import json
from pathlib import Path

import pytest
import yaml

from lightning_adam_mini.cli.compare import command
from lightning_adam_mini.cli.compare.assemble import best_learning_rates, load_comparison
from lightning_adam_mini.cli.compare.comparison import Costs, Estimate
from lightning_adam_mini.cli.compare.grid import Run, expand
from lightning_adam_mini.cli.compare.plan import Plan, write_plan
from lightning_adam_mini.cli.main import main
from tiny_runs import RECIPE, error_line


class Folder:
    """A comparison whose runs are written by hand."""

    def __init__(self, path, **plan):
        self.path = path
        recipe = path / "tiny.yaml"
        recipe.write_text("# A tiny one.\n" + yaml.safe_dump(RECIPE), "utf-8")
        self.recipe = str(recipe)
        settings = {"recipes": (self.recipe,), "optimizers": ("AdamW", "AdamMini"), "lrs": ("1e-3", "3e-3")}
        self.plan = Plan(**settings | {"seeds": (0, 1), "command": ("adam-mini", "compare")} | plan)
        write_plan(self.plan, path)
        self.grid = expand(self.plan)

    def write(self, optimizer, lr, seed, curve=(), status="done", *, mode="min", message="", **costs):
        """A run; its curve has a value every 10 steps of a second each."""
        folder = self.path / self.grid.folder(Run(self.recipe, optimizer, lr, seed))
        folder.mkdir(parents=True)
        (folder / "status.json").write_text(json.dumps({"status": status, "message": message, "wall_seconds": 9.0}))
        rows = [
            {"step": 10 * place, "time": 0.0, "val_top1": value, "training_seconds": 1.0 * place}
            for place, value in enumerate(curve, 1)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if status == "done":
            headline = {"metric": "val_top1", "mode": mode, "label": "accuracy", "curve": "val_top1"}
            result = {"steps": 10 * len(curve), "headline": headline | {"value": curve[-1]}, "metrics": {}}
            result |= {
                "costs": {"unit": "images", **costs},
                "hardware": {"cpu": "x"},
                "versions": {"torch": f"2.{seed}"},
            }
            (folder / "result.json").write_text(json.dumps(result))

    def load(self):
        (task,) = load_comparison(self.path).tasks
        return task


def test_all_figures_of_a_task(tmp_path):
    folder = Folder(tmp_path)
    for seed, last in enumerate((0.6, 0.8)):
        folder.write("AdamW", 1e-3, seed, (0.1, 0.2), mode="max")
        folder.write("AdamW", 3e-3, seed, (0.5, last), mode="max", step_milliseconds=2.0 + seed, parameter_bytes=40.0)
        folder.write("AdamMini", 1e-3, seed, (0.7, 0.9 + seed / 100), mode="max", step_milliseconds=5.0)
        folder.write("AdamMini", 3e-3, seed, (0.1, 0.1), mode="max")
    task = folder.load()
    adamw, mini = task.entries
    assert (task.title, task.unit, task.headline.mode, task.headline.label) == (
        "A tiny one.",
        "images",
        "max",
        "accuracy",
    )
    assert (adamw.best_lr, mini.best_lr) == (3e-3, 1e-3)
    assert task.target == pytest.approx(0.7)
    assert adamw.final == Estimate(pytest.approx(0.7), pytest.approx(0.02**0.5), 2)
    assert dict(adamw.steps_to_target.by_seed) == {0: None, 1: 20}
    assert adamw.steps_to_target.median is None, "half of its own seeds never reach their mean"
    assert dict(mini.steps_to_target.by_seed) == {0: 10, 1: 10}
    assert (mini.steps_to_target.median, mini.seconds_to_target.median) == (10, 1.0)
    assert adamw.costs.step_milliseconds == 2.5
    assert (mini.ratios.step_milliseconds, mini.ratios.peak_memory_bytes) == (2.0, None)
    assert adamw.verdict.word == "reference"
    assert mini.verdict.difference == pytest.approx(0.205)
    assert mini.verdict.word == "within the spread", "two seeds of 0.6 and 0.8"
    assert dict(mini.lrs[1e-3].values) == {0: 0.9, 1: 0.91}
    assert mini.lrs[3e-3].tuning == Estimate(0.1, 0.0, 2)
    assert [run.seed for run in mini.best_runs] == [0, 1]


def test_profiles_machine_and_versions_of_a_comparison(tmp_path):
    folder = Folder(tmp_path, lrs=("1e-3",))
    for seed in (0, 1):
        folder.write("AdamW", 1e-3, seed, (3.0, 2.0))
        folder.write("AdamMini", 1e-3, seed, (2.0, 1.0))
    found = load_comparison(tmp_path)
    adamw, mini = found.profiles["steps"]
    assert (adamw.factors[folder.recipe], mini.factors[folder.recipe]) == (2.0, 1.0)
    assert found.hardware == ({"cpu": "x"},)
    assert found.versions == {"torch": "2.0, 2.1"}
    assert found.statuses == {"done": 4}
    assert (found.reference, found.seeds, found.tuning_seeds) == ("AdamW", (0, 1), (0, 1))


def test_a_learning_rate_at_which_a_seed_diverged_is_not_the_best(tmp_path):
    folder = Folder(tmp_path)
    for seed in (0, 1):
        folder.write("AdamW", 1e-3, seed, (3.0,))
        folder.write("AdamMini", 1e-3, seed, status="failed", message="it cannot")
        folder.write("AdamMini", 3e-3, seed, status="failed", message="it cannot")
    folder.write("AdamW", 3e-3, 0, (1.0,))
    folder.write("AdamW", 3e-3, 1, status="diverged", message="not finite")
    adamw, mini = folder.load().entries
    assert adamw.best_lr == 1e-3
    assert (adamw.lrs[3e-3].eligible, adamw.lrs[3e-3].tuning) == (False, Estimate(1.0, None, 1))
    assert dict(adamw.lrs[3e-3].statuses) == {0: "done", 1: "diverged"}
    assert (mini.best_lr, mini.final, mini.message) == (None, None, "it cannot")
    assert mini.verdict.text == "no result: no verdict"
    assert len(mini.runs) == 4, "rows, not gaps"
    assert best_learning_rates(folder.grid, tmp_path) == {(folder.recipe, "AdamW"): 1e-3}


def test_a_seed_that_is_lost_at_the_best_learning_rate_takes_the_verdict(tmp_path):
    folder = Folder(tmp_path, seeds=(0, 1, 2), num_tuning_seeds=1)
    for seed in (0, 1, 2):
        folder.write("AdamW", 1e-3, seed, (3.0 + seed / 100,))
    folder.write("AdamMini", 1e-3, 0, (1.0,))
    folder.write("AdamMini", 1e-3, 1, (1.1,))
    folder.write("AdamMini", 1e-3, 2, status="diverged", message="not finite")
    for optimizer in ("AdamW", "AdamMini"):
        folder.write(optimizer, 3e-3, 0, (5.0,))
    adamw, mini = folder.load().entries
    assert len(adamw.runs) == 4, "the other seeds ran at the best learning rate alone"
    assert mini.final.n == 2
    assert mini.verdict.text == "1 seed did not come to an end: no verdict"
    assert mini.message == "seed 2 diverged: not finite"
    assert adamw.lrs[1e-3].tuning == Estimate(3.0, None, 1), "chosen on the first seed alone"


def test_one_seed_gives_no_verdict(tmp_path):
    folder = Folder(tmp_path, seeds=(0,), lrs=("1e-3",))
    folder.write("AdamW", 1e-3, 0, (2.0,))
    folder.write("AdamMini", 1e-3, 0, (1.0,))
    _, mini = folder.load().entries
    assert (mini.verdict.text, mini.verdict.difference) == ("one seed: no verdict", -1.0)


def test_a_grid_that_has_not_begun(tmp_path):
    task = Folder(tmp_path).load()
    assert task.target is None
    for entry in task.entries:
        assert {run.status for run in entry.runs} == {"pending"}
        assert (entry.best_lr, entry.final, entry.message) == (None, None, "no run has come to its end")
        assert entry.costs == Costs()


def test_a_best_learning_rate_at_the_edge_is_told(tmp_path):
    folder = Folder(tmp_path, seeds=(0,), lrs=("1e-3", "2e-3", "3e-3"))
    for place, lr in enumerate((1e-3, 2e-3, 3e-3)):
        folder.write("AdamW", lr, 0, (1.0 + place,))
        folder.write("AdamMini", lr, 0, (1.0 + abs(place - 1),))
    adamw, mini = folder.load().entries
    assert adamw.message == "its best learning rate is the smallest of those tried: a better one may lie beyond"
    assert mini.message == ""


def test_predicted_memory_is_parameters_gradients_and_state():
    assert Costs(parameter_bytes=40.0, predicted_state_bytes=50.0).predicted_memory_bytes == 130.0
    assert Costs(parameter_bytes=40.0).predicted_memory_bytes is None


def test_report_alone(tmp_path, capsys):
    folder = Folder(tmp_path, lrs=("1e-3",))
    for seed in (0, 1):
        folder.write("AdamW", 1e-3, seed, (3.0 + seed / 10, 2.0 + seed / 10))
    folder.write("AdamMini", 1e-3, 0, (2.0, 1.0))
    folder.write("AdamMini", 1e-3, 1, status="failed", message="it cannot")
    assert main(["report", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert "1 of 4 runs have no result: 1 failed" in told
    for name in ("report.html", "report.md", "report.csv"):
        assert (tmp_path / name).stat().st_size > 0
    (tmp_path / "report.md").unlink()
    assert main(["compare", "--report-only", "--out", str(tmp_path)]) == 1
    assert (tmp_path / "report.md").exists()


def test_report_of_nothing(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "holds no comparison: there is no plan.json" in error_line(capsys)
    assert command.report is not None
    assert not list(Path(tmp_path).iterdir())
