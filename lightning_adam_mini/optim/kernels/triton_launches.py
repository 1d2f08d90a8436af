"""From tables of work to launches: one for all tensors of the same dtypes, alignment and size of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_adam_mini.optim.kernels.triton_tables import CHUNK, TILE_COLUMNS, VECTOR, Work

__all__ = ["Alike", "Launch", "make_launches"]

Alike = tuple[tuple[torch.dtype, torch.dtype, torch.dtype], bool]
"""Dtypes of parameter, gradient and first moment, and whether memory starts at multiples of 16 bytes."""
Numbered = Sequence[tuple[int, Work]]
"""Works with the numbers of their tensors."""

IN_REGISTERS = 16384
"""The longest run that a program holds in registers: gradient, first moment and parameter, 16 elements a thread."""
SHORT_TILE = 2048
"""Elements of a program that takes several short runs."""
LONG_STEP = 4096
"""Elements at a time of a run that is too long for registers."""
TILE_STEP = 32
"""Rows of a tile at a time."""
FEW_SUMS, MANY_SUMS = 32, 1024
"""Partial sums of a block at a time, where blocks have few and where they have many."""
PHASES = ("sums", "finish", "update")
"""The order of launches: partial sums, second moments from them, the update."""


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Args:
        kernel: A function of the Triton modules.
        num_programs: Size of the grid.
        arguments: Tables, constants and the number of warps, by name.
        options: Names of the scalars of the step that the kernel takes.
    """

    kernel: Any
    num_programs: int
    arguments: dict[str, Any]
    options: tuple[str, ...]


def make_launches(groups: Mapping[Alike, Numbered], device: torch.device) -> tuple[Launch, ...]:
    """The launches of a step, in their order.

    Args:
        groups: Works that one launch can take together.
        device: Where tables are laid.
    """
    phases: dict[str, list[Launch]] = {phase: [] for phase in PHASES}
    for (types, aligned), works in groups.items():
        names = dict(zip(("param_type", "grad_type", "exp_avg_type"), map(_triton_type, types), strict=True))
        _add_bands(phases, works, names, aligned, device)
        for is_even in (True, False):
            alike = [(number, work) for number, work in works if work.is_even is is_even]
            names["is_aligned"] = aligned and is_even
            _add_elements(phases, alike, names, device)
            for is_known in (False, True):
                half = [(number, work) for number, work in alike if is_known is (not len(work.blocks))]
                _add_chunks(phases, half, names, device)
                _add_tiles(phases, half, names, device)
    return tuple(launch for phase in PHASES for launch in phases[phase])


def _triton_type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def _numbered(works: Numbered, field: str) -> Tensor:
    """Rows of a table of all tensors, with the number of the tensor in front."""
    tables = [(number, getattr(work, field)) for number, work in works]
    return torch.cat([torch.cat([torch.full_like(table[:, :1], number), table], 1) for number, table in tables])


def _blocks_of(works: Numbered) -> Tensor:
    """The blocks of all tensors; each tensor's partial sums follow those of the tensors before."""
    blocks, base = _numbered(works, "blocks"), 0
    for part, (_, work) in zip(blocks.split([len(work.blocks) for _, work in works]), works, strict=True):
        part[:, 2] += base
        base += work.num_sums
    return blocks


