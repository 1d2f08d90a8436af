"""Every recipe for language models parses and builds, and the values of its header are computed again."""

import re
import shlex
from functools import cache

import pytest
import torch

from checkout import ROOT

pytest.importorskip("transformers")

from lightning_adam_mini.cli.main import main
from lightning_adam_mini.cli.recipes import find_recipe
from lightning_adam_mini.factory import AdamMini, AdamW
from lightning_adam_mini.measure import adamw_state_bytes, optimizer_state_bytes
from recipe_files import header, recipes_of, start

# Parameters, peak and final learning rate of the schedule, steps of warm-up: what the sources say.
SOURCES = {
    "gpt2_125m": (124_475_904, 6e-4, 3e-5, 2000),
    "gpt2_330m": (354_871_296, 3e-4, 6e-5, 2000),
    "gpt2_770m": (774_090_240, 2e-4, 1e-5, 2000),
    "gpt2_1.5b": (1_557_686_400, 1e-4, 1e-5, 2000),
    "llama_20m": (19_794_176, 6e-4, 0.0, 40),
    "llama_39m": (38_738_304, 6e-4, 0.0, 78),
    "llama_67m": (66_857_472, 6e-4, 0.0, 134),
    "llama_102m": (101_924_480, 6e-4, 0.0, 204),
    "llama_162m": (162_423_552, 6e-4, 0.0, 324),
    "llama_271m": (271_090_688, 6e-4, 0.0, 542),
    "llama_1b": (1_055_991_808, 2e-4, 0.0, 2000),
    "tinyllama_1.1b": (1_100_048_384, 2e-4, 2e-5, 2000),
    "llama2_7b": (6_738_415_616, 8e-5, 8e-6, 2000),
    "llama2_13b": (13_015_864_320, 1e-4, 0.0, 100),
    "llama3_8b": (8_030_261_248, 1e-4, 0.0, 100),
}
FROM_PAPERS = [f"llm/{name}.yaml" for name in SOURCES]
# They run on any machine, and their headers give our measurements.
FOR_A_TRY = ["llm/gpt2_tiny.yaml", "llm/llama_tiny.yaml"]
LABELS = ["Command", "Data", "Hardware", "Source", "Expected", "Parameters", "Optimizer state", "With weights"]
LABELS += ["Tokens a step", "Learning rate"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Starting a run leaves its folder in the environment, for the processes of other ranks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADAM_MINI_RUN_DIR", "")


@cache
def build(recipe, *options):
    """The task with its model and its optimizer, without memory for either."""
    task = start(recipe, *options).model
    with torch.device("meta"):
        task.configure_model()
    return task, task.optimizer_factory.build(task)


def tokens_a_step(config):
    trainer, data = config.trainer, config.data.init_args
    return int(trainer.devices) * data.batch_size * trainer.accumulate_grad_batches * data.context_length


def steps_between_validations(config):
    steps, rest = divmod(config.trainer.val_check_interval, config.trainer.accumulate_grad_batches)
    assert rest == 0, "validation would fall between two batches of one step"
    return steps


def gigabytes(number):
    return f"{number / 1e9:.2f} GB"


def test_the_command_lists_every_recipe_with_a_title(capsys):
    assert main(["recipes"]) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert {name for name in listed if name.startswith("llm/")} >= {*FROM_PAPERS, *FOR_A_TRY}
    for name, title in listed.items():
        assert len(title.split()) > 3, name
        assert title.endswith("."), name


def test_every_recipe_for_language_models_is_tested():
    assert set(recipes_of("llm")) == {*FROM_PAPERS, *FOR_A_TRY}


@pytest.mark.parametrize("recipe", FOR_A_TRY)
def test_a_recipe_for_a_try_builds(recipe):
    task, optimizer = build(recipe)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in task.parameters()}
    assert optimizer_state_bytes(optimizer) < 0.6 * adamw_state_bytes(task.parameters())


@pytest.mark.parametrize("recipe", FROM_PAPERS)
def test_the_header_is_complete_and_its_command_parses(recipe):
    fields = header(recipe).fields
    assert [label for label in fields if label != "On one GPU"] == LABELS
    assert "not ours" in fields["Expected"] or fields["Expected"].startswith("nothing to compare with")
    assert "we have not run it" in fields["Hardware"]
    assert fields["Command"] == f"adam-mini fit --config {recipe}"
    assert start(recipe).trainer.max_steps > 0


