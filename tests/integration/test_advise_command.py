"""`adam-mini advise` as a user types it, from second moments and from the Hessian, on recipes that take a second."""

import json
import math
import shlex
from pathlib import Path

import pytest
import yaml

from lightning_adam_mini.cli.advise.command import main as advise
from lightning_adam_mini.cli.advise.command import parse
from lightning_adam_mini.cli.main import main as command
from lightning_adam_mini.hessian.advice import ModelAdvice
from lightning_adam_mini.measure.moment_statistics import SecondMomentRecord
from lightning_adam_mini.schedule import Schedule
from tiny_runs import write_recipe

FUSED = "transformer.h.0.attn.c_attn.weight"
MATRICES = [
    "model.transformer.wte.weight",
    "model.transformer.wpe.weight",
    f"model.{FUSED}",
    "model.transformer.h.0.attn.c_proj.weight",
    "model.transformer.h.0.mlp.c_fc.weight",
    "model.transformer.h.0.mlp.c_proj.weight",
]
SHORT = ("--steps", "6", "--from-step", "2", "--every", "2")


def result(folder):
    return json.loads((folder / "advice.json").read_text())


def shown(caplog):
    """The command line at the end of the log."""
    return shlex.split(caplog.text.rpartition("train with it:\n")[2].splitlines()[0])


