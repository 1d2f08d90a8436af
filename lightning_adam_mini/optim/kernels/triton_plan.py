"""From a list of tensors to launches, and which of the tensors the kernels do not take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_adam_mini.blocks import Kind
from lightning_adam_mini.optim.kernels.layout import Layout, box_layout, is_same_layout, layout
from lightning_adam_mini.optim.parameter_view import ParameterView

__all__ = ["Plan", "make_plan", "plan_key", "refusal"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of parameters, gradients and first moments."""
MAX_WIDTH = 2**22
"""Columns of a matrix whose blocks are columns: offsets within a tile have 32 bits."""
CHUNK = 4096
"""Elements that a program takes of a long block, or of a tensor that shares nothing: 16 a thread of eight warps."""
IN_CACHE = 65536
"""The longest run that one program updates: its gradient is read twice, the second time from the cache."""
TILE_ROWS, TILE_COLUMNS = 256, 128
"""Rows and columns of a tile: lines of at least 256 bytes, and a partial sum for 256 elements."""
VECTOR = 8
"""Elements that starts and lengths must be multiples of for loads of 128 bits, whatever the dtype."""
Alike = tuple[tuple[torch.dtype, torch.dtype, torch.dtype], bool]
"""Dtypes of parameter, gradient and first moment, and whether memory starts at multiples of 16 bytes."""
Numbered = Sequence[tuple[int, "Work"]]
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
class Plan:
    """What a step does with a list of tensors.

    Args:
        launches: Launches in their order.
        taken: Numbers of the tensors that the kernels update, as they are numbered in the tables.
        summed: Those of them whose second moments come from sums over all ranks.
        left: Numbers of the tensors that the reference updates.
    """

    launches: tuple[Launch, ...]
    taken: tuple[int, ...]
    summed: tuple[int, ...]
    left: tuple[int, ...]


def plan_key(tensor: ParameterView) -> tuple[object, ...]:
    """What a plan depends on, but for the shard, which has to be the very same object."""
    assert tensor.grad is not None
    param, grad, exp_avg = tensor.param, tensor.grad, tensor.exp_avg
    layouts = (param.stride(), grad.stride(), exp_avg.stride(), *(moment.stride() for moment in tensor.moments))
    dtypes = (param.dtype, grad.dtype, exp_avg.dtype, tensor.moments[0].dtype)
    return (
        id(tensor.shard),
        param.shape,
        layouts,
        dtypes,
        is_aligned(tensor),
        param.is_neg() or grad.is_neg(),
        tensor.square_sums is None,
        tensor.is_plain,
    )


def is_aligned(tensor: ParameterView) -> bool:
    """Whether all memory of a tensor starts at multiples of 16 bytes."""
    assert tensor.grad is not None
    pointers = tensor.param.data_ptr() | tensor.grad.data_ptr() | tensor.exp_avg.data_ptr()
    return not (pointers | tensor.moments[0].data_ptr()) % 16


def make_plan(tensors: Sequence[ParameterView], device: torch.device) -> Plan:
    """The plan for tensors on one device, which serves later steps too as long as `plan_key` is the same.

    Args:
        tensors: Tensors with gradients.
        device: Where they lie.
    """
    groups: dict[Alike, list[tuple[int, Work]]] = defaultdict(list)
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
        for work in _works(tensor):
            groups[types, is_aligned(tensor)].append((len(taken), work))
        taken.append(number)
    launches = make_launches(groups, device)
    return Plan(launches, tuple(taken), tuple(summed), tuple(left))


def _is_summed(tensor: ParameterView) -> bool:
    return tensor.square_sums is not None or tensor.shard.boxes is not None


def refusal(tensor: ParameterView) -> str | None:
    """Why the kernels do not take a tensor, wherever it lies; None where they do.

    Args:
        tensor: A tensor; without a gradient, as if it had one like the parameter.
    """
    param, exp_avg = tensor.param, tensor.exp_avg
    grad = param if tensor.grad is None else tensor.grad
    if tensor.blocks.kind is Kind.FACTORED:
        return "a factored second moment"
    if not tensor.is_plain:
        return "a first moment in 8 bits, or stochastic rounding"
    if any(t.dtype not in DTYPES for t in (param, grad, exp_avg)):
        return "dtypes other than float32, bfloat16 and float16"
    if any(moment.dtype != torch.float32 or not moment.is_contiguous() for moment in tensor.moments):
        return "second moments that are not contiguous float32"
    if any(t.device != param.device for t in (grad, exp_avg, *tensor.moments)):
        return "memory on several devices"
    if param.is_neg() or grad.is_neg():
        return "numbers that lie in memory with the other sign"
    if not (is_same_layout(param, grad) and is_same_layout(param, exp_avg)):
        return "a gradient or first moment that lies in memory in another order than the parameter"
    if _parts(tensor) is None:
        return "memory with gaps, or axes in an order that four sizes do not describe"
    return None


def _parts(tensor: ParameterView) -> list[tuple[int, Layout]] | None:
    """The first element and the layout of a tensor, or of each of its rectangles; None where one has none."""
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