@pytest.mark.parametrize("recipe", FROM_PAPERS)
def test_the_recipe_builds_what_its_sources_describe(recipe):
    app = start(recipe)
    task, optimizer = build(recipe)
    assert all(parameter.is_meta for parameter in task.parameters())
    factory = task.optimizer_factory
    assert isinstance(factory, AdamMini)
    assert (factory.betas, factory.eps, factory.weight_decay) == ((0.9, 0.95), 1e-8, 0.1)
    assert factory.partition_overrides == ({} if "gpt2" in recipe else {"value": "whole"})
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert sum(p.numel() for p in held) == sum(p.numel() for p in task.parameters())
    assert app.trainer.gradient_clip_val == 1.0
    assert app.trainer.precision == "bf16-mixed"
    assert app.datamodule.context_length == task.model.config.max_position_embeddings
    assert app.datamodule.wanted_vocab_size <= task.model.config.vocab_size


@pytest.mark.parametrize("recipe", FROM_PAPERS)
def test_parameters_and_memory_are_those_of_the_header(recipe):
    fields = header(recipe).fields
    task, optimizer = build(recipe)
    number = sum(p.numel() for p in task.parameters())
    mini, adamw = optimizer_state_bytes(optimizer), adamw_state_bytes(task.parameters())
    assert number == SOURCES[name_of(recipe)][0]
    assert fields["Parameters"] == f"{number:,}"
    assert fields["Optimizer state"] == (
        f"AdamW {adamw:,} bytes ({gigabytes(adamw)}), Adam-mini {mini:,} bytes ({gigabytes(mini)})"
    )
    # Weights, gradients and one moment in float32: what Adam-mini adds to that is the number to keep small.
    assert 12 * number < 8 * number + mini < 12.05 * number
    assert fields["With weights"].startswith(gigabytes(8 * number + mini))


def test_llama2_7b_needs_half_of_adamws_state():
    """Zhang et al. 2024, table 1: 53.92 GB with 6.74e9 parameters, and 26.96 GB in the final version."""
    task, optimizer = build("llm/llama2_7b.yaml")
    assert gigabytes(adamw_state_bytes(task.parameters())) == "53.91 GB"
    assert gigabytes(optimizer_state_bytes(optimizer)) == "26.96 GB"


@pytest.mark.parametrize("recipe", FROM_PAPERS)
def test_the_first_versions_memory_is_that_of_the_header(recipe):
    told = re.findall(r"(?:is the first|saves less here), ([\d.]+ GB)", header(recipe).text)
    task, _ = build(recipe)
    early = AdamMini(partition="transformer_early").build(task)
    assert told == [gigabytes(optimizer_state_bytes(early))] or not told


@pytest.mark.parametrize("recipe", FROM_PAPERS)
def test_tokens_of_a_step_and_of_the_run_are_those_of_the_header(recipe):
    config = start(recipe).config
    told = header(recipe).fields["Tokens a step"]
    product, steps, total = re.fullmatch(r"[\d,]+ = (.*) tokens; ([\d,]+) steps take ([\d.]+[BM])", told).groups()
    factors = [int(number) for number in re.findall(r"\d+", product)]
    trainer, data = config.trainer, config.data.init_args
    assert factors == [trainer.devices, data.batch_size, trainer.accumulate_grad_batches, data.context_length]
    tokens = tokens_a_step(config)
    assert told.startswith(f"{tokens:,} = ")
    assert steps == f"{trainer.max_steps:,}"
    assert total in (f"{tokens * trainer.max_steps / 1e9:.2f}B", f"{tokens * trainer.max_steps / 1e6:.0f}M")
    assert f": {trainer.max_steps:,} steps of {tokens // data.context_length} sequences" in header(recipe).title


@pytest.mark.parametrize("recipe", [name for name in FROM_PAPERS if "On one GPU" in header(name).fields])
def test_one_gpu_takes_the_same_steps(recipe):
    told = header(recipe).fields["On one GPU"]
    several, one = start(recipe).config, start(recipe, *shlex.split(told.removeprefix("add "))).config
    assert (int(several.trainer.devices), int(one.trainer.devices)) == (4, 1)
    assert tokens_a_step(one) == tokens_a_step(several)
    assert steps_between_validations(one) == steps_between_validations(several)


