"""Exact products of a model's Hessian with vectors, by double backward (Pearlmutter 1994 gives the identity)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.parallel import DistributedDataParallel

from lightning_adam_mini.hessian.blocks_of import ParameterBlock
from lightning_adam_mini.hessian.checks import (
    check_batches,
    check_block_names,
    check_finite,
    check_index,
    check_model,
    check_vector,
)
from lightning_adam_mini.hessian.gradient_graphs import GradientGraphs
from lightning_adam_mini.hessian.loss import LossOfParameters
from lightning_adam_mini.hessian.vectors import VectorLayout
from lightning_adam_mini.hessian.wrapped import unwrap

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["HessianOperator"]

_logger = logging.getLogger(__name__)


class HessianOperator:
    """The Hessian of a loss over batches, as an operator on vectors.

    `H v = d/dθ <∇L(θ), v>`: the gradient is computed with its graph, which is differentiated once more. Products are
    computed at leaves that stand in for the parameters (`torch.func.functional_call`). So the model keeps its
    gradients, mode, buffers and dtype, also after an error, and float64 needs no second model: only values are copied,
    for the time of a product. A model that casts to float32 by itself stays as inexact as that.

    `torch.func.hessian` does not serve, nor curvlinops: the vmap in their `jacrev` gives wrong second derivatives
    through layer and batch norm with weights (torch 2.15: not even symmetric, off by 1 to 24 %).

    Tied parameters count once, frozen ones not at all. A parameter that the loss does not reach has zero rows. Batches
    are moved to the parameters' device, and cast where the dtype is not the model's.

    Under DDP each rank gives its own batches, and the products are summed over ranks by one all-reduce. Under FSDP2 a
    rank's vectors are its shards (see `VectorLayout`), but for the time of a product each rank holds the whole
    parameters and vector beside what `product` takes, four times the parameters: FSDP2's hooks do not live through a
    double backward.

    Args:
        model: Also under DDP, FSDP2 or `torch.compile`, which is left out.
        loss_fn: Takes the model, without wrappers, and a batch; returns a scalar.
        batches: A sequence, or an iterable that gives the same batches on each pass.
        reduction: "mean" over batches, or "sum", as the public code of the paper does (eigenvalues then grow with the
            number of batches).
        dtype: torch.float32 or torch.float64; by default float64 if all parameters are, else float32.
        weight: Of a batch in the mean or sum, such as its number of samples or tokens where batches differ in them and
            the loss is a mean over them; 1 by default.
        group: Ranks that each give batches of their own to a model that is neither under DDP nor FSDP2.

    Raises:
        ValueError: Bad input; see `checks`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        batches: Iterable[Any],
        *,
        reduction: str = "mean",
        dtype: torch.dtype | None = None,
        weight: Callable[[Any], float] | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}")
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, not {dtype}: fewer bits have no use here")
        plain = unwrap(model)
        check_model(plain)
        check_batches(batches)
        parameters = {name: p for name, p in plain.named_parameters() if p.requires_grad}
        if not parameters:
            raise ValueError("no parameter takes a gradient: set requires_grad on those whose Hessian is wanted")
        self.layout = VectorLayout(parameters, _groups(model, parameters, group), dtype or _dtype_of(parameters))
        self.reduction = reduction
        self._graphs = GradientGraphs(LossOfParameters(plain, loss_fn, batches, weight or _one, self.layout.dtype))
        self._total_weight: tuple[float, float] | None = None

    @property
    def size(self) -> int:
        """Rows of the Hessian: the number of trainable parameters."""
        return self.layout.size

    @property
    def local_size(self) -> int:
        """Elements of a vector on this rank; `size` unless FSDP2 shards the model."""
        return self.layout.local_size

    @property
    def dtype(self) -> torch.dtype:
        """Of vectors and of the computation."""
        return self.layout.dtype

    @property
    def device(self) -> torch.device:
        """Of vectors."""
        return self.layout.device

    def block_size(self, block: ParameterBlock) -> int:
        """Rows of a principal block.

        Raises:
            ValueError: The model has no such parameter, or the block has positions outside of it.
        """
        check_block_names([block.parameter], self.layout.shapes)
        numel = self.layout.shapes[block.parameter].numel()
        check_index(block.name, block.index, numel)
        return numel if block.index is None else block.index.numel()

    def keep_graphs(self, budget_bytes: int) -> AbstractContextManager[None]:
        """Within it, products share the forward and first backward pass of the first batches, as many as fit.

        A product with a batch whose graph is kept takes about as long as two training passes, else two thirds longer.
        The parameters must not change within.

        Args:
            budget_bytes: For what the graphs hold on to, and for the parameters where these are in another dtype or
                gathered from other ranks; on one rank. With 0 nothing is kept.
        """
        return self._graphs.keep(budget_bytes)

    @torch.inference_mode(False)
    def product(self, vector: Tensor, *, out: Tensor | None = None) -> Tensor:
        """The Hessian times a vector.

        Memory beyond the model, its activations and `vector`: the result, and what the second backward pass gathers
        before it can add it to the result; twice the parameters.

        Args:
            vector: `(local_size,)`, parameters flattened one after another in the order of `named_parameters()`.
            out: Another vector, which is overwritten with the product: that spares new memory, but under FSDP2.

        Returns:
            A vector of the same shape, which is new or `out`.

        Raises:
            ValueError: A wrong vector, or a loss or product that is not finite; see `checks`.
        """
        check_vector("the Hessian", vector, self.local_size, self.dtype)
        if out is not None:
            check_vector("out", out, self.local_size, self.dtype)
            if out.data_ptr() == vector.data_ptr():
                raise ValueError("out is the vector itself, which the product needs to the end: give another one")
        (flat, products), total = self.layout.allocate(out), 0.0
        with self._graphs.open(products) as (leaves, gradients):
            vectors = self.layout.gather(vector)
            for gradient in gradients:
                if edges := gradient.edges:
                    # Not accumulated in leaves, which takes a tenth longer for the same memory.
                    seconds: tuple[Tensor | None, ...] = torch.autograd.grad(
                        list(edges.values()),
                        [leaves[name] for name in products],
                        [vectors[name] for name in edges],
                        retain_graph=gradient.is_kept,
                        allow_unused=True,
                    )
                    for product, second in zip(products.values(), seconds, strict=True):
                        if second is not None:
                            product.add_(second)
                    del seconds, second
                total += gradient.weight
                del gradient, edges
            del leaves, vectors
        result = self.layout.reduce(flat, products)
        self._divide_(result, total)
        check_finite(result, "the product with the Hessian")
        return result

    @torch.inference_mode(False)
    def block_products(self, vectors: Mapping[str, Tensor], blocks: Sequence[ParameterBlock]) -> dict[str, Tensor]:
        """Principal blocks times vectors; all share one forward and one first backward pass of a batch.

        Each vector costs a second backward pass, through the part of the graph between the block's parameter and the
        loss. Under DDP and FSDP2 each rank has all of each vector, and all products share one all-reduce.

        Args:
            vectors: By the name of the block: `(b,)`, or `(k, b)` for k vectors at once.
            blocks: Blocks that `vectors` names; others are left out.

        Returns:
            Products of the same names and shapes.

        Raises:
            ValueError: An unknown block, a wrong vector, or a loss or product that is not finite.
        """
        by_name = {block.name: block for block in blocks}
        check_block_names(vectors, by_name)
        chosen = [by_name[name] for name in vectors]
        for block in chosen:
            check_vector(block.name, vectors[block.name], self.block_size(block), self.dtype, rows=True)
        sizes = [vectors[block.name].numel() for block in chosen]
        flat, total = torch.zeros(sum(sizes), dtype=self.dtype, device=self.device), 0.0
        products = {
            block.name: part.view(vectors[block.name].shape)
            for block, part in zip(chosen, flat.split(sizes), strict=True)
        }
        names = list(dict.fromkeys(block.parameter for block in chosen))
        with self._graphs.open(names) as (leaves, gradients):
            for gradient in gradients:
                for block in chosen:
                    if edge := gradient.edges.get(block.parameter):
                        rows = zip(_rows(products[block.name]), _rows(vectors[block.name]), strict=True)
                        for product, vector in rows:
                            _add_block_product(product, edge, leaves[block.parameter], block, vector)
                total += gradient.weight
                del gradient, edge
        self.layout.all_reduce(flat)
        self._divide_(flat, total)
        for name, product in products.items():
            check_finite(product, f"the product with block {name}")
        return products

    def _divide_(self, product: Tensor, weight: float) -> None:
        """Turn the sum over batches into what `reduction` asks for."""
        if self._total_weight is None:
            total = torch.tensor(weight, dtype=torch.float64, device=self.device)
            self.layout.all_reduce(total)
            self._total_weight = (weight, total.item())
        own, everywhere = self._total_weight
        if own != weight:
            raise ValueError(f"a pass over the batches weighed {weight}, the first one {own}: use a list of batches")
        if everywhere <= 0:
            raise ValueError("batches is empty, on all ranks: give at least one batch")
        if self.reduction == "mean":
            product.div_(everywhere)


