"""From the folders of the runs to the comparison, against values worked out by hand."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lightning_adam_mini.cli.compare.analysis import best_learning_rates, load_comparison
from lightning_adam_mini.cli.compare.grid import Run, copy_of, expand
from lightning_adam_mini.cli.compare.notes import notes_of
from lightning_adam_mini.cli.compare.run_records import Costs
from lightning_adam_mini.cli.compare.spec import ComparisonPlan, write_plan
from lightning_adam_mini.cli.compare.stats import MeanStd
from lightning_adam_mini.cli.main import main
from tiny_runs import RECIPE, error_line


class Folder:
    """A comparison whose runs are written by hand."""

    def __init__(self, path, **plan):
        self.path = path
        path.mkdir(exist_ok=True)
        recipe = path / "tiny.yaml"
        recipe.write_text("# A tiny one.\n" + yaml.safe_dump(RECIPE), "utf-8")
        self.recipe = str(recipe)
        settings = {"recipes": (self.recipe,), "optimizers": ("AdamW", "AdamMini"), "lrs": ("1e-3", "3e-3")}
        self.plan = ComparisonPlan(**settings | {"seeds": (0, 1), "command": ("adam-mini", "compare")} | plan)
        write_plan(self.plan, path)
        self.grid = expand(self.plan)

    def write(
        self,
        optimizer,
        lr,
        seed,
        curve=(),
        status="done",
        *,
        mode="min",
        message="",
        more_status=None,
        result=None,
        **costs,
    ):
        """A run; its curve has a value every 10 steps of a second each.

        `more_status` goes to `status.json`, and `result` to `result.json`, in its primary metric and by its own keys.
        """
        folder = self.path / self.grid.folder(Run(self.recipe, optimizer, lr, seed))
        folder.mkdir(parents=True)
        word = {"status": status, "message": message, "wall_seconds": 9.0}
        (folder / "status.json").write_text(json.dumps(word | (more_status or {})))
        rows = [
            {"step": 10 * place, "time": 0.0, "val_top1": value, "training_seconds": 1.0 * place}
            for place, value in enumerate(curve, 1)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if status == "done":
            primary_metric = {"metric": "val_top1", "mode": mode, "label": "accuracy", "curve": "val_top1"}
            content = {
                "steps": 10 * len(curve),
                "primary_metric": primary_metric | {"value": curve[-1]} | (result or {}).get("primary_metric", {}),
                "costs": {"unit": "images", **costs},
                "hardware": {"cpu": "x"},
                "versions": {"torch": f"2.{seed}"},
            }
            others = {name: value for name, value in (result or {}).items() if name != "primary_metric"}
            (folder / "result.json").write_text(json.dumps(content | others))

    def load(self):
        (task,) = load_comparison(self.path).tasks
        return task


def test_all_values_of_a_task(tmp_path):
    folder = Folder(tmp_path)
    for seed, last in enumerate((0.6, 0.8)):
        folder.write("AdamW", 1e-3, seed, (0.1, 0.2), mode="max")
        folder.write("AdamW", 3e-3, seed, (0.5, last), mode="max", step_milliseconds=2.0 + seed, parameter_bytes=40.0)
        folder.write("AdamMini", 1e-3, seed, (0.7, 0.9 + seed / 100), mode="max", step_milliseconds=5.0)
        folder.write("AdamMini", 3e-3, seed, (0.1, 0.1), mode="max")
    task = folder.load()
    adamw, mini = task.summaries
    assert (task.title, task.primary_metric.mode, task.primary_metric.label) == ("A tiny one.", "max", "accuracy")
    assert task.primary_metric.curve_label == "accuracy", "a result.json of before has no label of the curve"
    assert (adamw.best_lr, mini.best_lr) == (3e-3, 1e-3)
    assert task.target == 0.6, "the worse of two"
    assert adamw.final == MeanStd(pytest.approx(0.7), pytest.approx(0.02**0.5), 2)
    assert dict(adamw.steps_to_target.by_seed) == {0: 20, 1: 20}
    assert adamw.steps_to_target.median == 20
    assert dict(mini.steps_to_target.by_seed) == {0: 10, 1: 10}
    assert (mini.steps_to_target.median, mini.seconds_to_target.median) == (10, 1.0)
    assert adamw.costs.step_milliseconds == 2.5
    assert (mini.ratios.step_milliseconds, mini.ratios.peak_memory_bytes) == (2.0, None)
    assert adamw.verdict.word == "reference"
    assert mini.verdict.difference == pytest.approx(0.205)
    assert mini.verdict.word == "within the spread", "two seeds of 0.6 and 0.8"
    assert dict(mini.lrs[1e-3].values) == {0: 0.9, 1: 0.91}
    assert mini.lrs[3e-3].tuning == MeanStd(0.1, 0.0, 2)
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
    adamw, mini = folder.load().summaries
    assert adamw.best_lr == 1e-3
    assert (adamw.lrs[3e-3].eligible, adamw.lrs[3e-3].tuning) == (False, MeanStd(1.0, None, 1))
    assert dict(adamw.lrs[3e-3].statuses) == {0: "done", 1: "diverged"}
    assert (mini.best_lr, mini.final, mini.message) == (None, None, "it cannot")
    assert (mini.verdict.word, mini.verdict.text) == ("failed", "every run failed")
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
    adamw, mini = folder.load().summaries
    assert len(adamw.runs) == 4, "the other seeds ran at the best learning rate only"
    assert mini.final.n == 2
    assert mini.verdict.text == "1 seed did not finish: no verdict"
    assert mini.message == "seed 2 diverged: not finite"
    assert adamw.lrs[1e-3].tuning == MeanStd(3.0, None, 1), "chosen on the first seed only"


def test_learning_rates_are_chosen_on_validation_where_the_primary_metric_is_a_test_metric(tmp_path):
    folder = Folder(tmp_path)
    for seed in (0, 1):
        for optimizer in ("AdamW", "AdamMini"):
            # The test is better at 3e-3, the validation at 1e-3.
            for lr, test, validation in ((1e-3, 0.5, 0.8), (3e-3, 0.6, 0.7)):
                metric = {"metric": "test", "value": test + seed / 100, "selection": validation + seed / 100}
                metric["curve_label"] = "validation accuracy"
                folder.write(optimizer, lr, seed, (0.1, validation), mode="max", result={"primary_metric": metric})
    task = folder.load()
    adamw, _ = task.summaries
    assert best_learning_rates(folder.grid, tmp_path)[folder.recipe, "AdamW"] == adamw.best_lr == 1e-3
    assert adamw.lrs[1e-3].tuning.mean == pytest.approx(0.805)
    assert adamw.final.mean == pytest.approx(0.505), "the primary metric itself is compared"
    assert task.selection_differs
    assert task.target == 0.8, "of the curve"
    assert (task.primary_metric.label, task.primary_metric.curve_label) == ("accuracy", "validation accuracy")


def test_a_run_without_the_metric_that_chooses_is_not_chosen_by_its_test_metric(tmp_path):
    folder = Folder(tmp_path, seeds=(0,), optimizers=("AdamW",))
    folder.write("AdamW", 1e-3, 0, (0.5,), result={"primary_metric": {"selection": None}})
    folder.write("AdamW", 3e-3, 0, (0.9,), result={"primary_metric": {"selection": 0.9}})
    assert best_learning_rates(folder.grid, tmp_path) == {(folder.recipe, "AdamW"): 3e-3}


@pytest.mark.parametrize("status", ["failed", "timeout", "interrupted", "pending"])
@pytest.mark.parametrize("loser", ["AdamW", "AdamMini"])
def test_a_tuning_run_that_was_lost_to_the_machine_is_reported_and_takes_the_verdict(tmp_path, status, loser):
    folder = Folder(tmp_path)
    for seed in (0, 1):
        for optimizer, value in (("AdamW", 3.0), ("AdamMini", 1.0)):
            folder.write(optimizer, 1e-3, seed, (value + seed / 100,))
            lost = optimizer == loser and seed == 1
            folder.write(optimizer, 3e-3, seed, (0.5 * value,), status if lost else "done")
    adamw, mini = folder.load().summaries
    word = {"timeout": "ran out of time", "interrupted": "was interrupted", "pending": "is pending"}.get(status, status)
    message = f"lr 3e-3 was left out: seed 1 {word}"
    assert adamw.message == (message if loser == "AdamW" else "")
    assert mini.message == (message if loser == "AdamMini" else f"AdamW's {message}")
    assert (adamw.best_lr, mini.best_lr) == ((1e-3, 3e-3) if loser == "AdamW" else (3e-3, 1e-3))
    assert (mini.verdict.word, mini.verdict.text) == (*("no verdict", "1 tuning run did not finish: no verdict"),)
    assert mini.verdict.difference is not None


def test_a_tuning_run_that_diverged_is_a_finding_and_leaves_the_verdict(tmp_path):
    folder = Folder(tmp_path)
    for seed in (0, 1):
        for optimizer, value in (("AdamW", 3.0), ("AdamMini", 1.0)):
            folder.write(optimizer, 1e-3, seed, (value + seed / 100,))
            folder.write(optimizer, 3e-3, seed, (0.5,), "diverged" if seed else "done")
    _, mini = folder.load().summaries
    assert (mini.verdict.word, mini.message) == ("better", "")


def test_learning_rates_of_which_none_has_all_its_seeds(tmp_path):
    folder = Folder(tmp_path, optimizers=("AdamW",))
    for lr in (1e-3, 3e-3):
        folder.write("AdamW", lr, 0, (lr,))
        folder.write("AdamW", lr, 1, status="timeout")
    (adamw,) = folder.load().summaries
    assert adamw.message == (
        "at each learning rate a seed did not finish: the best of the others; "
        "lr 1e-3: seed 1 ran out of time; lr 3e-3: seed 1 ran out of time"
    )


def test_a_seed_that_diverged_is_later_at_the_target_than_any_other(tmp_path):
    folder = Folder(tmp_path, lrs=("1e-3",), seeds=(0, 1, 2, 3), num_tuning_seeds=1)
    for seed in range(4):
        folder.write("AdamW", 1e-3, seed, (3.0, 2.0))
    folder.write("AdamMini", 1e-3, 0, (1.0, 1.0))
    folder.write("AdamMini", 1e-3, 1, (1.5, 1.5), "diverged", message="not finite")
    folder.write("AdamMini", 1e-3, 2, (1.5, 1.5), "diverged")
    folder.write("AdamMini", 1e-3, 3, (1.5, 1.5), "failed")
    _, mini = folder.load().summaries
    assert dict(mini.steps_to_target.by_seed) == {0: 10, 1: None, 2: None}, "one that failed might have reached it"
    assert mini.steps_to_target.median is None
    assert mini.seconds_to_target.median is None
    lost = mini.runs[1]
    assert [point.value for point in lost.curve] == [1.5, 1.5], (
        "it left no result.json; the task's primary metric is used"
    )
    assert mini.message == "seed 1 diverged, seed 2 diverged, seed 3 failed: not finite"


def test_the_reference_has_no_target_where_most_of_its_seeds_diverged(tmp_path):
    folder = Folder(tmp_path, lrs=("1e-3",), seeds=(0, 1, 2), num_tuning_seeds=1)
    for optimizer in ("AdamW", "AdamMini"):
        folder.write(optimizer, 1e-3, 0, (3.0, 2.0))
    for seed in (1, 2):
        folder.write("AdamW", 1e-3, seed, (3.0, 2.0), "diverged")
    assert folder.load().target is None


def test_a_command_is_shown_as_it_was_first_given(tmp_path):
    folder = Folder(tmp_path, seeds=(0,), lrs=("1e-3",), optimizers=("AdamW",))
    command = ["adam-mini", "fit", "--config=x", "--ckpt_path=last"]
    folder.write("AdamW", 1e-3, 0, (1.0,), more_status={"command": command})
    assert folder.load().summaries[0].runs[0].command == ("adam-mini", "fit", "--config=x")


def notes_of_runs(path, statuses, **plan):
    """All notes on a comparison of two runs, whose status.json and threads are given."""
    folder = Folder(path, seeds=(0,), optimizers=("AdamW",), **plan)
    for lr, (word, threads) in zip((1e-3, 3e-3), statuses, strict=True):
        folder.write("AdamW", lr, 0, (lr,), more_status=word, result={"hardware": {"cpu": "x", "threads": threads}})
    return " ".join(load_comparison(path).notes)


def test_how_many_runs_shared_the_machine_is_reported(tmp_path):
    shared = [({"num_jobs": 1, "launcher": "local"}, 1), ({"num_jobs": 4, "launcher": "local"}, 1)]
    notes = notes_of_runs(tmp_path / "shared", shared)
    assert "Up to 4 runs shared this machine: times and their ratios are indicative; --jobs 1 measures them." in notes
    assert "not recorded" not in notes
    alone = notes_of_runs(tmp_path / "alone", [({"num_jobs": 1, "launcher": "local"}, 1)] * 2)
    assert "indicative" not in alone
    assert "machines" not in alone
    assert "it was not recorded how many shared the machine" in notes_of_runs(tmp_path / "old", [({}, 1)] * 2)
    cluster = notes_of_runs(tmp_path / "cluster", [({"num_jobs": None, "launcher": "submitit"}, 1)] * 2)
    assert "Runs were jobs of a cluster" in cluster
    assert "not recorded" not in cluster


def test_machines_that_differ_are_reported(tmp_path):
    notes = notes_of_runs(tmp_path / "two", [({"num_jobs": 1}, 1), ({"num_jobs": 1}, 2)])
    assert "The runs were made on 2 machines, or with different threads" in notes


def test_what_the_rate_was_chosen_on_is_reported(tmp_path):
    one = Folder(tmp_path / "one", seeds=(0, 1, 2), num_tuning_seeds=1)
    assert "Seed 0, which chose the learning rate, is included in the mean." in " ".join(
        load_comparison(one.path).notes
    )
    two = Folder(tmp_path / "two", seeds=(0, 1, 2), num_tuning_seeds=2)
    assert "Seeds 0, 1, which chose the learning rate, are included in the mean." in " ".join(
        load_comparison(two.path).notes
    )


def test_multiples_of_the_recipes_own_learning_rate_are_reported(tmp_path):
    folder = Folder(tmp_path, lrs=("x0.5", "x1"))
    (note,) = [note for note in load_comparison(tmp_path).notes if "multiples" in note]
    assert note.startswith("The learning rates x0.5, x1 are multiples of the recipe's own")
    own = RECIPE["optimizer"]["class_path"].rpartition(".")[2]
    assert note.endswith(f"the recipe's own optimizer: {own} ({folder.recipe}).")
    assert not [note for note in notes_of(Folder(tmp_path, lrs=("1e-3",)).grid, []) if "multiples" in note]


def test_a_recipe_that_has_changed_is_not_read_for_its_learning_rates(tmp_path, capsys):
    folder = Folder(tmp_path, lrs=("x1",))
    recipe = Path(folder.recipe)
    digest = hashlib.sha256(recipe.read_bytes()).hexdigest()
    write_plan(replace(folder.plan, digests={folder.recipe: digest}), tmp_path)
    assert load_comparison(tmp_path).tasks
    before = recipe.read_text("utf-8")
    recipe.write_text(before.replace("lr:", "lr: 0.5 #"), "utf-8")
    assert main(["report", str(tmp_path)]) == 1
    assert "tiny.yaml is not the recipe that" in error_line(capsys)
    copy = copy_of(folder.recipe, tmp_path)
    copy.parent.mkdir()
    copy.write_text(before, "utf-8")
    assert list(load_comparison(tmp_path).tasks[0].summaries[0].lrs) == list(folder.grid.lrs[folder.recipe, "AdamW"])


def test_one_seed_gives_no_verdict(tmp_path):
    folder = Folder(tmp_path, seeds=(0,), lrs=("1e-3",))
    folder.write("AdamW", 1e-3, 0, (2.0,))
    folder.write("AdamMini", 1e-3, 0, (1.0,))
    _, mini = folder.load().summaries
    assert (mini.verdict.text, mini.verdict.difference) == ("one seed: no verdict", -1.0)


def test_a_grid_that_has_not_begun(tmp_path):
    task = Folder(tmp_path).load()
    assert task.target is None
    for entry in task.summaries:
        assert {run.status for run in entry.runs} == {"pending"}
        assert (entry.best_lr, entry.final, entry.message) == (None, None, "no run has finished")
        assert entry.costs == Costs()


def test_a_best_learning_rate_at_the_edge_is_reported(tmp_path):
    folder = Folder(tmp_path, seeds=(0,), lrs=("1e-3", "2e-3", "3e-3"))
    for place, lr in enumerate((1e-3, 2e-3, 3e-3)):
        folder.write("AdamW", lr, 0, (1.0 + place,))
        folder.write("AdamMini", lr, 0, (1.0 + abs(place - 1),))
    adamw, mini = folder.load().summaries
    assert adamw.message == "its best learning rate is the smallest one tried: a better one may lie beyond"
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
    printed = capsys.readouterr().out
    assert "1 of 4 runs have no result: 1 failed" in printed
    for name in ("report.html", "report.md", "report.csv"):
        assert (tmp_path / name).stat().st_size > 0


def test_report_of_nothing(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "holds no comparison: there is no plan.json" in error_line(capsys)
    assert not list(Path(tmp_path).iterdir())
