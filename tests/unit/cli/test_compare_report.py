"""The report of a comparison: what it says for every kind of comparison, in HTML, Markdown, CSV and charts."""

import csv
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from xml.etree import ElementTree as ET

import pytest

from lightning_adam_mini.cli.compare.report import content, render, wording, write_report
from lightning_adam_mini.cli.compare.report.charts import (
    curves_chart,
    focus,
    profile_chart,
    rates_chart,
    tradeoff_chart,
)
from lightning_adam_mini.cli.compare.report.content import task_names
from lightning_adam_mini.cli.compare.run_records import Costs
from lightning_adam_mini.cli.compare.stats import MeanStd, Verdict
from lightning_adam_mini.tasks.base import PrimaryMetric
from report_page import ReportPage
from synthetic_comparison import PRIMARY_METRICS, synthetic_comparison, without_costs

SHORT = {"lrs": (1e-3, 3e-3), "validations": 4}
CHARTS = ("curves_chart", "rates_chart", "state_chart", "peak_chart", "profile_chart", "tradeoff_chart")
MESSAGE = 'a | pipe, a comma, "quotes", <b>, `code` and\na second line'


@pytest.fixture
def page_of(tmp_path, monkeypatch):
    """The page of a comparison, by default without charts, which take most of the time."""

    def page(comparison, *, charts=False):
        for name in () if charts else CHARTS:
            monkeypatch.setattr(content, name, lambda *arguments: None)
        return ReportPage(write_report(comparison, tmp_path)["page"].read_text("utf-8"))

    return page


@pytest.fixture(scope="module")
def comparison():
    def lose(recipe, optimizer, lr, seed):
        if (recipe, optimizer, lr) == ("llm/synthetic_tiny", "AdamW", 6e-3):
            return "diverged", "training loss is not finite at step 37; lower --optimizer.lr"
        return ("failed", MESSAGE) if (optimizer, lr) == ("Lion|x", 1e-3) else None

    recipes = ("llm/synthetic_tiny", "/data/my recipes/digits.yaml")
    return synthetic_comparison(("AdamW", "AdamMini", "Lion|x"), recipes, lose=lose, validations=8)


