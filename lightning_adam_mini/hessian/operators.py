"""Exact products of a model's Hessian with vectors, by double backward (the identity is Pearlmutter's, 1994).

A product with a linear layer's Hessian takes nine matrix products: one in the forward pass, two in the first backward
pass, six in the second. Only the second depends on the vector. Where the graphs of the first backward pass are kept, a
product takes these six, as many as two training passes.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel

from lightning_adam_mini.hessian.loss import Leaves, LossOfParameters, check_batches, check_model, unwrap
from lightning_adam_mini.hessian.vectors import ParameterBlock, VectorLayout, check_block_names, check_vector

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["HessianOperator"]

_logger = logging.getLogger(__name__)


class HessianOperator:
    """The Hessian of a loss over batches, as an operator on vectors.

    `H v = d/dθ <∇L(θ), v>`: the gradient is computed with its graph, which is differentiated once more. Products are
    computed at leaves that stand in for the parameters (`torch.func.functional_call`). So the model keeps its
    gradients, mode, buffers and dtype, also after an error, and float64 needs no second model: only values are copied,
    for the time of a product. A model that casts to float32 internally stays as inexact as that.

    `torch.func.hessian` and curvlinops are no alternatives: the vmap in their `jacrev` gives wrong second derivatives
    through layer and batch norm with weights (torch 2.15: not even symmetric, off by 1 to 24 %).

    Tied parameters count once, frozen ones not at all. A parameter that the loss does not reach has zero rows. Batches
    are moved to the parameters' device, and cast where the dtype is not the model's.

    Under DDP each rank has its own batches, and one all-reduce sums the products over ranks. Under FSDP2 a rank's
    vectors are its shards (see `VectorLayout`), but during a product each rank holds the whole parameters and the whole
    vector in addition to what `product` takes, four times the parameters: FSDP2's hooks do not survive a double
    backward.

    Args:
        model: May be wrapped by DDP, FSDP2 or `torch.compile`; the compiled code is not used.
        loss_fn: Takes the model, without wrappers, and a batch; returns a scalar.
        batches: A sequence, or an iterable that gives the same batches on each pass.
        reduction: "mean" over batches, or "sum", as the public code of the paper does (eigenvalues then grow with the
            number of batches).
        dtype: torch.float32 or torch.float64; by default float64 if all parameters are, else float32.
        weight: Of a batch in the mean or sum, such as its number of samples or tokens where batches differ in them and
            the loss is a mean over them; 1 by default.
        group: Ranks with batches of their own, for a model that neither DDP nor FSDP2 wraps.

    Raises:
        ValueError: Unknown options; a model, batches or a loss without a well-defined Hessian (see `loss`); or no
            trainable parameter.
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
            raise ValueError(
                f"dtype must be torch.float32 or torch.float64, not {dtype}: lower precision has no use here"
            )
        plain = unwrap(model)
        check_model(plain)
        check_batches(batches)
        parameters = {name: p for name, p in plain.named_parameters() if p.requires_grad}
        if not parameters:
            raise ValueError("the model has no trainable parameter: set requires_grad on those whose Hessian is wanted")
        self.layout = VectorLayout(parameters, _groups(model, parameters, group), dtype or _dtype_of(parameters))
        self.reduction = reduction
        loss = LossOfParameters(plain, loss_fn, batches, weight or (lambda _: 1.0), self.layout.dtype)
        self._graphs = _GradientGraphs(loss)
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
        numel, index = self.layout.shapes[block.parameter].numel(), block.index
        if index is None:
            return numel
        if int(index.max()) >= numel or int(index.min()) < 0:
            raise ValueError(f"{block.name}: positions {int(index.min())} to {int(index.max())} of {numel} elements")
        return index.numel()

    def keep_graphs(self, budget_bytes: int) -> AbstractContextManager[None]:
        """Within the context, products share the forward and first backward pass of as many batches as fit.

        A product with a batch whose graph is kept takes about as long as two training passes, else two thirds longer.
        The parameters must not change within the context.

        Args:
            budget_bytes: For what the graphs hold on to, and for the parameters where these are in another dtype or
                gathered from other ranks; per rank. With 0 nothing is kept.
        """
        return self._graphs.keep(budget_bytes)

    @torch.inference_mode(False)
    def product(self, vector: Tensor, *, out: Tensor | None = None) -> Tensor:
        """The Hessian times a vector.

        Memory beyond the model, its activations and `vector`: the result, and what the second backward pass collects
        before it can add it to the result; twice the parameters.

        Args:
            vector: `(local_size,)`, parameters flattened one after another in the order of `named_parameters()`.
            out: Another vector, which is overwritten with the product; without FSDP2 this avoids an allocation.

        Returns:
            A vector of the same shape, which is new or `out`.

        Raises:
            ValueError: A wrong vector, or a loss or product that is not finite.
        """
        check_vector("the Hessian", vector, self.local_size, self.dtype)
        if out is not None:
            check_vector("out", out, self.local_size, self.dtype)
            if out.data_ptr() == vector.data_ptr():
                raise ValueError("out is the vector itself, which the product still needs: give another one")
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
        _check_finite(result, "the product with the Hessian")
        return result

    @torch.inference_mode(False)
    def block_products(self, vectors: Mapping[str, Tensor], blocks: Sequence[ParameterBlock]) -> dict[str, Tensor]:
        """Principal blocks times vectors; all share one forward and one first backward pass of each batch.

        Each vector costs a second backward pass, through the part of the graph between the block's parameter and the
        loss. Under DDP and FSDP2 each rank has all of each vector, and all products share one all-reduce.

        Args:
            vectors: By the name of the block: `(b,)`, or `(k, b)` for k vectors at once.
            blocks: Blocks that `vectors` names; others are ignored.

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
        self.layout.all_reduce(flat)  # all blocks together
        self._divide_(flat, total)
        for name, product in products.items():
            _check_finite(product, f"the product with block {name}")
        return products

    def _divide_(self, product: Tensor, weight: float) -> None:
        """Turn the sum over batches into what `reduction` asks for."""
        if self._total_weight is None:  # the first product: all ranks are here, and later ones need no collective
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


def _check_finite(product: Tensor, what: str) -> None:
    if product.numel() and not all(math.isfinite(extreme.item()) for extreme in torch.aminmax(product)):
        raise ValueError(
            f"{what} is not finite although the loss is: a second derivative overflows or does not exist at a point "
            "(a norm or square root at 0); use float64, or add an epsilon under the root"
        )


def _dtype_of(parameters: Mapping[str, Tensor]) -> torch.dtype:
    dtypes = {parameter.dtype for parameter in parameters.values()}
    chosen = torch.float64 if dtypes == {torch.float64} else torch.float32
    if dtypes != {chosen}:
        _logger.info("parameters in %s: Hessian-vector products are computed in float32", sorted(map(str, dtypes)))
    return chosen


def _groups(
    model: nn.Module, parameters: Mapping[str, Tensor], group: ProcessGroup | None
) -> list[ProcessGroup | None]:
    """The process groups whose ranks have batches of their own."""
    meshes = {mesh for p in parameters.values() if (mesh := getattr(p, "device_mesh", None)) is not None}
    if len(meshes) > 1:
        raise ValueError("parameters on several device meshes: shard all of the model over one")
    found: list[ProcessGroup | None] = [mesh.get_group(i) for mesh in meshes for i in range(mesh.ndim)]
    if isinstance(model := getattr(model, "_orig_mod", model), DistributedDataParallel):
        found = [model.process_group]
    if group is not None:
        if found:
            raise ValueError("group is for a model that neither DDP nor FSDP2 wraps: leave it out")
        found = [group]
    return found


@dataclass(frozen=True, eq=False)
class _BatchGradient:
    """The gradient of one batch's loss, times the weight of the batch.

    Args:
        weight: Of the batch.
        edges: By the name of the parameter, where the graph of its gradient ends; the gradient itself is freed.
            Gradients that depend on no parameter, where the loss is linear or does not reach, have none.
        is_kept: Whether the graph is used again.
    """

    weight: float
    edges: dict[str, GradientEdge]
    is_kept: bool = False


@dataclass(eq=False)
class _KeptGraphs:
    """Graphs of the first batches, with the leaves that they end at."""

    leaves: Leaves
    names: frozenset[str]
    versions: list[int]
    gradients: list[_BatchGradient] = field(default_factory=list)
    is_filled: bool = False


class _GradientGraphs:
    """Gradients of the batches' losses with their graphs, built for one product or kept for many.

    Args:
        loss: As a function of the parameters.
    """

    def __init__(self, loss: LossOfParameters) -> None:
        self._loss = loss
        self._budget = 0
        self._kept: _KeptGraphs | None = None

    @contextmanager
    def keep(self, budget_bytes: int) -> Iterator[None]:
        """See `HessianOperator.keep_graphs`."""
        before, self._budget, self._kept = (self._budget, self._kept), budget_bytes, None
        try:
            yield
        finally:
            self._budget, self._kept = before

    @contextmanager
    def open(self, names: Iterable[str]) -> Iterator[tuple[dict[str, Tensor], Iterator[_BatchGradient]]]:
        """The leaves by name, and the gradients of all batches with respect to these leaves.

        Raises:
            ValueError: As in `LossOfParameters`; or the parameters have changed since graphs were kept.
        """
        wanted = frozenset(names)
        with self._loss.evaluating():
            kept = self._reusable(wanted)
            leaves = kept.leaves if kept else self._loss.leaves(wanted)
            if kept is None and self._budget > 0:
                kept = self._kept = _KeptGraphs(leaves, wanted, self._loss.versions())
            inputs = {name: leaf for name, leaf in leaves.tensors.items() if name in wanted}
            yield inputs, self._gradients(leaves, inputs, kept)

    def _reusable(self, wanted: frozenset[str]) -> _KeptGraphs | None:
        kept = self._kept
        if kept is None or not kept.is_filled or not wanted <= kept.names:
            return None
        if kept.versions != self._loss.versions():
            raise ValueError("the parameters changed while graphs of their gradients are kept: end keep_graphs first")
        return kept

    def _gradients(
        self, leaves: Leaves, inputs: dict[str, Tensor], kept: _KeptGraphs | None
    ) -> Iterator[_BatchGradient]:
        if kept is not None and not kept.is_filled:
            yield from self._fill(kept, inputs)
            return
        known = kept.gradients if kept else []
        yield from known
        for weight, loss in self._loss.losses(leaves, skip=len(known)):
            yield _BatchGradient(weight, _edges(loss * weight, inputs))

    def _fill(self, kept: _KeptGraphs, inputs: dict[str, Tensor]) -> Iterator[_BatchGradient]:
        """The gradients of all batches; the first ones are kept as long as they fit."""
        saved = _SavedBytes(self._loss.storages())
        for leaf in kept.leaves.tensors.values():
            saved.add(*_memory(leaf))
        losses, fits = self._loss.losses(kept.leaves), True
        while True:
            with saved.counting() if fits else nullcontext():
                if (following := next(losses, None)) is None:
                    break
                weight, loss = following
                edges = _edges(loss * weight, inputs)
                del following, loss
            gradient = _BatchGradient(weight, edges, fits := fits and saved.total <= self._budget)
            del edges
            if gradient.is_kept:
                kept.gradients.append(gradient)
            yield gradient
            del gradient
        kept.is_filled = True


class _SavedBytes:
    """Bytes of the memory that graphs hold on to, as long as they do.

    Args:
        known: Addresses of memory that does not count, since it exists anyway.
    """

    def __init__(self, known: set[int]) -> None:
        self._known = known
        self._uses: Counter[int] = Counter()
        self.total = 0

    def counting(self) -> saved_tensors_hooks:
        """Within the context, count what autograd saves for a backward pass, until it is freed."""
        return saved_tensors_hooks(self._pack, _Saved.unpack)

    def add(self, address: int, num_bytes: int) -> None:
        """Count memory, once for each address."""
        if address not in self._known:
            self.total += num_bytes if not self._uses[address] else 0
            self._uses[address] += 1

    def remove(self, address: int, num_bytes: int) -> None:
        """Undo one `add`."""
        if address not in self._known:
            self._uses[address] -= 1
            self.total -= num_bytes if not self._uses[address] else 0

    def _pack(self, tensor: Tensor) -> _Saved:
        return _Saved(tensor, self)


class _Saved:
    """A tensor that a graph has saved."""

    def __init__(self, tensor: Tensor, counter: _SavedBytes) -> None:
        # Detached: the tensor itself may keep alive the graph that keeps this alive. Autograd links it again.
        self._tensor, self._version, self._counter = tensor.detach(), tensor._version, counter
        self._memory = _memory(tensor)
        counter.add(*self._memory)

    def __del__(self) -> None:
        """The graph, or this part of it, was freed."""
        self._counter.remove(*self._memory)

    def unpack(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: It was written to in the meantime; torch leaves this check to hooks.
        """
        if self._tensor._version != self._version:
            shape = tuple(self._tensor.shape)
            raise RuntimeError(f"a tensor {shape} that the gradient needs was modified by an inplace operation")
        return self._tensor


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Address and bytes."""
    if tensor.layout is not torch.strided:  # a sparse tensor has no address of its own
        return id(tensor), tensor._nnz() * (tensor.element_size() + 8 * tensor.dim())
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _edges(loss: Tensor, inputs: dict[str, Tensor]) -> dict[str, GradientEdge]:
    if not loss.requires_grad:
        return {}
    grads: tuple[Tensor | None, ...] = torch.autograd.grad(
        loss, list(inputs.values()), create_graph=True, allow_unused=True
    )
    found = zip(inputs, grads, strict=True)
    return {name: get_gradient_edge(grad) for name, grad in found if grad is not None and grad.requires_grad}
