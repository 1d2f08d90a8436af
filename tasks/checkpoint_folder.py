"""Folders of `torch.distributed.checkpoint`: their outline, whether they are whole, and reading them in one process.

Layout: `.metadata` names each tensor with its shape and the files of its parts, `__RANK_N.distcp` hold the parts, and
`meta.pt` is the rest of the checkpoint. Weights lie under `state_dict`, optimizers under `optimizer_0`, ... by names of
parameters.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .optimizer_names import number_parameters
from .run_files import error_line

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

__all__ = [
    "METADATA_NAME",
    "REST_NAME",
    "TENSOR_PARTS",
    "Outline",
    "alone",
    "optimizer_part",
    "read_folder",
    "read_outline",
    "read_rest",
    "split_parts",
]

METADATA_NAME = ".metadata"
REST_NAME = "meta.pt"

TENSOR_PARTS = ("state_dict", "current_model_state")
"""Parts of a checkpoint that hold tensors by name, beside the optimizers."""

_ALIASES = {"model": "state_dict"}  # the name under FSDP1

_SAFE_CLASSES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
}


class Outline:
    """What a folder holds: the path of each entry in the checkpoint, and shapes of tensors.

    Args:
        metadata: As torch reads it.
    """

    def __init__(self, metadata: Metadata) -> None:
        self.entries = metadata.state_dict_metadata
        self.paths: dict[str, tuple[Any, ...]] = {}
        for key in self.entries:
            part, *rest = metadata.planner_data[key]
            self.paths[key] = (_ALIASES.get(part, part), *rest)
        self.parts = {path[0] for path in self.paths.values()}

    def empty(self, key: str, device: str) -> Tensor | None:
        """A tensor without values; None for what is no tensor."""
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        entry = self.entries[key]
        if not isinstance(entry, TensorStorageMetadata):
            return None
        return torch.empty(entry.size, dtype=entry.properties.dtype, device=device)

    def shapes(self, part: str) -> dict[str, Tensor]:
        """Tensors of a part on the meta device; those of an optimizer as `state.PARAMETER.KEY`."""
        found = {
            ".".join(map(str, path[1:])): self.empty(key, "meta") for key, path in self.paths.items() if path[0] == part
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def read_outline(folder: Path) -> Outline:
    """The outline of a folder that is whole.

    Raises:
        ValueError: A file is missing, cut off or of another kind; the message names it.
    """
    for name in (METADATA_NAME, REST_NAME):
        if not (folder / name).is_file():
            raise _broken(folder, f"it has no {name}")
    try:
        with (folder / METADATA_NAME).open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        sizes: dict[str, int] = {}
        for part in metadata.storage_data.values():
            sizes[part.relative_path] = max(sizes.get(part.relative_path, 0), part.offset + part.length)
        outline = Outline(metadata)
    except Exception as error:  # unpickling other bytes may raise anything
        raise _broken(folder, f"{METADATA_NAME} is none of a checkpoint") from error
    for name, size in sorted(sizes.items()):
        if not (folder / name).is_file():
            raise _broken(folder, f"{name} is missing")
        if (found := (folder / name).stat().st_size) < size:
            raise _broken(folder, f"{name} has {found} bytes of {size}")
    if "state_dict" not in outline.parts:
        raise ValueError(f"{folder} is no checkpoint of a training: it has no weights under 'state_dict'")
    return outline


def read_rest(folder: Path, *, weights_only: bool | None) -> dict[str, Any]:
    """What a checkpoint folder holds beside tensors.

    Raises:
        ValueError: It cannot be read, or no training saved it.
    """
    try:
        rest: Any = torch.load(folder / REST_NAME, map_location="cpu", weights_only=weights_only)
    except Exception as error:  # unpickling other bytes may raise anything
        raise _broken(folder, f"{REST_NAME}: {error_line(error)}") from error
    if not isinstance(rest, dict) or "pytorch-lightning_version" not in rest:
        raise ValueError(f"{folder} is no checkpoint of a training: {REST_NAME} names no version of Lightning")
    return rest


@contextmanager
def alone() -> Iterator[None]:
    """Without torch's warning that there is no process group: one process is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def split_parts(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of a checkpoint torch writes to a folder, by its names there, and the rest."""
    tensors = {part: checkpoint[part] for part in TENSOR_PARTS if part in checkpoint}
    tensors |= {optimizer_part(index): state for index, state in enumerate(checkpoint.get("optimizer_states", []))}
    return tensors, {key: value for key, value in checkpoint.items() if key not in (*TENSOR_PARTS, "optimizer_states")}


def optimizer_part(index: int) -> str:
    """Name of the state of an optimizer in a folder."""
    return f"optimizer_{index}"


def read_folder(folder: Path, *, weights_only: bool | None = None) -> dict[str, Any]:
    """A checkpoint with whole tensors, as one process without sharding saves it; no process group is needed.

    Args:
        folder: The folder.
        weights_only: As for `torch.load`, of the part that holds no tensors.

    Raises:
        ValueError: The folder is not whole, or its content cannot be read.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    outline, checkpoint = read_outline(folder), read_rest(folder, weights_only=weights_only)
    values: dict[str, Any] = {key: outline.empty(key, "cpu") for key in outline.entries}
    try:
        with alone():
            load(values, checkpoint_id=folder, no_dist=True)
    except (Exception, CheckpointException) as error:  # of many kinds, though all files are there
        raise _broken(folder, error_line(error)) from error
    tree: dict[Any, Any] = {}
    for key, value in values.items():
        *above, last = outline.paths[key]
        branch = tree
        for step in above:
            branch = branch.setdefault(step, {})
        branch[last] = value
    states: list[Any] = []
    while state := tree.pop(optimizer_part(len(states)), None):
        states.append(number_parameters(_with_lists(state)))
    # A checkpoint of weights alone has no list of optimizers, not an empty one.
    return {**checkpoint, **tree, **({"optimizer_states": states} if states else {})}


def _with_lists(tree: Any) -> Any:
    """Entries that are numbered are those of a list."""
    if not isinstance(tree, dict):
        return tree
    entries = {key: _with_lists(value) for key, value in tree.items()}
    if entries and all(isinstance(key, int) for key in entries):
        return [entries[index] for index in sorted(entries)]
    return entries


def _broken(folder: Path, what: str) -> ValueError:
    return ValueError(
        f"cannot read the checkpoint {folder}: {what}; the folder is no checkpoint or was cut off. Use another "
        "checkpoint of the run"
    )


class _MetadataUnpickler(pickle.Unpickler):
    """Reads the classes of an outline, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        known = module.startswith("torch.distributed.checkpoint.") or (module, name) in _SAFE_CLASSES
        if known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into the outline of a checkpoint")
