"""Models without memory or downloads: of recipes, and of other libraries by name or configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from .dummy_inputs import built, check_size, shortened
from .model_building import Source, building, config_file, is_subclass, near, package, quiet, read_json
from .recipes import find_recipe, read_yaml
from .transformers_models import of_transformers
from .without_training import trainer_options

__all__ = ["SOURCES"]


def of_recipe(name: str) -> Source:
    """The task of a recipe with its optimizer's partition, as `fit` would build it.

    Raises:
        ValueError: There is no such recipe, it cannot be read, or the task cannot be built.
    """
    recipe = find_recipe(name, given_as="recipe")
    read_yaml(recipe, f"recipe {name}")  # what the parser says of one that cannot be read does not name the file
    from lightning_adam_mini.factory import AdamMini

    package("lightning", f"recipe {name}", "llm")
    from .application import Application

    with quiet():
        options = ["--config", str(recipe), *trainer_options(), "--seed_everything=false"]
        application = Application(options, run=False)
        task: Any = application.model
        told = task.configure_meta_model(application.datamodule)
    factory = task.optimizer_factory
    if not isinstance(factory, AdamMini):
        other = type(factory).__name__
        told.append(f"the recipe's optimizer is {other}, which has no blocks; this is AdamMini with its defaults")
        factory = AdamMini()
    dtype = getattr(torch, factory.exp_avg_dtype) if factory.exp_avg_dtype else None
    return Source(
        task,
        partition=factory.partition,
        overrides=factory.partition_overrides,
        layouts=factory.partition_layouts,
        exp_avg_dtype=dtype,
        warnings=tuple(told),
        runnable=lambda: _runnable_task(task, application.datamodule),
    )


def _runnable_task(task: Any, data: Any) -> tuple[nn.Module, list[str]]:
    """The task of an outline, with random weights."""
    if hasattr(task.model, "base_model_prefix"):  # a model of transformers
        task.model, told = shortened(task.model)
        return task, told
    check_size(task)
    task.configure_meta_model(data, device="cpu")
    return task, []


def of_timm(name: str) -> Source:
    """A model of timm by its name, of random weights.

    Raises:
        ValueError: timm has no model of that name, or is not installed.
    """
    timm = package("timm", "--timm", "vision")
    known = name.partition(".")[0]
    if ":" in name or "/" in name or not timm.is_model(known):
        raise ValueError(f"--timm {name}: timm has no model of that name{near(known, timm.list_models())}")
    with quiet(), building(f"--timm {name}"), torch.device("meta"):
        model = timm.create_model(known, pretrained=False)
    return Source(model, runnable=lambda: built(lambda: timm.create_model(known, pretrained=False), model))


def of_diffusers(name: str) -> Source:
    """A model of diffusers from the defaults of its class, or from a `config.json`.

    Args:
        name: A class; or the file, or a folder with it.

    Raises:
        ValueError: There is no such class or file, the configuration is incomplete, or diffusers is not installed.
    """
    diffusers = package("diffusers", "--diffusers", "diffusion")
    with quiet():
        path = config_file("--diffusers", name)
        options = {"_class_name": name} if path is None else read_json("--diffusers", path)
        class_name = options.get("_class_name")
        if class_name is None:
            raise ValueError(f"--diffusers {path}: it has no _class_name, which says what to build")
        cls: Any = getattr(diffusers, str(class_name), None)
        if not is_subclass(cls, diffusers.ModelMixin):
            classes = [known for known in dir(diffusers.models) if known[0].isupper() and known != "AutoModel"]
            hint = near(str(class_name), (known for known in classes if not known.endswith("Mixin")))
            raise ValueError(f"--diffusers {name}: diffusers has no model {class_name}{hint}")
        remedy = "" if path else "; its defaults may be incomplete: give a config.json with _class_name"
        with building(f"--diffusers {name}", remedy), torch.device("meta"):
            model = cls.from_config(options) if path else cls()
    return Source(model, runnable=lambda: built(lambda: cls.from_config(model.config), model))


SOURCES: Mapping[str, Callable[[str], Source]] = MappingProxyType(
    {"recipe": of_recipe, "hf": of_transformers, "timm": of_timm, "diffusers": of_diffusers}
)
"""Sources by the option that names them."""
