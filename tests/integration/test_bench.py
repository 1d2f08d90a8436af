"""`adam-mini bench` as a user types it: files, rows, and what is wrong in one line."""

import json
import os
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("transformers")
pytest.importorskip("lightning")

from apart import apart, assert_passes_apart
from lightning_adam_mini.cli.bench import steps
from lightning_adam_mini.cli.bench.throughput import workload
from lightning_adam_mini.cli.main import main
from tiny_runs import RECIPE, error_line, write_recipe

COMMAND, VALUE = 2, 1  # exit codes: what is wrong
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 200,
    "max_position_embeddings": 64,
}
CONFIG = json.dumps(TINY)
OURS = ("adam-mini-reference", "adam-mini-foreach")


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    """Small probes of bandwidth, one thread, an own folder, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(steps, "COPY_BYTES", 1 << 16)

    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def bench(*arguments, name="bench"):
    """What `adam-mini bench ARGUMENTS --out out` writes."""
    assert main(["bench", *map(str, arguments), "--device", "cpu", "--out", "out"]) == 0
    return json.loads(Path(f"out/{name}.json").read_text("utf-8"))


def row_of(result, label):
    (row,) = [row for row in result["rows"] if row["label"] == label]
    return row


@apart
def test_steps_of_a_configuration(tmp_path, capsys):
    result = bench("--hf", CONFIG, "--rounds", 4, "--optimizers", "authors", *OURS, "adamw-foreach")
    assert result["rows"][0]["label"] == "adamw-fused"
    baseline, ours = row_of(result, "adamw-fused"), row_of(result, "adam-mini-foreach")
    assert baseline["cpu"]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0, "uncertainty": 0.0}
    assert baseline["streams"] == pytest.approx(7, abs=0.01)
    assert 5 < ours["streams"] < 5.2
    assert ours["state_bytes"] < 0.52 * baseline["state_bytes"]
    for row in result["rows"]:
        if "reason" not in row:
            assert row["wall"]["ratio"]["low"] <= row["wall"]["ratio"]["median"] <= row["wall"]["ratio"]["high"]
            assert len(row["wall"]["rounds"]) == result["rounds"] == 4
    assert result["command"].startswith("adam-mini bench --hf '{")
    assert {"torch", "transformers"} <= result["versions"].keys()
    assert result["hardware"]["threads"] == result["threads"] == 1
    printed = capsys.readouterr().out
    assert "adam-mini-foreach" in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bench.json", "bench.png"]
    assert (tmp_path / "out/bench.png").read_bytes().startswith(b"\x89PNG")


@apart
def test_partitions_dtype_and_the_seed():
    options = ("--partition", "transformer", "factored", "--dtype", "bfloat16", "--seed", 3)
    result = bench("--hf", CONFIG, "--rounds", 3, "--optimizers", "adam-mini-foreach", *options)
    labels = [row["label"] for row in result["rows"]]
    assert labels == ["adamw-fused", "adam-mini-foreach transformer", "adam-mini-foreach factored"]
    assert (result["dtype"], result["seed"]) == ("bfloat16", 3)
    blocks, factored = (row_of(result, label)["state_bytes"] for label in labels[1:])
    assert blocks != factored


@apart
def test_one_rank_of_many(capsys):
    """Its share of the state, a collective where heads may be split, and none that waits for the others."""
    options = ("--rounds", 3, "--optimizers", *OURS, "adam-mini-8bit")
    alone, sharded = (bench("--hf", CONFIG, "--ranks", ranks, *options) for ranks in (1, 4))
    assert "collectives" not in row_of(alone, "adam-mini-foreach")
    assert (sharded["ranks"], sharded["parameters"]) == (4, alone["parameters"])
    for label in ("adamw-fused", "adam-mini-foreach"):
        share = row_of(sharded, label)["state_bytes"] / row_of(alone, label)["state_bytes"]
        assert share == pytest.approx(0.25, rel=0.02)
    assert [row["collectives"] for row in sharded["rows"]] == [0, 1, 1, 1]
    assert row_of(sharded, "adamw-fused")["collective_bytes"] == 0
    # In float64: flags of the parameters that share blocks, and sums of squares, one a head, one a norm's scale.
    assert 0 < row_of(sharded, "adam-mini-foreach")["collective_bytes"] < 50 * 8
    assert row_of(sharded, "adamw-fused")["streams"] == pytest.approx(7, abs=0.05)
    assert "one of 4 ranks" in capsys.readouterr().out
    assert not dist.is_initialized()


@pytest.mark.parametrize(("recipe", "package"), [("graph/gcn", "torch_geometric"), ("diffusion/digits", "diffusers")])
@apart
def test_recipes_of_other_tasks(recipe, package):
    pytest.importorskip(package)
    result = bench(recipe, "--rounds", 3, "--optimizers", "adam-mini-foreach")
    assert "reason" not in row_of(result, "adam-mini-foreach")


@apart
def test_throughput_of_a_configuration(capsys):
    result = bench("throughput", "--hf", CONFIG, "--memory", "5MB", name="throughput")
    adamw, ours = (row["predicted"] for row in result["rows"])
    assert 0 < adamw["batch"] < ours["batch"]
    assert max(adamw["total_bytes"], ours["total_bytes"]) <= 5_000_000
    assert ours["total_bytes"] + ours["activation_bytes_of_a_further_sequence"] > 5_000_000
    assert adamw["parameter_bytes"] == adamw["gradient_bytes"] == 4 * result["parameters"]
    assert "AdamMini" in capsys.readouterr().out


@apart
def test_throughput_over_ranks_and_in_other_precisions():
    def first(*options):
        fixed = ("--hf", CONFIG, "--memory", "5MB", "--optimizers", "AdamW")
        result = bench("throughput", *fixed, *options, name="throughput")
        return result["rows"][0]["predicted"]

    one, two = first(), first("--ranks", 2)
    assert two["state_bytes"] == one["state_bytes"] // 2
    assert two["gathered_bytes"] > one["gathered_bytes"] == 0
    half = first("--precision", "bf16-true")
    assert half["parameter_bytes"] == one["parameter_bytes"] // 2
    assert first("--precision", "bf16-mixed")["parameter_bytes"] == one["parameter_bytes"]
    kept, again = (first("--checkpointing", on)["activation_bytes_of_a_further_sequence"] for on in ("off", "on"))
    assert again < kept


@apart
def test_a_memory_that_not_even_one_sequence_fits(capsys):
    result = bench("throughput", "--hf", CONFIG, "--memory", "1MB", name="throughput")
    assert [row["predicted"]["batch"] for row in result["rows"]] == [0, 0]
    assert "AdamW: even one sequence needs" in capsys.readouterr().out


@apart
def test_a_recipe_says_how_it_is_trained(tmp_path):
    model = {**RECIPE["model"], "init_args": {**RECIPE["model"]["init_args"], "activation_checkpointing": True}}
    trainer = {"precision": "bf16-mixed", "strategy": "fsdp2", "devices": 4, "num_nodes": 2}
    write_recipe(tmp_path, model=model, trainer=trainer)
    blank = dict.fromkeys(("context", "precision", "checkpointing", "ranks"))
    options = Namespace(source="recipe", model="tiny.yaml", measure=False, **blank)
    load = workload(options)
    assert (load.context, load.precision, load.checkpointing, load.ranks) == (16, "bf16-mixed", True, 8)
    changed = {"context": 32, "precision": "32-true", "checkpointing": "off", "ranks": 1}
    load = workload(Namespace(**{**vars(options), **changed}))
    assert (load.context, load.precision, load.checkpointing, load.ranks) == (32, "32-true", False, 1)


@pytest.mark.slow
@apart
def test_measured_batches_fit(capsys):
    options = ("--memory", "150MB", "--measure", "--sequences", 8, "--optimizers", "AdamMini")
    result = bench("throughput", "--hf", json.dumps(TINY | {"hidden_size": 256}), *options, name="throughput")
    (row,) = result["rows"]
    measured, predicted = row["measured"], row["predicted"]
    assert measured["peak_bytes"] <= 150_000_000
    assert measured["tokens_per_second"] > 0
    further = predicted["activation_bytes_of_a_further_sequence"]
    expected = predicted["total_bytes"] + (measured["batch"] - predicted["batch"]) * further
    assert measured["allocated_bytes"] == pytest.approx(expected, rel=0.1)
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ([], COMMAND, "give exactly one of RECIPE, --hf, --timm and --diffusers"),
        (["llm/gpt2_tiny", "--hf", "x"], COMMAND, "give exactly one of"),
        (["--hf", ""], COMMAND, "--hf is empty"),
        (["--hf", "{no"], VALUE, "this is not JSON"),
        (["--hf", '{"model_type": "gpt"}'], VALUE, "did you mean"),
        (["llm/gpt2_tyny"], COMMAND, "did you mean llm/gpt2_tiny.yaml"),
        (["--hf", CONFIG, "--rounds", "0"], COMMAND, "--rounds 0: quartiles need at least 3"),
        (["--hf", CONFIG, "--ranks", "0"], COMMAND, "--ranks 0: at least 1"),
        (["--hf", CONFIG, "--threads", "0"], COMMAND, "--threads 0: at least 1"),
        (["--hf", CONFIG, "--partition", "row_column"], COMMAND, "transformer_early, factored, slimadam"),
        (["--hf", CONFIG, "--optimizers", "adamw"], COMMAND, "choose from adamw-fused, adamw-foreach"),
        (["--hf", CONFIG, "--optimizers", "authors", "authors"], COMMAND, "give each name once"),
        (["--hf", CONFIG, "--out", "file"], COMMAND, "this is a file"),
        (["--hf", CONFIG, "--dtype", "int8"], COMMAND, "invalid choice: 'int8'"),
        (["throughput", "--hf", CONFIG], COMMAND, "--memory"),
        (["throughput", "--hf", CONFIG, "--memory", "80 apples"], COMMAND, "such as 80GB, 80GiB or 500MB"),
        (["throughput", "--hf", CONFIG, "--memory", "0GB"], COMMAND, "more than nothing"),
        (["throughput", "--hf", CONFIG, "--memory", "1GB", "--context", "65"], VALUE, "the model has 64 positions"),
        (["throughput", "--hf", CONFIG, "--memory", "1GB", "--ranks", "2", "--measure"], COMMAND, "on one device"),
        (["throughput", "--hf", CONFIG, "--memory", "1GB", "--optimizers", "Adamm"], COMMAND, "did you mean Adam"),
        (["throughput", "graph/gcn", "--memory", "1GB"], VALUE, "is no causal language model"),
    ],
)
@apart
def test_what_is_wrong_in_one_line(arguments, code, told, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    if "graph/gcn" in arguments:
        pytest.importorskip("torch_geometric")
    assert main(["bench", *arguments]) == code
    assert told in error_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not apart.args[0], reason="once, outside of that process")
def test_threads_are_set_before_torch_is_loaded():
    """The command starts itself again with OpenMP's variables; a wrong command line costs no start of torch."""
    wrong = "import sys; from lightning_adam_mini.cli.main import main; main(['bench', '--rounds', '1', '--hf', '{}'])"
    told = f"{wrong}; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", told], check=False, capture_output=True).returncode == 0
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    small = ["--hf", CONFIG, "--rounds", "3", "--optimizers", "adamw-fused", "--threads", "2", "--out", "out"]
    command = [sys.executable, "-m", "lightning_adam_mini.cli.main", "bench", *small]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(Path("out/bench.json").read_text("utf-8"))
    assert result["environment"] == {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    assert result["threads"] == 2


@pytest.mark.slow
@pytest.mark.skipif(not apart.args[0], reason="this is the process")
def test_in_a_process_of_its_own():
    assert_passes_apart(__file__)