def optimizer_of(words, capsys):
    """The optimizer that a `fit` command would train with."""
    program, *arguments = words
    assert program == "adam-mini"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        command([*arguments, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)["optimizer"]


def test_moments_give_a_recipe_that_fit_takes(small, caplog, capsys):
    assert (
        advise(["tiny.yaml", *SHORT, "--out", "found", "--optimizer.lr", "5e-3", "--trainer.log_every_n_steps=1"]) == 0
    )
    found = result(small / "found")
    assert [each["name"] for each in found["matrices"]] == MATRICES
    assert found["observations"] == 3
    assert (found["optimizer"]["lr"], found["rule"], found["bound"]) == (5e-3, "slimadam", None)
    fused = found["matrices"][2]
    assert fused["structures"]["row"]["signal_to_noise"] > 0
    assert fused["structures"]["factored"]["signal_to_noise"] is None
    assert found["num_elements"] == sum(math.prod(each["shape"]) for each in found["matrices"])
    assert "query+key+value" in caplog.text
    words = shown(caplog)
    assert words == ["adam-mini", "fit", "found/recipe.yaml", "--trainer.log_every_n_steps=1"]
    optimizer = optimizer_of(words, capsys)
    assert optimizer["class_path"] == "lightning_adam_mini.factory.AdamMini"
    assert optimizer["init_args"]["lr"] == 5e-3
    assert optimizer["init_args"]["partition"] == "element"
    assert optimizer["init_args"]["partition_overrides"] == found["partition_overrides"]
    assert command(["explain", "found/recipe.yaml"]) == 0
    assert sorted(path.name for path in small.iterdir()) == ["found", "text.txt", "tiny.yaml"], "no run folder"


def test_without_out_the_command_line_has_the_advice(small, caplog, capsys, monkeypatch):
    advised = {f"model.{FUSED}": "row", r"re:model\.transformer\.w.e\.weight": "column"}
    monkeypatch.setattr(SecondMomentRecord, "overrides", lambda *_: advised)
    recipe = yaml.safe_load((small / "tiny.yaml").read_text())
    recipe["optimizer"]["init_args"] |= {"partition_overrides": {"mlp": "whole"}, "weight_decay": 0.3}
    (small / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    assert advise(["tiny.yaml", *SHORT, "--optimizer.weight_decay=0.1", "--optimizer.exp_avg_dtype", "bfloat16"]) == 0
    snippet = yaml.safe_load(caplog.text.partition("for the recipe:\n")[2].partition("\n\n")[0])
    own = {"lr": 0.01, "partition": "element", "partition_overrides": advised, "exp_avg_dtype": "bfloat16"}
    assert snippet["optimizer"]["init_args"] == own
    optimizer = optimizer_of(shown(caplog), capsys)
    assert optimizer["init_args"].items() >= {**own, "weight_decay": 0.1, "betas": [0.9, 0.95]}.items()


def test_the_least_memory_within_a_bound(small):
    options = ("tiny.yaml", *SHORT, "--rule", "least-memory", "--bound")
    assert advise([*options, "1e-9", "--out", "none", "--optimizer", "AdamW"]) == 0
    assert advise([*options, "100", "--out", "all"]) == 0
    assert result(small / "none")["partition_overrides"] == {}
    assert {each["advice"] for each in result(small / "all")["matrices"]} == {"whole"}
    assert result(small / "all")["num_values"] == 6


def test_attention_over_a_graph(tmp_path, monkeypatch):
    pytest.importorskip("torch_geometric")
    import tiny_graphs

    tiny_graphs.write_recipe(tmp_path, model={"architecture": "gat", "heads": 2})
    monkeypatch.chdir(tmp_path)
    assert advise(["tiny.yaml", *SHORT, "--out", "found"]) == 0
    found = result(tmp_path / "found")
    assert len(found["matrices"]) > 1
    assert command(["explain", "found/recipe.yaml"]) == 0


def test_the_hessian_gives_a_recipe_that_fit_takes(small):
    options = ("--blocks", "*attn*weight", "*c_fc.weight", "--method", "sketch", "--columns", "16")
    assert advise(["tiny.yaml", "--source", "hessian", "--batches", "1", *options]) == 0
    found = result(small / "runs/hessian/tiny/advise")
    assert [row["parameter"] for row in found["parameters_advised"]] == [MATRICES[2], MATRICES[3], MATRICES[4]]
    assert all(
        row["structure"] in ("keep", "head", "row", "column", "whole", "element") for row in found["parameters_advised"]
    )
    recipe = yaml.safe_load((small / "tiny.yaml").read_text())
    recipe["optimizer"]["init_args"]["partition_overrides"] = found["partition_overrides"]
    (small / "advised.yaml").write_text(yaml.safe_dump(recipe))
    assert command(["explain", "advised.yaml"]) == 0


def from_hessian(*options):
    assert advise(["tiny.yaml", "--source=hessian", "--batches", "1", "--blocks", "*c_fc.weight", *options]) == 0


def test_advice_from_the_hessian_of_another_optimizer_is_a_recipe_for_adam_mini(small, caplog, monkeypatch):
    monkeypatch.setattr(ModelAdvice, "overrides", property(lambda advice: {"mlp": "element"}))
    from_hessian("--optimizer", "AdamW", "--out", "found")
    text = caplog.text.partition("for the recipe:\n")[2].partition("\n\n")[0]
    advised = yaml.safe_load(text)["optimizer"]
    assert advised["class_path"] == "lightning_adam_mini.factory.AdamMini"
    assert advised["init_args"]["partition_overrides"] == result(small / "found")["partition_overrides"]


@pytest.mark.slow
def test_advice_from_the_hessian_keeps_the_overrides_of_the_recipe(small):
    overrides = {"mlp": "element", "position_embedding": "whole"}
    recipe = yaml.safe_load((small / "tiny.yaml").read_text())
    recipe["optimizer"]["init_args"]["partition_overrides"] = overrides
    (small / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    from_hessian("--out", "found")
    found = result(small / "found")
    (row,) = found["parameters_advised"]
    assert row["structure"] == "row"
    assert found["partition_overrides"].items() > overrides.items()
    recipe["optimizer"]["init_args"]["partition_overrides"] = found["partition_overrides"]
    (small / "advised.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    assert command(["explain", "advised.yaml"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny.yaml", "--source", "gradients"], "invalid choice: 'gradients'"),
        (["tinny.yaml"], "no recipe of that name"),
        ([], "RECIPE"),
        (["tiny.yaml", "--steps", "50"], "--steps 50 is below --from-step 100, so that nothing would be observed"),
        (["tiny.yaml", "--steps", "0"], "--steps 0: at least 1"),
        (["tiny.yaml", "--from-step", "0"], "--from-step 0: at least 1"),
        (["tiny.yaml", "--every", "0"], "--every 0: at least 1"),
        (["tiny.yaml", "--every", "often"], "argument --every: invalid int value"),
        (["tiny.yaml", "--rule", "adafactor"], "argument --rule: invalid choice"),
        (["tiny.yaml", "--bound", "2"], "--bound 2 has no effect on --rule slimadam: give --rule least-memory"),
        (["tiny.yaml", "--rule", "least-memory", "--bound", "nan"], "--bound nan: a deviation is positive"),
        (["tiny.yaml", "--columns", "8"], "no option --columns"),
        (["tiny.yaml", "--checkpoint.save_last", "true"], "--checkpoint.save_last changes nothing here"),
        (["tiny.yaml", "--out", "text.txt"], "this is a file; give a folder"),
        (["--trainer.precision", "bf16-true", "tiny.yaml"], "--trainer.precision stands before RECIPE"),
        (
            ["tiny.yaml", "--optimizer", "Lion"],
            "trains with Lion, whose options are not AdamW's.*give --optimizer AdamW",
        ),
        (["tiny.yaml", "--source", "hessian", "--columns", "1"], "--columns 1: at least 2"),
        (["tiny.yaml", "--source", "hessian", "--steps", "1"], "no option --steps"),
        (
            ["tiny.yaml", "--source", "hessian", "--method", "exact", "--memory", "1MB"],
            "--memory 1MB: a dense Hessian of",
        ),
        (["tiny.yaml", "--source", "hessian", "--blocks", "*ln_1.weight"], "no rows or heads"),
        (["tiny.yaml", "--source", "hessian", "--blocks", f"{FUSED}[0]"], "whole parameters"),
    ],
)
def test_bad_input_is_one_line(small, arguments, message):
    with pytest.raises(Exception, match=message) as raised:
        advise(arguments)
    assert type(raised.value).__name__ in ("ValueError", "ArgumentError", "UsageError")
    assert "\n" not in str(raised.value).strip()
    assert not list(small.rglob("*.json*"))


