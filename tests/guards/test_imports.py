"""Imports run one way: blocks <- partition <- optim, hessian, measure <- factory <- tasks <- integrations, cli."""

import pytest

from checkout import ROOT, SHIPPED_FOLDERS, module_name, project_files
from imports import BARE_NAMES, find_imports, find_violations

PYTHON_FILES = [name for name in project_files() if name.suffix == ".py"]
SHIPPED = [name for name in PYTHON_FILES if name.parts[0] in SHIPPED_FOLDERS]
BESIDE = [name for name in PYTHON_FILES if name.parts[0] not in SHIPPED_FOLDERS]


def test_shipped_code_imports_downwards_only():
    assert SHIPPED
    violations = [
        violation
        for name in SHIPPED
        for violation in find_violations(
            (ROOT / name).read_text(), module_name(name), is_package=name.name == "__init__.py"
        )
    ]
    assert not violations, "\n".join(violations)


def test_nothing_beside_imports_a_bare_folder():
    bare = [
        f"{name}:{imported.line}: imports {imported.name}"
        for name in BESIDE
        for imported in find_imports((ROOT / name).read_text(), module_name(name))
        if imported.name.split(".")[0] in BARE_NAMES and not imported.level
    ]
    assert not bare, "\n".join(bare)


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("optim.adam_mini", "import lightning", "torch alone"),
        ("optim.adam_mini", "def f():\n    from lightning.pytorch import Trainer", "torch alone"),
        ("partition.roles", "if TYPE_CHECKING:\n    import transformers", "torch alone"),
        ("measure.memory", "import importlib\nimportlib.import_module('jsonargparse')", "torch alone"),
        ("optim.adam_mini", "import pytorch_optimizer", "torch alone"),
        ("optim.adam_mini", "from lightning_adam_mini.tasks import base", "not above tasks"),
        ("integrations.lightning", "import transformers", "torch alone"),
        ("optim.adam_mini", "from lightning_adam_mini.integrations import lightning", "not above integrations"),
        ("tasks.base", "from lightning_adam_mini.integrations import lightning", "not above integrations"),
        ("factory", "import lightning_adam_mini.cli.main", "not above cli"),
        ("factory", "from .cli import main", "not above cli"),
        ("blocks", "from lightning_adam_mini.partition import roles", "not above partition"),
        ("blocks", "from lightning_adam_mini import optim", "not above optim"),
        ("partition.roles", "from lightning_adam_mini.optim import AdamMini", "not above optim"),
        ("partition.roles", "from ..hessian import lanczos", "not above hessian"),
        ("optim.adam_mini", "from lightning_adam_mini import hessian", "not above hessian"),
        ("hessian.lanczos", "from lightning_adam_mini.optim import AdamMini", "not above optim"),
        ("optim.adam_mini", "from lightning_adam_mini import AdamMini", "not above lightning_adam_mini"),
        ("tasks.base", "from ..cli import main", "not above cli"),
        ("tasks.llm.module", "from ..vision import data", "must not know tasks/vision"),
        ("tasks.llm.module", "from ..graph.data import Data", "must not know tasks/graph"),
        ("tasks.base", "from .llm import module", "must not know tasks/llm"),
        ("tasks.llm.module", "from tasks import base", "write lightning_adam_mini.tasks"),
        ("cli.main", "import configs", "write lightning_adam_mini.configs"),
        ("cli.main", "import tests.reference", "not part of the package"),
        ("cli.main", "from lightning_adam_mini.tasks import base", "relative import"),
        ("cli.main", "from ..optim import AdamMini", "full name"),
        ("utilities", "", "its place"),
    ],
)
def test_the_guard_finds(module, source, reason):
    (violation,) = find_violations(source, f"lightning_adam_mini.{module}")
    assert reason in violation


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("blocks", "import dataclasses\nfrom torch import Tensor"),
        ("partition.roles", "from lightning_adam_mini.blocks import Blocks\nfrom .layouts import Layout"),
        ("optim.adam_mini", "from lightning_adam_mini.partition import infer\nimport triton.language as tl"),
        ("measure.memory", "from lightning_adam_mini import optim"),
        ("factory", "def build():\n    import pytorch_optimizer"),
        ("integrations.lightning", "import jsonargparse\nfrom lightning.pytorch import cli"),
        ("tasks.base", "import lightning\nfrom lightning_adam_mini.factory import OptimizerFactory"),
        (
            "tasks.llm.module",
            "from ..base import Task\nfrom .data import A\nfrom lightning_adam_mini import AdamMini",
        ),
        ("cli.main", "from ..tasks.llm import module\nfrom ..configs import __file__\nfrom .recipes import show"),
    ],
)
def test_the_guard_allows(module, source):
    assert find_violations(source, f"lightning_adam_mini.{module}") == []


def test_relative_imports_of_a_package_start_in_it():
    assert find_violations("from .llm import module", "lightning_adam_mini.tasks.llm", is_package=True) == []
    assert find_violations("from ..graph import data", "lightning_adam_mini.tasks.llm", is_package=True)
