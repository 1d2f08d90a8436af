"""Checkpoints of sharded models: whole or absent, and the same for however many ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from ..atomic_files import put_in_place, remove, temporary_path
from ..errors import on_all_ranks
from .files import read_file, write_file
from .folders import (
    CHECKSUMS,
    REST_NAME,
    TENSOR_PARTS,
    check_parts,
    drop_unsaved,
    load_tensors,
    name_parameters,
    number_parameters,
    optimizer_part,
    read_outline,
    save_tensors,
    split_parts,
)
from .saving import cannot_save, check_checkpoint

__all__ = ["AtomicFolderCheckpoint"]


T = TypeVar("T")


class _Unread(dict[str, Tensor]):
    """Tensors without values by their names, of one part of a folder; each rank reads its shards of them later."""

    def __init__(self, folder: Path, part: str, shapes: Mapping[str, Tensor]) -> None:
        super().__init__(shapes)
        self.folder, self.part = folder, part

    def __reduce__(self) -> tuple[Any, ...]:  # ranks send it to each other
        return type(self), (self.folder, self.part, dict(self))

    def fill(self, own: dict[str, Any]) -> dict[str, Any]:
        """Read this rank's shards into `own`, a state dict of DTensors."""
        state = {self.part: own}
        load_tensors(state, self.folder)
        return state[self.part]


class AtomicFolderCheckpoint(ModelParallelStrategy):
    """A ModelParallelStrategy whose checkpoints a kill cannot spoil, and that any number of ranks can load.

    A folder is written beside its place and takes it when all ranks have written. Loading checks all names and shapes
    before anything is overwritten. A full file is what one process without sharding would have saved: Lightning's own
    assumes that optimizers number parameters as `model.parameters()` does, which two groups of weight decay do not.
    """

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Optimizers are loaded when the task has seen whose state it is."""
        return True

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state as DTensors by names; for a full file whole and numbered, on rank zero alone."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        full = not self._save_distributed_checkpoint
        options = StateDictOptions(full_state_dict=full, cpu_offload=True)
        assert self.model is not None
        state = cast("dict[str, Any]", get_optimizer_state_dict(self.model, _bare(optimizer), options=options))
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
            write_file({**rest, CHECKSUMS: checksums}, folder / REST_NAME)
            put_in_place(folder, target)

        try:
            self._on_rank_zero(lambda: folder.mkdir(parents=True, exist_ok=True))
            written = self._from_all_ranks(save_tensors(tensors, folder))
            checksums = {name: told for of_rank in written for name, told in of_rank.items()}
            self._on_rank_zero(finish)
        except OSError as error:
            raise on_all_ranks(cannot_save(target, error)) from error
        finally:
            if self.is_global_zero:
                remove(folder)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint without the values of its tensors, but for a full file on rank zero, which maps it.

        Raises:
            ValueError: On all ranks, where one finds the checkpoint damaged, cut off or foreign.
        """
        path = Path(self.broadcast(checkpoint_path))
        mapped: dict[str, Any] = {}

        def read() -> tuple[dict[str, Any], Mapping[str, Any]]:
            if path.is_dir():
                return _outline_folder(path, weights_only)
            mapped.update(check_checkpoint(read_file(path, weights_only=weights_only, mmap=True), path))
            return _outline_file(mapped), {}

        checkpoint, checks = self._on_rank_zero(read)
        failure: str | None = None
        try:
            check_parts(path, checks, rank=self.global_rank, world_size=self.world_size)
        except (OSError, ValueError) as error:
            failure = str(error)
        if told := [found for found in self._from_all_ranks(failure) if found is not None]:
            raise on_all_ranks(ValueError(told[0]))
        return {**checkpoint, **mapped}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights under `state_dict`, each rank its shards."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

        assert self.model is not None
        saved = checkpoint["state_dict"]
        if isinstance(saved, _Unread):
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
            optimizer = _bare(wrapped)
            tuples = [
                [key for key, value in group.items() if isinstance(value, tuple)] for group in optimizer.param_groups
            ]
            state = cast("dict[str, Any]", get_optimizer_state_dict(self.model, optimizer))
            if isinstance(saved, _Unread):
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
        """What rank zero's `do` returns, on all ranks; its error is raised on all, so that none waits for another."""
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
        """What each rank has, by rank."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(values, value)
        return values


def _outline_folder(path: Path, weights_only: bool | None) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The checkpoint without the values of its tensors, and what is left to check."""
    outline = read_outline(path, weights_only=weights_only)
    checkpoint = dict(outline.rest)
    for part in TENSOR_PARTS:
        if part in outline.parts:
            checkpoint[part] = _Unread(path, part, outline.shapes(part))
    states: list[_Unread] = []
    while (part := optimizer_part(len(states))) in outline.parts:
        states.append(_Unread(path, part, outline.shapes(part)))
    if states:
        checkpoint["optimizer_states"] = states
    return checkpoint, outline.checks


def _outline_file(checkpoint: dict[str, Any]) -> dict[str, Any]:
    outline = dict(checkpoint)
    for part in TENSOR_PARTS:
        if part in checkpoint:
            outline[part] = {name: tensor.to("meta") for name, tensor in checkpoint[part].items()}
    if "optimizer_states" in checkpoint:
        outline["optimizer_states"] = [{} for _ in checkpoint["optimizer_states"]]
    return outline


def _named(saved: Mapping[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A numbered state by names, which is found to fit `own`."""
    named = name_parameters(saved, own["param_groups"])
    tensors = {f"state.{name}.{key}": value for name, values in named["state"].items() for key, value in values.items()}
    drop_unsaved(own, {name: value for name, value in tensors.items() if isinstance(value, Tensor)})
    return named


def _bare(optimizer: Optimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