def _add_bands(
    phases: dict[str, list[Launch]],
    works: Numbered,
    names: dict[str, Any],
    aligned: bool,
    device: torch.device,
) -> None:
    """Launches over runs, one for each power of two that holds their lengths."""
    if not works:
        return
    from lightning_adam_mini.optim.kernels.triton_runs import update_long_runs, update_runs

    bands = _numbered(works, "bands")
    wide = ((bands[:, 1] | bands[:, 3]) % VECTOR == 0) & aligned
    bits = [max(int(length) - 1, 15).bit_length() for length in bands[:, 3].tolist()]
    sizes = torch.tensor(bits, dtype=torch.int64, device="cpu")
    sizes[bands[:, 3] > torch.where(wide, IN_REGISTERS, IN_REGISTERS // 2)] = 0  # narrow loads take more addresses
    for size, is_wide in sorted({*zip(sizes.tolist(), wide.tolist(), strict=True)}):
        chosen = bands[(sizes == size) & (wide == is_wide)]
        block_size = 2**size if size else LONG_STEP
        num_rows = max(SHORT_TILE // block_size, 1) if size else 1
        programs = (chosen[:, 2] + num_rows - 1) // num_rows
        first = programs.cumsum(0) - programs
        arguments = {
            "bands": torch.cat([chosen, first[:, None]], 1).to(device),
            "band_of_program": torch.repeat_interleave(programs).to(device, torch.int32),
            **names,
            "is_aligned": is_wide,
            "block_size": block_size,
            "num_warps": max(block_size * num_rows // 512, 1),
        }
        options = ("scalars", "beta2", "weight1", "weight2", "eps", "sign")
        if size:
            arguments["num_rows"] = num_rows
        kernel = update_runs if size else update_long_runs
        phases["update"].append(Launch(kernel, int(programs.sum()), arguments, options))


def _add_chunks(phases: dict[str, list[Launch]], works: Numbered, names: dict[str, Any], device: torch.device) -> None:
    """Launches over chunks of blocks, with those that make their second moments."""
    from lightning_adam_mini.optim.kernels.triton_kernels import sum_chunks, update_chunks

    works = [(number, work) for number, work in works if len(work.chunks)]
    if not works:
        return
    table = _numbered(works, "chunks")
    shared = {"chunks": table.to(device), "block_size": CHUNK, "num_warps": 8}
    _add_sums(phases, sum_chunks, works, {**shared, **_of_gradient(names)}, device)
    options = ("scalars", "weight1", "eps", "sign")
    phases["update"].append(Launch(update_chunks, len(table), {**shared, **names}, options))


def _add_elements(
    phases: dict[str, list[Launch]], works: Numbered, names: dict[str, Any], device: torch.device
) -> None:
    """A launch over the chunks of tensors that share nothing."""
    from lightning_adam_mini.optim.kernels.triton_kernels import update_elements

    works = [(number, work) for number, work in works if len(work.elements)]
    if not works:
        return
    table = _numbered(works, "elements")
    arguments = {"chunks": table.to(device), **names, "block_size": CHUNK, "num_warps": 8}
    options = ("scalars", "beta2", "weight1", "weight2", "eps", "sign")
    phases["update"].append(Launch(update_elements, len(table), arguments, options))


def _add_tiles(phases: dict[str, list[Launch]], works: Numbered, names: dict[str, Any], device: torch.device) -> None:
    """Launches over tiles, with those that make their second moments."""
    from lightning_adam_mini.optim.kernels.triton_columns import sum_columns, update_columns

    works = [(number, work) for number, work in works if len(work.tiles)]
    if not works:
        return
    table, columns, num_columns, num_sums = _numbered(works, "tiles"), [], 0, 0
    for part, (_, work) in zip(table.split([len(work.tiles) for _, work in works]), works, strict=True):
        part[:, 5] += num_columns
        columns.append(work.columns + torch.tensor([0, num_sums], device="cpu"))
        num_columns += len(work.columns)
        num_sums += work.num_sums
    shared: dict[str, Any] = {"tiles": table.to(device), "columns": torch.cat(columns).to(device, torch.int32)}
    shared |= {"num_rows": TILE_STEP, "block_size": TILE_COLUMNS, "num_warps": 8}
    _add_sums(phases, sum_columns, works, {**shared, **_of_gradient(names)}, device)
    options = ("scalars", "weight1", "eps", "sign")
    phases["update"].append(Launch(update_columns, len(table), {**shared, **names}, options))


def _add_sums(
    phases: dict[str, list[Launch]], kernel: Any, works: Numbered, arguments: dict[str, Any], device: torch.device
) -> None:
    """Launches that make second moments: partial sums, then what they add up to."""
    from lightning_adam_mini.optim.kernels.triton_kernels import finish_moments

    blocks = _blocks_of(works)
    if not len(blocks):
        return
    sums = torch.empty(sum(work.num_sums for _, work in works), dtype=torch.float64, device=device)
    table = arguments["chunks"] if "chunks" in arguments else arguments["tiles"]
    phases["sums"].append(Launch(kernel, len(table), {**arguments, "sums": sums}, ()))
    is_short = blocks[:, 3] <= FEW_SUMS
    for chosen, group_size, num_slots in ((blocks[is_short], 32, FEW_SUMS), (blocks[~is_short], 1, MANY_SUMS)):
        if not len(chosen):
            continue
        arguments = {
            "blocks": chosen.to(device),
            "sums": sums,
            "num_blocks": len(chosen),
            "longest": int(chosen[:, 3].max()),
            "group_size": group_size,
            "num_slots": num_slots,
            "num_warps": 4,
        }
        phases["finish"].append(Launch(finish_moments, -(-len(chosen) // group_size), arguments, ("beta2", "weight2")))


def _of_gradient(names: dict[str, Any]) -> dict[str, Any]:
    return {name: names[name] for name in ("grad_type", "is_aligned")}
