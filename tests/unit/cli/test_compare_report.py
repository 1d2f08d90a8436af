"""The page of a comparison: what it says, that it says it for every kind of comparison, and that it stands alone."""

import math
import re
from dataclasses import replace
from statistics import fmean, stdev
from xml.etree import ElementTree as ET

import pytest

from lightning_adam_mini.cli.compare.outcomes import Estimate, Verdict
from lightning_adam_mini.cli.compare.report import write_report
from lightning_adam_mini.cli.compare.run_records import Costs, PrimaryMetric
from report_page import ReportPage
from synthetic_comparison import HEADLINES, synthetic_comparison, without_costs

ACCURACY = (PrimaryMetric(metric="val_top1", mode="max", label="accuracy", curve="val_top1", curve_label="accuracy"),)
SHORT = {"lrs": (1e-3, 3e-3), "validations": 4}


def page_of(comparison, folder):
    return ReportPage(write_report(comparison, folder)["page"].read_text("utf-8"))


@pytest.fixture(scope="module")
def comparison():
    def lose(recipe, optimizer, lr, seed):
        if (recipe, optimizer, lr) == ("llm/synthetic_tiny", "AdamW", 6e-3):
            return "diverged", "training loss is not finite at step 37; lower --optimizer.lr"
        return None

    recipes = ("llm/synthetic_tiny", "/data/my recipes/digits.yaml")
    return synthetic_comparison(("AdamW", "AdamMini", "Lion"), recipes, lose=lose)


@pytest.fixture(scope="module")
def source(comparison, tmp_path_factory):
    return write_report(comparison, tmp_path_factory.mktemp("out"))["page"].read_text("utf-8")


@pytest.fixture(scope="module")
def page(source):
    return ReportPage(source)


