"""How Lightning saves and loads checkpoints: atomically, verified, and the same for any number of ranks.

`AtomicCheckpointIO` is for whole checkpoints in one file, `AtomicFolderCheckpoint` for strategies that shard the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from ..atomic_files import put_in_place, remove, replacing, temporary_path
from ..errors import cannot_write, on_all_ranks
from .files import read_file, write_file
from .folders import (
    REMEDY,
    TENSOR_PARTS,
    check_parts,
    drop_unsaved,
    load_tensors,
    name_parameters,
    number_parameters,
    optimizer_part,
    read_contents,
    read_folder,
    save_tensors,
    split_parts,
    write_rest,
)

__all__ = ["AtomicCheckpointIO", "AtomicFolderCheckpoint", "read_checkpoint", "read_without_tensors"]

T = TypeVar("T")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves files so that a kill leaves the old checkpoint or the new one; reads files and folders.

    Files are saved with a checksum, and none is unpickled before its checksum was compared. Folders of
    `torch.distributed.checkpoint` are read with whole tensors.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """See `CheckpointIO.save_checkpoint`.

        Raises:
            OSError: The disk is full, or the folder cannot be written; an older file at `path` is untouched.
        """
        if storage_options is not None:
            raise TypeError("AtomicCheckpointIO takes no storage_options")
        with replacing(Path(path), what="the checkpoint", remedy=REMEDY) as new:
            write_file(checkpoint, new)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See `CheckpointIO.load_checkpoint`; tensors are on the CPU, and no code runs without `weights_only=False`.

        Raises:
            ValueError: The file or folder is no checkpoint, is damaged or cut off, or would run code.
        """
        weights_only = kwargs.pop("weights_only", None)
        if "://" in str(path):
            kwargs["weights_only"] = weights_only is not False
            return super().load_checkpoint(path, *args, **kwargs)
        if args or kwargs:
            raise TypeError("AtomicCheckpointIO loads to the CPU: it takes no map_location")
        return read_checkpoint(Path(path), weights_only=weights_only)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a file, a folder, or a link without its target."""
        remove(Path(path))


def read_checkpoint(path: Path, *, weights_only: bool | None = None, mmap: bool = False) -> dict[str, Any]:
    """Read a file or folder with whole tensors on the CPU.

    Args:
        path: The file or folder.
        weights_only: As for `read_file`.
        mmap: Leave the tensors of a file on the disk until they are used.

    Raises:
        ValueError: It is no checkpoint, is damaged or cut off, or would run code.
    """
    if path.is_dir():
        return read_folder(path, weights_only=weights_only)
    content = read_file(path, weights_only=weights_only, mmap=mmap)
    if not isinstance(content, dict) or not {"state_dict", "pytorch-lightning_version"} <= content.keys():
        raise ValueError(f"{path} is no checkpoint of a training: it has no weights under 'state_dict'")
    return content


def read_without_tensors(path: Path, *, weights_only: bool | None = None) -> dict[str, Any]:
    """Read what a file or folder holds besides tensors, which stay on the disk; see `read_checkpoint`."""
    if path.is_dir():
        return read_contents(path, weights_only=weights_only).rest
    return read_checkpoint(path, weights_only=weights_only, mmap=True)


class _UnreadTensors(dict[str, Tensor]):
    """Tensors of one part of a folder by name, on the meta device; each rank reads its shards of them later."""

    def __init__(self, folder: Path, part: str, shapes: Mapping[str, Tensor]) -> None:
        super().__init__(shapes)
        self.folder, self.part = folder, part

    def __reduce__(self) -> tuple[Any, ...]:  # ranks broadcast it, and a dict's own pickling would drop the fields
        return type(self), (self.folder, self.part, dict(self))

    def fill(self, own: dict[str, Any]) -> dict[str, Any]:
        """Read this rank's shards into `own`, a state dict of DTensors."""
        state = {self.part: own}
        load_tensors(state, self.folder)
        return state[self.part]


