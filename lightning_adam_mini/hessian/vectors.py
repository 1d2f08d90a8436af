"""Vectors over the trainable parameters: flat, sharded as the model is, restricted to principal blocks, or random.

One process keeps a flat vector in the order of `named_parameters()`. Under DDP each rank keeps all of it. Under FSDP2
each rank keeps its shards of the parameters one after another: a vector is sharded like the model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.hints import did_you_mean

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

__all__ = [
    "ParameterBlock",
    "VectorLayout",
    "block_of",
    "blocks_of",
    "check_block_names",
    "check_vector",
    "dots",
    "parameter_blocks",
    "probe",
    "probe_seed",
]

CHUNK = 2**16
"""Elements that are converted to float64 at a time: 512 KiB of each operand, which stays in the cache."""


@dataclass(frozen=True, eq=False)
class ParameterBlock:
    """A principal block of the Hessian: the rows and columns that belong to elements of one parameter.

    Args:
        name: Name of the block, unique among the blocks that are used together.
        parameter: Name of the parameter, as in `named_parameters()` of the model without wrappers such as DDP.
        index: Positions of the elements in the flattened parameter, an int64 tensor `(b,)` without repeats; None for
            all of them in order.

    Raises:
        ValueError: `index` is not a one-dimensional int64 tensor, is empty, or names an element twice.
    """

    name: str
    parameter: str
    index: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the index; whether it fits the parameter is checked where the parameter is known."""
        if self.index is None:
            return
        if self.index.dtype is not torch.int64 or self.index.dim() != 1 or not self.index.numel():
            raise ValueError(f"{self.name}: index must be a non-empty int64 tensor (b,) of flat positions")
        if self.index.unique().numel() != self.index.numel():
            raise ValueError(f"{self.name}: index names an element twice; a principal block has each element once")


def parameter_blocks(model: nn.Module) -> list[ParameterBlock]:
    """One block for each trainable parameter; tied parameters are one block, under their first name."""
    return [ParameterBlock(name, name) for name, tensor in model.named_parameters() if tensor.requires_grad]


def block_of(parameter: str, blocks: Blocks, number: int, *, name: str | None = None) -> ParameterBlock:
    """One block of a parameter's block structure.

    Args:
        parameter: Name of the parameter.
        blocks: Its block structure.
        number: In the order of the flattened `exp_avg_sq`, as `Blocks.block_index` counts.
        name: Of the block; `parameter[number]` by default.

    Raises:
        ValueError: There is no block of that number, or the second moment is factored and has no blocks.
    """
    index = blocks.block_index()
    if not 0 <= number < blocks.num_values:
        raise ValueError(f"{parameter} has blocks 0 to {blocks.num_values - 1}: there is no block {number}")
    positions = (index == number).flatten().nonzero().squeeze(1)
    return ParameterBlock(name or f"{parameter}[{number}]", parameter, positions)


def blocks_of(parameter: str, blocks: Blocks) -> Iterator[ParameterBlock]:
    """All blocks of a parameter's block structure, named `parameter[0]`, `parameter[1]`, ..."""
    numbers = blocks.block_index().flatten()
    order = numbers.argsort(stable=True)
    counts = numbers.bincount(minlength=blocks.num_values)
    for number, positions in enumerate(order.split(counts.tolist())):
        yield ParameterBlock(f"{parameter}[{number}]", parameter, positions)