def test_the_page_needs_nothing_but_itself(source, page):
    """No script, no file, no address; and the browser is told to load none."""
    assert not page.all("script", "img", "iframe", "object")
    assert page.all("link") == [{"rel": "icon", "href": "data:,"}]
    outside = set(re.findall(r"https?://[^\s\"'<)]+", source)) - {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not outside
    assert not re.findall(r"@import|url\((?!#)", source)
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert "default-src 'none'" in policy


def test_the_page_is_laid_out_for_every_reader(page):
    assert page.all("html") == [{"lang": "en"}]
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    assert page.all("th")
    assert all(heading.get("scope") in ("row", "col") for heading in page.all("th"))
    headings = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1


def test_every_reference_within_the_page_is_met(source, page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = {attributes[name][1:] for _, attributes in page.elements for name in ("href", "xlink:href")
              if attributes.get(name, "").startswith("#")}  # fmt: skip
    wanted |= set(re.findall(r"url\(#([^)]+)\)", source))
    assert wanted
    assert wanted <= set(ids)


def test_the_title_and_the_summary_say_what_was_compared(page):
    assert "AdamW, AdamMini and Lion on llm/synthetic_tiny and digits" in page.text
    assert "The reference is AdamW." in page.text
    assert (
        "the learning rates 0.001, 0.002, 0.003 and 0.006 with seed 0, then the best one with seeds 1 and 2"
        in page.text
    )
    assert "35 of 36 runs finished; 1 diverged." in page.text


def test_the_order_is_that_of_reading(page):
    places = [page.text.index(text) for text in (
        "Compared:", "final validation loss", "Validation loss against steps", "Sensitivity to the learning rate",
        "Optimizer state", "Performance profile, steps", "1 of 36 runs", "Software.",
        "Command of the comparison", "Best learning rate The one",
    )]  # fmt: skip
    assert places == sorted(places)


def test_the_table_holds_the_figures_of_the_comparison(comparison, page):
    """Recomputed here from the runs."""
    task = comparison.tasks[0]
    rows = page.table("final validation loss")
    assert [row["optimizer"] for row in rows] == ["AdamW reference", "AdamMini", "Lion"]
    for row, entry in zip(rows, task.entries, strict=True):
        values = [run.value for run in entry.runs if run.lr == entry.best_lr]
        mean, spread = re.match(r"(\S+) ± (\S+) 3 seeds", row["final validation loss"]).groups()
        assert float(mean) == pytest.approx(fmean(values), abs=0.0006)
        assert float(spread) == pytest.approx(stdev(values), abs=0.0006)
        assert row["best lr"] == f"{entry.best_lr:g} of 4"
        assert row["verdict"] == entry.verdict.word
    assert rows[1]["optimizer state"] == "4.40 MB 0.50×"
    assert rows[1]["peak memory"] == "608 MB 0.99×"
    assert rows[1]["time per step"] == "93.0 ms 1.03×"
    assert rows[1]["optimizer's update"] == "12.2 ms 0.86×"
    assert rows[0]["optimizer state"] == "8.80 MB"


def test_the_difference_has_its_interval(comparison, page):
    verdict = comparison.tasks[0].entries[1].verdict
    (column,) = [name for name in page.table("verdict")[0] if name.startswith("difference to AdamW")]
    assert "95" in column
    shown = page.table("verdict")[1][column].replace("−", "-")
    difference, low, high = map(float, re.match(r"(\S+) (\S+) to (\S+)", shown).groups())
    assert difference == pytest.approx(verdict.difference, abs=6e-4)
    assert (low, high) == pytest.approx(verdict.interval, abs=6e-4)


def test_lost_runs_are_rows(page):
    (row,) = page.table("message")
    assert row["task"] == "llm/synthetic_tiny"
    assert (row["optimizer"], row["lr"], row["seed"], row["status"], row["steps"]) == (
        "AdamW",
        "0.006",
        "0",
        "diverged",
        "37",
    )
    assert row["message"].startswith("training loss is not finite at step 37")


def test_commands_are_those_that_one_types(page):
    assert "adam-mini compare llm/synthetic_tiny '/data/my recipes/digits.yaml' --out 'runs/a folder'" in page.text


def test_every_text_is_escaped(tmp_path):
    """Each text that comes from outside tries to open a script of its own."""

    def evil(where):
        return f"</style></svg><script>alert('{where}')</script>\x1b[0m & \"$x_1$\""

    def lose(recipe, optimizer, lr, seed):
        return ("failed", evil("message")) if lr == 1e-3 and seed == 0 else None

    primary_metrics = (PrimaryMetric(label=evil("label")),)
    optimizers = ("AdamW", evil("optimizer"))
    comparison = synthetic_comparison(
        optimizers, (evil("recipe"),), primary_metrics=primary_metrics, lose=lose, **SHORT
    )
    (task,) = comparison.tasks
    entry = replace(task.entries[1], message=evil("entry"), verdict=Verdict(word="no verdict", text=evil("verdict")))
    comparison = replace(
        comparison,
        tasks=(replace(task, title=evil("title"), entries=(task.entries[0], entry)),),
        notes=(evil("note"),),
        versions={evil("package"): evil("version")},
        hardware=({"cpu": evil("cpu"), "memory_bytes": evil("memory")},),
        command=("adam-mini", evil("command")),
        created=evil("created"),
    )
    page = page_of(comparison, tmp_path)
    assert not page.all("script")
    shown = page.text.replace("'\"'\"'", "'")  # as the shell needs it in a command
    for where in (
        *("message", "label", "optimizer", "recipe", "entry", "verdict", "title", "note", "package", "version", "cpu"),
        *("memory", "command", "created"),
    ):
        assert f"alert('{where}')" in shown, where
    texts = {path.suffix: path.read_text("utf-8") for path in tmp_path.iterdir() if path.is_file()}
    assert "<script" not in texts[".html"]
    assert "<script" not in re.sub("(?s)```.*?```", "", texts[".md"])
    for path in (tmp_path / "figures").iterdir():
        ET.parse(path)
        assert "<script" not in path.read_text("utf-8"), path


def test_one_run_alone(tmp_path):
    page = page_of(synthetic_comparison(("AdamMini",), seeds=(0,), lrs=(3e-3,), validations=1), tmp_path)
    assert "The run finished." in page.text
    (row,) = page.table("verdict")
    assert row["best lr"] == "0.003 the only one"
    assert row["final validation loss"].endswith(" 1 seed")
    assert "±" not in row["final validation loss"]


def test_one_seed_gives_no_verdict_and_no_band(tmp_path):
    page = page_of(synthetic_comparison(seeds=(0,), **SHORT), tmp_path)
    assert "There is one seed, so there is no verdict" in page.text
    assert page.table("verdict")[1]["verdict"] == "no verdict one seed"
    assert "One seed, so there is no band." in page.text
    assert "fill-opacity" not in "".join(attributes.get("style", "") for attributes in page.all("path"))


def test_seeds_give_a_band(page):
    assert "fill-opacity" in "".join(attributes.get("style", "") for attributes in page.all("path", "use"))


def test_a_comparison_without_any_result(tmp_path):
    page = page_of(synthetic_comparison(lose=lambda *run: ("failed", f"no data for seed {run[3]}"), **SHORT), tmp_path)
    assert len(page.table("message")) == 4
    assert "0 of 4 runs finished; 4 failed." in page.text
    assert {row["final validation loss"] for row in page.table("verdict")} == {"no finished run"}
    assert "There is no target" in page.text
    assert not page.all("figure")


def test_a_comparison_that_has_not_begun(tmp_path):
    comparison = synthetic_comparison(lose=lambda *run: ("pending", ""), **SHORT)
    comparison = replace(comparison, hardware=(), versions={}, command=(), notes=(), created="")
    page = page_of(comparison, tmp_path)
    assert "The comparison is not complete." in page.text


def test_the_reference_may_be_lost_alone(tmp_path):
    lose = lambda recipe, optimizer, lr, seed: ("timeout", "late") if optimizer == "AdamW" else None  # noqa: E731
    rows = page_of(synthetic_comparison(lose=lose, **SHORT), tmp_path).table("verdict")
    assert rows[1]["verdict"].startswith("no verdict")
    assert rows[1]["steps to target"] == "–"
    assert rows[1]["optimizer state"] == "4.40 MB"


def test_costs_that_are_not_known_are_dashes(tmp_path):
    page = page_of(without_costs(synthetic_comparison(**SHORT)), tmp_path)
    for row in page.table("verdict"):
        assert row["time per step"] == row["peak memory"] == row["optimizer state"] == "–"
        assert row["time to target"] in ("never", "– time not logged")
    titles = " ".join(figure["id"] for figure in page.all("figure"))
    assert "-steps" in titles
    assert not re.search("-time|-state|-memory", titles)


def test_values_that_are_not_finite(tmp_path):
    comparison = synthetic_comparison(**SHORT)
    (task,) = comparison.tasks

    def curve(run):
        return (*run.curve[:-1], replace(run.curve[-1], value=math.nan))

    entry = task.entries[1]
    broken = replace(
        entry,
        final=Estimate(math.nan, math.nan, 3),
        costs=Costs(step_milliseconds=math.inf, optimizer_state_bytes=math.nan, peak_memory_bytes=1e9),
        verdict=Verdict(word="no verdict", text="NaN", difference=math.nan, interval=(-math.inf, math.inf)),
        runs=tuple(replace(run, curve=curve(run), value=math.inf) for run in entry.runs),
    )
    page = page_of(replace(comparison, tasks=(replace(task, entries=(task.entries[0], broken)),)), tmp_path)
    assert page.table("verdict")[1]["final validation loss"].startswith("NaN")
    drawn = " ".join(attributes.get("d", "") for attributes in page.all("path"))
    assert not re.search("nan|inf", drawn)
    steps = next(chart["aria-label"] for chart in page.all("svg") if "against steps" in chart.get("aria-label", ""))
    assert re.search(r"AdamMini at .* after 120 steps", steps)  # the last that all seeds have


def test_more_is_better_where_the_primary_metric_says_so(tmp_path):
    comparison = synthetic_comparison(("AdamW", "AdamMini"), primary_metrics=ACCURACY, **SHORT)
    page = page_of(comparison, tmp_path)
    assert "final accuracy (more is better)" in page.text


def test_the_target_is_one_of_the_curve(tmp_path):
    """Charts and target are of the validation; the primary_metric is of the test."""
    comparison = synthetic_comparison(primary_metrics=HEADLINES[2:], **SHORT)
    page = page_of(comparison, tmp_path)
    (task,) = comparison.tasks
    assert f"The target is a validation accuracy of {task.target:.4f}, the median of" in page.text
    assert "Learning rates were chosen by validation accuracy, not by this figure." in page.text
    assert "Validation accuracy against steps" in page.text
    assert "Test accuracy at the best epoch against" not in page.text
    (rates,) = [chart["aria-label"] for chart in page.all("svg") if "Sensitivity" in chart.get("aria-label", "")]
    tuned = task.entries[0].lrs[3e-3].tuning.mean
    assert f"{tuned:.4f} at 0.003" in rates
    assert "validation accuracy (it chooses the rate)" in rates


def test_the_target_has_its_unit(tmp_path):
    primary_metric = PrimaryMetric(label="accuracy, of all nodes", curve_label="accuracy, of all nodes")
    comparison = synthetic_comparison(primary_metrics=(primary_metric,), **SHORT)
    assert (
        f"The target is an accuracy of {comparison.tasks[0].target:.3f} of all nodes, the"
        in page_of(comparison, tmp_path).text
    )
    page = page_of(replace(comparison, tasks=(replace(comparison.tasks[0], target=None),)), tmp_path)
    assert "There is no target, because most seeds of AdamW diverged or were not validated." in page.text


def test_within_the_spread_claims_neither_equality_nor_a_win(tmp_path):
    even = Verdict(word="within the spread", text="within the spread", difference=-0.1, interval=(-0.3, 0.1))
    comparison = synthetic_comparison(**SHORT)
    (task,) = comparison.tasks

    def judged(verdict):
        entries = (task.entries[0], replace(task.entries[1], verdict=verdict))
        return page_of(replace(comparison, tasks=(replace(task, entries=entries),)), tmp_path)

    sentence = "What is within the spread shows neither a difference nor equality."
    assert f"AdamMini: within the spread. {sentence}" in judged(even).text
    assert sentence not in judged(replace(even, word="better", text="better", interval=(-0.3, -0.1))).text
    assert not re.search(r"\bno difference|on par|as good as|equally|alike\.", judged(even).text)


def test_an_optimizer_of_which_every_run_failed_is_called_so(tmp_path):
    comparison = synthetic_comparison(**SHORT)
    (task,) = comparison.tasks
    entry = replace(task.entries[1], verdict=Verdict(word="failed", text="every run failed"))
    page = page_of(replace(comparison, tasks=(replace(task, entries=(task.entries[0], entry)),)), tmp_path)
    assert page.table("verdict")[1]["verdict"] == "failed every run failed"
    assert "AdamMini: failed." in page.text


def test_the_definitions_play_nothing_down(page):
    assert "chosen on figures of validation" in page.text
    assert "there is no held-out set" in page.text
    assert not re.search("a little|flatters all|only factors", page.text)


def test_budgets_that_differ_are_told(tmp_path):
    comparison = synthetic_comparison(**SHORT)
    (task,) = comparison.tasks
    fewer = replace(task.entries[1], lrs={lr: rate for lr, rate in task.entries[1].lrs.items() if lr == 3e-3})
    page = page_of(replace(comparison, tasks=(replace(task, entries=(task.entries[0], fewer)),)), tmp_path)
    assert "The budgets differ: 1 to 2 learning rates" in page.text


def test_many_optimizers_share_an_overview(tmp_path):
    optimizers = tuple(f"optimizer {number} " + "x" * 40 for number in range(9))
    comparison = synthetic_comparison(optimizers, ("a", "b"), seeds=(0, 1), lrs=(3e-3,), validations=3)
    page = page_of(comparison, tmp_path)
    (overview,) = page.tables[f"Final figure against {optimizers[0]}, on each task."]
    assert overview[0] == ["optimizer", "a", "b"]
    words = [[task.entry(name).verdict.word for task in comparison.tasks] for name in optimizers[1:]]
    assert [row[1:] for row in overview[1:]] == words
    assert "9 optimizers on a and b" in page.text
