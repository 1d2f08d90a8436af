"""The charts of a report: their colours in both themes, their size, their words; and numbers as texts."""

import itertools
import math
import re
from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest

from lightning_adam_mini.cli.compare.report import wording
from lightning_adam_mini.cli.compare.report.charts import curves_chart
from lightning_adam_mini.cli.compare.report.names import task_names
from lightning_adam_mini.cli.compare.report.profiles import profile_chart
from lightning_adam_mini.cli.compare.report.rates import rates_chart
from lightning_adam_mini.cli.compare.report.scales import focus
from lightning_adam_mini.cli.compare.report.theme import PALETTE, SERIES, series_style, theme_css
from synthetic_comparison import synthetic_comparison

TEXT_ON = [
    *itertools.product(["ink", "muted", "accent"], ["page", "surface"]),
    *[("good-ink", "good-fill"), ("bad-ink", "bad-fill"), ("even-ink", "even-fill"), ("page", "ink")],
]


def contrast(one, other):
    """Contrast ratio of two colours (WCAG 2.2)."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.fixture(scope="module")
def task():
    lose = lambda recipe, optimizer, lr, seed: ("diverged", "x") if optimizer == "Lion" and lr == 6e-3 else None  # noqa: E731
    return synthetic_comparison(("AdamW", "AdamMini", "Lion"), lose=lose).tasks[0]


@pytest.fixture(scope="module")
def drawing(task):
    return curves_chart(task, "chart", "steps")


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_texts_and_lines_stand_out_in_both_themes(theme):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for text, ground in TEXT_ON:
        assert contrast(PALETTE[text][theme], PALETTE[ground][theme]) >= 4.5, (text, ground)
    for style, ground in itertools.product(SERIES, ["page", "surface"]):
        assert contrast(PALETTE[style.variable][theme], PALETTE[ground][theme]) >= 3, (style, ground)


def test_series_differ_without_colour():
    styles = [series_style(number) for number in range(16)]
    assert len({style.marker for style in styles[:8]}) == len({str(style.linestyle) for style in styles[:8]}) == 8
    assert len({(style.variable, style.marker) for style in styles}) == 16


def test_every_variable_is_defined_in_both_themes(drawing):
    used = set(re.findall(r"var\(--([\w-]+)\)", drawing.svg))
    assert {"ink", "muted", "grid", "series-1", "series-2", "series-3"} - used <= {"ink"}
    assert used <= set(PALETTE)
    assert all(theme_css().count(f"--{name}:") == 2 for name in used)


def test_a_chart_has_no_colour_of_its_own(drawing):
    assert not re.findall(r"#[0-9a-fA-F]{6}\b", drawing.svg)
    assert "<style" not in drawing.svg  # it would hold for the whole page


def test_texts_of_a_chart_are_texts_and_large_enough_on_a_phone(drawing):
    root = ET.fromstring(drawing.svg)
    width = float(root.get("viewBox").split()[2])
    texts = [element for element in root.iter() if element.tag.endswith("}text")]
    assert "optimizer steps" in {text.text for text in texts}
    sizes = [float(re.search(r"font(?:-size)?: *([\d.]+)px", text.get("style"))[1]) for text in texts]
    assert min(sizes) * (390 - 32) / width >= 11
    assert root.get("width") is None


def test_a_chart_says_its_numbers_in_words(task, drawing):
    root = ET.fromstring(drawing.svg)
    assert root.get("role") == "img"
    assert root.get("aria-label") == drawing.words
    for entry in task.entries:
        last = sum(run.curve[-1].value for run in entry.best_runs) / len(entry.best_runs)
        told = re.search(rf"{entry.optimizer} at learning rate [\d.]+: .*?, ([\d.]+) after 800 steps", drawing.words)
        assert float(told[1]) == pytest.approx(last, abs=6e-4)


def test_a_file_of_a_chart_brings_its_colours(drawing):
    root = ET.fromstring(drawing.file_text().encode())
    assert "prefers-color-scheme:dark" in next(e.text for e in root.iter() if e.tag.endswith("}style"))


def test_a_run_that_diverged_is_no_part_of_the_curve(task):
    entry = task.entries[1]
    seeds = [run for run in entry.runs if run.lr == entry.best_lr]
    lost = replace(seeds[1], status="diverged", value=None)
    runs = tuple(lost if run is seeds[1] else run for run in entry.runs)
    words = curves_chart(replace(task, entries=(replace(entry, runs=runs),)), "chart", "steps").words
    values = [run.curve[-1].value for run in (seeds[0], seeds[2])]
    assert f"{sum(values) / 2:.3f} after 800 steps" in words


def test_lost_learning_rates_are_marked(task):
    drawing = rates_chart(task, "rates")
    assert "Lion: " in drawing.words
    assert "runs lost at 0.006" in drawing.words
    assert "cross" in drawing.caption
    assert "cross" not in rates_chart(replace(task, entries=task.entries[:2]), "rates").caption


def test_profiles_need_two_tasks(task):
    assert profile_chart(synthetic_comparison(validations=2), "steps") is None
    words = profile_chart(synthetic_comparison(recipes=("a", "b"), validations=6), "steps").words
    assert re.search(r"AdamMini: a (never|factor [\d.]+), b (never|factor [\d.]+)\.", words)


def test_the_range_is_that_of_good_values():
    low, high = focus([1.0, 1.1, 1.2, 1.3, 1e9], "min")
    assert low < 1.0
    assert 1.3 < high < 4
    low, high = focus([0.9, 0.8, 0.85, -1e9], "max")
    assert -1 < low < 0.8
    assert high > 0.9
    assert focus([], "min", target=2.0)[0] < 2.0 < focus([], "min", target=math.nan)[1] + 2
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
