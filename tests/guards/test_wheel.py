"""What a user gets from the wheel, outside the checkout and without the editable install."""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from checkout import MAPPED_FOLDERS, PACKAGE, ROOT, project_files, shipped_files

LISTINGS = {"recipes": ["recipes"], "studies": ["study", "--help"]}


def run(*command: object, cwd: Path) -> str:
    finished = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, f"{command}\n{finished.stdout}\n{finished.stderr}"
    return finished.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel as a release is made: a source archive from a clean copy, and the wheel from that archive."""
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    for name in project_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, copy, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """An interpreter that has the wheel and, for its requirements, sees the packages of this environment.

    A folder that a `.pth` file adds is searched for modules, but the `.pth` files in it are not run: the editable
    install, which is one of those, stays out of sight.
    """
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=home)
    site_packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip()
    (Path(site_packages) / "requirements_of_the_wheel.pth").write_text(sysconfig.get_path("purelib"))
    return python


def test_the_wheel_holds_every_file(wheel):
    expected = shipped_files()
    assert any(name.suffix == ".yaml" for name in expected)
    missing = set(expected.values()) - set(zipfile.ZipFile(wheel).namelist())
    assert not missing, f"a folder without __init__.py, or package data that setup.py does not name: {sorted(missing)}"


def test_the_wheel_holds_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    info = next(name.split("/")[0] for name in names if name.endswith(".dist-info/METADATA"))
    assert {name.split("/")[0] for name in names} == {PACKAGE, info}
    assert f"{info}/licenses/LICENSE" in names
    surplus = {name for name in names if not name.startswith(info)} - set(shipped_files().values())
    assert not surplus


@pytest.mark.slow
def test_the_wheel_imports_outside_the_checkout(python, tmp_path):
    modules = f"{PACKAGE}, {PACKAGE}.tasks.llm, {PACKAGE}.cli, {PACKAGE}.configs"
    show = f"import {modules}; print(*[module.__file__ for module in ({modules})])"
    for path in run(python, "-c", show, cwd=tmp_path).split():
        assert Path(path).is_relative_to(python.parents[1]), path
    run(python, "-c", f"from {PACKAGE} import AdamMini", cwd=tmp_path)


def test_no_bare_folder_is_importable(python, tmp_path):
    bare = [*MAPPED_FOLDERS, "tests"]
    find = f"from importlib.util import find_spec; print([name for name in {bare} if find_spec(name)])"
    assert run(python, "-c", find, cwd=tmp_path).strip() == "[]"


def test_the_commands_list_every_recipe_and_study(python, tmp_path):
    listed = {folder: run(python.parent / "adam-mini", *words, cwd=tmp_path) for folder, words in LISTINGS.items()}
    recipes = [path.removeprefix(f"{PACKAGE}/configs/") for path in shipped_files().values() if path.endswith(".yaml")]
    studies = [recipe.removeprefix("studies/") for recipe in recipes if recipe.startswith("studies/")]
    missing = [recipe for recipe in recipes if not recipe.startswith("studies/") and recipe not in listed["recipes"]]
    missing += [study for study in studies if study.removesuffix(".yaml") not in listed["studies"]]
    assert recipes
    assert studies
    assert not missing
