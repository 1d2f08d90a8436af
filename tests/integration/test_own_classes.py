"""Tasks and data of the user's own, in a file of the working directory or beside the recipe."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning.pytorch")  # its log goes where errors went when it was imported: not into a test's

from lightning_adam_mini.cli.main import main
from lightning_adam_mini.cli.run_folder import holds_run
from tiny_runs import error_line

OWN = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning_adam_mini.factory import OptimizerFactory
from lightning_adam_mini.schedule import Schedule
from lightning_adam_mini.tasks.base import Task

class Line(Task):
    def __init__(self, optimizer: OptimizerFactory | None = None, schedule: Schedule | None = None, width: int = 3):
        super().__init__(optimizer, schedule)
        self.width = width
    def configure_model(self):
        if self.model is None:
            self.build(lambda: torch.nn.Linear(self.width, 1))
    def training_step(self, batch, batch_idx):
        loss = (self.model(batch["x"]) - batch["y"]).square().mean()
        self.log("train_loss", loss)
        return loss
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", (self.model(batch["x"]) - batch["y"]).square().mean())

class Points(LightningDataModule):
    def train_dataloader(self):
        points = [{"name": "p", "x": x, "y": x.sum()[None]} for x in torch.randn(32, 3)]
        return torch.utils.data.DataLoader(points, 8)
    val_dataloader = train_dataloader

class Untyped(Line):
    def __init__(self, optimizer=None, schedule=None):
        super().__init__(optimizer, schedule)

class Without(Line):
    def __init__(self):
        super().__init__()

class Plain(LightningModule):
    pass
"""
RECIPE = """
model: MODULE.Line
data: MODULE.Points
optimizer: AdamMini
trainer: {accelerator: cpu, devices: 1, max_steps: 4, val_check_interval: 2, log_every_n_steps: 1,
  enable_progress_bar: false}
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A recipe with classes of a module beside it, whose name no other test has; the name."""
    name = f"own_{tmp_path.parent.name}_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(OWN, "utf-8")
    (tmp_path / "own.yaml").write_text(RECIPE.replace("MODULE", name), "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield name
    sys.modules.pop(name, None)


def test_a_task_that_says_nothing_of_its_batches_counts_samples(own, capsys):
    assert main(["fit", "--config", "own.yaml", "--run_dir", "run"]) == 0
    assert '"samples_per_second"' in Path("run/metrics.jsonl").read_text("utf-8")
    assert main(["validate", "--config", "own.yaml", "--run_dir", "run", "--ckpt_path", "last"]) == 0


def test_classes_beside_a_recipe_of_another_folder(own, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["fit", "--config", "../own.yaml"]) == 0


EARLY = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_acc"]


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--model", "MODULE.Plain"], 2, "MODULE.Plain is a LightningModule, but no Task; derive it from lightning_a"),
        (["--model", "MODULE.Lin"], 2, "there is no class 'MODULE.Lin': MODULE has no Lin; did you mean Line? Choose"),
        (
            ["--model", "MODULE.Untyped"],
            1,
            "schedule must be of the class Schedule, not Namespace; annotate it in __in",
        ),
        (
            ["--model", "MODULE.Without"],
            1,
            "MODULE.Without has no option 'optimizer', so --optimizer would have no ef",
        ),
        (["--model.width", "null"], 2, "model.width must be a whole number, not null"),
        (["--checkpoint.monitor", "val_acc"], 1, "checkpoint monitors 'val_acc', which Line does not log; it logs"),
        (EARLY, 1, "EarlyStopping monitors 'val_acc', which Line does not log; it logs optimizer_milliseconds"),
        (
            [*EARLY, "--trainer.val_check_interval=1.0", "--trainer.max_epochs=1"],
            1,
            "EarlyStopping monitors 'val_acc', which Line does not log; it logs optimizer_milliseconds",
        ),
    ],
)
def test_what_is_refused(own, capsys, options, code, told):
    options = [option.replace("MODULE", own) for option in options]
    assert main(["fit", "--config", "own.yaml", *options]) == code
    assert told.replace("MODULE", own) in error_line(capsys)


def test_a_figure_that_is_logged_is_monitored(own):
    options = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss", "--trainer.max_steps=6"]
    assert main(["fit", "--config", "own.yaml", "--run_dir", "run", *options]) == 0
    assert holds_run(Path("run"))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("import torch\n\nx = undefined\n", "line 3, cannot be imported: NameError: name 'undefined' is not defined"),
        ("import torch\nclass M(:\n", "line 2, cannot be imported: SyntaxError: invalid syntax"),
        ("\nimport no_such_package\n", "line 2, cannot be imported: ModuleNotFoundError: No module named 'no_such_pa"),
        ("from torch import nothing\n", "line 1, cannot be imported: ImportError: cannot import name 'nothing' from"),
        ("import torch\n\ntorch.nothing()\n", "line 3, cannot be imported: AttributeError: module 'torch' has no"),
        ("raise ValueError('first\\nsecond')\n", "line 1, cannot be imported: ValueError: first second"),
    ],
)
def test_a_module_that_cannot_be_imported(own, capsys, content, told):
    Path("broken_module.py").write_text(content, "utf-8")
    for option in ("--model", "--data", "--optimizer", "--trainer.callbacks+", "--model.help"):
        assert main(["fit", "--config", "own.yaml", f"{option}=broken_module.M"]) == 2
        line = error_line(capsys)
        assert "broken_module.py" in line
        assert told in line


@pytest.mark.parametrize(
    ("option", "name", "shows"),
    [
        ("--model.help", "LanguageModel", "--model.temperature"),
        ("--model.help", "NodeClassifier", "--model.hidden_size"),
        ("--data.help", "TextFiles", "--data.context_length"),
        ("--data.help", "Mnist5k", "--data.batch_size"),
        ("--optimizer.help", "AdamW", "--optimizer.weight_decay"),
        ("--trainer.callbacks.help", "EarlyStopping", "--trainer.callbacks.patience"),
    ],
)
def test_help_by_the_bare_name_of_a_class(own, capsys, option, name, shows):
    with pytest.raises(SystemExit) as end:
        main(["fit", option, name])
    assert end.value.code == 0
    assert shows in capsys.readouterr().out


def test_a_bare_name_needs_no_recipe_that_loads_it(own, capsys):
    assert main(["fit", "--config", "own.yaml", "--model", "ImageClassifier", "--data", "Mnst5k"]) == 2
    assert "no class 'Mnst5k'; did you mean Mnist5k? Choose from: CallGraph, " in error_line(capsys)