class VectorLayout:
    """The place of each trainable parameter in a flat vector.

    Args:
        parameters: Trainable parameters by name.
        groups: Process groups over which products are summed, one after another.
        dtype: Of vectors.

    Raises:
        ValueError: Parameters on several devices.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], groups: Sequence[ProcessGroup | None], dtype: torch.dtype
    ) -> None:
        devices = {parameter.device for parameter in parameters.values()}
        if len(devices) != 1:
            raise ValueError(f"the parameters are on {sorted(map(str, devices))}: move the model to one device")
        (self.device,) = devices
        self.dtype = dtype
        self.groups = tuple(groups)
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self.specs = {name: _spec(p) for name, p in parameters.items() if hasattr(p, "device_mesh")}
        self.local_shapes = {
            name: getattr(parameter, "_local_tensor", parameter).shape for name, parameter in parameters.items()
        }
        self.size = sum(map(math.prod, self.shapes.values()))
        self.local_size = sum(map(math.prod, self.local_shapes.values()))

    @property
    def is_sharded(self) -> bool:
        """Whether a rank keeps shards alone."""
        return bool(self.specs)

    def pieces(self, vector: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Views of a rank's vector, one for each parameter, in the shape of the rank's part."""
        start = 0
        for name, shape in self.local_shapes.items():
            length = math.prod(shape)
            yield name, vector.narrow(0, start, length).view(shape)
            start += length

    def gather(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector as whole tensors in the shape of the parameters: views, or gathered from all ranks."""
        return {name: self._whole(name, piece) for name, piece in self.pieces(vector)}

    def allocate(self, out: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Zeros for all parameters in one flat tensor, and views of it in the shape of each, on every rank.

        Args:
            out: A rank's vector, whose memory is reused where it holds all parameters.
        """
        if out is None or self.is_sharded:
            flat = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        else:
            flat = out.zero_()
        lengths = [math.prod(shape) for shape in self.shapes.values()]
        parts = zip(self.shapes.items(), flat.split(lengths), strict=True)
        return flat, {name: part.view(shape) for (name, shape), part in parts}

    def reduce(self, flat: Tensor, views: Mapping[str, Tensor]) -> Tensor:
        """The sum over ranks of what `allocate` returned, as a rank's vector; `flat` must not be used afterwards."""
        if not self.is_sharded:
            self.all_reduce(flat)
            return flat
        result = torch.empty(self.local_size, dtype=self.dtype, device=self.device)
        for name, piece in self.pieces(result):
            if name in self.specs:
                piece.copy_(self._reduce_scatter(name, views[name]))
            else:
                self.all_reduce(views[name])
                piece.copy_(views[name])
        return result

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum a tensor over all ranks, in place."""
        for group in self.groups:
            dist.all_reduce(tensor, group=group)

    def dots(self, rows: Tensor, vector: Tensor) -> Tensor:
        """Inner products of vectors of this layout with one, `(k,)`; under FSDP2 with one all-reduce."""
        if not self.is_sharded:
            return dots(rows, vector)
        total, start = torch.zeros(rows.shape[0], dtype=torch.float64, device=self.device), 0
        for name, piece in self.pieces(vector):
            part = rows.narrow(1, start, piece.numel())
            # The all-reduce adds what several ranks keep copies of once for each copy.
            total += dots(part, piece.reshape(-1)) / self._num_copies(name)
            start += piece.numel()
        self.all_reduce(total)
        return total

    def random(self, seed: int, *, rademacher: bool = False) -> Tensor:
        """A random vector with independent elements, the same for any number of ranks.

        Args:
            seed: Of a generator on the CPU, from which parameters are drawn one by one.
            rademacher: Elements of -1 and 1 instead of standard normal ones.
        """
        generator = torch.Generator().manual_seed(seed)
        vector = torch.empty(self.local_size, dtype=self.dtype, device=self.device)
        for name, piece in self.pieces(vector):
            piece.copy_(self._shard(name, _draw(self.shapes[name], generator, self.dtype, rademacher=rademacher)))
        return vector

    def _num_copies(self, name: str) -> int:
        """On how many ranks each element of a parameter is."""
        if name not in self.specs:
            return math.prod(dist.get_world_size(group) for group in self.groups)
        mesh, placements = self.specs[name]
        return math.prod(mesh.size(i) for i, placement in enumerate(placements) if placement.is_replicate())

    def _whole(self, name: str, piece: Tensor) -> Tensor:
        if name not in self.specs:
            return piece
        from torch.distributed.tensor import DTensor

        mesh, placements = self.specs[name]
        shape = self.shapes[name]
        # Uneven shards: from_local cannot infer the whole shape from one of them.
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(piece, mesh, placements, run_check=False, shape=shape, stride=stride).full_tensor()

    def _reduce_scatter(self, name: str, whole: Tensor) -> Tensor:
        """The rank's shard of the sum over ranks."""
        from torch.distributed.tensor import DTensor, Partial

        mesh, placements = self.specs[name]
        partial = DTensor.from_local(whole, mesh, [Partial()] * mesh.ndim, run_check=False)
        return partial.redistribute(placements=placements).to_local()

    def _shard(self, name: str, whole: Tensor) -> Tensor:
        """The rank's part of a tensor that all ranks have."""
        if name not in self.specs:
            return whole
        from torch.distributed.tensor import DTensor, Replicate

        mesh, placements = self.specs[name]
        whole = whole.to(self.device)
        replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return replicated.redistribute(placements=placements).to_local()


def dots(rows: Tensor, vector: Tensor) -> Tensor:
    """Inner products of vectors with one, summed in float64 without a copy of any.

    A float32 sum over 1e8 elements keeps about four digits, too few for the recurrence of Lanczos.

    Args:
        rows: `(k, n)`.
        vector: `(n,)`.

    Returns:
        `(k,)` in float64.
    """
    if rows.dtype is torch.float64:
        return rows @ vector
    total = torch.zeros(rows.shape[0], dtype=torch.float64, device=rows.device)
    length = max(1, CHUNK // max(rows.shape[0], 1))
    for part, piece in zip(rows.split(length, 1), vector.split(length), strict=True):
        total += part.double() @ piece.double()
    return total


def probe_seed(seed: int, name: str, number: int) -> int:
    """A seed for probe `number` of the block `name`, unrelated to the seeds of other probes."""
    text = f"{seed}/{name}/{number}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest())


def probe(
    size: int, seed: int, name: str, number: int, *, dtype: torch.dtype, device: torch.device, rademacher: bool = False
) -> Tensor:
    """A random vector `(size,)` for a block: standard normal, or -1 and 1.

    It is the same whatever other blocks, ranks and devices there are.
    """
    generator = torch.Generator().manual_seed(probe_seed(seed, name, number))
    return _draw((size,), generator, dtype, rademacher=rademacher).to(device)


def check_block_names(names: Iterable[str], known: Iterable[str]) -> None:
    """Reject a parameter or block that does not exist.

    Raises:
        ValueError: A name is unknown; the message lists close ones.
    """
    available = list(known)
    for name in names:
        if name not in available:
            hint = did_you_mean(name, available, otherwise=f"; it has {', '.join(available[:3])}, ...", cutoff=0.4)
            raise ValueError(f"there is no trainable parameter {name!r} (tied ones go by their first name){hint}")


def check_vector(name: str, vector: Tensor, size: int, dtype: torch.dtype, *, rows: bool = False) -> None:
    """Reject a vector of the wrong shape or dtype.

    Args:
        name: What it is multiplied by, for the message.
        vector: `(size,)`, or `(k, size)` where `rows`.
        size: Number of elements.
        dtype: Of the operator.
        rows: Whether several vectors may come as rows.

    Raises:
        ValueError: The shape or the dtype is different.
    """
    fits = vector.dim() in ((1, 2) if rows else (1,)) and vector.shape[-1] == size
    if not fits or vector.dtype is not dtype:
        raise ValueError(
            f"{name} takes a vector ({size},){f' or rows (k, {size})' if rows else ''} in {dtype}, not "
            f"{tuple(vector.shape)} in {vector.dtype}"
        )


def _draw(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype, *, rademacher: bool) -> Tensor:
    """A random tensor on the CPU."""
    if rademacher:
        return torch.randint(0, 2, tuple(shape), generator=generator, dtype=torch.int8).mul_(2).sub_(1).to(dtype)
    return torch.randn(tuple(shape), generator=generator, dtype=dtype)


def _spec(tensor: Any) -> tuple[DeviceMesh, tuple[Placement, ...]]:
    return tensor.device_mesh, tensor.placements
