"""Folders of `torch.distributed.checkpoint`: their outline, whether they are whole, and reading them in one process.

Layout: `.metadata` names each tensor with its shape and the files of its parts, `__RANK_N.distcp` hold the parts, and
`meta.pt` is the rest of the checkpoint. Weights lie under `state_dict`, optimizers under `optimizer_0`, ... by names of
parameters. `meta.pt`, which has its own checksum, keeps sizes and checksums of the other files; folders of other
programs have none, and there the archives within the parts are checked.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ..errors import error_line
from .files import ChecksummedStream, ExactUnpickler, checksum_of, has_checksum, read_file, reason, verify_zip

__all__ = [
    "CHECKSUMS",
    "METADATA_NAME",
    "REST_NAME",
    "TENSOR_PARTS",
    "Outline",
    "check_parts",
    "drop_unsaved",
    "load_tensors",
    "name_parameters",
    "number_parameters",
    "optimizer_part",
    "read_folder",
    "read_outline",
    "save_tensors",
    "split_parts",
]


METADATA_NAME = ".metadata"
REST_NAME = "meta.pt"

CHECKSUMS = "checksums"
"""Entry of `meta.pt`: size in bytes and CRC-32 of each of the other files."""

TENSOR_PARTS = ("state_dict", "current_model_state")
"""Parts of a checkpoint that hold tensors by name, beside the optimizers."""

_ALIASES = {"model": "state_dict"}  # the name under FSDP1

_OUTLINE_CLASSES = {
    *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
}


class Outline:
    """What a folder holds: the path of each entry in the checkpoint, and shapes of tensors.

    Args:
        metadata: As torch reads it.
        rest: What the checkpoint holds beside tensors.
        checks: By the name of each file with tensors, what `check_parts` compares.
    """

    def __init__(self, metadata: Metadata, rest: dict[str, Any], checks: Mapping[str, Any]) -> None:
        self.entries = metadata.state_dict_metadata
        self.rest, self.checks = rest, checks
        self.paths: dict[str, tuple[Any, ...]] = {}
        for key in self.entries:
            part, *rest_of_path = metadata.planner_data[key]
            self.paths[key] = (_ALIASES.get(part, part), *rest_of_path)
        self.parts = {path[0] for path in self.paths.values()}

    def empty(self, key: str, device: str) -> Tensor | None:
        """A tensor without values; None for what is no tensor."""
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


def read_outline(folder: Path, *, weights_only: bool | None = None) -> Outline:
    """The outline of a folder that is whole: `meta.pt` and `.metadata` are as they were saved, and no file is short.

    Args:
        folder: The folder.
        weights_only: As for `read_file`, of `meta.pt`.

    Raises:
        ValueError: A file is missing, cut off, damaged or of another kind; the message names it.
    """
    for name in (METADATA_NAME, REST_NAME):
        if not (folder / name).is_file():
            raise _broken(folder, f"it has no {name}")
    try:
        rest = read_file(folder / REST_NAME, weights_only=weights_only)
    except ValueError as error:
        raise _broken(folder, f"{REST_NAME}: {reason(error.__cause__ or error)}", REST_NAME) from error
    checksums = rest.pop(CHECKSUMS, None) if isinstance(rest, dict) else None
    with (folder / REST_NAME).open("rb") as file:
        if not has_checksum(file):
            checksums = None  # another program has copied them from the folder that it went on from
    if checksums is not None:
        _check_file(folder, METADATA_NAME, checksums.get(METADATA_NAME, (0, "")))
    try:
        metadata = _read_metadata(folder)
        slices: dict[str, list[tuple[int, int]]] = {}
        for part in metadata.storage_data.values():
            slices.setdefault(part.relative_path, []).append((part.offset, part.length))
        outline = Outline(metadata, rest, slices if checksums is None else checksums)
        for part in outline.parts:
            outline.shapes(part)
        sizes = {name: max(offset + length for offset, length in found) for name, found in slices.items()}
        if foreign := [name for name in sizes if Path(name).name != name]:
            raise ValueError(f"it names {foreign[0]!r}, which is no file of the folder")
    except Exception as error:  # unpickling other bytes may raise anything
        raise _broken(folder, f"{METADATA_NAME} is none of a checkpoint: {reason(error)}", METADATA_NAME) from error
    for name, size in sorted(sizes.items()):
        if not (folder / name).is_file():
            raise _broken(folder, f"{name} is missing")
        _check_size(folder, name, size)
    if "state_dict" not in outline.parts:
        raise ValueError(f"{folder} is no checkpoint of a training: it has no weights under 'state_dict'")
    if not isinstance(rest, dict) or "pytorch-lightning_version" not in rest:
        raise ValueError(f"{folder} is no checkpoint of a training: {REST_NAME} names no version of Lightning")
    return outline


def check_parts(folder: Path, checks: Mapping[str, Any], *, rank: int = 0, world_size: int = 1) -> None:
    """Compare the checksums of the files with tensors; each of several ranks takes its share of them.

    Args:
        folder: The folder.
        checks: Of its outline.
        rank: Number of this rank.
        world_size: How many ranks there are.

    Raises:
        ValueError: A file is not as it was saved; the message names it.
    """
    for name in sorted(checks.keys() - {METADATA_NAME})[rank::world_size]:
        _check_file(folder, name, checks[name])


def _check_file(folder: Path, name: str, expected: Any) -> None:
    """Compare a file with its size and checksum, or the archives in it, by their slices, with their own."""
    told = f"{name} is none of a checkpoint: " if name == METADATA_NAME else f"{name}: "
    if not (folder / name).is_file():
        raise _broken(folder, f"{name} is missing")
    with (folder / name).open("rb") as file:
        if isinstance(expected, list):
            for offset, length in expected:
                file.seek(offset)
                archive = io.BytesIO(file.read(length))
                try:
                    verify_zip(archive)
                except Exception as error:
                    raise _broken(folder, told + error_line(error), name) from error
            return
        size, checksum = expected
        if name != METADATA_NAME:
            _check_size(folder, name, size)
        if checksum_of(file, size) != checksum or file.read(1):
            raise _broken(folder, f"{told}its checksum is not the one that it was saved with", name)


def _check_size(folder: Path, name: str, size: int) -> None:
    if (found := (folder / name).stat().st_size) < size:
        raise _broken(folder, f"{name} has {found} bytes of {size}", name)


def _read_metadata(folder: Path) -> Metadata:
    with (folder / METADATA_NAME).open("rb") as file:
        metadata: Metadata = ExactUnpickler(file, _OUTLINE_CLASSES).load()
    return metadata


def save_tensors(tensors: dict[str, Any], folder: Path, *, alone: bool = False) -> dict[str, tuple[int, str]]:
    """Write this rank's parts of tensors into a folder.

    Args:
        tensors: State dicts by the names of their parts.
        folder: The new folder.
        alone: Write all, without a process group.

    Returns:
        Size and checksum of each file that this rank has written.

    Raises:
        OSError: The disk is full, say; on all ranks, wherever it arose.
    """
    writer = FileSystemWriter(folder)
    writer.fs = files = _ChecksummedFiles()
    try:
        with _quiet():
            save(tensors, storage_writer=writer, no_dist=alone)
    except CheckpointException as error:  # the same on all ranks, wherever it arose
        cause, _ = next(iter(error.failures.values()))
        raise OSError(error_line(cause)) from error
    return files.written


def load_tensors(values: dict[str, Any], folder: Path, *, alone: bool = False) -> None:
    """Read what `values` names from a folder, each rank its shards; nothing in the folder runs code.

    Args:
        values: State dicts, or entries by their keys; changed in place.
        folder: A folder that is whole.
        alone: Read without a process group.

    Raises:
        ValueError: The content cannot be read; on all ranks, wherever it arose.
    """
    try:
        with _quiet():
            load(values, storage_reader=_Reader(folder), planner=_Planner(), no_dist=alone)
    except (Exception, CheckpointException) as error:  # of many kinds, though all files are there
        cause: BaseException = error
        if isinstance(error, CheckpointException):
            cause, _ = next(iter(error.failures.values()))
        raise _broken(folder, reason(cause)) from error


class _ChecksummedFiles(FileSystem):
    """Files that torch writes, with their sizes and checksums by name."""

    def __init__(self) -> None:
        self.written: dict[str, tuple[int, str]] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as file:
            stream = ChecksummedStream(file)  # type: ignore[arg-type]
            try:
                yield stream
            except RuntimeError as error:
                raise stream.error or error from error
        self.written[Path(path).name] = (stream.size, stream.checksum)

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


class _Reader(FileSystemReader):
    """Unpickles the classes of an outline, where torch's own does any."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return _read_metadata(Path(self.path))


