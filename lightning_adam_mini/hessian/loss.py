"""The loss as a function of the parameters: on leaves of its own, so that the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_adam_mini.hessian.attention import AttentionSpy, check_functions, twice_differentiable
from lightning_adam_mini.hessian.batches import place
from lightning_adam_mini.hessian.checks import check_loss, check_same_loss
from lightning_adam_mini.hessian.wrapped import is_fully_sharded, plain_twin

__all__ = ["Leaves", "LossOfParameters"]


class _Loss(nn.Module):
    """The loss function as a forward pass, which `functional_call` can run with other parameters."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self.loss_fn(self.model, batch)


@dataclass(frozen=True, eq=False)
class Leaves:
    """Tensors that stand in for the parameters.

    Args:
        tensors: By name.
        module: The loss, which is computed with them.
    """

    tensors: dict[str, Tensor]
    module: _Loss


class LossOfParameters:
    """The losses of batches, at leaves that share the memory of the model's parameters or are copies in another dtype.

    Args:
        model: Without wrappers; FSDP2 may have sharded it.
        loss_fn: Takes the model and a batch, returns a scalar.
        batches: Gives the same batches on each pass.
        weight: Of a batch.
        dtype: Of the computation.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        batches: Iterable[Any],
        weight: Callable[[Any], float],
        dtype: torch.dtype,
    ) -> None:
        self._model, self._loss_fn, self._batches, self._weight, self._dtype = model, loss_fn, batches, weight, dtype
        # Batches stay as they are where the model does.
        converts = any(p.is_floating_point() and p.dtype is not dtype for p in model.parameters())
        self._batch_dtype = dtype if converts else None
        self._is_sharded = is_fully_sharded(model)
        self._first_losses: list[float] = []
        self._attention_told = False

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it derivatives are computed: autocast and `no_grad` of the caller do not reach inside.

        Attention runs on a kernel with second derivatives.

        Raises:
            ValueError: An operation of the model has no second derivative.
        """
        with ExitStack() as stack:
            device_type = next(self._model.parameters()).device.type
            stack.enter_context(torch.autocast(device_type, enabled=False))
            if any(_is_compiled(module) for module in self._model.modules()):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(twice_differentiable())
            stack.enter_context(torch.enable_grad())
            yield

    def leaves(self, trainable: Iterable[str]) -> Leaves:
        """The leaves of all parameters; those named require a gradient.

        On the first pass all do that take a gradient, so that a loss which depends on none of them is found. Under
        FSDP2 each rank gathers the whole parameters.
        """
        names = set(trainable) if self._first_losses else None
        model = plain_twin(self._model) if self._is_sharded else self._model
        found = {}
        for name, parameter in model.named_parameters():
            requires_grad = parameter.requires_grad if names is None else name in names
            found[name] = self._copy(parameter).requires_grad_(requires_grad)
        return Leaves(found, _Loss(model, self._loss_fn))

    def losses(self, leaves: Leaves, *, skip: int = 0) -> Iterator[tuple[float, Tensor]]:
        """Weight and loss of each batch, at the leaves.

        Args:
            leaves: Of all parameters.
            skip: The number of first batches that are left out.

        Raises:
            ValueError: There is no batch; a loss is no finite scalar of the parameters, or not what it was on the
                first pass.
        """
        # Copies of buffers: a batch norm in train mode moves its running statistics.
        buffers = {name: self._copy(buffer, clone=True) for name, buffer in leaves.module.model.named_buffers()}
        values = {f"model.{name}": value for name, value in (leaves.tensors | buffers).items()}
        device = next(iter(leaves.tensors.values())).device
        number, is_first_pass = -1, not self._first_losses
        for number, batch in enumerate(self._batches):
            if number < skip:
                continue
            weight = self._weight(batch)
            batch = place(batch, device, self._batch_dtype)
            loss = check_loss(self._call(leaves.module, values, batch), depends=is_first_pass)
            if is_first_pass and not number:
                check_functions(loss)
            self._compare(number, loss.item())
            yield weight, loss
            del loss
        if self._first_losses and number + 1 != len(self._first_losses):
            raise ValueError(f"a pass gave {number + 1} batches, the first one {len(self._first_losses)}: use a list")

    def storages(self) -> set[int]:
        """Addresses of the parameters' memory on this rank."""
        found = (getattr(p, "_local_tensor", p) for p in self._model.parameters())
        return {p.untyped_storage().data_ptr() for p in found}

    def versions(self) -> list[int]:
        """A number for each parameter that grows where torch writes to it in place."""
        return [0 if p.is_inference() else p._version for p in self._model.parameters()]

    def _call(self, module: nn.Module, values: dict[str, Tensor], batch: Any) -> Any:
        if self._attention_told:
            return functional_call(module, values, (batch,))
        with AttentionSpy() as spy:
            loss = functional_call(module, values, (batch,))
        spy.tell()
        self._attention_told = True
        return loss

    def _compare(self, number: int, value: float) -> None:
        if number == len(self._first_losses):
            check_same_loss(number, value, value)
            self._first_losses.append(value)
        elif number < len(self._first_losses):
            check_same_loss(number, self._first_losses[number], value)

    def _copy(self, tensor: Tensor, *, clone: bool = False) -> Tensor:
        """The values of a tensor without its history, whole and in the dtype of the computation."""
        with torch.no_grad():
            values = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()
            if values.is_floating_point():
                values = values.to(self._dtype)
            return values.clone() if clone and values.data_ptr() == tensor.data_ptr() else values


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