def _add_block_product(
    product: Tensor, edge: GradientEdge, leaf: Tensor, block: ParameterBlock, vector: Tensor
) -> None:
    """Add the product with one batch's block to `product`."""
    if block.index is None:
        whole = vector.view(leaf.shape)
    else:
        index = block.index.to(leaf.device)
        whole = torch.zeros_like(leaf, requires_grad=False, memory_format=torch.contiguous_format)
        whole.view(-1)[index] = vector
    (second,) = torch.autograd.grad(edge, leaf, whole, retain_graph=True, allow_unused=True)
    if second is not None:
        second = second.reshape(-1)
        product.add_(second if block.index is None else second[index])


def _rows(vectors: Tensor) -> Tensor:
    return vectors if vectors.dim() == 2 else vectors.unsqueeze(0)


def _one(_: Any) -> float:
    return 1.0


def _dtype_of(parameters: Mapping[str, Tensor]) -> torch.dtype:
    dtypes = {parameter.dtype for parameter in parameters.values()}
    chosen = torch.float64 if dtypes == {torch.float64} else torch.float32
    if dtypes != {chosen}:
        _logger.info("parameters in %s: Hessian-vector products are computed in float32", sorted(map(str, dtypes)))
    return chosen


def _groups(
    model: nn.Module, parameters: Mapping[str, Tensor], group: ProcessGroup | None
) -> list[ProcessGroup | None]:
    """The groups of ranks that have batches of their own."""
    meshes = {mesh for p in parameters.values() if (mesh := getattr(p, "device_mesh", None)) is not None}
    if len(meshes) > 1:
        raise ValueError("parameters on several device meshes: shard all of the model over one")
    found: list[ProcessGroup | None] = [mesh.get_group(i) for mesh in meshes for i in range(mesh.ndim)]
    if isinstance(model := getattr(model, "_orig_mod", model), DistributedDataParallel):
        found = [model.process_group]
    if group is not None:
        if found:
            raise ValueError("group is for a model that neither DDP nor FSDP2 has wrapped: leave it out")
        found = [group]
    return found
