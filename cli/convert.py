"""`adam-mini convert`: checkpoints for another optimizer, partition or layout (a file, or a folder of sharded runs)."""

from __future__ import annotations

import logging
import shlex
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import Parser, check_place
from .recipes import find_recipe
from .run_folder import new_run_dirs, resolve_checkpoint

if TYPE_CHECKING:
    from torch import nn

    from lightning_adam_mini.convert.conversion import Conversion
    from lightning_adam_mini.factory import OptimizerFactory

__all__ = ["main"]

KEPT = ("lr", "betas", "eps", "weight_decay")
"""Options that the checkpoint decides: `fit --ckpt_path` continues with its values too."""

OPTIMIZERS = {"adam-mini": "AdamMini", "adamw": "AdamW"}
LAYOUTS = ("file", "folder")
DESCRIPTION = """Convert the checkpoint of a run, so that `adam-mini fit --ckpt_path` continues with another optimizer
or partition: AdamW's state as Adam-mini's, at half the size, or the other way round. Step, schedule, learning rate,
betas, eps and weight decay are kept. Checkpoint folders of sharded runs become one file, and back. The source is not
changed."""

log = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> None:
    """Convert a checkpoint.

    Raises:
        ArgumentError: The command line is wrong.
        ValueError: There is no such checkpoint, it cannot be read, belongs to another model, or the target exists.
        OSError: The target cannot be written.
    """
    parser = _parser()
    own, passed = _split(parser, arguments)
    options = parser.parse_args(own)
    source, run_dir = _find_checkpoint(options)
    optimizer, layout = _wishes(parser, options.to, "folder" if source.is_dir() else "file")
    if optimizer is None and passed:
        parser.error(f"{passed[0]}: an option of an optimizer needs --to adam-mini or --to adamw")
    target: Path = options.out.expanduser()
    _check_target(target, layout, overwrite=options.overwrite)
    check_place(target)

    converts = optimizer is not None or layout != "file"
    config = _find_config(options.recipe, source, run_dir) if converts else None
    checkpoint = _read(source)
    states = checkpoint.get("optimizer_states") or []
    if len(states) != 1:
        raise ValueError(f"{source} holds the states of {len(states)} optimizers; a checkpoint of a training has one")
    (state,) = states
    command = ""
    names: list[str] | None = None
    if config is not None:
        from .models import meta_task

        task = meta_task(config, checkpoint["state_dict"], optimizer, passed)
        built = _continued_factory(task.optimizer_factory, checkpoint, state, passed)
        own_optimizer, names = _build(built, task)
        if optimizer is not None:
            state = _converted_state(checkpoint, state, own_optimizer, built)
        else:
            _check_groups(state, own_optimizer)
        command = _next_command(config, [type(built).__name__, *passed], target, checkpoint)
    for group in state["param_groups"]:
        group.pop("param_names", None)
    checkpoint["optimizer_states"] = [state]
    _write(checkpoint, names, target, layout)
    log.info("%s", f"wrote {target}{command}")


def _next_command(config: Path, optimizer: Sequence[str], target: Path, checkpoint: Mapping[str, Any]) -> str:
    """The end of the message: the command that continues from the converted checkpoint, in a new run folder.

    Args:
        config: The configuration that the model was built from.
        optimizer: Name and options of the optimizer.
        target: The converted checkpoint.
        checkpoint: Its content.
    """
    words = ["adam-mini", "fit", "--config", config, "--run_dir", next(new_run_dirs(target.stem))]
    words += ["--optimizer", *optimizer, "--ckpt_path", target]
    further = _further(config, checkpoint)
    over = ". Its run is finished, and this trains as long again: " if further else "; "
    return f"{over}continue with {shlex.join(map(str, [*words, *further]))}"


def _further(config: Path, checkpoint: Mapping[str, Any]) -> list[str]:
    """Options with which a finished run trains as long again; none for an unfinished run."""
    import yaml

    content = yaml.safe_load(config.read_text("utf-8"))
    trainer, schedule = content.get("trainer") or {}, content.get("schedule") or {}
    step, (max_steps, max_epochs) = checkpoint.get("global_step", 0), map(trainer.get, ("max_steps", "max_epochs"))
    if max_steps and 0 < max_steps <= step:
        further = ["--trainer.max_steps", str(2 * max_steps)]
    elif max_epochs and 0 < max_epochs <= _epochs(checkpoint):
        further = ["--trainer.max_epochs", str(2 * max_epochs)]
    else:
        return []
    horizon = schedule.get("horizon")
    return [*further, *(["--schedule.horizon", str(2 * step)] if horizon and horizon <= step else [])]


def _epochs(checkpoint: Mapping[str, Any]) -> int:
    """Number of complete epochs of a run."""
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    epochs = loop.get("epoch_progress", {}).get("current", {})
    is_last = loop.get("epoch_loop.batch_progress", {}).get("is_last_batch", False)
    return int(epochs.get("ready" if is_last else "processed", checkpoint.get("epoch", 0)))


