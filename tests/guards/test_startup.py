"""A script that wants the optimizer, or a shell that wants the list of recipes, must not wait for a framework."""

import subprocess
import sys

import pytest

from checkout import PACKAGE

FRAMEWORKS = {"jsonargparse", "lightning", "pytorch_lightning", "transformers"}
RECIPES = f"import sys; sys.argv = ['adam-mini', 'recipes']; from {PACKAGE}.cli.main import main; sys.exit(main())"


def loaded_modules(statement: str) -> set[str]:
    """Top-level modules that a new interpreter holds at its exit, which may be a `SystemExit`."""
    report = "import atexit, sys; atexit.register(lambda: print('loaded:', *sys.modules))"
    finished = subprocess.run(
        [sys.executable, "-c", f"{report}\n{statement}"], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    *_, last = finished.stdout.splitlines()
    assert last.startswith("loaded: ")
    return {name.split(".")[0] for name in last.split()[1:]}


@pytest.mark.parametrize("statement", [f"import {PACKAGE}", f"from {PACKAGE} import AdamMini"])
def test_the_library_loads_no_framework(statement):
    loaded = loaded_modules(statement)
    assert PACKAGE in loaded
    assert not loaded & FRAMEWORKS


def test_listing_recipes_loads_no_torch():
    loaded = loaded_modules(RECIPES)
    assert PACKAGE in loaded
    assert not loaded & {"torch", "rich", "yaml", *FRAMEWORKS}


def test_the_guard_sees_late_imports():
    assert "transformers" in loaded_modules("import sys; sys.modules['transformers'] = sys; raise SystemExit")