@pytest.fixture(scope="module")
def out(comparison, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "new"
    write_report(comparison, folder)
    return folder


@pytest.fixture(scope="module")
def source(out):
    return (out / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def page(source):
    return ReportPage(source)


def test_the_page_needs_nothing_but_itself(source, page):
    """No script, no file, no address; and the browser may load none."""
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
    assert "AdamW, AdamMini and Lion|x on llm/synthetic_tiny and digits" in page.text
    assert "The reference is AdamW." in page.text
    assert (
        "the learning rates 0.001, 0.002, 0.003 and 0.006 with seed 0, then the best one with seeds 1 and 2"
        in page.text
    )
    assert "33 of 36 runs finished; 1 diverged and 2 failed." in page.text


def test_the_order_is_that_of_reading(page):
    places = [page.text.index(text) for text in (
        "Compared:", "final validation loss", "Validation loss against steps", "Sensitivity to the learning rate",
        "Optimizer state", "Performance profile, steps", "3 of 36 runs.", "Software.",
        "Command of the comparison", "Best learning rate The one",
    )]  # fmt: skip
    assert places == sorted(places)


def test_the_table_holds_the_values_of_the_comparison(comparison, page):
    """Recomputed here from the runs."""
    task = comparison.tasks[0]
    rows = page.table("final validation loss")
    assert [row["optimizer"] for row in rows] == ["AdamW reference", "AdamMini", "Lion|x"]
    for row, summary in zip(rows, task.summaries, strict=True):
        values = [run.value for run in summary.runs if run.lr == summary.best_lr]
        mean, spread = re.match(r"(\S+) ± (\S+) 3 seeds", row["final validation loss"]).groups()
        assert float(mean) == pytest.approx(fmean(values), abs=0.0006)
        assert float(spread) == pytest.approx(stdev(values), abs=0.0006)
        assert row["best lr"] == f"{summary.best_lr:g} of 4"
        assert row["verdict"].startswith(summary.verdict.word)
    assert rows[1]["optimizer state"] == "4.40 MB 0.50×"
    assert rows[1]["peak memory"] == "608 MB 0.99×"
    assert rows[1]["time per step"] == "93.0 ms 1.03×"
    assert rows[1]["optimizer's update"] == "12.2 ms 0.86×"
    assert rows[0]["optimizer state"] == "8.80 MB"


def test_the_difference_has_its_interval(comparison, page):
    verdict = comparison.tasks[0].summaries[1].verdict
    (column,) = [name for name in page.table("verdict")[0] if name.startswith("difference to AdamW")]
    assert "95" in column
    shown = page.table("verdict")[1][column].replace("−", "-")
    difference, low, high = map(float, re.match(r"(\S+) (\S+) to (\S+)", shown).groups())
    assert difference == pytest.approx(verdict.difference, abs=6e-4)
    assert (low, high) == pytest.approx(verdict.interval, abs=6e-4)


def test_lost_runs_are_rows(page):
    row, *_ = page.table("message")
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


def test_every_text_is_escaped(page_of, tmp_path):
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
    summary = replace(
        task.summaries[1], message=evil("entry"), verdict=Verdict(word="no verdict", text=evil("verdict"))
    )
    comparison = replace(
        comparison,
        tasks=(replace(task, title=evil("title"), summaries=(task.summaries[0], summary)),),
        notes=(evil("note"),),
        versions={evil("package"): evil("version")},
        hardware=({"cpu": evil("cpu"), "memory_bytes": evil("memory")},),
        command=("adam-mini", evil("command")),
        created=evil("created"),
    )
    page = page_of(comparison, charts=True)
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


def test_one_run_alone(page_of):
    page = page_of(synthetic_comparison(("AdamMini",), seeds=(0,), lrs=(3e-3,), validations=1))
    assert "The run finished." in page.text
    (row,) = page.table("verdict")
    assert row["best lr"] == "0.003 the only one"
    assert row["final validation loss"].endswith(" 1 seed")
    assert "±" not in row["final validation loss"]


def test_one_seed_gives_no_verdict_and_no_band(page_of):
    page = page_of(synthetic_comparison(seeds=(0,), **SHORT), charts=True)
    assert "There is one seed, so there is no verdict" in page.text
    assert page.table("verdict")[1]["verdict"] == "no verdict one seed"
    assert "One seed, so there is no band." in page.text
    assert "fill-opacity" not in "".join(attributes.get("style", "") for attributes in page.all("path"))


def test_seeds_give_a_band(page):
    assert "fill-opacity" in "".join(attributes.get("style", "") for attributes in page.all("path", "use"))


def test_a_comparison_without_any_result(page_of):
    page = page_of(
        synthetic_comparison(lose=lambda *run: ("failed", f"no data for seed {run[3]}"), **SHORT), charts=True
    )
    assert len(page.table("message")) == 4
    assert "0 of 4 runs finished; 4 failed." in page.text
    assert {row["final validation loss"] for row in page.table("verdict")} == {"no finished run"}
    assert "There is no target" in page.text
    assert not page.all("figure")


def test_a_comparison_that_has_not_begun(page_of):
    comparison = synthetic_comparison(lose=lambda *run: ("pending", ""), **SHORT)
    comparison = replace(comparison, hardware=(), versions={}, command=(), notes=(), created="")
    page = page_of(comparison)
    assert "The comparison is not complete." in page.text


def test_the_reference_may_be_lost_alone(page_of):
    lose = lambda recipe, optimizer, lr, seed: ("timeout", "late") if optimizer == "AdamW" else None  # noqa: E731
    rows = page_of(synthetic_comparison(lose=lose, **SHORT)).table("verdict")
    assert rows[1]["verdict"].startswith("no verdict")
    assert rows[1]["steps to target"] == "–"
    assert rows[1]["optimizer state"] == "4.40 MB"


def test_costs_that_are_not_known_are_dashes(page_of):
    page = page_of(without_costs(synthetic_comparison(**SHORT)), charts=True)
    for row in page.table("verdict"):
        assert row["time per step"] == row["peak memory"] == row["optimizer state"] == "–"
        assert row["time to target"] in ("never", "– time not logged")
    titles = " ".join(figure["id"] for figure in page.all("figure"))
    assert "-steps" in titles
    assert not re.search("-time|-state|-memory", titles)


def test_values_that_are_not_finite(page_of):
    comparison = synthetic_comparison(**SHORT)
    (task,) = comparison.tasks

    def curve(run):
        return (*run.curve[:-1], replace(run.curve[-1], value=math.nan))

    summary = task.summaries[1]
    broken = replace(
        summary,
        final=MeanStd(math.nan, math.nan, 3),
        costs=Costs(step_milliseconds=math.inf, optimizer_state_bytes=math.nan, peak_memory_bytes=1e9),
        verdict=Verdict(word="no verdict", text="NaN", difference=math.nan, interval=(-math.inf, math.inf)),
        runs=tuple(replace(run, curve=curve(run), value=math.inf) for run in summary.runs),
    )
    page = page_of(replace(comparison, tasks=(replace(task, summaries=(task.summaries[0], broken)),)), charts=True)
    assert page.table("verdict")[1]["final validation loss"].startswith("NaN")
    drawn = " ".join(attributes.get("d", "") for attributes in page.all("path"))
    assert not re.search("nan|inf", drawn)
    steps = next(chart["aria-label"] for chart in page.all("svg") if "against steps" in chart.get("aria-label", ""))
    assert re.search(r"AdamMini at .* after 120 steps", steps)  # the last that all seeds have


def test_more_is_better_where_the_primary_metric_says_so(page_of):
    comparison = synthetic_comparison(("AdamW", "AdamMini"), primary_metrics=PRIMARY_METRICS[1:], **SHORT)
    page = page_of(comparison)
    assert "final validation accuracy (top 1) (more is better)" in page.text


def test_the_target_is_one_of_the_curve(page_of):
    """Charts and target are of the validation; the primary metric is of the test."""
    comparison = synthetic_comparison(primary_metrics=PRIMARY_METRICS[2:], **SHORT)
    page = page_of(comparison, charts=True)
    (task,) = comparison.tasks
    assert f"The target is a validation accuracy of {task.target:.4f}, the median of" in page.text
    assert "Learning rates were chosen by validation accuracy, not by this metric." in page.text
    assert "Validation accuracy against steps" in page.text
    assert "Test accuracy at the best epoch against" not in page.text
    (rates,) = [chart["aria-label"] for chart in page.all("svg") if "Sensitivity" in chart.get("aria-label", "")]
    tuned = task.summaries[0].lrs[3e-3].tuning.mean
    assert f"{tuned:.4f} at 0.003" in rates
    assert "validation accuracy (it chooses the rate)" in rates


def test_the_target_has_its_unit(page_of):
    primary_metric = PrimaryMetric(label="accuracy, of all nodes")
    comparison = synthetic_comparison(primary_metrics=(primary_metric,), **SHORT)
    assert (
        f"The target is an accuracy of {comparison.tasks[0].target:.3f} of all nodes, the" in page_of(comparison).text
    )
    page = page_of(replace(comparison, tasks=(replace(comparison.tasks[0], target=None),)))
    assert "There is no target, because most seeds of AdamW diverged or were not validated." in page.text


def test_within_the_spread_claims_neither_equality_nor_a_win(page_of):
    even = Verdict(word="within the spread", text="within the spread", difference=-0.1, interval=(-0.3, 0.1))
    comparison = synthetic_comparison(**SHORT)
    (task,) = comparison.tasks

    def judged(verdict):
        summaries = (task.summaries[0], replace(task.summaries[1], verdict=verdict))
        return page_of(replace(comparison, tasks=(replace(task, summaries=summaries),)))

    sentence = "A difference within the spread shows neither a difference nor equality."
    assert f"AdamMini: within the spread. {sentence}" in judged(even).text
    assert sentence not in judged(replace(even, word="better", text="better", interval=(-0.3, -0.1))).text


def test_an_optimizer_of_which_every_run_failed_is_called_so(page_of):
    comparison = synthetic_comparison(**SHORT)
    (task,) = comparison.tasks
    summary = replace(task.summaries[1], verdict=Verdict(word="failed", text="every run failed"))
    page = page_of(replace(comparison, tasks=(replace(task, summaries=(task.summaries[0], summary)),)))
    assert page.table("verdict")[1]["verdict"] == "failed every run failed"
    assert "AdamMini: failed." in page.text


def test_budgets_that_differ_are_reported(page_of):
    comparison = synthetic_comparison(**SHORT)
    (task,) = comparison.tasks
    fewer = replace(task.summaries[1], lrs={lr: rate for lr, rate in task.summaries[1].lrs.items() if lr == 3e-3})
    page = page_of(replace(comparison, tasks=(replace(task, summaries=(task.summaries[0], fewer)),)))
    assert "The budgets differ: 1 to 2 learning rates" in page.text


def test_many_optimizers_share_an_overview(page_of):
    optimizers = tuple(f"optimizer {number} " + "x" * 40 for number in range(9))
    comparison = synthetic_comparison(optimizers, ("a", "b"), seeds=(0, 1), lrs=(3e-3,), validations=3)
    page = page_of(comparison)
    (overview,) = page.tables[f"Final value against {optimizers[0]}, on each task."]
    assert overview[0] == ["optimizer", "a", "b"]
    words = [[task.summary_of(name).verdict.word for task in comparison.tasks] for name in optimizers[1:]]
    assert [row[1:] for row in overview[1:]] == words
    assert "9 optimizers on a and b" in page.text


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_run_is_a_row(comparison, out):
    rows = rows_of(out / "report.csv")
    assert len(rows) == len(comparison.runs)
    for row, run in zip(rows, comparison.runs, strict=True):
        assert (row["recipe"], row["optimizer"], float(row["lr"]), int(row["seed"])) == (
            *(run.recipe, run.optimizer, run.lr, run.seed),
        )
        assert row["value"] == ("" if run.value is None else repr(run.value))
        assert row["selection"] == ("" if run.selection is None else repr(run.selection))
        assert (row["status"], row["message"]) == (run.status, run.message)
        assert row["optimizer_state_bytes"] == ("" if run.value is None else repr(run.costs.optimizer_state_bytes))
        assert tuple(shlex.split(row["command"])) == run.command
    metrics = {row["recipe"]: (row["primary_metric"], row["primary_metric_mode"]) for row in rows}
    assert metrics == {"llm/synthetic_tiny": ("val_loss", "min"), "/data/my recipes/digits.yaml": ("val_top1", "max")}


def test_the_runs_at_the_best_learning_rate_are_marked(comparison, out):
    rows = rows_of(out / "report.csv")
    for task in comparison.tasks:
        for summary in task.summaries:
            own = [row for row in rows if (row["recipe"], row["optimizer"]) == (task.recipe, summary.optimizer)]
            marked = {float(row["lr"]) for row in own if row["is_best_lr"] == "True"}
            assert marked == {summary.best_lr}
            assert {row["seed"] for row in own if row["is_tuning_seed"] == "True"} == {"0"}


def test_every_optimizer_is_a_row_of_the_summary(comparison, out):
    rows = rows_of(out / "summary.csv")
    assert len(rows) == 6
    for row, summary in zip(rows, [summary for task in comparison.tasks for summary in task.summaries], strict=True):
        assert (float(row["mean"]), float(row["std"]), int(row["n"])) == (
            *(summary.final.mean, summary.final.std, summary.final.n),
        )
        assert row["verdict"] == summary.verdict.word
        assert (row["interval_low"] == "") == (summary.verdict.interval is None)
        assert row["is_reference"] == str(summary.optimizer == "AdamW")
    ratios = [float(row["optimizer_state_bytes_ratio"]) for row in rows[:3]]
    assert ratios == pytest.approx([1, 1 / 2, 1 / 3])


def test_markdown_has_the_same_tables(comparison, out):
    text = (out / "report.md").read_text("utf-8")
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    assert all(len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1 for table in tables)
    verdicts = [table for table in tables if "optimizer's update" in table[0]]
    assert len(verdicts) == len(comparison.tasks)
    for table, task in zip(verdicts, comparison.tasks, strict=True):
        for line, summary in zip(table[2:], task.summaries, strict=True):
            assert f"**{summary.optimizer.replace('|', chr(92) + '|')}**" in line
            assert summary.verdict.word in line
    (failures,) = [table for table in tables if "message" in table[0]]
    assert len(failures) == 2 + sum(run.status != "done" for run in comparison.runs)
    assert "a second line |" in failures[3]
    assert "<b>" not in failures[3]


def test_markdown_shows_the_charts_that_are_there(out):
    links = set(re.findall(r"!\[[^\n]*\]\((figures/[^)]+)\)", (out / "report.md").read_text("utf-8")))
    assert links == {f"figures/{path.name}" for path in (out / "figures").iterdir()}
    assert len(links) == 2 * 5 + 3


def test_nothing_is_left_beside_the_files(out):
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]
    assert {path.name for path in out.iterdir()} == {
        *("report.html", "report.md", "report.csv", "summary.csv", "figures"),
    }


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = render._write_text(tmp_path / "report.md", "old")

    def fail(self, *args, **kwargs):
        self.write_bytes(b"ne")
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="no space"):
        render._write_text(path, "new")
    assert path.read_bytes() == b"old"


