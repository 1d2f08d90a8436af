"""Plan a step by Triton kernels: from a list of tensors to launches, and to the tensors that the kernels do not take.

A plan has three stages. `_parts` finds the layout of each tensor, or of each of its boxes. `contiguous_work`,
`tiled_work` and `elementwise_work` turn a layout into rows of tables, which say what elements each program takes; the
tables are described in `triton_kernels`. `make_launches` joins the tables of all tensors that one launch can serve.
Everything is int64 tensor operations on the CPU, with no loop over blocks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_adam_mini.blocks import Kind
from lightning_adam_mini.optim.kernels.layout import Layout, box_layout, is_same_layout, layout, run_starts
from lightning_adam_mini.optim.update import ParameterView

__all__ = ["TritonPlan", "make_plan", "plan_key", "refusal"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of parameters, gradients and first moments."""
MAX_WIDTH = 2**22
"""Columns of a matrix whose blocks are columns: offsets within a tile have 32 bits."""
CHUNK = 4096
"""Elements per program of a long block, or of an element-wise tensor: 16 per thread of eight warps."""
IN_CACHE = 65536
"""The longest run that one program updates: it reads the gradient twice, the second time from the cache."""
IN_REGISTERS = 16384
"""The longest run that a program holds in registers: gradient, first moment and parameter, 16 elements per thread."""
SHORT_TILE = 2048
"""Elements of a program that takes several short runs."""
LONG_STEP = 4096
"""Elements at a time of a run that is too long for registers."""
TILE_ROWS, TILE_COLUMNS = 256, 128
"""Rows and columns of a tile: lines of at least 256 bytes, and one partial sum per 256 elements."""
TILE_STEP = 32
"""Rows of a tile at a time."""
FEW_SUMS, MANY_SUMS = 32, 1024
"""Partial sums of a block at a time, for blocks that have few and for blocks that have many."""
VECTOR = 8
"""Starts and lengths must be multiples of this many elements for 128-bit loads in every dtype."""
SUM, FINISH, UPDATE = range(3)
"""Phases of a step: partial sums, second moments from them, the update. Launches of one phase are independent."""
STEP_SCALARS = ("scalars", "beta2", "weight1", "weight2", "eps", "sign")
"""Kernel arguments that change from step to step."""