class AtomicFolderCheckpoint(ModelParallelStrategy):
    """A ModelParallelStrategy with atomic checkpoints that any number of ranks can load.

    A folder takes its place when all ranks have written their parts. Loading checks all names and shapes before it
    overwrites anything. A full file is what one process without sharding would have saved. Lightning's own strategy
    assumes that optimizers number parameters in the order of `model.parameters()`, which two groups of weight decay do
    not.
    """

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Load optimizers after the task has checked which optimizer the state belongs to."""
        return True

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state as DTensors by names; for a full file as whole tensors by numbers, on rank zero alone."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        full = not self._save_distributed_checkpoint
        options = StateDictOptions(full_state_dict=full, cpu_offload=True)
        assert self.model is not None
        state = cast("dict[str, Any]", get_optimizer_state_dict(self.model, _unwrapped(optimizer), options=options))
        return number_parameters(state) if full and self.is_global_zero else state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Save a folder, or a full file from rank zero.

        Raises:
            OSError: On all ranks, where one cannot write; an older checkpoint at the path is untouched.
        """
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} takes no storage_options")
        target = Path(self.broadcast(filepath))
        if self._save_distributed_checkpoint:
            self._save_folder(checkpoint, target)
        else:
            self._on_rank_zero(lambda: self.checkpoint_io.save_checkpoint(checkpoint, target))

    def _save_folder(self, checkpoint: dict[str, Any], target: Path) -> None:
        tensors, rest = split_parts(checkpoint)
        folder = Path(self.broadcast(str(temporary_path(target))))

        def finish() -> None:
            write_rest(rest, folder, checksums)
            put_in_place(folder, target)

        try:
            self._on_rank_zero(lambda: folder.mkdir(parents=True, exist_ok=True))
            written = self._from_all_ranks(save_tensors(tensors, folder))
            checksums = {name: checksum for of_rank in written for name, checksum in of_rank.items()}
            self._on_rank_zero(finish)
        except OSError as error:
            raise on_all_ranks(cannot_write(f"the checkpoint {target}", error, REMEDY)) from error
        finally:
            if self.is_global_zero:
                remove(folder)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Load the checkpoint without the values of its tensors, which only rank zero has, mapped, of a full file.

        Raises:
            ValueError: On all ranks, if one of them finds that it is damaged, cut off or no checkpoint.
        """
        path = Path(self.broadcast(checkpoint_path))
        mapped: dict[str, Any] = {}

        def read() -> tuple[dict[str, Any], Mapping[str, Any]]:
            if path.is_dir():
                return _without_values_of_folder(path, weights_only)
            mapped.update(read_checkpoint(path, weights_only=weights_only, mmap=True))
            return _without_values(mapped), {}

        checkpoint, checks = self._on_rank_zero(read)
        failure: str | None = None
        try:
            check_parts(path, checks, rank=self.global_rank, world_size=self.world_size)
        except (OSError, ValueError) as error:
            failure = str(error)
        if failures := [found for found in self._from_all_ranks(failure) if found is not None]:
            raise on_all_ranks(ValueError(failures[0]))
        return {**checkpoint, **mapped}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights under `state_dict`, each rank its shards."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

        assert self.model is not None
        saved = checkpoint["state_dict"]
        if isinstance(saved, _UnreadTensors):
            state = saved.fill(get_model_state_dict(self.model))
            set_model_state_dict(self.model, state, options=StateDictOptions(strict=strict))
        else:
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=strict)
            set_model_state_dict(self.model, dict(saved) if self.is_global_zero else {}, options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the states of all optimizers, each rank its shards.

        Raises:
            ValueError: The state of another optimizer, model or partition; nothing is changed then.
        """
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_optimizer_state_dict,
            set_optimizer_state_dict,
        )

        assert self.model is not None
        for wrapped, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer = _unwrapped(wrapped)
            tuples = [
                [key for key, value in group.items() if isinstance(value, tuple)] for group in optimizer.param_groups
            ]
            state = cast("dict[str, Any]", get_optimizer_state_dict(self.model, optimizer))
            if isinstance(saved, _UnreadTensors):
                drop_unsaved(state, saved)
                options = StateDictOptions(strict=False)
                set_optimizer_state_dict(self.model, optimizer, saved.fill(state), options=options)
            else:
                named: dict[str, Any] = {}
                self._on_rank_zero(lambda: named.update(_named(saved, state)))  # noqa: B023
                options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
                set_optimizer_state_dict(self.model, optimizer, named, options=options)
            for group, keys in zip(optimizer.param_groups, tuples, strict=True):
                group.update({key: tuple(group[key]) for key in keys})  # torch has made lists of them

    def _on_rank_zero(self, do: Callable[[], T]) -> T:
        """Run `do` on rank zero; give its result to all ranks, or raise its error on all, so that none waits."""
        result: T | None = None
        failure: tuple[type[Exception], str] | None = None
        if self.is_global_zero:
            try:
                result = do()
            except (OSError, ValueError) as error:
                failure = (OSError if isinstance(error, OSError) else ValueError, str(error))
        result, failure = self.broadcast((result, failure))
        if failure is not None:
            kind, message = failure
            raise on_all_ranks(kind(message))
        return cast("T", result)

    def _from_all_ranks(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(values, value)
        return values


def _without_values_of_folder(path: Path, weights_only: bool | None) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The checkpoint with unread tensors, and the checks of `check_parts` that are left to do."""
    contents = read_contents(path, weights_only=weights_only)
    checkpoint = dict(contents.rest)
    for part in TENSOR_PARTS:
        if part in contents.parts:
            checkpoint[part] = _UnreadTensors(path, part, contents.shapes(part))
    states: list[_UnreadTensors] = []
    while (part := optimizer_part(len(states))) in contents.parts:
        states.append(_UnreadTensors(path, part, contents.shapes(part)))
    if states:
        checkpoint["optimizer_states"] = states
    return checkpoint, contents.checks


def _without_values(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint with its weights on the meta device and without optimizer states, as ranks can broadcast it."""
    others = dict(checkpoint)
    for part in TENSOR_PARTS:
        if part in checkpoint:
            others[part] = {name: tensor.to("meta") for name, tensor in checkpoint[part].items()}
    if "optimizer_states" in checkpoint:
        others["optimizer_states"] = [{} for _ in checkpoint["optimizer_states"]]
    return others


def _named(saved: Mapping[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A numbered state by names, checked to fit `own`."""
    named = name_parameters(saved, own["param_groups"])
    tensors = {f"state.{name}.{key}": value for name, values in named["state"].items() for key, value in values.items()}
    drop_unsaved(own, {name: value for name, value in tensors.items() if isinstance(value, Tensor)})
    return named


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