@pytest.mark.parametrize("recipe", FROM_PAPERS)
def test_the_learning_rate_runs_between_the_sources_values(recipe):
    app = start(recipe)
    _, peak, end, warmup = SOURCES[name_of(recipe)]
    schedule, lr, steps = app.model.schedule, app.model.optimizer_factory.lr, app.trainer.max_steps
    horizon = schedule.horizon or steps
    assert steps <= horizon
    rates = [lr * schedule.scale(step, horizon) for step in (0, warmup, steps - 1, horizon)]
    assert rates == pytest.approx([peak / (warmup + 1), peak, rates[2], end], rel=1e-9)
    assert lr * schedule.scale(warmup - 1, horizon) < peak > lr * schedule.scale(warmup + 1, horizon)
    told = "{:.2e} in the first step, {:.2e} at the peak, {:.2e} in the last step".format(*rates)
    assert header(recipe).fields["Learning rate"] == told


@pytest.mark.parametrize("recipe", FROM_PAPERS)
def test_validation_and_checkpoints_fall_between_steps(recipe):
    """A checkpoint follows each validation, and the run ends with one."""
    config = start(recipe).config
    assert 4 <= config.trainer.max_steps / steps_between_validations(config) <= 200
    assert config.checkpoint.every_n_train_steps is None
    assert config.checkpoint.save_last is True


@pytest.mark.parametrize("recipe", ["llm/gpt2_125m.yaml", "llm/llama_39m.yaml"])
def test_the_authors_baseline_is_one_option_away(recipe):
    task, optimizer = build(recipe, *shlex.split("--optimizer AdamW --optimizer.weight_decay_policy all"))
    peak = SOURCES[name_of(recipe)][1]
    assert isinstance(task.optimizer_factory, AdamW)
    decays = [group["weight_decay"] for group in optimizer.param_groups if group["params"]]
    assert set(decays) == {0.1}
    assert (task.optimizer_factory.lr, task.optimizer_factory.betas) == (peak, (0.9, 0.95))


@pytest.mark.parametrize(
    ("line", "misspelt", "known"),
    [
        ("      hidden_size: 384", "      hiden_size: 384", "hidden_size"),
        ("    compile: true", "    compiled: true", "compile"),
        ("    val_path: data/c4/validation", "    val_paths: data/c4/validation", "val_path"),
        ("    batch_size: 64", "    batchsize: 64", "batch_size"),
        ("    weight_decay: 0.1", "    weight_decai: 0.1", "weight_decay"),
        ("      value: whole", "      value: hole", "whole"),
    ],
)
def test_an_unknown_option_is_refused_and_the_known_ones_named(line, misspelt, known, tmp_path, capsys):
    text = find_recipe("llm/llama_39m.yaml").read_text("utf-8")
    assert f"\n{line}\n" in text
    recipe = tmp_path / "misspelt.yaml"
    recipe.write_text(text.replace(f"\n{line}\n", f"\n{misspelt}\n"), "utf-8")
    assert main(["fit", "--config", str(recipe), "--trainer.accelerator", "cpu"]) != 0
    told = capsys.readouterr().err.splitlines()[-1]
    assert misspelt.strip().split(":")[0 if known != "whole" else 1].strip() in told
    assert re.search(rf"\b{known}\b", told)


def test_a_misspelt_recipe_names_the_ones_that_come_near(capsys):
    assert main(["fit", "--config", "llm/llama_7b"]) != 0
    assert "llm/llama2_7b.yaml" in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_of_recipes_shows_the_same_figures():
    page = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    rows = {row[1]: row[2] for row in re.finditer(r"^\| \[`llm/(\S+)`\]\(\S+\) \| (.*) \|$", page, re.MULTILINE)}
    assert set(rows) == set(SOURCES)
    for name, row in rows.items():
        recipe = f"llm/{name}.yaml"
        task, optimizer = build(recipe)
        config, horizon = start(recipe).config, task.schedule.horizon
        states = (adamw_state_bytes(task.parameters()), optimizer_state_bytes(optimizer))
        early = optimizer_state_bytes(AdamMini(partition="transformer_early").build(task))
        number, peak, end, warmup = SOURCES[name]
        steps = f"{config.trainer.max_steps:,}"
        assert row.split(" | ")[:9] == [
            f"{number:,}",
            f"{config.data.init_args.context_length}",
            f"{tokens_a_step(config):,}",
            steps if horizon in (None, config.trainer.max_steps) else f"{steps} of {horizon:,}",
            f"{peak:.0e}".replace("e-0", "e-"),
            f"{warmup:,}, {task.schedule.shape} to {end:.0e}".replace("e-0", "e-").replace("0e+00", "0"),
            *(f"{state / 1e9:.2f}" for state in (*states, early)),
        ], name


def name_of(recipe):
    return recipe.removeprefix("llm/").removesuffix(".yaml")
