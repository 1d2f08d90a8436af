"""Models of transformers without weights or downloads, from a `config.json`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .runnable_models import shortened
from .model_building import Source, building, config_file, is_subclass, near, package, quiet, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["of_transformers"]

HEADS = ("num_attention_heads", "num_key_value_heads")


def of_transformers(name: str) -> Source:
    """A model of transformers from a `config.json`, of random weights in float32.

    Args:
        name: The file, a folder with it, the name of a model in the local cache of the hub, or what would be in the
            file, from its `{` on.

    Raises:
        ValueError: There is no such file on this machine, or transformers cannot build what it says.
    """
    transformers = package("transformers", "--hf", "llm")
    with quiet():
        path = name.strip() if name.lstrip().startswith("{") else config_file("--hf", name) or _cached(name)
        options = read_json("--hf", path)
        architecture = _architecture(options)
        cls: Any = getattr(transformers, architecture, None)
        if cls is transformers.PreTrainedModel:
            raise ValueError(
                f"--hf {path}: {architecture} is the base of all models; name one, such as LlamaForCausalLM"
            )
        config = _transformers_config(path, options)
        says_sizes = options.keys() - {"model_type", "architectures"}
        remedy = "" if says_sizes else "; its defaults may be incomplete: give the config.json of a model"
        with building(f"--hf {path}", remedy), torch.device("meta"):
            if is_subclass(cls, transformers.PreTrainedModel):
                model = cls(config)
            elif type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
                model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.get_default_dtype())
            elif type(config) in transformers.MODEL_MAPPING:
                model = transformers.AutoModel.from_config(config, dtype=torch.get_default_dtype())
            else:
                model = None
        if model is None:
            raise ValueError(
                f"--hf {path}: AutoModel of transformers has no class for model_type {config.model_type!r}; "
                f"{_classes_of(config)}"
            )
    told = [] if architecture in ("", type(model).__name__) else [_other_class(architecture, model)]
    where = "the configuration" if isinstance(path, str) else path.name
    told += [
        f"{where} does not say {size}, so {type(part).__name__}'s default of {value} is taken: heads decide about "
        "blocks"
        for part, size, value in _defaults(config, options)
    ]
    return Source(model, warnings=tuple(told), runnable=lambda: shortened(model))


def _cached(name: str) -> Path:
    """The configuration of a model in the local cache of the hub.

    Raises:
        ValueError: It is not there; nothing is downloaded.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        path = None
    if not isinstance(path, str):
        raise ValueError(
            f"--hf {name}: not on this machine, and nothing is downloaded; give a local config.json, from "
            f"`hf download {name} config.json` elsewhere or written with model_type and the sizes"
        )
    return Path(path)


def _architecture(options: Mapping[str, Any]) -> str:
    """The first class that a configuration names; empty where it names none."""
    match options.get("architectures"):
        case str(name) | [str(name), *_]:
            return name
    return ""


def _transformers_config(path: Path | str, options: dict[str, Any]) -> PreTrainedConfig:
    from transformers import CONFIG_MAPPING

    model_type = options.get("model_type")
    if not isinstance(model_type, str):
        raise ValueError(f"--hf {path}: it has no model_type, such as llama, which says what to build")
    if model_type not in CONFIG_MAPPING:
        own_code = "; it brings code of its own, which is never run here" if "auto_map" in options else ""
        hint = near(model_type, list(CONFIG_MAPPING))
        raise ValueError(f"--hf {path}: transformers knows no model_type {model_type!r}{own_code or hint}")
    with building(f"--hf {path}"):
        config = CONFIG_MAPPING[model_type].from_dict(options)
        # Attention never runs, so what it would run with, also in parts, need not be here.
        config._attn_implementation = "eager"
    return config


def _classes_of(config: Any) -> str:
    """What to name in place of the class that `AutoModel` lacks for a configuration, for the end of a message."""
    from transformers import PreTrainedModel

    found = []
    with contextlib.suppress(ImportError):
        module = import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
        for name in getattr(module, "__all__", ()):
            cls: Any = getattr(module, name, None)
            is_model = is_subclass(cls, PreTrainedModel) and not name.endswith("PreTrainedModel")
            if is_model and cls.config_class is type(config):
                found.append(name)
    return f"name one in architectures: {' or '.join(found)}" if found else "it describes a part of a model"


def _defaults(config: Any, options: Mapping[str, Any]) -> Iterator[tuple[Any, str, int]]:
    """Numbers of heads that a configuration or a part of it does not say: the part, their name and the default.

    A default of None is no guess: such a number follows from what the configuration says.
    """
    own_names, parameters = config.attribute_map, signature(type(config)).parameters
    said = {own_names.get(key, key) for key in options}
    for name in dict.fromkeys(own_names.get(name, name) for name in HEADS):
        default = parameters[name].default if name in parameters else None
        if name not in said and isinstance(default, int):
            yield config, name, default
    for part in config.sub_configs:
        if isinstance(options.get(part), dict):
            yield from _defaults(getattr(config, part), options[part])


def _other_class(architecture: str, model: nn.Module) -> str:
    return f"transformers has no class {architecture}; this is {type(model).__name__}"
