"""Every recipe for diffusion models parses and builds, and its header tells what it builds."""

import re
import shlex

import pytest
import torch

pytest.importorskip("diffusers")

from lightning_adam_mini.cli.application import Application
from lightning_adam_mini.cli.main import main
from lightning_adam_mini.cli.recipes import find_recipe, list_recipes, resolve_configs
from lightning_adam_mini.factory import AdamMini
from lightning_adam_mini.measure import adamw_state_bytes, optimizer_state_bytes

RECIPES = ["diffusion/celeba64.yaml", "diffusion/celeba64_v.yaml", "diffusion/digits.yaml", "diffusion/images.yaml"]
LABELS = ["Command", "Data", "Hardware", "Source", "Expected", "Parameters", "Optimizer state"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Starting a run leaves its folder in the environment, for the processes of other ranks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADAM_MINI_RUN_DIR", "")


def header(recipe):
    """The comment on top of a recipe: the text under each label."""
    fields, label = {}, None
    for line in find_recipe(recipe).read_text("utf-8").splitlines():
        if not line.startswith("#"):
            break
        if labelled := re.match(r"# ([A-Z][\w ]+):  +(.*)", line):
            label = labelled[1]
            fields[label] = labelled[2]
        elif label and line.startswith("#" + " " * 18):
            fields[label] += f" {line[1:].strip()}"
        else:
            label = None
    return fields


def built(recipe):
    arguments, _ = resolve_configs(["--config", recipe, "--trainer.accelerator", "cpu"])
    app = Application(arguments, run=False)
    assert app.model.configure_meta_model(app.datamodule) == []
    return app.model, app.datamodule, app.config


def test_every_recipe_is_tested():
    assert sorted(name for name in list_recipes() if name.startswith("diffusion/")) == RECIPES


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_header_tells_what_the_recipe_builds(recipe, capsys):
    fields = header(recipe)
    assert list(fields) == LABELS
    program, command, *words = shlex.split(fields["Command"].replace("FOLDER", "pictures"))
    assert (program, command, words[:2]) == ("adam-mini", "fit", ["--config", recipe])
    with pytest.raises(SystemExit, match=r"^0$"):
        main([command, *words, "--print_config"])
    capsys.readouterr()
    task, data, config = built(recipe)
    own = AdamMini(lr=1.0).build(task)
    assert fields["Parameters"] == f"{sum(p.numel() for p in task.parameters()):,}"
    adamw, mini = adamw_state_bytes(task.parameters()), optimizer_state_bytes(own)
    told = re.findall(r"([\d,]+) bytes", fields["Optimizer state"])
    assert told == [f"{adamw:,}", f"{mini:,}"]
    assert all(parameter.is_meta for parameter in task.parameters())
    shape = task.model.config.in_channels, task.model.config.sample_size, task.model.config.sample_size
    assert shape == data.image_shape
    assert config.trainer.gradient_clip_val == 1.0
    if recipe != "diffusion/digits.yaml":
        assert "we have not run it" in fields["Hardware"]


def test_the_papers_settings():
    """Zhang et al. 2024, first version, appendix E.1."""
    task, data, config = built("diffusion/celeba64.yaml")
    assert (task.optimizer_factory.lr, task.schedule.shape, data.batch_size) == (5e-5, "cosine", 128)
    assert (config.trainer.max_epochs, task.noise_schedule.config.prediction_type) == (50, "epsilon")
    assert [width // 64 for width in task.model.config.block_out_channels] == [1, 2, 4, 8]
    assert task.num_timesteps == 1000


def test_the_velocity_recipe_weighs_by_min_snr():
    task, _, _ = built("diffusion/celeba64_v.yaml")
    assert task.noise_schedule.config.prediction_type == "v_prediction"
    alphas = task.noise_schedule.alphas_cumprod
    snr = alphas / (1 - alphas)
    torch.testing.assert_close(task.loss_weights, snr.clamp(max=5) / (snr + 1))