def _parser() -> Parser:
    parser = Parser(
        prog="adam-mini convert",
        description=DESCRIPTION,
        epilog="Options of the new optimizer are given as for fit: --optimizer.partition NAME, "
        "--optimizer.partition_overrides.value row, ...",
        allow_abbrev=False,
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="Run folder, checkpoint file, or checkpoint folder of a sharded run.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="TARGET", help="The new checkpoint.")
    parser.add_argument(
        "--to",
        action="append",
        choices=[*OPTIMIZERS, *LAYOUTS],
        default=[],
        help="Optimizer (adam-mini by default) or layout (the source's by default); one of each may be given.",
    )
    parser.add_argument(
        "--recipe",
        "--config",
        metavar="RECIPE",
        help="Recipe or config.yaml of the run; by default the config.yaml of the run folder that SOURCE is in.",
    )
    parser.add_argument("--ckpt_path", default="last", help="Of a run folder: `last`, `best`, or a path.")
    parser.add_argument("--overwrite", action="store_true", help="Replace a checkpoint at TARGET.")
    return parser


def _split(parser: Parser, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command's own arguments, and options of the optimizer as `--optimizer.OPTION=VALUE`."""
    own: list[str] = []
    passed: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        if not argument.startswith("--optimizer"):
            own.append(argument)
            continue
        option, equals, value = argument.partition("=")
        name = option.removeprefix("--optimizer.")
        if name == option:
            parser.error(f"{argument}: give the optimizer as --to adam-mini or --to adamw")
        if name in KEPT:
            parser.error(f"{option}: the value of the checkpoint stays, here and in `fit --ckpt_path`")
        if not equals and (value := next(remaining, "")) == "":
            parser.error(f"{option}: expected a value")
        passed.append(f"{option}={value}")
    return own, passed


def _wishes(parser: Parser, to: Sequence[str], layout: str) -> tuple[str | None, str]:
    """The optimizer to convert to, or None, and the layout to write."""
    optimizers, layouts = [wish for wish in to if wish in OPTIMIZERS], [wish for wish in to if wish in LAYOUTS]
    if len(optimizers) > 1 or len(layouts) > 1:
        parser.error(f"--to: give one of {', '.join(OPTIMIZERS)} and one of {', '.join(LAYOUTS)}, not {', '.join(to)}")
    if layouts == [layout] and not optimizers:
        parser.error(f"--to {layout}: the source is a {layout} already")
    optimizer = OPTIMIZERS[optimizers[0]] if optimizers else (None if layouts else "AdamMini")
    return optimizer, (layouts or [layout])[0]


def _find_checkpoint(options: Namespace) -> tuple[Path, Path | None]:
    """The file or folder of the checkpoint, and the run folder if SOURCE is one."""
    from ..tasks.checkpoints.folders import is_checkpoint_folder

    source: Path = options.source.expanduser()
    if source.is_file() or is_checkpoint_folder(source):
        return source, None
    if (source / "config.yaml").is_file() or (source / "checkpoints").is_dir():
        found = resolve_checkpoint(options.ckpt_path, source, may_start=False)
        assert found is not None
        return Path(found), source
    reason = "it holds no checkpoint" if source.is_dir() else "no such file or folder"
    raise ValueError(
        f"{source}: {reason}; give a run folder (with config.yaml and checkpoints/), a checkpoint file, or a "
        "checkpoint folder (with .metadata)"
    )


def _find_config(recipe: str | None, source: Path, run_dir: Path | None) -> Path:
    """The configuration that the model is built from."""
    if recipe is not None:
        return find_recipe(recipe, given_as="--recipe")
    folders = [run_dir] if run_dir else [source.parent, source.parent.parent]
    for folder in folders:
        if (folder / "config.yaml").is_file():
            return folder / "config.yaml"
    raise ValueError(
        f"there is no config.yaml of a run next to {source}; give the recipe that it was trained with as --recipe"
    )


def _check_target(target: Path, layout: str, *, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise ValueError(f"{target} exists; choose another --out, or give --overwrite")
    from ..tasks.checkpoints.folders import is_checkpoint_folder

    if not (is_checkpoint_folder(target) if layout == "folder" else target.is_file()):
        raise ValueError(f"--overwrite only replaces a checkpoint {layout}, and {target} is none; choose another --out")


def _continued_factory(
    factory: OptimizerFactory, checkpoint: Mapping[str, Any], state: Mapping[str, Any], passed: Sequence[str]
) -> OptimizerFactory:
    """The factory with the values of the checkpoint, so that the next run finds the same ones and does not warn."""
    saved = checkpoint.get("optimizer_factory")
    if saved is None:  # of another training program
        groups = state["param_groups"]
        saved = {key: groups[0][key] for key in ("betas", "eps") if key in groups[0]}
        saved["lr"] = max(float(group.get("initial_lr", group["lr"])) for group in groups)
        saved["weight_decay"] = max(group.get("weight_decay", 0.0) for group in groups)
    given = {option.partition("=")[0] for option in passed}
    policy = () if "--optimizer.weight_decay_policy" in given else ("weight_decay_policy",)
    known = asdict(factory)
    kept = {key: saved[key] for key in (*KEPT, *policy) if key in saved and key in known}
    if "betas" in kept:
        kept["betas"] = tuple(kept["betas"])
    return replace(factory, **kept)


def _build(factory: OptimizerFactory, task: nn.Module) -> tuple[Any, list[str]]:
    """The optimizer of the meta-device model, and the names of its parameters in the order of its state."""
    optimizer = factory.build(task)
    names = {parameter: name for name, parameter in task.named_parameters()}
    for group in optimizer.param_groups:
        group["param_names"] = [names[parameter] for parameter in group["params"]]
    return optimizer, [name for group in optimizer.param_groups for name in group["param_names"]]


def _converted_state(
    checkpoint: dict[str, Any], state: dict[str, Any], optimizer: Any, factory: OptimizerFactory
) -> dict[str, Any]:
    """The state for another optimizer; other entries of the checkpoint that describe the optimizer are updated."""
    from lightning_adam_mini.convert.conversion import convert

    saved = checkpoint.get("optimizer_factory")
    if saved is not None and saved["name"] not in ("AdamW", "Adam", "AdamMini"):
        raise ValueError(
            f"the checkpoint was saved with {saved['name']}; states of AdamW, Adam and AdamMini are converted"
        )
    conversion = convert(state, optimizer, keep_hyperparameters=True)
    name = type(factory).__name__
    checkpoint["optimizer_factory"] = {"name": name, **asdict(factory)}
    if "optimizer" in checkpoint.get("hyper_parameters", {}):
        checkpoint["hyper_parameters"]["optimizer"] = factory
    for schedule in checkpoint.get("lr_schedulers", []):
        _regroup(schedule, len(state["param_groups"]), conversion)
    before, after = _num_bytes(state), _num_bytes(conversion.state)
    source = saved["name"] if saved else conversion.source
    log.info("%s", f"{source} -> {name}: {before:,} bytes of optimizer state -> {after:,}")
    return conversion.state


def _regroup(schedule: dict[str, Any], num_groups: int, conversion: Conversion) -> None:
    """Adapt the lists of a schedule, with one entry per parameter group, to the new groups."""
    for key in ("base_lrs", "_last_lr", "lr_lambdas"):
        values = schedule.get(key)
        if isinstance(values, list) and len(values) == num_groups:
            schedule[key] = [values[numbers[0] if numbers else 0] for numbers in conversion.group_sources]


def _check_groups(state: Mapping[str, Any], optimizer: Any) -> None:
    """Check that a state without names has the groups of the configuration's optimizer."""
    sizes = [len(group["params"]) for group in state["param_groups"]]
    own = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != own:
        raise ValueError(
            f"the checkpoint has optimizer groups of {sizes} parameters, the configuration makes {own}: it belongs to "
            "another model or optimizer; give the recipe that it was trained with as --recipe"
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    for parameter, number in zip(parameters, numbers, strict=True):
        saved = state["state"].get(number, {}).get("exp_avg")
        if saved is not None and saved.shape != parameter.shape:
            raise ValueError(
                f"the optimizer state has a parameter of shape {tuple(saved.shape)} where the configuration has one of "
                f"shape {tuple(parameter.shape)}; give the recipe that it was trained with as --recipe"
            )


def _named(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A numbered state keyed by names, as torch.distributed.checkpoint takes it."""
    groups = [{**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[number]: value for number, value in state["state"].items()}, "param_groups": groups}


def _num_bytes(state: Mapping[str, Any]) -> int:
    """Bytes of the tensors of a state."""
    values = (value for entry in state["state"].values() for value in entry.values())
    return sum(value.nbytes for value in values if hasattr(value, "nbytes"))


def _read(source: Path) -> dict[str, Any]:
    """A checkpoint with whole tensors; the optimizer state of a folder keeps the names of its parameters."""
    from ..tasks import base  # noqa: F401 - registers the classes that checkpoints hold
    from ..tasks.checkpoints.folders import read_parameter_names
    from ..tasks.checkpoints.saving import AtomicCheckpointIO

    checkpoint = AtomicCheckpointIO().load_checkpoint(source, weights_only=True)
    if source.is_dir() and checkpoint.get("optimizer_states"):
        groups = checkpoint["optimizer_states"][0]["param_groups"]
        for group, names in zip(groups, read_parameter_names(source), strict=True):
            group["param_names"] = names
    return checkpoint


def _write(checkpoint: dict[str, Any], names: Sequence[str] | None, target: Path, layout: str) -> None:
    from ..tasks.checkpoints.folders import write_folder
    from ..tasks.checkpoints.saving import AtomicCheckpointIO

    if layout == "file":
        AtomicCheckpointIO().save_checkpoint(checkpoint, target)
        return
    assert names is not None
    (state,) = checkpoint["optimizer_states"]
    write_folder({**checkpoint, "optimizer_states": [_named(state, names)]}, target)
