"""Every model family of transformers, timm and diffusers on the meta device: what the partition says of each.

    python benchmarks/scan_layouts.py --out benchmarks/results/scan_layouts.json

Default configurations, one model for each type of configuration (transformers), each module (timm) and each class
(diffusers). For each: the partition that `auto` takes, whether `transformer` raises, the share of elements in
parameters that no rule knows, and how many elements lie in modules that attend, with those among them that nothing but
the names of a module's children decided. A family that its library cannot build from defaults alone, or not within a
minute of computing, is counted as not built. About twenty minutes on one core; nothing is allocated or downloaded.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_adam_mini import explain
from lightning_adam_mini.partition import resolve_strategy
from lightning_adam_mini.partition.layouts import find_layouts
from lightning_adam_mini.partition.tree import plain_names, walk

os.environ["HF_HUB_OFFLINE"] = "1"
SECONDS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--libraries", nargs="+", default=list(LIBRARIES), choices=list(LIBRARIES))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGPROF, _stop)
    report: dict[str, Any] = {
        "versions": {name: version(name) for name in ("torch", *options.libraries)},
        "families": {name: dict(_scan(LIBRARIES[name])) for name in options.libraries},
    }
    report["sums"] = {name: _sums(families) for name, families in report["families"].items()}
    print(json.dumps(report["sums"], indent=2))
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def transformers_models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    from transformers import AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    for name in CONFIG_MAPPING_NAMES:
        yield name, lambda name=name: AutoModel.from_config(CONFIG_MAPPING[name]())


def timm_models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    import timm

    for module in timm.list_modules():
        names = timm.list_models(module=module)
        if names:
            yield module, lambda name=names[0]: timm.create_model(name, pretrained=False)


def diffusers_models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    import diffusers

    for name in sorted(dir(diffusers)):
        cls = getattr(diffusers, name, None)
        if isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin) and cls is not diffusers.ModelMixin:
            yield name, cls


LIBRARIES = {"transformers": transformers_models, "timm": timm_models, "diffusers": diffusers_models}


class OutOfTimeError(Exception):
    """A model took too long to build."""


def _stop(*_: object) -> None:
    raise OutOfTimeError


def _scan(models: Callable[[], Iterator[tuple[str, Callable[[], nn.Module]]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, build in models():
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            with torch.device("meta"):
                model = build()
        except Exception as error:  # noqa: BLE001 - whatever a library raises
            yield name, {"not_built": type(error).__name__}
            continue
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        yield name, _explained(model)


def _explained(model: nn.Module) -> dict[str, Any]:
    model.requires_grad_(True)
    strategy = resolve_strategy("auto", model).name
    try:
        explanation = explain(model, "transformer")
    except ValueError as error:
        return {"auto": strategy, "raised": str(error)}
    unknown = sum(row.elements for row in explanation.rows if not row.known)
    attending, by_name = _of_attention(model)
    return {
        "auto": strategy,
        "parameters": explanation.totals.elements,
        "unknown": unknown,
        "attending": attending,
        "attending_by_name": by_name,
        "saving_percent": round(explanation.totals.saving_percent, 2),
    }


def _of_attention(model: nn.Module) -> tuple[int, int]:
    """Elements in modules that attend, and of those the ones that no row for a class decided, but one for names."""
    attending: dict[int, int] = {}
    by_class, by_name = set(), set()
    for node in walk(model):
        found = find_layouts(node.module)
        if not found:
            continue
        attends = any(layout.is_attention for layout in found)
        parameters = dict(node.module.named_parameters())
        for name, plain in plain_names(node.module).items():
            place = id(parameters[name])
            if attends:
                attending[place] = parameters[name].numel()
            deciding = next((layout for layout in found if layout.find(plain)), None)
            if deciding is not None:
                (by_class if deciding.classes else by_name).add(place)
    return sum(attending.values()), sum(attending.get(place, 0) for place in by_name - by_class)


def _sums(families: dict[str, dict[str, Any]]) -> dict[str, Any]:
    built = {name: found for name, found in families.items() if "not_built" not in found}
    explained = [found for found in built.values() if "raised" not in found and found["parameters"]]
    shares = [found["unknown"] / found["parameters"] for found in explained]
    return {
        "families": len(families),
        "built": len(built),
        "raised": sorted(name for name, found in built.items() if "raised" in found),
        "all_known": sum(share == 0 for share in shares),
        "unknown_above_0.1_percent": sorted(
            name
            for name, found in built.items()
            if found.get("parameters") and found["unknown"] / found["parameters"] > 1e-3
        ),
        "attending_by_name_percent": round(
            100
            * sum(found["attending_by_name"] for found in explained)
            / max(1, sum(found["attending"] for found in explained)),
            2,
        ),
        "auto": {kind: sum(found["auto"] == kind for found in built.values()) for kind in ("transformer", "default")},
    }


if __name__ == "__main__":
    main()
