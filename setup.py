"""Map the folders of the checkout to packages; everything else about the build is in `pyproject.toml`.

`tasks/`, `cli/` and `configs/` must not be installed under their bare names, which would overwrite other people's
packages. The list is computed, because a nested package that a literal list forgets works in an editable install
and vanishes from the wheel.
"""

from setuptools import find_namespace_packages, find_packages, setup

PACKAGE = "lightning_adam_mini"
MAPPED_FOLDERS = ("tasks", "cli", "configs")

package_dir = {PACKAGE: PACKAGE} | {f"{PACKAGE}.{folder}": folder for folder in MAPPED_FOLDERS}
packages = [
    f"{package}{suffix}"
    for package, folder in package_dir.items()
    for suffix in ("", *(f".{name}" for name in find_packages(folder)))
]
# Folders of recipes hold no Python, and setuptools still wants to hear of them.
packages += [f"{PACKAGE}.configs.{name}" for name in find_namespace_packages("configs") if "__pycache__" not in name]
# Nor do folders of page templates.
packages += [f"{PACKAGE}.cli.{name}" for name in find_namespace_packages("cli") if name.endswith(".templates")]

setup(
    packages=packages,
    package_dir=package_dir,
    # Everything that is not Python and still belongs to the code: recipes, kernel sources, page templates, the marker
    # of types.
    package_data={"": ["py.typed", "*.c", "*.h", "*.yaml", "*.csv", "*.j2", "*.css"]},
)
