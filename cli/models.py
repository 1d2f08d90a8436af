"""Models without training: on the meta device from recipes, other libraries or checkpoints, and the weights of runs.

No weights are made, no data are read and nothing is downloaded, except by `open_data` and `load_weights`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor, nn

from lightning_adam_mini.hints import did_you_mean, require_package
from lightning_adam_mini.partition import STRATEGIES

from .arguments import UsageError
from .messages import quiet
from .recipes import find_recipe, read_yaml
from .runnable_models import built, check_size, shortened

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule
    from transformers import PreTrainedConfig

    from ..tasks.base import Task
    from .application import Application

__all__ = [
    "ON_ONE_CPU",
    "SOURCES",
    "Source",
    "build_application",
    "check_partition",
    "load_weights",
    "meta_task",
    "open_data",
    "trainer_options",
    "without_start",
]

ON_ONE_CPU = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "precision": "32-true",
    "logger": False,
    "callbacks": None,
    "plugins": None,
    "profiler": None,
}
"""Options of the trainer. What only training needs may ask for devices and packages that are missing here."""
_OF_A_START = ("ckpt_path", "weights_only")
_HEADS = ("num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True)
class Source:
    """A model on the meta device, and how AdamMini partitions it.

    Args:
        model: The model.
        partition: Name of the partition.
        overrides: Its overrides.
        layouts: Layouts of its attention classes.
        exp_avg_dtype: Dtype of the first moment.
        warnings: How it may differ from the model that the user means.
        runnable: Builds the model again with random weights on the CPU, a large one with fewer layers, and returns it
            with one sentence for each part that is left out.
    """

    model: nn.Module
    partition: str = "auto"
    overrides: Mapping[str, str] = field(default_factory=dict)
    layouts: Mapping[str, str] = field(default_factory=dict)
    exp_avg_dtype: torch.dtype | None = None
    warnings: tuple[str, ...] = ()
    runnable: Callable[[], tuple[nn.Module, list[str]]] | None = None


def check_partition(name: str) -> None:
    """Check the name of `--partition`.

    Raises:
        UsageError: There is no such partition; the message lists them.
    """
    known = ["auto", *STRATEGIES]
    if name not in known:
        raise UsageError(f"--partition {name}: choose from {', '.join(known)}{did_you_mean(name, known, count=1)}")


def _package(name: str, option: str, extra: str) -> Any:
    """Import a package of an extra."""
    require_package(name, option, extra=extra)
    return import_module(name)


@contextlib.contextmanager
def _building(what: str, remedy: str = "") -> Iterator[None]:
    """Report in one line what a library could not build: it may raise anything, for any configuration."""
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # Configurations that validate themselves name the place in the first line, and the error in the last.
        is_checked = len(lines) > 1 and "validation" in lines[0].lower()
        cause = lines[-1] if is_checked else f"{type(error).__name__}: {next(iter(lines), '')}"
        missing = isinstance(error, ImportError)  # no other configuration fixes that
        raise ValueError(f"{what}: cannot be built: {cause[:200]}{'' if missing else remedy}") from error


def _config_file(option: str, name: str) -> Path | None:
    """The `config.json` of a path; None if the name is no path.

    Raises:
        ValueError: A folder without one, or a path that does not exist.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise ValueError(f"{option} {name}: the folder has no config.json")
    if path.is_file():
        return path
    if path.suffix == ".json" or name.startswith((".", "/", "~")):
        raise ValueError(f"{option} {name}: no such file")
    return None


