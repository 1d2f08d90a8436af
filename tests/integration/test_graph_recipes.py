"""Every recipe for graphs parses and builds, and the values of its header are computed again."""

import re

import pytest

pytest.importorskip("torch_geometric")

from lightning_adam_mini.cli.main import main
from lightning_adam_mini.measure import adamw_state_bytes, optimizer_state_bytes
from recipe_files import header, recipes_of, started

RECIPES = [f"graph/{name}.yaml" for name in ("gat", "gat_arxiv", "gcn", "gcn_arxiv", "gcn_cora")]
# What we have not run, and its learning rate in the source.
FROM_PAPERS = {"graph/gcn_arxiv.yaml": 5e-3, "graph/gat_arxiv.yaml": 2e-3, "graph/gcn_cora.yaml": 1e-2}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Starting a run leaves its folder in the environment, for the processes of other ranks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADAM_MINI_RUN_DIR", "")


def test_every_recipe_for_graphs_is_tested():
    assert recipes_of("graph") == RECIPES


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipe_builds_with_its_parameters_and_half_of_adamws_state(recipe):
    app = started(recipe)
    parameters = sum(parameter.numel() for parameter in app.model.parameters())
    assert header(recipe).fields["Parameters"] == f"{parameters:,}"
    optimizer = app.model.optimizer_factory.build(app.model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(parameter) for parameter in app.model.parameters()}
    # Vectors keep a number for each element, which shows in networks of 39,000 parameters.
    assert optimizer_state_bytes(optimizer) < 0.525 * adamw_state_bytes(app.model.parameters())


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_header_has_command_data_hardware_source_and_result(recipe):
    fields = header(recipe).fields
    assert fields.keys() >= {"Command", "Data", "Hardware", "Source"}
    assert fields["Command"] == f"adam-mini fit --config {recipe}"
    if recipe in FROM_PAPERS:
        assert re.search(r"we have not run it", fields["Hardware"], re.IGNORECASE)
        assert "not ours" in fields["Expected"]
    else:
        assert "Measured" in fields


@pytest.mark.parametrize(("recipe", "lr"), FROM_PAPERS.items())
def test_the_learning_rate_is_the_sources_and_stays(recipe, lr):
    task = started(recipe).model
    assert task.optimizer_factory.lr == lr
    assert (task.schedule.shape, task.schedule.scale(500, 1000)) == ("constant", 1.0)
    if "arxiv" in recipe:  # DGL's scripts: step e of the first 50 has e / 50 of it
        assert [task.schedule.scale(step, 1000) for step in (0, 24, 49)] == [1 / 50, 25 / 50, 1.0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_last_step_is_validated(recipe):
    trainer = started(recipe).config.trainer
    assert trainer.max_steps % trainer.val_check_interval == 0
    assert trainer.check_val_every_n_epoch is None


@pytest.mark.parametrize("recipe", ["graph/gcn.yaml", "graph/gat_arxiv.yaml", "graph/gcn_cora.yaml"])
def test_a_recipe_is_explained_without_its_data(recipe, capsys):
    assert main(["explain", recipe]) == 0
    assert "model.body.convs." in capsys.readouterr().out
