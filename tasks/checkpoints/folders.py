"""Checkpoint folders of `torch.distributed.checkpoint`: written with checksums, verified, and read by one process.

A folder has three kinds of files. `.metadata` names each tensor with its shape and the files that hold its parts;
`__RANK_N.distcp` hold the parts; `meta.pt` holds everything else of the checkpoint. Weights are saved under
`state_dict`, optimizers under `optimizer_0`, ... by parameter names. `meta.pt` has a checksum of its own, and keeps
sizes and checksums of the other files. In folders of other programs, which have none, the archives within the parts are
checked.
"""

from __future__ import annotations

import errno
import io
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict, load
from torch.distributed.checkpoint.state_dict_saver import save

from ..atomic_files import replacing
from ..errors import error_line
from .files import (
    ChecksummedStream,
    ExactUnpickler,
    checksum_of,
    has_checksum,
    read_file,
    reason,
    verify_zip,
    write_file,
)

__all__ = [
    "REMEDY",
    "TENSOR_PARTS",
    "FolderContents",
    "check_parts",
    "drop_unsaved",
    "is_checkpoint_folder",
    "load_tensors",
    "name_parameters",
    "number_parameters",
    "optimizer_part",
    "read_contents",
    "read_folder",
    "read_parameter_names",
    "save_tensors",
    "split_parts",
    "write_folder",
    "write_rest",
]

_METADATA_NAME = ".metadata"
_REST_NAME = "meta.pt"

_CHECKSUMS = "checksums"
"""Entry of `meta.pt`: size in bytes and CRC-32 of each of the other files."""

TENSOR_PARTS = ("state_dict", "current_model_state")
"""Parts of a checkpoint that hold tensors by name, besides the optimizers."""

REMEDY = "free space or set another --run_dir. Earlier checkpoints are untouched"
"""What to do where a checkpoint cannot be written."""

_ALIASES = {"model": "state_dict"}  # its name under FSDP1

