"""Every recipe for graphs parses and builds, and the figures of its header are computed again."""

import re

import pytest

pytest.importorskip("torch_geometric")

from lightning_adam_mini.cli.application import Application
from lightning_adam_mini.cli.main import main
from lightning_adam_mini.cli.recipes import find_recipe, list_recipes, resolve_configs
from lightning_adam_mini.measure import adamw_state_bytes, optimizer_state_bytes

RECIPES = ["gat", "gat_arxiv", "gcn", "gcn_arxiv", "gcn_cora"]
# What we have not run, and its learning rate in the source.
FROM_PAPERS = {"gcn_arxiv": 5e-3, "gat_arxiv": 2e-3, "gcn_cora": 1e-2}


@pytest.fixture
def start(tmp_path, monkeypatch):
    """The application as `adam-mini fit` builds it, its network without memory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADAM_MINI_RUN_DIR", "")

    def build(recipe, *options):
        arguments, _ = resolve_configs(["--config", f"graph/{recipe}.yaml", "--trainer.accelerator", "cpu", *options])
        app = Application(arguments, run=False)
        app.model.configure_meta_model(app.datamodule)
        return app

    return build


def header(recipe):
    lines = find_recipe(f"graph/{recipe}.yaml").read_text("utf-8").splitlines()
    return "\n".join(line[2:] for line in lines if line.startswith("#"))


def test_every_recipe_for_graphs_is_tested():
    assert [name for name in sorted(list_recipes()) if name.startswith("graph/")] == [
        f"graph/{n}.yaml" for n in RECIPES
    ]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipe_builds_with_its_parameters_and_half_of_adamws_state(recipe, start):
    app = start(recipe)
    parameters = sum(parameter.numel() for parameter in app.model.parameters())
    assert re.search(r"^Parameters: +([\d,]+)", header(recipe), re.MULTILINE)[1] == f"{parameters:,}"
    optimizer = app.model.optimizer_factory.build(app.model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(parameter) for parameter in app.model.parameters()}
    assert optimizer_state_bytes(optimizer) < 0.51 * adamw_state_bytes(app.model.parameters())


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_header_tells_command_data_hardware_source_and_result(recipe):
    text = header(recipe)
    for label in ("Command", "Data", "Hardware", "Source"):
        assert re.search(rf"^{label}: ", text, re.MULTILINE), label
    assert f"adam-mini fit --config graph/{recipe}.yaml" in text
    if recipe in FROM_PAPERS:
        assert re.search(r"we have not run it", text, re.IGNORECASE)
        assert "not ours" in text
    else:
        assert re.search(r"^Measured: ", text, re.MULTILINE)


@pytest.mark.parametrize(("recipe", "lr"), FROM_PAPERS.items())
def test_the_learning_rate_is_the_sources_and_stays(recipe, lr, start):
    task = start(recipe).model
    assert task.optimizer_factory.lr == lr
    assert (task.schedule.shape, task.schedule.scale(500, 1000)) == ("constant", 1.0)
    if recipe.endswith("arxiv"):  # DGL's scripts: step e of the first 50 has e / 50 of it
        assert [task.schedule.scale(step, 1000) for step in (0, 24, 49)] == [1 / 50, 25 / 50, 1.0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_last_step_is_validated(recipe, start):
    trainer = start(recipe).config.trainer
    assert trainer.max_steps % trainer.val_check_interval == 0
    assert trainer.check_val_every_n_epoch is None


@pytest.mark.parametrize("recipe", ["gcn", "gat_arxiv", "gcn_cora"])
def test_a_recipe_is_explained_without_its_data(recipe, start, capsys):
    assert main(["explain", f"graph/{recipe}.yaml"]) == 0
    assert "model.body.convs." in capsys.readouterr().out