class _Planner(DefaultLoadPlanner):
    """Loads what is no tensor without running code, where torch's own loads anything."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


@contextmanager
def _quiet() -> Iterator[None]:
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
        weights_only: As for `read_file`, of the part that holds no tensors.

    Raises:
        ValueError: The folder is not whole, or its content cannot be read.
    """
    outline = read_outline(folder, weights_only=weights_only)
    check_parts(folder, outline.checks)
    values: dict[str, Any] = {key: outline.empty(key, "cpu") for key in outline.entries}
    load_tensors(values, folder, alone=True)
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
    return {**outline.rest, **tree, **({"optimizer_states": states} if states else {})}


def _with_lists(tree: Any) -> Any:
    """Entries that are numbered are those of a list."""
    if not isinstance(tree, dict):
        return tree
    entries = {key: _with_lists(value) for key, value in tree.items()}
    if entries and all(isinstance(key, int) for key in entries):
        return [entries[index] for index in sorted(entries)]
    return entries


def _broken(folder: Path, what: str, name: str | None = None) -> ValueError:
    return ValueError(
        f"cannot read the checkpoint {folder}: {what}; {folder / name if name else 'the folder'} is damaged, was cut "
        "off or is of no checkpoint. Use another checkpoint of the run"
    )


_REMEDY = "Continue with the optimizer, model and partition that saved it, or start a new run from its weights alone"


