"""Every recipe for diffusion models parses and builds, and its header says what it builds."""

import re

import pytest
import torch

pytest.importorskip("diffusers")

from lightning_adam_mini.measure import adamw_state_bytes, optimizer_state_bytes
from recipe_files import header, recipes_of, started

RECIPES = ["diffusion/celeba64.yaml", "diffusion/celeba64_v.yaml", "diffusion/digits.yaml", "diffusion/images.yaml"]
LABELS = ["Command", "Data", "Hardware", "Source", "Expected", "Parameters", "Optimizer state"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Starting a run leaves its folder in the environment, for the processes of other ranks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADAM_MINI_RUN_DIR", "")


def built(recipe):
    app = started(recipe)
    return app.model, app.datamodule, app.config


def test_every_recipe_is_tested():
    assert recipes_of("diffusion") == RECIPES


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_header_says_what_the_recipe_builds(recipe):
    fields = header(recipe).fields
    assert list(fields) == LABELS
    command = f"adam-mini fit --config {recipe}"
    assert fields["Command"] in (command, f"{command} --data.path FOLDER")
    task, data, config = built(recipe)
    own = task.optimizer_factory.build(task)
    assert fields["Parameters"] == f"{sum(p.numel() for p in task.parameters()):,}"
    adamw, mini = adamw_state_bytes(task.parameters()), optimizer_state_bytes(own)
    assert re.findall(r"([\d,]+) bytes", fields["Optimizer state"]) == [f"{adamw:,}", f"{mini:,}"]
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