@pytest.mark.slow
def test_the_schedule_is_that_of_the_recipes_own_run(small, monkeypatch):
    build, horizons = Schedule.build, []
    monkeypatch.setattr(Schedule, "build", lambda own, *args: horizons.append(args[1]) or build(own, *args))
    advise(["tiny.yaml", *SHORT])
    advise(["tiny.yaml", *SHORT, "--schedule.horizon", "50"])
    advise(["tiny.yaml", *SHORT, "--trainer.max_steps", "4"])
    assert horizons == [10, 50, 6]


def test_what_a_task_draws_at_the_end_is_not_kept(small, monkeypatch):
    from lightning_adam_mini.tasks.llm import LanguageModel

    drawn = []

    def draw(task):
        drawn.append(folder := Path(task.trainer.default_root_dir))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "picture.png").touch()

    monkeypatch.setattr(LanguageModel, "on_train_end", draw)
    advise(["tiny.yaml", *SHORT])
    assert len(drawn) == 1
    assert sorted(path.name for path in small.iterdir()) == ["text.txt", "tiny.yaml"]


def test_a_run_that_diverges_has_no_advice(work_dir):
    write_recipe(work_dir)
    with pytest.raises(ValueError, match="training has diverged") as raised:
        advise(["tiny.yaml", *SHORT, "--optimizer.lr", "1e30", "--trainer.gradient_clip_val", "null"])
    assert raised.value.exit_code == 3


def test_options_of_the_recipe_are_left_for_it():
    options = parse(["tiny.yaml", "--schedule.warmup", "-1", "--steps=200", "--trainer.accelerator", "cpu"])
    assert options.recipe_options == ["--schedule.warmup", "-1", "--trainer.accelerator", "cpu"]
    assert (options.recipe, options.source, options.steps, options.bound) == ("tiny.yaml", "moments", 200, None)
