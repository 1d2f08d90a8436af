"""The tables of `docs/memory.md`: recomputed, and held to what the optimizer itself keeps."""

import importlib.util
import json
import re
import sys
from functools import cache

import pytest

from checkout import ROOT
from lightning_adam_mini import AdamMini
from lightning_adam_mini.measure import optimizer_state_bytes

pytest.importorskip("transformers")

SCRIPT = ROOT / "benchmarks" / "memory_tables.py"
PAGE = ROOT / "docs" / "memory.md"
RESULTS = ROOT / "benchmarks" / "results" / "memory_tables.json"
PARAMETERS = {
    "GPT2-1.5B": 1_557_611_200,
    "TinyLlama-1.1B": 1_100_048_384,
    "Phi-3-mini": 3_821_079_552,
    "Llama2-7B": 6_738_415_616,
    "Llama3-8B": 8_030_261_248,
    "Gemma-7B": 8_537_680_896,
    "Llama2-13B": 13_015_864_320,
    "Llama3-70B": 70_553_706_496,
}
FAST = ["GPT2-1.5B", "TinyLlama-1.1B"]


def load_script():
    spec = importlib.util.spec_from_file_location("memory_tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["memory_tables"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


memory_tables = load_script()


@cache
def model(name):
    return memory_tables.build(name)


@cache
def figures(name):
    return memory_tables.measure(model(name))


def lines_of(name):
    """The lines of a page's tables that are about a model."""
    return [line for line in PAGE.read_text().splitlines() if line.startswith(f"| {name} |")]


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_exactly_those_of_the_published_model(name):
    assert sum(parameter.numel() for parameter in model(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", FAST)
def test_the_page_shows_what_the_script_computes(name):
    rows = (memory_tables.memory_row, memory_tables.kept_row, memory_tables.share_row)
    assert lines_of(name) == [memory_tables.markdown_row(row(name, figures(name))) for row in rows]


def test_the_page_shows_the_kept_results():
    rows = {
        row.pop("model"): memory_tables.Figures(**{key: row[key] for key in row if key != "config"})
        for row in json.loads(RESULTS.read_text())["rows"]
    }
    of_one_process, _, _ = PAGE.read_text().partition("## 8-bit and bfloat16 first moments")
    on_page = "\n".join(re.findall(r"^\|.*", of_one_process, re.MULTILINE))
    assert on_page == memory_tables.tables(rows).replace("\n\n", "\n")
    assert RESULTS.with_suffix(".md").read_text() == memory_tables.tables(rows) + "\n"


def test_the_page_shows_the_measured_rank():
    result = json.loads((RESULTS.parent / "sharded_memory_7b.json").read_text())
    _, _, of_one_rank = PAGE.read_text().partition("## One rank of a sharded model")
    table = [line.strip("| ").split(" | ")[1:] for line in re.findall(r"^\| Adam.*", of_one_rank, re.MULTILINE)]
    shown = ("parameter_bytes", "gradient_bytes", "state_bytes", "peak_resident_bytes")
    assert table == [[gigabytes(row["measured"][key]) for key in shown] for row in result["rows"]]
    for row in result["rows"]:
        assert row["predicted"].items() <= row["measured"].items(), row["optimizer"]


def gigabytes(count):
    return f"{count / 1e9:.3g} GB"


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("partition", memory_tables.PARTITIONS)
def test_the_optimizer_keeps_what_the_tables_say(name, partition):
    strategy, overrides = memory_tables.PARTITIONS[partition]
    module = model(name)
    optimizer = AdamMini(module, partition=strategy, partition_overrides=overrides)
    step_counters = 4 * len(list(module.parameters()))
    assert optimizer_state_bytes(optimizer) == figures(name).state_bytes[partition] + step_counters


def test_the_final_version_keeps_less_than_a_thousandth_of_the_second_moments():
    assert all(figures(name).removed("final") > 0.999 for name in FAST)