def test_two_writers_do_not_share_a_file_beside(tmp_path, monkeypatch):
    """A report may be written while a comparison that ends writes its own."""
    beside = []
    monkeypatch.setattr(Path, "replace", lambda self, target: beside.append(self))
    for process in (1, 2):
        monkeypatch.setattr("os.getpid", lambda process=process: process)
        render._write_text(tmp_path / "report.md", "text")
    assert len(set(beside)) == 2


def test_a_text_that_utf8_cannot_hold_is_written_all_the_same(tmp_path):
    assert render._write_text(tmp_path / "report.md", "a\ud800\r\nb").read_bytes() == b"a?\r\nb"


def test_the_same_comparison_gives_the_same_bytes(comparison, out, tmp_path):
    write_report(comparison, tmp_path)
    files = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    assert len(files) == 4 + 13
    for name in files:
        assert (out / name).read_bytes() == (tmp_path / name).read_bytes(), name


@pytest.fixture(scope="module")
def task(comparison):
    return comparison.tasks[0]


@pytest.fixture(scope="module")
def chart(task):
    return curves_chart(task, "chart", "steps")


def test_texts_of_a_chart_are_texts_and_large_enough_on_a_phone(chart):
    root = ET.fromstring(chart.svg)
    width = float(root.get("viewBox").split()[2])
    texts = [element for element in root.iter() if element.tag.endswith("}text")]
    assert "optimizer steps" in {text.text for text in texts}
    sizes = [float(re.search(r"font(?:-size)?: *([\d.]+)px", text.get("style"))[1]) for text in texts]
    assert min(sizes) * (390 - 32) / width >= 11


