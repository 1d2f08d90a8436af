"""Every recipe for images parses and builds, and the figures of its header are computed again."""

import re

import pytest

pytest.importorskip("torchvision")

from lightning_adam_mini.cli.application import Application
from lightning_adam_mini.cli.main import main
from lightning_adam_mini.cli.recipes import find_recipe, list_recipes, resolve_configs
from lightning_adam_mini.measure import adamw_state_bytes, optimizer_state_bytes
from lightning_adam_mini.tasks.vision.models import inspect_model

# Images a step, epochs, and learning rate: what the sources say, where there are any.
RECIPES = {
    "fashion_mnist": None,
    "mnist5k": None,
    "resnet18_cifar10": None,
    "resnet18_imagenet": (256, 90, 5e-3),
    "resnet50_imagenet": (1024, 600, None),
    "vit_b16_imagenet": (128, None, 1e-4),
}
NOT_RUN = sorted(set(RECIPES) - {"mnist5k"})


@pytest.fixture
def start(tmp_path, monkeypatch):
    """The application as `adam-mini fit` builds it, its network without memory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADAM_MINI_RUN_DIR", "")

    def build(recipe):
        one = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.precision", "32-true"]
        arguments, _ = resolve_configs(["--config", f"vision/{recipe}.yaml", *one])
        app = Application(arguments, run=False)
        assert app.model.configure_meta_model(app.datamodule) == []
        return app

    return build


def text_of(recipe):
    return find_recipe(f"vision/{recipe}.yaml").read_text("utf-8")


def header(recipe):
    return "\n".join(line[2:] for line in text_of(recipe).splitlines() if line.startswith("#"))


def test_every_recipe_for_images_is_tested():
    listed = [name for name in sorted(list_recipes()) if name.startswith("vision/")]
    assert listed == [f"vision/{name}.yaml" for name in RECIPES]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipe_builds_with_the_figures_of_its_header(recipe, start):
    app = start(recipe)
    parameters = sum(parameter.numel() for parameter in app.model.parameters())
    assert re.search(r"^Parameters: +([\d,]+)$", header(recipe), re.MULTILINE)[1] == f"{parameters:,}"
    optimizer = app.model.optimizer_factory.build(app.model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(parameter) for parameter in app.model.parameters()}
    mini, adamw = optimizer_state_bytes(optimizer), adamw_state_bytes(app.model.parameters())
    assert mini < 0.51 * adamw
    told = f"AdamW {adamw:,} bytes ({adamw / 1e9:.2f} GB), Adam-mini {mini:,} bytes ({mini / 1e9:.2f} GB)"
    assert (told in header(recipe)) == ("Optimizer state:" in header(recipe))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_network_takes_the_images_of_the_data(recipe, start):
    app = start(recipe)
    classes = app.model.num_classes or app.datamodule.num_classes
    for shape in {app.datamodule.image_shape, app.datamodule.evaluation_shape}:
        assert inspect_model(app.model.model, recipe, shape, classes) > 0
    assert app.datamodule.transforms.training()
    assert app.datamodule.transforms.evaluation()


@pytest.mark.parametrize("recipe", [name for name, source in RECIPES.items() if source])
def test_the_steps_are_those_of_the_source(recipe, start):
    images, epochs, lr = RECIPES[recipe]
    app = start(recipe)
    devices = int(re.search(r"^  devices: (\d+)", text_of(recipe), re.MULTILINE)[1])
    assert devices * app.datamodule.batch_size == images
    assert epochs in (None, app.trainer.max_epochs)
    assert lr in (None, app.model.optimizer_factory.lr)
    if on_several := re.search(r"--trainer\.devices (\d+) .*--data\.batch_size (\d+)", header(recipe)):
        assert int(on_several[1]) * int(on_several[2]) == images


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_header_tells_command_data_hardware_source_and_result(recipe):
    text = header(recipe)
    for label in ("Command", "Data", "Hardware", "Source", "Expected", "Parameters"):
        assert re.search(rf"^{label}: ", text, re.MULTILINE), label
    assert f"adam-mini fit --config vision/{recipe}.yaml" in text
    words = " ".join(text.split())
    if recipe in NOT_RUN:
        assert "we have not run it" in words
        assert "not ours" in words or "nothing to compare with" in words
    else:
        assert "standard deviation of three seeds" in words or "Ours, one seed" in words


def test_the_command_prints_a_configuration_that_it_reads_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for config in ("vision/resnet50_imagenet.yaml", "printed.yaml"):
        with pytest.raises(SystemExit, match=r"^0$"):
            main(["fit", "--config", config, "--print_config"])
        printed = capsys.readouterr().out
        (tmp_path / "printed.yaml").write_text(printed, "utf-8")
    assert "policy: trivialaugment" in printed
    assert "eval_size: 224" in printed