def number_parameters(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state by names as the optimizer itself saves it: parameters numbered through the groups."""
    numbers: dict[str, int] = {}
    for group in state["param_groups"]:
        for name in group["params"]:
            numbers[name] = len(numbers)
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
    values = {numbers[name]: values for name, values in state.get("state", {}).items()}
    return {"state": dict(sorted(values.items())), "param_groups": groups}


def name_parameters(state: Mapping[str, Any], own_groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A numbered state by names, matched by their positions in the groups, as torch's `load_state_dict` does.

    Args:
        state: What an optimizer saved, with whatever numbers.
        own_groups: Groups of this optimizer, with names under `params`.

    Raises:
        ValueError: The groups have other sizes.
    """
    groups = state["param_groups"]
    sizes, own_sizes = ([len(group["params"]) for group in some] for some in (groups, own_groups))
    if sizes != own_sizes:
        raise ValueError(
            f"the optimizer state has groups of {sizes} parameters, this optimizer has {own_sizes}: it belongs to "
            f"another model, or to other parameter groups. {_REMEDY}"
        )
    names: dict[Any, str] = {}
    for group, own in zip(groups, own_groups, strict=True):
        names |= dict(zip(group["params"], own["params"], strict=True))
    return {
        "state": {names[number]: values for number, values in state["state"].items()},
        "param_groups": [{**group, "params": [names[number] for number in group["params"]]} for group in groups],
    }


def drop_unsaved(state: dict[str, Any], saved: Mapping[str, Tensor]) -> None:
    """Check that a state by names fits what was saved, and leave out parameters that had no step, hence no state yet.

    Args:
        state: This optimizer's, changed in place.
        saved: Tensors by `state.PARAMETER.KEY`.

    Raises:
        ValueError: With the first tensor that differs.
    """
    own = {f"state.{name}.": values for name, values in state["state"].items()}
    known = {prefix + key for prefix, values in own.items() for key in values}
    if foreign := [name for name in saved if name.startswith("state.") and name not in known]:
        raise ValueError(
            f"the saved optimizer state has {foreign[0].removeprefix('state.')}, this one has not. {_REMEDY}"
        )
    for name in list(state["state"]):
        values = own[f"state.{name}."]
        found = [key for key in values if f"state.{name}.{key}" in saved]
        if not found and saved:
            del state["state"][name]
            continue
        for key, value in values.items():
            if key not in found:
                raise ValueError(f"the saved optimizer state has no {name}.{key}. {_REMEDY}")
            shape = tuple(saved[f"state.{name}.{key}"].shape)
            if isinstance(value, Tensor) and shape != tuple(value.shape):
                raise ValueError(
                    f"the saved {key} of {name!r} has shape {shape}, but here it has {tuple(value.shape)}. {_REMEDY}"
                )
