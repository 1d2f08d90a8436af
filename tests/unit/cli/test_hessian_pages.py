"""Pictures, pages and durations of `adam-mini hessian`."""

import logging
from argparse import Namespace
from itertools import pairwise

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from lightning_adam_mini.cli.hessian.pictures import draw_divergences, draw_hessians, drawn
from lightning_adam_mini.cli.hessian.report import HessianReport, PageTable
from lightning_adam_mini.cli.progress import log_duration, log_each
from lightning_adam_mini.hessian import Heterogeneity, Scale
from lightning_adam_mini.measure import describe_machine


def labels(ticks):
    return [tick.get_text() for tick in ticks]


def divergences(count, names=None):
    values = torch.rand(count, count, dtype=torch.float64) / 2
    names = names or [f"model.layers.{number}.weight" for number in range(count)]
    return Heterogeneity(tuple(names), (values + values.T) / 2, 1e-3, Scale.RAW, 1e-2)


@pytest.mark.parametrize("count", [2, 40, 300])
def test_a_heat_map_has_a_label_for_each_block_where_there_is_room(count):
    figure = draw_divergences(divergences(count))
    axes = figure.axes[0]
    shown = labels(axes.get_yticklabels())
    assert shown[0] == "layers.0.weight"
    assert len(shown) == (count if count <= 96 else 75)
    assert max(figure.get_size_inches()) <= 19
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.get_yticklabels()]
    assert not any(one.overlaps(other) for one, other in pairwise(boxes))


def test_long_names_stay_apart():
    long = [
        f"model.{side}_blocks.1.transformer_blocks.0.resnets.0.time_emb_proj.{part}"
        for side in ("up", "down")
        for part in "ab"
    ]
    shown = labels(draw_divergences(divergences(4, long)).axes[0].get_yticklabels())
    assert len(set(shown)) == 4
    assert max(map(len, shown)) <= 46


def test_a_picture_of_very_many_blocks_shows_some():
    blocks = {str(number): torch.eye(2) for number in range(1000)}
    shown, part = drawn(blocks)
    assert len(shown) == 64
    assert [next(iter(shown)), list(shown)[-1]] == ["0", "999"]
    assert part == "; 64 of 1,000 blocks"
    assert len(draw_hessians(shown).axes) == 64
    assert drawn({"a": 1}) == ({"a": 1}, "")


def page(tmp_path, **options):
    settings = {"weights": "fresh", "parameters": 70_000, "sigma": 0.0031622776, "hardware": describe_machine()}
    report = HessianReport(
        Namespace(out=tmp_path, recipe="some.yaml"), {**settings, "versions": {"torch": "3"}}, **options
    )
    report.write("figures.json", {})
    return (tmp_path / "report.html").read_text("utf-8")


def test_a_page_has_settings_and_machine(tmp_path):
    text = page(tmp_path)
    assert "<dt>parameters</dt><dd>70,000</dd>" in text
    assert "<dd>0.003162</dd>" in text
    assert f", threads: {torch.get_num_threads()}</dd>" in text
    assert "<dd>torch 3</dd>" in text


def test_code_in_a_note_keeps_its_lines(tmp_path):
    text = page(tmp_path, notes=["for the recipe:\noptimizer:\n  init_args: {}\n", "a < b"])
    assert '<p class="note">for the recipe:</p>\n<pre>optimizer:\n  init_args: {}' in text
    assert '<p class="note">a &lt; b</p>' in text


def test_sentences_are_aligned_to_the_left_with_their_heads(tmp_path):
    table = PageTable(
        "Reasons", ["parameter", "reason", "bytes"], [["a", "long " * 12, "1"], ["b", "short", "22"]], left=2
    )
    text = page(tmp_path, tables=[table])
    assert '<th>parameter</th><th class="text">reason</th><th>bytes</th>' in text
    assert '<td class="text">short</td><td>22</td>' in text


def test_a_logged_table_keeps_names_in_brackets_and_long_lines(tmp_path, caplog):
    caplog.set_level(logging.INFO, "lightning_adam_mini")
    logging.getLogger("lightning_adam_mini").propagate = True
    name = "transformer." * 30 + "weight[0]"
    table = PageTable("Blocks", ["block", "rows"], [[name, "8"], ["[red]:smile:", "1,024"]])
    HessianReport(Namespace(out=tmp_path), {}, tables=[table]).log([tmp_path])
    width = len(name)
    assert caplog.messages[0].splitlines() == [
        "Blocks",
        f"{'block':<{width}}   rows",
        f"{name}      8",
        f"{'[red]:smile:':<{width}}  1,024",
    ]


@pytest.mark.parametrize(
    ("times", "lines"),
    [
        ([0, 1, 4, 5.9], []),
        ([0, 1, 7, 30], ["work: about 35 seconds in all"]),
        ([0, 1300, 1400, 1500], ["work: about 3.6 hours in all"]),
        ([0, 30, 60, 90], ["work: about 5.0 minutes in all"]),
    ],
)
def test_a_long_duration_is_logged_once(times, lines, caplog):
    caplog.set_level(logging.INFO, "lightning_adam_mini")
    logging.getLogger("lightning_adam_mini").propagate = True
    ticks = iter(times)
    update = log_duration("work", lambda: next(ticks))
    for done in range(1, len(times)):
        update(done, 10)
    assert caplog.messages == lines


def test_what_is_over_has_no_duration(caplog):
    caplog.set_level(logging.INFO, "lightning_adam_mini")
    ticks = iter([0, 50, 100])
    update = log_duration("work", lambda: next(ticks))
    update(0, 10)
    update(10, 10)
    assert caplog.messages == []


def test_each_piece_is_named_but_not_by_the_hundred(caplog):
    caplog.set_level(logging.INFO, "lightning_adam_mini")
    logging.getLogger("lightning_adam_mini").propagate = True
    seconds = [0.0]
    update = log_each("work", [1, 1, 2], lambda: seconds[0])
    for number, time in enumerate((0, 0.5, 10), 1):
        seconds[0] = time
        update("abc"[number - 1], number, 3)
    assert caplog.messages == ["1 of 3: a", "3 of 3: c", "work: about 20 seconds in all"]
