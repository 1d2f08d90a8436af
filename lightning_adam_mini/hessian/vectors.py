"""How a vector over all trainable parameters lies in memory and on ranks.

One process keeps a flat vector in the order of `named_parameters()`. Under DDP each rank keeps all of it. Under FSDP2
each rank keeps its shards of the parameters one after another: a vector is sharded like the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

__all__ = ["VectorLayout", "dots", "draw"]

CHUNK = 2**16
"""Elements that are converted to float64 at a time: 512 KiB of each operand, which stays in the cache."""


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
            raise ValueError(f"the parameters lie on {sorted(map(str, devices))}: move the model to one device")
        (self.device,) = devices
        self.dtype = dtype
        self.groups = tuple(groups)
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self.specs = {name: _spec(parameter) for name, parameter in parameters.items() if _is_dtensor(parameter)}
        self.local_shapes = {name: _local(parameter).shape for name, parameter in parameters.items()}
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
            out: A rank's vector whose memory is taken where it is one of all parameters.
        """
        if out is None or self.is_sharded:
            flat = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        else:
            flat = out.zero_()
        lengths = [math.prod(shape) for shape in self.shapes.values()]
        parts = zip(self.shapes.items(), flat.split(lengths), strict=True)
        return flat, {name: part.view(shape) for (name, shape), part in parts}

    def reduce(self, flat: Tensor, views: Mapping[str, Tensor]) -> Tensor:
        """The sum over ranks of what `allocate` gave, as a rank's vector; `flat` is not to be used again."""
        if not self.is_sharded:
            self.all_reduce(flat)
            return flat
        result = torch.empty(self.local_size, dtype=self.dtype, device=self.device)
        for name, piece in self.pieces(result):
            if name in self.specs:
                piece.copy_(self._scattered(name, views[name]))
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
            total += dots(part, piece.reshape(-1)) / self._copies(name)
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
            piece.copy_(self._own(name, draw(self.shapes[name], generator, self.dtype, rademacher=rademacher)))
        return vector

    def _copies(self, name: str) -> int:
        """On how many ranks each element of a parameter lies."""
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
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(piece, mesh, placements, run_check=False, shape=shape, stride=stride).full_tensor()

    def _scattered(self, name: str, whole: Tensor) -> Tensor:
        """The rank's shard of the sum over ranks."""
        from torch.distributed.tensor import DTensor, Partial

        mesh, placements = self.specs[name]
        partial = DTensor.from_local(whole, mesh, [Partial()] * mesh.ndim, run_check=False)
        return partial.redistribute(placements=placements).to_local()

    def _own(self, name: str, whole: Tensor) -> Tensor:
        """The rank's part of a tensor that all ranks have."""
        if name not in self.specs:
            return whole
        from torch.distributed.tensor import DTensor, Replicate

        mesh, placements = self.specs[name]
        whole = whole.to(self.device)
        replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return replicated.redistribute(placements=placements).to_local()


def draw(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype, *, rademacher: bool = False) -> Tensor:
    """A random tensor on the CPU: standard normal, or -1 and 1."""
    if rademacher:
        return torch.randint(0, 2, tuple(shape), generator=generator, dtype=torch.int8).mul_(2).sub_(1).to(dtype)
    return torch.randn(tuple(shape), generator=generator, dtype=dtype)


def _is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


def _spec(tensor: Any) -> tuple[DeviceMesh, tuple[Placement, ...]]:
    return tensor.device_mesh, tensor.placements


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if _is_dtensor(tensor) else tensor