def test_a_chart_says_its_numbers_in_words(task, chart):
    root = ET.fromstring(chart.svg)
    assert root.get("role") == "img"
    assert root.get("aria-label") == chart.words
    for summary in task.summaries:
        last = sum(run.curve[-1].value for run in summary.best_runs) / len(summary.best_runs)
        words = re.search(
            rf"{re.escape(summary.optimizer)} at learning rate [\d.]+: .*?, ([\d.]+) after 320 steps", chart.words
        )
        assert float(words[1]) == pytest.approx(last, abs=6e-4)


def test_a_run_that_diverged_is_no_part_of_the_curve(task):
    summary = task.summaries[1]
    seeds = [run for run in summary.runs if run.lr == summary.best_lr]
    lost = replace(seeds[1], status="diverged", value=None)
    runs = tuple(lost if run is seeds[1] else run for run in summary.runs)
    words = curves_chart(replace(task, summaries=(replace(summary, runs=runs),)), "chart", "steps").words
    values = [run.curve[-1].value for run in (seeds[0], seeds[2])]
    assert f"{sum(values) / 2:.3f} after 320 steps" in words


def test_lost_learning_rates_are_marked(task):
    chart = rates_chart(task, "rates")
    assert re.search(r"AdamW: [^:]* runs lost at 0\.006; best", chart.words)
    assert "cross" in chart.caption
    assert "cross" not in rates_chart(replace(task, summaries=task.summaries[1:2]), "rates").caption