_METADATA_CLASSES = {
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

_OTHER_OPTIMIZER = (
    "Continue with the optimizer, model and partition that saved it, or start a new run from its weights alone"
)


class FolderContents:
    """What a folder holds, without the values of its tensors.

    Args:
        metadata: As torch reads it.
        rest: The content of `meta.pt`.
        checks: By the name of each file with tensors, what `check_parts` compares.
    """

    def __init__(self, metadata: Metadata, rest: dict[str, Any], checks: Mapping[str, Any]) -> None:
        self.rest, self.checks = rest, checks
        self._shapes: dict[str, dict[str, Tensor]] = {}
        for key, entry in metadata.state_dict_metadata.items():
            part, *path = metadata.planner_data[key]
            shapes = self._shapes.setdefault(_ALIASES.get(part, part), {})
            if isinstance(entry, TensorStorageMetadata):
                shapes[".".join(map(str, path))] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")

    @property
    def parts(self) -> Collection[str]:
        """Names of the parts of the checkpoint that hold tensors."""
        return self._shapes.keys()

    def shapes(self, part: str) -> dict[str, Tensor]:
        """Tensors of a part on the meta device; those of an optimizer as `state.PARAMETER.KEY`."""
        return self._shapes[part]


def is_checkpoint_folder(path: Path) -> bool:
    """Whether a path is a checkpoint folder, whole or not."""
    return (path / _METADATA_NAME).is_file()


def read_contents(folder: Path, *, weights_only: bool | None = None) -> FolderContents:
    """Read what a folder holds, and check that `meta.pt` and `.metadata` are as saved and no other file is short.

    Args:
        folder: The folder.
        weights_only: As for `read_file`, of `meta.pt`.

    Raises:
        ValueError: A file is missing, cut off, damaged or of another kind; the message names it.
    """
    for name in (_METADATA_NAME, _REST_NAME):
        if not (folder / name).is_file():
            raise _broken(folder, f"it has no {name}")
    try:
        rest = read_file(folder / _REST_NAME, weights_only=weights_only)
    except ValueError as error:
        raise _broken(folder, f"{_REST_NAME}: {reason(error.__cause__ or error)}", _REST_NAME) from error
    checksums = rest.pop(_CHECKSUMS, None) if isinstance(rest, dict) else None
    with (folder / _REST_NAME).open("rb") as file:
        if not has_checksum(file):
            checksums = None  # another program has copied them from the folder that it continued from
    if checksums is not None:
        _check_file(folder, _METADATA_NAME, checksums.get(_METADATA_NAME, (0, "")))
    try:
        metadata = _read_metadata(folder)
        slices: dict[str, list[tuple[int, int]]] = {}
        for part in metadata.storage_data.values():
            slices.setdefault(part.relative_path, []).append((part.offset, part.length))
        contents = FolderContents(metadata, rest, slices if checksums is None else checksums)
        sizes = {name: max(offset + length for offset, length in found) for name, found in slices.items()}
        if outside := [name for name in sizes if Path(name).name != name]:
            raise ValueError(f"it names {outside[0]!r}, which is no file of the folder")
    except Exception as error:  # unpickling other bytes may raise anything
        raise _broken(folder, f"{_METADATA_NAME} is none of a checkpoint: {reason(error)}", _METADATA_NAME) from error
    for name, size in sorted(sizes.items()):
        if not (folder / name).is_file():
            raise _broken(folder, f"{name} is missing")
        _check_size(folder, name, size)
    if "state_dict" not in contents.parts:
        raise ValueError(f"{folder} is no checkpoint of a training: it has no weights under 'state_dict'")
    if not isinstance(rest, dict) or "pytorch-lightning_version" not in rest:
        raise ValueError(f"{folder} is no checkpoint of a training: {_REST_NAME} names no version of Lightning")
    return contents


def check_parts(folder: Path, checks: Mapping[str, Any], *, rank: int = 0, world_size: int = 1) -> None:
    """Compare the checksums of the files with tensors; each of several ranks takes its share of them.

    Args:
        folder: The folder.
        checks: Those of its `FolderContents`.
        rank: Number of this rank.
        world_size: How many ranks there are.

    Raises:
        ValueError: A file is not as it was saved; the message names it.
    """
    for name in sorted(checks.keys() - {_METADATA_NAME})[rank::world_size]:
        _check_file(folder, name, checks[name])


def _check_file(folder: Path, name: str, expected: Any) -> None:
    """Compare a file with its size and checksum; or the archives in it, given by slices, with their own."""
    prefix = f"{name} is none of a checkpoint: " if name == _METADATA_NAME else f"{name}: "
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
                    raise _broken(folder, prefix + error_line(error), name) from error
            return
        size, checksum = expected
        if name != _METADATA_NAME:
            _check_size(folder, name, size)
        if checksum_of(file, size) != checksum or file.read(1):
            raise _broken(folder, f"{prefix}its checksum is not the one that it was saved with", name)


def _check_size(folder: Path, name: str, size: int) -> None:
    if (found := (folder / name).stat().st_size) < size:
        raise _broken(folder, f"{name} has {found} bytes of {size}", name)


def _broken(folder: Path, what: str, name: str | None = None) -> ValueError:
    return ValueError(
        f"cannot read the checkpoint {folder}: {what}; {folder / name if name else 'the folder'} is damaged, was cut "
        "off or is of no checkpoint. Use another checkpoint of the run"
    )


def write_folder(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint as a folder from one process, without a process group.

    Args:
        checkpoint: As a file holds it, with optimizer states keyed by parameter names.
        path: The folder, which replaces what is there.

    Raises:
        OSError: For example, the disk is full. What was at `path` is untouched.
    """
    tensors, rest = split_parts(checkpoint)
    with replacing(path, what="the checkpoint", remedy=REMEDY) as new:
        new.mkdir()
        write_rest(rest, new, save_tensors(tensors, new, alone=True))


def split_parts(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide a checkpoint into what torch writes to a folder, by its names there, and the rest."""
    tensors = {part: checkpoint[part] for part in TENSOR_PARTS if part in checkpoint}
    tensors |= {optimizer_part(index): state for index, state in enumerate(checkpoint.get("optimizer_states", []))}
    return tensors, {key: value for key, value in checkpoint.items() if key not in (*TENSOR_PARTS, "optimizer_states")}


def optimizer_part(index: int) -> str:
    """Name of the state of an optimizer in a folder."""
    return f"optimizer_{index}"


def save_tensors(tensors: dict[str, Any], folder: Path, *, alone: bool = False) -> dict[str, tuple[int, str]]:
    """Write this rank's parts of tensors into a folder.

    Args:
        tensors: State dicts by the names of their parts.
        folder: The new folder.
        alone: Write all, without a process group.

    Returns:
        Size and checksum of each file that this rank has written.

    Raises:
        OSError: For example, the disk is full; on all ranks, whichever has failed.
    """
    writer = FileSystemWriter(folder)
    writer.fs = files = _ChecksummedFiles()
    try:
        with _without_group_warning():
            save(tensors, storage_writer=writer, no_dist=alone)
    except CheckpointException as error:  # the same on all ranks
        cause, _ = next(iter(error.failures.values()))
        raise OSError(errno.EIO, error_line(cause)) from error
    return files.written


def write_rest(rest: Mapping[str, Any], folder: Path, checksums: Mapping[str, tuple[int, str]]) -> None:
    """Write `meta.pt`, the last file of a folder.

    Raises:
        OSError: For example, the disk is full.
    """
    write_file({**rest, _CHECKSUMS: dict(checksums)}, folder / _REST_NAME)


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


def load_tensors(values: dict[str, Any], folder: Path) -> None:
    """Read the tensors that `values` names, each rank its shards; nothing in the folder runs code.

    Args:
        values: State dicts by the names of their parts, changed in place.
        folder: A folder that is whole.

    Raises:
        ValueError: The content cannot be read; on all ranks, whichever has failed.
    """
    with _readable(folder):
        load(values, storage_reader=_SafeReader(folder), planner=_SafePlanner())


def read_folder(folder: Path, *, weights_only: bool | None = None) -> dict[str, Any]:
    """Read a checkpoint with whole tensors, as one process without sharding saves it; no process group is needed.

    Args:
        folder: The folder.
        weights_only: As for `read_file`, of `meta.pt`.

    Raises:
        ValueError: The folder is not whole, or its content cannot be read.
    """
    contents = read_contents(folder, weights_only=weights_only)
    check_parts(folder, contents.checks)
    tree = {_ALIASES.get(part, part): value for part, value in _read_whole(folder).items()}
    states: list[Any] = []
    while state := tree.pop(optimizer_part(len(states)), None):
        states.append(number_parameters(state))
    # A checkpoint of weights alone has no list of optimizers, not an empty one.
    return {**contents.rest, **tree, **({"optimizer_states": states} if states else {})}


def read_parameter_names(folder: Path) -> list[list[str]]:
    """Names of the parameters of each group of the first optimizer in a folder.

    Raises:
        ValueError: The folder is not whole.
    """
    read_contents(folder)
    optimizer = _read_whole(folder, f"{optimizer_part(0)}.param_groups").get(optimizer_part(0), {})
    return [group["params"] for group in optimizer.get("param_groups", [])]


def _read_whole(folder: Path, *keys: str) -> dict[str, Any]:
    """State dicts with whole tensors by their parts; of some keys alone where they are given.

    It reads as torch's `dcp_to_torch_save` does, but without running code.
    """
    state: dict[str, Any] = {}
    with _readable(folder):
        planner = _SafeWholePlanner(keys=set(keys) or None)
        _load_state_dict(state, storage_reader=_SafeReader(folder), planner=planner, no_dist=True)
    return state


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Turn what torch raises, on all ranks, into one error that names the folder."""
    try:
        with _without_group_warning():
            yield
    except (Exception, CheckpointException) as error:  # CheckpointException is no Exception
        cause: BaseException = error
        if isinstance(error, CheckpointException):
            cause, _ = next(iter(error.failures.values()))
        raise _broken(folder, reason(cause)) from error


@contextmanager
def _without_group_warning() -> Iterator[None]:
    """Without torch's warning that there is no process group: one process is intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _read_metadata(folder: Path) -> Metadata:
    with (folder / _METADATA_NAME).open("rb") as file:
        metadata: Metadata = ExactUnpickler(file, _METADATA_CLASSES).load()
    return metadata


class _SafeReader(FileSystemReader):
    """Unpickles the classes of metadata, where torch's own reader unpickles any."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return _read_metadata(Path(self.path))


class _SafePlanner(DefaultLoadPlanner):
    """Loads what is no tensor without running code, where torch's own planner unpickles any class."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        harmless = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), harmless)
        harmless.seek(0)
        super().load_bytes(read_item, harmless)


class _SafeWholePlanner(_SafePlanner, _EmptyStateDictLoadPlanner):
    """The same, for all that a folder holds."""


def number_parameters(state: Mapping[str, Any]) -> dict[str, Any]:
    """Number the parameters of an optimizer state through its groups, as the optimizer itself saves it.

    Args:
        state: With parameters by name, as `torch.distributed.checkpoint` has them.
    """
    numbers: dict[str, int] = {}
    for group in state["param_groups"]:
        for name in group["params"]:
            numbers[name] = len(numbers)
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
    values = {numbers[name]: values for name, values in state.get("state", {}).items()}
    return {"state": dict(sorted(values.items())), "param_groups": groups}


def name_parameters(state: Mapping[str, Any], own_groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Name the parameters of a numbered state by their positions in the groups, as torch's `load_state_dict` does.

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
            f"another model, or to other parameter groups. {_OTHER_OPTIMIZER}"
        )
    names: dict[Any, str] = {}
    for group, own in zip(groups, own_groups, strict=True):
        names |= dict(zip(group["params"], own["params"], strict=True))
    return {
        "state": {names[number]: values for number, values in state["state"].items()},
        "param_groups": [{**group, "params": [names[number] for number in group["params"]]} for group in groups],
    }


def drop_unsaved(state: dict[str, Any], saved: Mapping[str, Tensor]) -> None:
    """Check that a state by names fits what was saved, and drop parameters that had no step and so no state yet.

    Args:
        state: This optimizer's, changed in place.
        saved: Tensors by `state.PARAMETER.KEY`.

    Raises:
        ValueError: With the first tensor that differs.
    """
    own = {f"state.{name}.": values for name, values in state["state"].items()}
    known = {prefix + key for prefix, values in own.items() for key in values}
    if unexpected := [name for name in saved if name.startswith("state.") and name not in known]:
        raise ValueError(
            f"the saved optimizer state has {unexpected[0].removeprefix('state.')}, this one has not. "
            f"{_OTHER_OPTIMIZER}"
        )
    for name in list(state["state"]):
        values = own[f"state.{name}."]
        found = [key for key in values if f"state.{name}.{key}" in saved]
        if not found and saved:
            del state["state"][name]
            continue
        for key, value in values.items():
            if key not in found:
                raise ValueError(f"the saved optimizer state has no {name}.{key}. {_OTHER_OPTIMIZER}")
            shape = tuple(saved[f"state.{name}.{key}"].shape)
            if isinstance(value, Tensor) and shape != tuple(value.shape):
                raise ValueError(
                    f"the saved {key} of {name!r} has shape {shape}, but here it has {tuple(value.shape)}. "
                    f"{_OTHER_OPTIMIZER}"
                )
