"""Every recipe for images parses and builds, and the values of its header are computed again."""

import re

import pytest

pytest.importorskip("torchvision")

from lightning_adam_mini.cli.main import main
from lightning_adam_mini.cli.recipes import find_recipe
from lightning_adam_mini.measure import adamw_state_bytes, optimizer_state_bytes
from lightning_adam_mini.tasks.vision.models import inspect_model
from recipe_files import header, recipes_of, started

# Images per step, epochs, and learning rate: what the sources say, if there are any.
RECIPES = {
    "vision/fashion_mnist.yaml": None,
    "vision/mnist5k.yaml": None,
    "vision/resnet18_cifar10.yaml": None,
    "vision/resnet18_imagenet.yaml": (256, 90, 5e-3),
    "vision/resnet50_imagenet.yaml": (1024, 600, None),
    "vision/vit_b16_imagenet.yaml": (128, None, 1e-4),
}
ONE_DEVICE = ("--trainer.devices", "1", "--trainer.precision", "32-true")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Starting a run leaves its folder in the environment, for the processes of other ranks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADAM_MINI_RUN_DIR", "")


def test_every_recipe_for_images_is_tested():
    assert recipes_of("vision") == list(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipe_builds_with_the_values_of_its_header(recipe):
    app, fields = started(recipe, *ONE_DEVICE), header(recipe).fields
    assert fields["Parameters"] == f"{sum(parameter.numel() for parameter in app.model.parameters()):,}"
    optimizer = app.model.optimizer_factory.build(app.model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(parameter) for parameter in app.model.parameters()}
    mini, adamw = optimizer_state_bytes(optimizer), adamw_state_bytes(app.model.parameters())
    assert mini < 0.51 * adamw
    state = f"AdamW {adamw:,} bytes ({adamw / 1e9:.2f} GB), Adam-mini {mini:,} bytes ({mini / 1e9:.2f} GB)"
    assert fields.get("Optimizer state", state) == state
    classes = app.model.num_classes or app.datamodule.num_classes
    for shape in {app.datamodule.image_shape, app.datamodule.evaluation_shape}:
        assert inspect_model(app.model.model, recipe, shape, classes) > 0
    assert app.datamodule.transforms.training()
    assert app.datamodule.transforms.evaluation()


@pytest.mark.parametrize("recipe", [name for name, source in RECIPES.items() if source])
def test_the_steps_are_those_of_the_source(recipe):
    images, epochs, lr = RECIPES[recipe]
    app = started(recipe, *ONE_DEVICE)
    devices = int(re.search(r"^  devices: (\d+)", find_recipe(recipe).read_text("utf-8"), re.MULTILINE)[1])
    assert devices * app.datamodule.batch_size == images
    assert epochs in (None, app.trainer.max_epochs)
    assert lr in (None, app.model.optimizer_factory.lr)
    if on_several := re.search(r"--trainer\.devices (\d+) .*--data\.batch_size (\d+)", header(recipe).text):
        assert int(on_several[1]) * int(on_several[2]) == images


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_header_has_command_data_hardware_source_and_result(recipe):
    fields = header(recipe).fields
    assert fields.keys() >= {"Command", "Data", "Hardware", "Source", "Expected", "Parameters"}
    assert fields["Command"] == f"adam-mini fit --config {recipe}"
    if recipe == "vision/mnist5k.yaml":
        assert "standard deviation of three seeds" in fields["Expected"]
    else:
        assert "we have not run it" in fields["Hardware"]
        assert "not ours" in fields["Expected"] or "nothing to compare with" in fields["Expected"]


def test_the_command_prints_a_configuration_that_it_reads_again(tmp_path, capsys):
    for config in ("vision/resnet50_imagenet.yaml", "printed.yaml"):
        with pytest.raises(SystemExit, match=r"^0$"):
            main(["fit", "--config", config, "--print_config"])
        printed = capsys.readouterr().out
        (tmp_path / "printed.yaml").write_text(printed, "utf-8")
    assert "policy: trivialaugment" in printed
    assert "eval_size: 224" in printed