def test_profiles_need_two_tasks(comparison):
    names = task_names(comparison)
    assert profile_chart(replace(comparison, tasks=comparison.tasks[:1]), "steps", names) is None
    words = profile_chart(comparison, "steps", names).words
    assert re.search(r"AdamMini: llm/synthetic_tiny (never|factor [\d.]+), digits (never|factor [\d.]+)\.", words)


def test_what_memory_costs(comparison, task):
    names = task_names(comparison)
    chart = tradeoff_chart(comparison.tasks, names, "tradeoff")
    verdict = task.summary_of("AdamMini").verdict
    state = task.summary_of("AdamMini").ratios.optimizer_state_bytes
    found = re.search(r"llm/synthetic_tiny: AdamMini (\S+) with (\d+) % of the state", chart.words)
    assert float(found[1].replace("−", "-")) == pytest.approx(verdict.difference, rel=1e-3)
    assert int(found[2]) == round(100 * state)
    assert all(name in "".join(ET.fromstring(chart.svg).itertext()) for name in names.values())


def test_what_memory_costs_needs_a_difference_and_both_states(comparison, task):
    names = task_names(comparison)
    alone = replace(task, summaries=tuple(each for each in task.summaries if each.optimizer == "AdamW"))
    assert tradeoff_chart((alone,), names, "tradeoff") is None
    unknown = tuple(replace(each, ratios=replace(each.ratios, optimizer_state_bytes=None)) for each in task.summaries)
    assert tradeoff_chart((replace(task, summaries=unknown),), names, "tradeoff") is None


