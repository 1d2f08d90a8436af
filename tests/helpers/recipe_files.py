"""Packaged recipes: what their headers say, and what `adam-mini fit` builds from them, on the meta device."""

import re
from dataclasses import dataclass
from functools import cache

from lightning_adam_mini.cli.application import Application
from lightning_adam_mini.cli.recipes import find_recipe, list_recipes, resolve_configs


@dataclass(frozen=True)
class Header:
    """The comment on top of a recipe: its first line, the text under each label, and all of it in one line."""

    title: str
    fields: dict[str, str]
    text: str


@cache
def header(recipe):
    lines = [line[1:] for line in find_recipe(recipe).read_text("utf-8").splitlines() if line.startswith("#")]
    fields, label = {}, None
    for line in lines:
        if labelled := re.match(r" ([A-Z][\w -]+):  +(.*)", line):
            label = labelled[1]
            fields[label] = labelled[2]
        elif label and line.startswith(" " * 18):
            fields[label] += f" {line.strip()}"
        else:
            label = None
    return Header(lines[0].strip(), fields, " ".join(" ".join(lines).split()))


@cache
def start(recipe, *options):
    """The application as `adam-mini fit` builds it, on a machine without accelerator, before it trains."""
    arguments, _ = resolve_configs(["--config", recipe, *options, "--trainer.accelerator", "cpu"])
    return Application(arguments, run=False)


@cache
def started(recipe, *options):
    """The same with its network on the meta device."""
    app = start(recipe, *options)
    assert app.model.configure_meta_model(app.datamodule) == []
    return app


def recipes_of(domain):
    return [name for name in sorted(list_recipes()) if name.startswith(f"{domain}/")]