@dataclass(frozen=True)
class TritonPlan:
    """What a step does with a list of tensors.

    Args:
        launches: Launches in order.
        taken: Indices of the tensors that the kernels update, in the order in which the tables number them.
        summed: Those of them whose second moments come from sums over all ranks, or over several boxes.
        left: Indices of the tensors that the reference updates.
    """

    launches: tuple[Launch, ...]
    taken: tuple[int, ...]
    summed: tuple[int, ...]
    left: tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Args:
        kernel: A function of `triton_kernels`.
        num_programs: Size of the grid.
        arguments: Tables, constants and the number of warps, by name.
        options: Names of the `STEP_SCALARS` that the kernel takes.
        phase: When it runs: `SUM`, `FINISH` or `UPDATE`.
    """

    kernel: Any
    num_programs: int
    arguments: dict[str, Any]
    options: tuple[str, ...]
    phase: int


def _launch(phase: int, name: str, num_programs: int, arguments: Mapping[str, Any]) -> Launch:
    """A launch of the kernel `name`, with those of the arguments that it takes."""
    from lightning_adam_mini.optim.kernels import triton_kernels  # imports Triton, which may not be installed

    kernel = getattr(triton_kernels, name)
    taken = {*kernel.arg_names, "num_warps"}
    chosen = {name: value for name, value in arguments.items() if name in taken}
    return Launch(kernel, num_programs, chosen, tuple(name for name in STEP_SCALARS if name in taken), phase)


def _empty(width: int) -> Tensor:
    return torch.empty(0, width, dtype=torch.int64, device="cpu")


@dataclass(frozen=True)
class Work:
    """The work on one tensor or box, as rows of the tables without the number of the tensor.

    Args:
        bands: (n, 4): first element, number of runs, elements per run, first second moment.
        chunks: (n, 3): first element, elements, second moment. The chunks of a block are adjacent.
        elements: (n, 3): the same for a tensor with one second moment per element.
        tiles: (n, 6): first element, elements to the next row, rows, columns, first entry of `columns`, index of the
            tile along its columns.
        columns: (n, 2): second moment, first partial sum.
        blocks: (n, 4): second moment, first partial sum, number of partial sums, elements. Empty if the second moments
            are computed before.
        num_sums: Number of partial sums.
        is_even: Whether starts and lengths of chunks, elements and tiles are multiples of `VECTOR`.
    """

    bands: Tensor = field(default_factory=partial(_empty, 4))
    chunks: Tensor = field(default_factory=partial(_empty, 3))
    elements: Tensor = field(default_factory=partial(_empty, 3))
    tiles: Tensor = field(default_factory=partial(_empty, 6))
    columns: Tensor = field(default_factory=partial(_empty, 2))
    blocks: Tensor = field(default_factory=partial(_empty, 4))
    num_sums: int = 0
    is_even: bool = True


_Group = tuple[tuple[torch.dtype, torch.dtype, torch.dtype], bool]
"""Dtypes of parameter, gradient and first moment, and whether memory starts at multiples of 16 bytes."""
_Works = Sequence[tuple[int, Work]]
"""Works, each with the number of its tensor."""


def plan_key(tensor: ParameterView) -> tuple[object, ...]:
    """All that a plan depends on. The shard counts by identity, so whoever keeps a key must keep the shard alive."""
    assert tensor.grad is not None
    param, grad, exp_avg = tensor.param, tensor.grad, tensor.exp_avg
    layouts = (param.stride(), grad.stride(), exp_avg.stride(), *(moment.stride() for moment in tensor.moments))
    dtypes = (param.dtype, grad.dtype, exp_avg.dtype, tensor.moments[0].dtype)
    return (
        id(tensor.shard),
        param.shape,
        layouts,
        dtypes,
        _is_aligned(tensor),
        param.is_neg() or grad.is_neg(),
        tensor.square_sums is None,
        tensor.is_plain,
    )


def _is_aligned(tensor: ParameterView) -> bool:
    """Whether all memory of a tensor starts at multiples of 16 bytes."""
    assert tensor.grad is not None
    pointers = tensor.param.data_ptr() | tensor.grad.data_ptr() | tensor.exp_avg.data_ptr()
    return not (pointers | tensor.moments[0].data_ptr()) % 16


def make_plan(tensors: Sequence[ParameterView], device: torch.device) -> TritonPlan:
    """The plan for tensors on one device. It serves later steps too, as long as every `plan_key` is the same.

    Args:
        tensors: Tensors with gradients.
        device: Their device.
    """
    groups: dict[_Group, list[tuple[int, Work]]] = defaultdict(list)
    taken: list[int] = []
    summed: list[int] = []
    left: list[int] = []
    for number, tensor in enumerate(tensors):
        if refusal(tensor) is not None:
            left.append(number)
            continue
        if _is_summed(tensor):
            summed.append(number)
        assert tensor.grad is not None
        types = (tensor.param.dtype, tensor.grad.dtype, tensor.exp_avg.dtype)
        groups[types, _is_aligned(tensor)] += [(len(taken), work) for work in _works(tensor)]
        taken.append(number)
    return TritonPlan(make_launches(groups, device), tuple(taken), tuple(summed), tuple(left))


def _is_summed(tensor: ParameterView) -> bool:
    """Whether second moments are computed before the kernels run: several ranks or several boxes contribute to them."""
    return tensor.square_sums is not None or tensor.shard.boxes is not None


def refusal(tensor: ParameterView) -> str | None:
    """Why the kernels do not take a tensor, on whatever device; None if they do.

    Args:
        tensor: A tensor; one without a gradient is judged as if its gradient were like the parameter.
    """
    param, exp_avg = tensor.param, tensor.exp_avg
    grad = param if tensor.grad is None else tensor.grad
    if tensor.blocks.kind is Kind.FACTORED:
        return "a factored second moment"
    if not tensor.is_plain:
        return "an 8-bit first moment, or stochastic rounding"
    if any(t.dtype not in DTYPES for t in (param, grad, exp_avg)):
        return "dtypes other than float32, bfloat16 and float16"
    if any(moment.dtype != torch.float32 or not moment.is_contiguous() for moment in tensor.moments):
        return "second moments that are not contiguous float32"
    if any(t.device != param.device for t in (grad, exp_avg, *tensor.moments)):
        return "memory on several devices"
    if param.is_neg() or grad.is_neg():
        return "lazily negated memory"
    if not (is_same_layout(param, grad) and is_same_layout(param, exp_avg)):
        return "a gradient or first moment with another memory order than the parameter"
    if _parts(tensor) is None:
        return "memory with gaps, or axes in an order that four sizes do not describe"
    return None


def _parts(tensor: ParameterView) -> list[tuple[int, Layout]] | None:
    """The first element and the layout of a tensor, or of each of its boxes; None if one has no layout."""
    param, blocks = tensor.param, tensor.blocks
    found: list[tuple[int, Layout | None]]
    if tensor.shard.boxes is None:
        found = [(0, layout(blocks, param))]
    else:
        start = int(param.storage_offset())
        boxes = tensor.shard.boxes
        found = [(int(box.view(param).storage_offset()) - start, box_layout(blocks, box, param)) for box in boxes]
    parts = []
    for offset, part in found:
        if part is None or (not part.has_contiguous_rows and part.sizes[2] * part.sizes[3] > MAX_WIDTH):
            return None
        parts.append((offset, part))
    return parts


def _works(tensor: ParameterView) -> Iterator[Work]:
    """The work on a tensor that `refusal` accepts: one for the whole tensor, or one per box."""
    if not tensor.param.numel():
        return
    parts, is_summed = _parts(tensor), _is_summed(tensor)
    assert parts is not None
    for offset, part in parts:
        if tensor.blocks.kind is Kind.ELEMENT or (not is_summed and part.is_elementwise):
            yield elementwise_work(offset, part.num_rows)
        elif part.has_contiguous_rows:
            yield contiguous_work(part, offset, is_summed=is_summed)
        else:
            yield tiled_work(part, offset, is_summed=is_summed)


def _is_even(*values: Tensor | int) -> bool:
    return all(not (torch.as_tensor(value, device="cpu") % VECTOR).any() for value in values)


def _split(runs: Tensor) -> Tensor:
    """Split runs (start, length, number) into pieces of at most `CHUNK` elements, in order."""
    start, length, number = runs.unbind(1)
    counts = (length + CHUNK - 1) // CHUNK
    run = torch.repeat_interleave(counts)
    shift = (torch.arange(len(run), device="cpu") - (counts.cumsum(0) - counts)[run]) * CHUNK
    return torch.stack([start[run] + shift, (length[run] - shift).clamp_max(CHUNK), number[run]], 1)


def elementwise_work(offset: int, numel: int) -> Work:
    """The work on a tensor with one second moment per element, in the same order."""
    pieces = _split(torch.tensor([[offset, numel, 0]], device="cpu"))
    pieces[:, 2] = pieces[:, 0] - offset
    return Work(elements=pieces, is_even=_is_even(offset, numel))


def contiguous_work(layout: Layout, offset: int, *, is_summed: bool) -> Work:
    """The work on a tensor whose rows are contiguous.

    Args:
        layout: Its layout.
        offset: Elements before it in the tensor whose address the kernel gets.
        is_summed: Whether this step's second moments are computed before.
    """
    runs = layout.runs()
    runs = torch.stack([offset + runs[:, 0] * layout.row_length, runs[:, 1] * layout.row_length, runs[:, 2]], 1)
    is_one_pass = torch.zeros(len(runs), dtype=torch.bool, device="cpu")
    if not is_summed:  # short enough, and the only run of its block
        is_one_pass = (runs[:, 1] <= IN_CACHE) & (torch.bincount(runs[:, 2])[runs[:, 2]] == 1)
    rest = runs[~is_one_pass]
    rest = rest[rest[:, 2].argsort(stable=True)]
    chunks = _split(rest)
    blocks, num_sums = _empty(4), 0
    if not is_summed:
        numbers, counts = chunks[:, 2].unique_consecutive(return_counts=True)
        block = torch.repeat_interleave(counts)
        sizes = torch.zeros_like(numbers).index_add_(0, block, chunks[:, 1])
        blocks, num_sums = torch.stack([numbers, counts.cumsum(0) - counts, counts, sizes], 1), len(chunks)
    bands, is_even = _bands(runs[is_one_pass]), _is_even(rest[:, :2])
    return Work(bands=bands, chunks=chunks, blocks=blocks, num_sums=num_sums, is_even=is_even)


def _bands(runs: Tensor) -> Tensor:
    """Merge runs (start, length, number) of equal length that are adjacent in memory and in number into one row."""
    start, length, number = runs.unbind(1)
    follows = (length.diff() == 0) & (number.diff() == 1) & (start.diff() == length[:-1])
    first, counts = run_starts(~follows, len(runs))
    return torch.stack([start[first], counts, length[first], number[first]], 1)


def tiled_work(layout: Layout, offset: int, *, is_summed: bool) -> Work:
    """The work on a tensor whose rows are columns in memory; arguments as in `contiguous_work`.

    The kernels see `(A, C1, R, C2)` as `A` matrices of `C1` rows and `R * C2` columns. Columns order their partial sums
    by block, so that the sums of a block are adjacent.
    """
    outer, height, num_rows, inner = layout.sizes
    width = num_rows * inner
    numbers = torch.arange(layout.num_rows, device="cpu") if layout.block_of_row is None else layout.block_of_row
    numbers = numbers.repeat_interleave(inner)
    num_down, num_across = -(-height // TILE_ROWS), -(-width // TILE_COLUMNS)
    order = numbers.argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device="cpu")
    batch, down, across = torch.meshgrid(
        *(torch.arange(count, device="cpu") for count in (outer, num_down, num_across)), indexing="ij"
    )
    top, left = down * TILE_ROWS, across * TILE_COLUMNS
    fields = [
        offset + (batch * height + top) * width + left,
        torch.full_like(top, width),
        (height - top).clamp_max(TILE_ROWS),
        (width - left).clamp_max(TILE_COLUMNS),
        batch * width + left,
        down,
    ]
    tiles = torch.stack([values.flatten() for values in fields], 1)
    columns = torch.stack([numbers, rank * num_down], 1)
    blocks, num_sums = _empty(4), 0
    if not is_summed:
        found, counts = numbers[order].unique_consecutive(return_counts=True)
        first = (counts.cumsum(0) - counts) * num_down
        blocks, num_sums = torch.stack([found, first, counts * num_down, counts * height], 1), len(order) * num_down
    return Work(tiles=tiles, columns=columns, blocks=blocks, num_sums=num_sums, is_even=_is_even(offset, width))


def make_launches(groups: Mapping[_Group, _Works], device: torch.device) -> tuple[Launch, ...]:
    """The launches of a step, in order.

    Args:
        groups: Works that one launch can serve together.
        device: Device of the tables.
    """
    launches: list[Launch] = []
    for (dtypes, is_aligned), works in groups.items():
        constants = dict(zip(("param_type", "grad_type", "exp_avg_type"), map(_triton_type, dtypes), strict=True))
        launches += _band_launches(works, constants, is_aligned, device)
        for is_even in (True, False):
            same = [(number, work) for number, work in works if work.is_even is is_even]
            constants["is_aligned"] = is_aligned and is_even
            launches += _element_launches(same, constants, device)
            for is_summed in (False, True):
                half = [(number, work) for number, work in same if is_summed is (not len(work.blocks))]
                launches += _chunk_launches(half, constants, device)
                launches += _tile_launches(half, constants, device)
    return tuple(sorted(launches, key=lambda launch: launch.phase))


def _triton_type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def _table(works: _Works, name: str) -> Tensor:
    """One table of all tensors, with the number of the tensor as the first column."""
    tables = [(number, getattr(work, name)) for number, work in works]
    return torch.cat([torch.cat([torch.full_like(table[:, :1], number), table], 1) for number, table in tables])


def _band_launches(
    works: _Works, constants: Mapping[str, Any], is_aligned: bool, device: torch.device
) -> Iterator[Launch]:
    """Launches over runs, one for each power of two that holds their lengths."""
    if not works:
        return
    bands = _table(works, "bands")
    wide = ((bands[:, 1] | bands[:, 3]) % VECTOR == 0) & is_aligned
    bits = [max(int(length) - 1, 15).bit_length() for length in bands[:, 3].tolist()]
    sizes = torch.tensor(bits, dtype=torch.int64, device="cpu")
    # Narrow loads need more registers for addresses. Size 0 stands for runs that do not fit in registers.
    sizes[bands[:, 3] > torch.where(wide, IN_REGISTERS, IN_REGISTERS // 2)] = 0
    for size, is_wide in sorted({*zip(sizes.tolist(), wide.tolist(), strict=True)}):
        chosen = bands[(sizes == size) & (wide == is_wide)]
        block_size = 2**size if size else LONG_STEP
        num_rows = max(SHORT_TILE // block_size, 1) if size else 1
        programs = (chosen[:, 2] + num_rows - 1) // num_rows
        first = programs.cumsum(0) - programs
        arguments = {
            **constants,
            "bands": torch.cat([chosen, first[:, None]], 1).to(device),
            "band_of_program": torch.repeat_interleave(programs).to(device, torch.int32),
            "is_aligned": is_wide,
            "block_size": block_size,
            "num_rows": num_rows,
            "num_warps": max(block_size * num_rows // 512, 1),
        }
        yield _launch(UPDATE, "update_runs" if size else "update_long_runs", int(programs.sum()), arguments)


def _element_launches(works: _Works, constants: Mapping[str, Any], device: torch.device) -> Iterator[Launch]:
    """One launch over the chunks of tensors with one second moment per element."""
    works = [(number, work) for number, work in works if len(work.elements)]
    if not works:
        return
    table = _table(works, "elements")
    arguments = {**constants, "chunks": table.to(device), "block_size": CHUNK, "num_warps": 8}
    yield _launch(UPDATE, "update_elements", len(table), arguments)


def _chunk_launches(works: _Works, constants: Mapping[str, Any], device: torch.device) -> Iterator[Launch]:
    """Launches over the chunks of long blocks, with those that make their second moments."""
    works = [(number, work) for number, work in works if len(work.chunks)]
    if not works:
        return
    table = _table(works, "chunks")
    arguments = {**constants, "chunks": table.to(device), "block_size": CHUNK, "num_warps": 8}
    yield from _sum_launches(works, "sum_chunks", len(table), arguments, device)
    yield _launch(UPDATE, "update_chunks", len(table), arguments)


def _tile_launches(works: _Works, constants: Mapping[str, Any], device: torch.device) -> Iterator[Launch]:
    """Launches over tiles, with those that make their second moments."""
    works = [(number, work) for number, work in works if len(work.tiles)]
    if not works:
        return
    table, columns, num_columns, num_sums = _table(works, "tiles"), [], 0, 0
    for part, (_, work) in zip(table.split([len(work.tiles) for _, work in works]), works, strict=True):
        part[:, 5] += num_columns
        columns.append(work.columns + torch.tensor([0, num_sums], device="cpu"))
        num_columns += len(work.columns)
        num_sums += work.num_sums
    arguments = {
        **constants,
        "tiles": table.to(device),
        "columns": torch.cat(columns).to(device, torch.int32),
        "num_rows": TILE_STEP,
        "block_size": TILE_COLUMNS,
        "num_warps": 8,
    }
    yield from _sum_launches(works, "sum_columns", len(table), arguments, device)
    yield _launch(UPDATE, "update_columns", len(table), arguments)


def _sum_launches(
    works: _Works, kernel: str, num_programs: int, arguments: Mapping[str, Any], device: torch.device
) -> Iterator[Launch]:
    """Launches that make second moments: partial sums by `kernel`, then their totals."""
    blocks, num_sums = _table(works, "blocks"), 0
    if not len(blocks):
        return
    for part, (_, work) in zip(blocks.split([len(work.blocks) for _, work in works]), works, strict=True):
        part[:, 2] += num_sums
        num_sums += work.num_sums
    sums = torch.empty(num_sums, dtype=torch.float64, device=device)
    yield _launch(SUM, kernel, num_programs, {**arguments, "sums": sums})
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
        yield _launch(FINISH, "finish_moments", -(-len(chosen) // group_size), arguments)
