"""Map the folders of the checkout to packages, and list the extras; all else about the build is in `pyproject.toml`.

`tasks/`, `cli/` and `configs/` must not be installed under their bare names, which would overwrite other people's
packages. The packages and the extras of domains are found by looking, because a nested package that a literal list
forgets works in an editable install and vanishes from the wheel.
"""

from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

PACKAGE = "lightning_adam_mini"
MAPPED_FOLDERS = ("tasks", "cli", "configs")

package_dir = {PACKAGE: PACKAGE} | {f"{PACKAGE}.{folder}": folder for folder in MAPPED_FOLDERS}
packages = [
    f"{package}{suffix}"
    for package, folder in package_dir.items()
    for suffix in ("", *(f".{name}" for name in find_packages(folder)))
]
# Folders of recipes and of page templates hold no Python, and setuptools still wants to hear of them.
packages += [f"{PACKAGE}.configs.{name}" for name in find_namespace_packages("configs") if "__pycache__" not in name]
packages += [f"{PACKAGE}.cli.{name}" for name in find_namespace_packages("cli") if name.endswith(".templates")]

# A domain is a folder of tasks with a `requirements.txt`, which is the extra of its name.
domains = {
    path.parent.name: [line for line in path.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    for path in sorted(Path("tasks").glob("*/requirements.txt"))
}
extras = {
    # What every task shares: Lightning and its command line.
    "app": [
        # The releases 2.6.2 and 2.6.3 were compromised; never lower this bound.
        "lightning>=2.6.4",
        "filelock",
        "jinja2",
        "jsonargparse[signatures]>=4.46,<5",
        "matplotlib",
        "pytorch-optimizer>=4.1,<5",
        "rich",
        "scipy",
        "tensorboard",
    ],
    **domains,
    "domains": [f"lightning-adam-mini[{','.join(domains)}]"],
    # `adam-mini compare --launcher submitit`.
    "cluster": ["lightning-adam-mini[app]", "submitit"],
    "loggers": ["lightning-adam-mini[app]", "mlflow-skinny", "wandb"],
    # The frameworks of `integrations/`; torchtitan holds `datasets` at an older version, so they are not in `dev`.
    "integrations": ["deepspeed>=0.19", "peft", "ray[train]", "torchtitan>=0.3", "trl>=1.16"],
    "dev": [
        # The authors' package: the parity tests run in lockstep with exactly this release.
        "adam-mini==1.1.1",
        "build",
        # The Hessian operators are compared with it on models where it is right.
        "curvlinops-for-pytorch",
        "hypothesis",
        "mypy",
        # Adapters, which must not change what a parameter does.
        "peft",
        "submitit",
        "pytest>=9",
        "pytest-xdist",
        "ruff",
        # The guards build the wheel without isolation, so that they need no network.
        "setuptools>=77",
        "types-PyYAML",
    ],
    "all": ["lightning-adam-mini[domains,cluster,loggers,dev]"],
}

setup(
    packages=packages,
    package_dir=package_dir,
    extras_require=extras,
    # Everything that is not Python and still belongs to the code: recipes, kernel sources, page templates, the marker
    # of types, and what the extras are made of.
    package_data={"": ["py.typed", "requirements.txt", "*.c", "*.h", "*.yaml", "*.csv", "*.j2", "*.css"]},
)