def _read_json(option: str, source: Path | str) -> dict[str, Any]:
    """The content of a configuration.

    Args:
        option: The option that names it, for messages.
        source: The file, or the content itself.

    Raises:
        ValueError: It is no JSON object, or nested too deeply to be read.
    """
    try:
        options = json.loads(source if isinstance(source, str) else source.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{option} {source}: this is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{option} {source}: this is nested too deeply for a configuration") from error
    if not isinstance(options, dict):
        raise ValueError(f"{option} {source}: a configuration is a JSON object, not a {type(options).__name__}")
    return options


def _close(name: str, known: Iterable[str]) -> str:
    return did_you_mean(name, [other for other in known if other != name], cutoff=0.5)


def _is_subclass(cls: Any, base: type) -> bool:
    """Whether `cls`, which may be any object, is a proper subclass of `base`."""
    return isinstance(cls, type) and issubclass(cls, base) and cls is not base


def _of_recipe(name: str) -> Source:
    """The task of a recipe with its optimizer's partition, as `fit` builds it.

    Raises:
        ValueError: There is no such recipe, it cannot be read, or the task cannot be built.
    """
    recipe = find_recipe(name, given_as="recipe")
    read_yaml(recipe, f"recipe {name}")  # the parser's own message would not name the file
    from lightning_adam_mini.factory import AdamMini

    require_package("lightning", f"recipe {name}", extra="llm")
    from .application import Application

    with quiet():
        options = ["--config", str(recipe), *trainer_options(), "--seed_everything=false"]
        application = Application(options, run=False)
        task: Any = application.model
        remarks = task.configure_meta_model(application.datamodule)
    factory = task.optimizer_factory
    if not isinstance(factory, AdamMini):
        other = type(factory).__name__
        remarks.append(f"the recipe's optimizer is {other}, which has no blocks; this is AdamMini with its defaults")
        factory = AdamMini()
    dtype = getattr(torch, factory.exp_avg_dtype) if factory.exp_avg_dtype else None
    return Source(
        task,
        partition=factory.partition,
        overrides=factory.partition_overrides,
        layouts=factory.partition_layouts,
        exp_avg_dtype=dtype,
        warnings=tuple(remarks),
        runnable=lambda: _runnable_task(task, application.datamodule),
    )


def _runnable_task(task: Any, data: Any) -> tuple[nn.Module, list[str]]:
    """A task on the meta device, with random weights on the CPU."""
    if hasattr(task.model, "base_model_prefix"):  # a model of transformers
        task.model, remarks = shortened(task.model)
        return task, remarks
    check_size(task)
    task.configure_meta_model(data, device="cpu")
    return task, []


def _of_transformers(name: str) -> Source:
    """A model of transformers from a `config.json`, of random weights in float32.

    Args:
        name: The file, a folder with it, the name of a model in the local cache of the hub, or the content of such a
            file, which starts with `{`.

    Raises:
        ValueError: There is no such file on this machine, or transformers cannot build what it says.
    """
    transformers = _package("transformers", "--hf", "llm")
    with quiet():
        path = name.strip() if name.lstrip().startswith("{") else _config_file("--hf", name) or _cached(name)
        options = _read_json("--hf", path)
        architecture = _architecture(options)
        cls: Any = getattr(transformers, architecture, None)
        if cls is transformers.PreTrainedModel:
            raise ValueError(
                f"--hf {path}: {architecture} is the base of all models; name one, such as LlamaForCausalLM"
            )
        config = _transformers_config(path, options)
        says_sizes = options.keys() - {"model_type", "architectures"}
        remedy = "" if says_sizes else "; its defaults may be incomplete: give the config.json of a model"
        with _building(f"--hf {path}", remedy), torch.device("meta"):
            if _is_subclass(cls, transformers.PreTrainedModel):
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
    remarks = []
    if architecture not in ("", built_class := type(model).__name__):
        remarks.append(f"transformers has no class {architecture}; this is {built_class}")
    where = "the configuration" if isinstance(path, str) else path.name
    remarks += [
        f"{where} does not say {size}, so {type(part).__name__}'s default of {value} is taken: blocks depend on the "
        "number of heads"
        for part, size, value in _defaults(config, options)
    ]
    return Source(model, warnings=tuple(remarks), runnable=lambda: shortened(model))


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
    """The first class that a configuration names; empty if there is none."""
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
        hint = _close(model_type, list(CONFIG_MAPPING))
        raise ValueError(f"--hf {path}: transformers knows no model_type {model_type!r}{own_code or hint}")
    with _building(f"--hf {path}"):
        config = CONFIG_MAPPING[model_type].from_dict(options)
        # Attention never runs, so the package of its implementation, also of parts, need not be installed.
        config._attn_implementation = "eager"
    return config


def _classes_of(config: Any) -> str:
    """The classes to name for a configuration that `AutoModel` has no class for, as the end of a message."""
    from transformers import PreTrainedModel

    found = []
    with contextlib.suppress(ImportError):
        module = import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
        for name in getattr(module, "__all__", ()):
            cls: Any = getattr(module, name, None)
            is_model = _is_subclass(cls, PreTrainedModel) and not name.endswith("PreTrainedModel")
            if is_model and cls.config_class is type(config):
                found.append(name)
    return f"name one in architectures: {' or '.join(found)}" if found else "it describes a part of a model"


def _defaults(config: Any, options: Mapping[str, Any]) -> Iterator[tuple[Any, str, int]]:
    """Numbers of heads that a configuration or a part of it leaves out: the part, the name and the default.

    A default of None is no guess: transformers derives such a number from the others.
    """
    own_names, parameters = config.attribute_map, signature(type(config)).parameters
    said = {own_names.get(key, key) for key in options}
    for name in dict.fromkeys(own_names.get(name, name) for name in _HEADS):
        default = parameters[name].default if name in parameters else None
        if name not in said and isinstance(default, int):
            yield config, name, default
    for part in config.sub_configs:
        if isinstance(options.get(part), dict):
            yield from _defaults(getattr(config, part), options[part])


def _of_timm(name: str) -> Source:
    """A model of timm by its name, of random weights.

    Raises:
        ValueError: timm has no model of that name, or is not installed.
    """
    timm = _package("timm", "--timm", "vision")
    known = name.partition(".")[0]
    if ":" in name or "/" in name or not timm.is_model(known):
        raise ValueError(f"--timm {name}: timm has no model of that name{_close(known, timm.list_models())}")
    with quiet(), _building(f"--timm {name}"), torch.device("meta"):
        model = timm.create_model(known, pretrained=False)
    return Source(model, runnable=lambda: built(lambda: timm.create_model(known, pretrained=False), model))


def _of_diffusers(name: str) -> Source:
    """A model of diffusers from the defaults of its class, or from a `config.json`.

    Args:
        name: A class; or the file, or a folder with it.

    Raises:
        ValueError: There is no such class or file, the configuration is incomplete, or diffusers is not installed.
    """
    diffusers = _package("diffusers", "--diffusers", "diffusion")
    with quiet():
        path = _config_file("--diffusers", name)
        options = {"_class_name": name} if path is None else _read_json("--diffusers", path)
        class_name = options.get("_class_name")
        if class_name is None:
            raise ValueError(f"--diffusers {path}: it has no _class_name, which says what to build")
        cls: Any = getattr(diffusers, str(class_name), None)
        if not _is_subclass(cls, diffusers.ModelMixin):
            classes = [known for known in dir(diffusers.models) if known[0].isupper() and known != "AutoModel"]
            hint = _close(str(class_name), (known for known in classes if not known.endswith("Mixin")))
            raise ValueError(f"--diffusers {name}: diffusers has no model {class_name}{hint}")
        remedy = "" if path else "; its defaults may be incomplete: give a config.json with _class_name"
        with _building(f"--diffusers {name}", remedy), torch.device("meta"):
            model = cls.from_config(options) if path else cls()
    return Source(model, runnable=lambda: built(lambda: cls.from_config(model.config), model))


SOURCES: Mapping[str, Callable[[str], Source]] = MappingProxyType(
    {"recipe": _of_recipe, "hf": _of_transformers, "timm": _of_timm, "diffusers": _of_diffusers}
)
"""Sources by the option that names them."""


def trainer_options(values: Mapping[str, object] = ON_ONE_CPU) -> list[str]:
    """Options of the trainer as those of the command line."""
    return [f"--trainer.{key}={'null' if value is None else value}" for key, value in values.items()]


def build_application(recipe: Path, options: Sequence[str]) -> Application:
    """The model, data and trainer of a recipe, or of a run's `config.yaml`; nothing runs.

    Args:
        recipe: The file.
        options: Options of the command line that change it, the last one wins.
    """
    from .application import Application

    with TemporaryDirectory() as folder, quiet():
        plain, content = recipe, read_yaml(recipe)
        if (without := without_start(content)) != content:  # a run's configuration
            plain = Path(folder) / recipe.name
            plain.write_text(yaml.safe_dump(without), "utf-8")
        return Application(["--config", str(plain), *options], recipe=recipe.stem, run=False)


def without_start(content: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the options that only the subcommands of runs take."""
    return {name: value for name, value in content.items() if name not in _OF_A_START}


def open_data(data: LightningDataModule, checkpoint: str | None, stage: str) -> None:
    """Set up the data of a run so that they match the outputs of its checkpoint (classes, tokenizer)."""
    from ..tasks.data.module import SampledDataModule

    if checkpoint is not None and isinstance(data, SampledDataModule):
        data.recall(checkpoint)
    data.prepare_data()
    data.setup(stage)


def load_weights(task: Task, checkpoint: str) -> dict[str, Any]:
    """Load the weights of a checkpoint that evaluations use, and return its whole content."""
    from ..tasks.checkpoints.saving import AtomicCheckpointIO

    saved = AtomicCheckpointIO().load_checkpoint(checkpoint, weights_only=True)
    task.on_load_checkpoint(saved)
    task.load_state_dict(saved["state_dict"])
    return saved


def meta_task(config: Path, weights: Mapping[str, Tensor], optimizer: str | None, options: Sequence[str]) -> Task:
    """The task of a run on the meta device, with the shapes and dtypes of its saved weights.

    Args:
        config: The run's `config.yaml`, or a recipe.
        weights: Saved weights. They decide dtypes, and sizes that depend on data, such as a vocabulary.
        optimizer: Optimizer that replaces the configuration's.
        options: Further options of the command line, such as `--optimizer.partition=default`.

    Raises:
        ValueError: The configuration cannot be read, or the weights belong to another model.
    """
    from .application import Application

    content = read_yaml(config)
    own = content.get("optimizer")
    own = own.get("class_path", "") if isinstance(own, dict) else str(own or "AdamMini")
    content = without_start(content)
    content["trainer"] = {**(content.get("trainer") or {}), **ON_ONE_CPU}
    content["seed_everything"] = False
    replaced = [f"--optimizer={optimizer}"] if optimizer and own.rpartition(".")[2] != optimizer else []
    with TemporaryDirectory() as folder, quiet():
        cleaned = Path(folder) / config.name
        cleaned.write_text(yaml.safe_dump(content), "utf-8")
        application = Application(["--config", str(cleaned), *replaced, *options], run=False)
        task: Task = application.model
        remarks = task.configure_meta_model(application.datamodule)
    _take_shapes(task, weights, config, may_differ=bool(remarks))
    return task


def _take_shapes(task: Task, weights: Mapping[str, Tensor], config: Path, *, may_differ: bool) -> None:
    """Give parameters on the meta device the dtypes and shapes of saved weights.

    Args:
        task: The task.
        weights: Saved weights by name.
        config: Where the task comes from, for messages.
        may_differ: Whether one size, of the first dimension, depends on data that were not read.
    """
    sizes: set[tuple[int, int]] = set()
    for name, parameter in task.named_parameters():
        saved = weights.get(name)
        if saved is None:
            raise ValueError(_other_model(config, f"it has no {name!r}"))
        if saved.shape != parameter.shape:
            is_count = may_differ and saved.dim() == parameter.dim() and saved.shape[1:] == parameter.shape[1:]
            sizes |= {(saved.shape[0], parameter.shape[0])} if is_count else set()
            if not is_count or len(sizes) > 1:
                shapes = f"{name!r} has shape {tuple(saved.shape)} there and {tuple(parameter.shape)} here"
                raise ValueError(_other_model(config, shapes))
        # In place, so that tied parameters stay one.
        parameter.data = torch.empty(saved.shape, dtype=saved.dtype, device="meta")


def _other_model(config: Path, difference: str) -> str:
    return (
        f"the checkpoint belongs to another model than {config}: {difference}; give --recipe, the recipe or "
        "config.yaml that it was trained with"
    )