def test_one_task_has_what_memory_costs_among_its_own_charts(comparison):
    one = replace(comparison, tasks=comparison.tasks[:1])
    assert [chart.name.rpartition("-")[2] for chart in content.make_page(one).tasks[0].charts][-1] == "tradeoff"
    assert not content.make_page(one).across
    assert content.make_page(comparison).across[0].name == "tradeoff"


def test_every_optimizer_is_in_the_legend(task):
    """A label with an underscore in front is hidden to matplotlib; one that looks like markup stays text."""
    summaries = tuple(
        replace(summary, optimizer=name)
        for summary, name in zip(task.summaries, ("_mine", ' id="x_1"', "#000000 <b>"), strict=True)
    )
    svg = curves_chart(replace(task, summaries=summaries), "chart", "steps").svg
    texts = "".join(ET.fromstring(svg).itertext())
    assert all(label in texts for label in ("_mine", 'id="x_1"', "#000000 <b>"))


def test_the_range_is_that_of_good_values():
    low, high = focus([1.0, 1.1, 1.2, 1.3, 1e9], "min")
    assert low < 1.0
    assert 1.3 < high < 4
    low, high = focus([0.9, 0.8, 0.85, -1e9], "max")
    assert -1 < low < 0.8
    assert high > 0.9
    low, high = focus([], "min", target=2.0)
    assert low < 2.0 < high
    low, high = focus([1.0, 1.0], "min")
    assert low < 1.0 < high


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (wording.number(None), "–"),
        (wording.number(math.nan), "NaN"),
        (wording.number(-math.inf), "−infinite"),
        (wording.number(0.0), "0"),
        (wording.number(-1234.5678), "−1,235"),
        (wording.number(1.5e-9), "1.500e−9"),
        (wording.with_spread(4.73612, 0.0911), "4.736 ± 0.091"),
        (wording.with_spread(0.912345, 0.00021), "0.91234 ± 0.00021"),
        (wording.with_spread(4.7, None), "4.700"),
        (wording.with_spread(4.7, 0.0), "4.700 ± 0"),
        (wording.signed(0.25), "+0.2500"),
        (wording.signed(-0.25, decimals=1), "−0.2"),
        (wording.number(9.99996), "10.00"),
        (wording.number(2.5e10), "2.500e10"),
        (wording.count(12345.0), "12,345"),
        (wording.count(None), "–"),
        (wording.milliseconds(0.01234), "0.0123 ms"),
        (wording.duration(8.414), "8.41 s"),
        (wording.duration(185.2), "3 min 05 s"),
        (wording.duration(3599.7), "1 h 00 min"),
        (wording.duration(7441.0), "2 h 04 min"),
        (wording.duration(None), "–"),
        (wording.size(999.0), "999 B"),
        (wording.size(999_990.0), "1.00 MB"),
        (wording.size(26_956_000_000), "27.0 GB"),
        (wording.size(None), "–"),
        (wording.factor(0.5), "0.50×"),
        (wording.factor(0.0123), "0.012×"),
        (wording.learning_rate(1e-5), "1e-5"),
        (wording.learning_rate(3e-3), "0.003"),
        (wording.learning_rate(1e6), "1e6"),
        (wording.learning_rate(None), "–"),
        (wording.shorten("a\x00b" + "c" * 30, 8), "a bcccc…"),
    ],
)
def test_numbers_as_texts(text, expected):
    assert text == expected


def test_names_of_recipes_are_short_as_far_as_they_differ():
    recipes = ("llm/gpt2_tiny", "/data/recipes/x.yaml", "/a/y.yaml", "./b/y.yaml")
    comparison = synthetic_comparison(recipes=recipes, lose=lambda *run: ("pending", ""))
    names = dict(zip(recipes, ("llm/gpt2_tiny", "x", "/a/y.yaml", "./b/y.yaml"), strict=True))
    assert task_names(comparison) == names
