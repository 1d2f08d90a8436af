"""How a model is to be partitioned, kept with the model, for an optimizer that gets its parameters alone.

Most frameworks build an optimizer from parameters or groups of them, often after they have wrapped the model and
replaced its parameters: fully_shard puts shards in their place, `copy.deepcopy` and tensor parallelism new tensors.
What is written onto a parameter is lost there. The model stays, so the annotation belongs to it, and an optimizer looks
for the annotated model that its parameters belong to at that moment.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from torch import Tensor, nn

from lightning_adam_mini.partition.inference import Layouts
from lightning_adam_mini.partition.partition import partition_module
from lightning_adam_mini.partition.strategies import Strategy

__all__ = ["Annotation", "annotate", "annotation_of"]

_ATTRIBUTE = "_adam_mini_annotation"
_live: weakref.WeakSet[Annotation] = weakref.WeakSet()
_order = count()


@dataclass(eq=False)
class Annotation:
    """The partition of a model, as its user wants it. Copies and pickles of the model have one of their own.

    Args:
        model: The annotated model.
        partition: As for `AdamMini`.
        overrides: As `partition_overrides` of `AdamMini`.
        layouts: As `partition_layouts` of `AdamMini`.
    """

    model: nn.Module
    partition: str | Strategy
    overrides: Mapping[str, str]
    layouts: Layouts
    _number: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Be found from now on."""
        self._number = next(_order)
        _live.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of the model, whose own attribute this is, is found too."""
        self.__dict__.update(state)
        self.__post_init__()


def annotate(
    model: nn.Module,
    partition: str | Strategy = "auto",
    overrides: Mapping[str, str] | None = None,
    layouts: Layouts | None = None,
) -> nn.Module:
    """Let any later `AdamMini(params)` partition the parameters of a model by what they do in it.

    Call it in each process, once the model is built, before or after it is wrapped. The optimizer may get parameters,
    pairs or groups, of all of the model or of a part of it, after FSDP, FSDP2, tensor parallelism, DDP or adapters, and
    of copies of the model.

    Args:
        model: The model that is trained. A second annotation replaces the first.
        partition: Block structure of the parameters, as for `AdamMini`.
        overrides: Block structures by role, name or `re:` pattern, as `partition_overrides` of `AdamMini`.
        layouts: Layouts for classes of the model, as `partition_layouts` of `AdamMini`.

    Returns:
        The model.

    Raises:
        ValueError: The partition does not fit the model, as for `AdamMini`.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"annotate takes a model, an nn.Module, not an object of type {type(model).__name__}")
    # What does not fit raises here; but not where FSDP1 hides the shapes, which only the optimizer recovers.
    if not any(getattr(parameter, "_fsdp_flattened", False) for parameter in model.parameters()):
        partition_module(model, partition, overrides, layouts)
    setattr(model, _ATTRIBUTE, Annotation(model, partition, dict(overrides or {}), dict(layouts or {})))
    return model


def annotation_of(parameters: Iterable[Tensor]) -> Annotation | None:
    """The annotation of the model that has all of these parameters, if any; the last one where several models have.

    Raises:
        ValueError: An annotated model has some of them, and not the others.
    """
    wanted = {id(parameter): parameter for parameter in parameters}
    if not wanted:
        return None
    fewest, nearest = set(wanted), None
    for annotation in sorted(_live, key=lambda each: each._number, reverse=True):
        if getattr(annotation.model, _ATTRIBUTE, None) is not annotation:
            continue  # another one has replaced it
        missing = wanted.keys() - {id(parameter) for parameter in annotation.model.parameters()}
        if not missing:
            return annotation
        if len(missing) < len(fewest):
            fewest, nearest = missing, annotation
    if nearest is None:
        return None
    other = next(tuple(parameter.shape) for key, parameter in wanted.items() if key in fewest)
    raise ValueError(
        f"{len(wanted) - len(fewest)} of {len(wanted)} parameters belong to the annotated "
        f"{type(nearest.model).__name__}, and others, such as one of shape {other}, do not: annotate the model that "
        "has all of them, or give it as module="
    )
