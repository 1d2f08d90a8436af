"""The report in Markdown and CSV, and that its files are whole whenever they are there."""

import csv
import errno
import os
import re
import shlex
from pathlib import Path

import pytest

from lightning_adam_mini.cli.compare.report import write_report
from lightning_adam_mini.cli.compare.report.files import write_text
from synthetic_comparison import synthetic_comparison

MESSAGE = 'a | pipe, a comma, "quotes", <b>, `code` and\na second line'


@pytest.fixture(scope="module")
def comparison():
    def lose(recipe, optimizer, lr, seed):
        return ("failed", MESSAGE) if (optimizer, lr) == ("Lion|x", 1e-3) else None

    recipes = ("llm/a_b", "graph/c")
    return synthetic_comparison(("AdamW", "AdamMini", "Lion|x"), recipes, lrs=(1e-3, 3e-3), lose=lose, validations=4)


@pytest.fixture(scope="module")
def out(comparison, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "new"
    write_report(comparison, folder)
    return folder


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
    assert metrics == {"llm/a_b": ("val_loss", "min"), "graph/c": ("val_top1", "max")}


def test_the_runs_at_the_best_learning_rate_are_marked(comparison, out):
    rows = rows_of(out / "report.csv")
    for task in comparison.tasks:
        for entry in task.entries:
            own = [row for row in rows if (row["recipe"], row["optimizer"]) == (task.recipe, entry.optimizer)]
            marked = {float(row["lr"]) for row in own if row["is_best_lr"] == "True"}
            assert marked == {entry.best_lr}
            assert {row["seed"] for row in own if row["is_tuning_seed"] == "True"} == {"0"}


def test_every_optimizer_is_a_row_of_the_summary(comparison, out):
    rows = rows_of(out / "summary.csv")
    assert len(rows) == 6
    for row, entry in zip(rows, [entry for task in comparison.tasks for entry in task.entries], strict=True):
        assert (float(row["mean"]), float(row["std"]), int(row["n"])) == (
            *(entry.final.mean, entry.final.std, entry.final.n),
        )
        assert row["verdict"] == entry.verdict.word
        assert (row["interval_low"] == "") == (entry.verdict.interval is None)
        assert row["is_reference"] == str(entry.optimizer == "AdamW")
    ratios = [float(row["optimizer_state_bytes_ratio"]) for row in rows[:3]]
    assert ratios == pytest.approx([1, 1 / 2, 1 / 3])


def test_markdown_has_the_same_tables(comparison, out):
    text = (out / "report.md").read_text("utf-8")
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    assert all(len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1 for table in tables)
    verdicts = [table for table in tables if "optimizer's update" in table[0]]
    assert len(verdicts) == len(comparison.tasks)
    for table, task in zip(verdicts, comparison.tasks, strict=True):
        for line, entry in zip(table[2:], task.entries, strict=True):
            assert f"**{entry.optimizer.replace('|', chr(92) + '|')}**" in line
            assert entry.verdict.word in line
    (failures,) = [table for table in tables if "message" in table[0]]
    assert len(failures) == 2 + sum(run.status != "done" for run in comparison.runs)
    assert "a second line |" in failures[2]
    assert "<b>" not in failures[2]


def test_markdown_shows_the_charts_that_are_there(out):
    links = set(re.findall(r"!\[[^\n]*\]\((figures/[^)]+)\)", (out / "report.md").read_text("utf-8")))
    assert links == {f"figures/{path.name}" for path in (out / "figures").iterdir()}
    assert "figures/legend.svg" in links
    assert len(links) == 1 + 2 * 5 + 2


def test_nothing_is_left_beside_the_files(out):
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]
    assert {path.name for path in out.iterdir()} == {
        *("report.html", "report.md", "report.csv", "summary.csv", "figures"),
    }


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = write_text(tmp_path / "report.md", "old")

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"cannot write .*report\.md: No space left"):
        write_text(path, "new")
    assert path.read_bytes() == b"old"


def test_two_writers_do_not_share_a_file_beside(tmp_path, monkeypatch):
    """A report may be written while a comparison that ends writes its own."""
    beside = []
    monkeypatch.setattr(Path, "replace", lambda self, target: beside.append(self))
    for process in (1, 2):
        monkeypatch.setattr("os.getpid", lambda process=process: process)
        write_text(tmp_path / "report.md", "text")
    assert len(set(beside)) == 2


def test_a_text_that_utf8_cannot_hold_is_written_all_the_same(tmp_path):
    assert write_text(tmp_path / "report.md", "a\ud800\r\nb").read_bytes() == b"a?\r\nb"


def test_the_same_comparison_gives_the_same_bytes(comparison, out, tmp_path):
    write_report(comparison, tmp_path)
    files = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    assert len(files) == 4 + 13
    for name in files:
        assert (out / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_the_result_names_the_files(comparison, out):
    assert write_report(synthetic_comparison(lrs=(3e-3,), seeds=(0,), validations=2), out.parent / "other") == {
        "page": out.parent / "other" / "report.html",
        "markdown": out.parent / "other" / "report.md",
        "runs": out.parent / "other" / "report.csv",
        "summary": out.parent / "other" / "summary.csv",
    }