def _works(tensor: ParameterView) -> list[Work]:
    """The work of a tensor that is not refused, a part for each rectangle."""
    if not tensor.param.numel():
        return []
    parts = _parts(tensor)
    assert parts is not None
    return [_work(part, offset, tensor.blocks.kind, is_summed=_is_summed(tensor)) for offset, part in parts]


def _work(found: Layout, offset: int, kind: Kind, *, is_summed: bool) -> Work:
    if kind is Kind.ELEMENT or (not is_summed and found.is_elementwise):
        return elementwise_work(offset, found.num_rows)
    if found.has_contiguous_rows:
        return contiguous_work(found, offset, is_summed=is_summed)
    return tiled_work(found, offset, is_summed=is_summed)


@dataclass(frozen=True)
class Work:
    """What is to do for one tensor or rectangle, in rows of the tables, without the number of the tensor.

    Args:
        bands: (n, 4): first element, number of runs, elements a run, first second moment.
        chunks: (n, 3): first element, elements, second moment; those of one block follow each other.
        elements: (n, 3): the same of a tensor with a second moment an element.
        tiles: (n, 6): first element, elements to the next row, rows, columns, first entry of `columns`, number of the
            tile along its columns.
        columns: (n, 2): second moment, first partial sum.
        blocks: (n, 4): second moment, first partial sum, number of partial sums, elements; empty where the second
            moments are known before.
        num_sums: Number of partial sums.
        is_even: Whether starts and lengths of chunks, elements and tiles are multiples of `VECTOR`.
    """

    bands: Tensor
    chunks: Tensor
    elements: Tensor
    tiles: Tensor
    columns: Tensor
    blocks: Tensor
    num_sums: int = 0
    is_even: bool = True


def _empty(width: int) -> Tensor:
    return torch.empty(0, width, dtype=torch.int64, device="cpu")


def _is_even(*values: Tensor | int) -> bool:
    return all(not (torch.as_tensor(value, device="cpu") % VECTOR).any() for value in values)


def _split(runs: Tensor) -> Tensor:
    """Runs (start, length, number) in pieces of at most `CHUNK` elements, in their order."""
    start, length, number = runs.unbind(1)
    counts = (length + CHUNK - 1) // CHUNK
    run = torch.repeat_interleave(counts)
    shift = (torch.arange(len(run), device="cpu") - (counts.cumsum(0) - counts)[run]) * CHUNK
    return torch.stack([start[run] + shift, (length[run] - shift).clamp_max(CHUNK), number[run]], 1)


def elementwise_work(offset: int, numel: int) -> Work:
    """A tensor whose second moments are as many as its elements, in the same order."""
    pieces = _split(torch.tensor([[offset, numel, 0]], device="cpu"))
    pieces[:, 2] = pieces[:, 0] - offset
    return Work(_empty(4), _empty(3), pieces, _empty(6), _empty(2), _empty(4), is_even=_is_even(offset, numel))


def contiguous_work(layout: Layout, offset: int, *, is_summed: bool) -> Work:
    """A tensor whose rows are contiguous.

    Args:
        layout: Its layout.
        offset: Elements before it in the tensor that addresses point to.
        is_summed: Whether the second moments of this step are known before.
    """
    runs = layout.runs()
    runs = torch.stack([offset + runs[:, 0] * layout.row_length, runs[:, 1] * layout.row_length, runs[:, 2]], 1)
    is_one_pass = torch.zeros(len(runs), dtype=torch.bool, device="cpu")
    if not is_summed:
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
    return Work(bands, chunks, _empty(3), _empty(6), _empty(2), blocks, num_sums, is_even)


def _bands(runs: Tensor) -> Tensor:
    """Runs (start, length, number) of one length that follow each other in memory and in number, as one row each."""
    if not len(runs):
        return _empty(4)
    start, length, number = runs.unbind(1)
    follows = (length.diff() == 0) & (number.diff() == 1) & (start.diff() == length[:-1])
    starts = torch.nonzero(~follows).flatten() + 1
    first = torch.cat([starts.new_zeros(1), starts])
    counts = torch.cat([first, first.new_full((1,), len(runs))]).diff()
    return torch.stack([start[first], counts, length[first], number[first]], 1)


def tiled_work(layout: Layout, offset: int, *, is_summed: bool) -> Work:
    """A tensor whose rows are columns in memory; arguments as in `contiguous_work`.

    `(A, C1, R, C2)` is taken as `A` matrices of `C1` rows and `R * C2` columns. Columns have their partial sums in the
    order of their blocks, so that those of a block follow each other.
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
    tiles = torch.stack([field.flatten() for field in fields], 1)
    columns = torch.stack([numbers, rank * num_down], 1)
    blocks, num_sums = _empty(4), 0
    if not is_summed:
        found, counts = numbers[order].unique_consecutive(return_counts=True)
        first = (counts.cumsum(0) - counts) * num_down
        blocks, num_sums = torch.stack([found, first, counts * num_down, counts * height], 1), len(order) * num_down
    return Work(_empty(4), _empty(3), _empty(3), tiles, columns, blocks, num_sums, _is_even(offset, width))


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
    from lightning_adam_mini.optim.kernels.triton_kernels import update_long_runs, update_runs

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
    from lightning_adam_mini.optim.kernels.triton_kernels import sum_columns, update_columns

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
