"""The loss as a function of the parameters, in a form that can be differentiated twice.

The model is taken out of its wrappers, attention runs on a kernel with second derivatives, and the loss is computed at
leaves that stand in for the parameters, so that the model stays as it was. Input that has no well-defined Hessian is
refused before the work.
"""

from __future__ import annotations

import copy
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

__all__ = ["Leaves", "LossOfParameters", "check_batches", "check_model", "place", "tensors_of", "unwrap"]

_logger = logging.getLogger(__name__)

_RANDOM_SAMPLERS = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
# As transformers names them; "sdpa" and "eager" have second derivatives.
_FUSED_ATTENTION = ("flash", "flex", "paged", "kernels-community")
_DROPOUT_ATTRIBUTES = ("p", "drop_prob", "dropout", "attention_dropout", "attn_dropout", "dropout_p")
SAME_LOSS = 1e-3
"""Relative change of a batch's loss between two passes that rounding on a GPU explains; dropout changes it more."""
# The file of the wrapper that once_differentiable puts around a backward pass.
_ONCE_FILE = once_differentiable.__code__.co_filename
# How torch says that an operation cannot be differentiated twice.
_REFUSALS = ("derivative for", "double backward", "does not support double", "CompiledFunction")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TENSOR_PARALLEL = "tensor parallelism is not supported here: take the whole model, or one that FSDP2 alone shards"


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
        model: Without wrappers, see `unwrap`; FSDP2 may have sharded it.
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
        self._is_sharded = _is_fully_sharded(model)
        self._first_losses: list[float] = []
        self._attention_logged = False

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Compute derivatives inside: autocast and `no_grad` of the caller do not apply there.

        Raises:
            ValueError: An operation of the model has no second derivative.
        """
        with ExitStack() as stack:
            device_type = next(self._model.parameters()).device.type
            stack.enter_context(torch.autocast(device_type, enabled=False))
            if any(_is_compiled(module) for module in self._model.modules()):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(_twice_differentiable())
            stack.enter_context(torch.enable_grad())
            yield

    def leaves(self, trainable: Iterable[str]) -> Leaves:
        """The leaves of all parameters; those named in `trainable` require a gradient.

        On the first pass all trainable parameters do, so that a loss that depends on none of them is found. Under FSDP2
        each rank gathers the whole parameters.
        """
        names = set(trainable) if self._first_losses else None
        model = _without_fsdp2(self._model) if self._is_sharded else self._model
        found = {}
        for name, parameter in model.named_parameters():
            requires_grad = parameter.requires_grad if names is None else name in names
            found[name] = self._copy(parameter).requires_grad_(requires_grad)
        return Leaves(found, _Loss(model, self._loss_fn))

    def losses(self, leaves: Leaves, *, skip: int = 0) -> Iterator[tuple[float, Tensor]]:
        """Weight and loss of each batch, at the leaves.

        Args:
            leaves: Of all parameters.
            skip: Number of leading batches to leave out.

        Raises:
            ValueError: There is no batch; a loss is not a finite scalar that depends on the parameters, or differs from
                that of the first pass.
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
            loss = _check_loss(self._call(leaves.module, values, batch), must_depend=is_first_pass)
            if is_first_pass and not number:
                _check_functions(loss)
            self._check_value(number, loss.item())
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
        if self._attention_logged:
            return functional_call(module, values, (batch,))
        with _AttentionSpy() as spy:
            loss = functional_call(module, values, (batch,))
        if spy.seen:
            _logger.info(
                "scaled_dot_product_attention runs on torch's math kernel here: flash, memory-efficient and cuDNN "
                "attention have no second derivatives. Attention matrices take batch x heads x length^2 elements."
            )
        self._attention_logged = True
        return loss

    def _check_value(self, number: int, loss: float) -> None:
        """Reject a loss that is not finite, or that changes between passes over the same batch and parameters."""
        if not math.isfinite(loss):
            raise ValueError(f"the loss of batch {number} is {loss}: check the weights and the batch, or use float64")
        if number == len(self._first_losses):
            self._first_losses.append(loss)
        if number >= len(self._first_losses):
            return
        before = self._first_losses[number]
        if abs(loss - before) > SAME_LOSS * max(abs(before), abs(loss)):
            raise ValueError(
                f"the loss of batch {number} changed from {before:.8g} to {loss:.8g} between two passes with the same "
                "parameters: turn off dropout (model.eval()), shuffling and augmentation, and keep the weights as they "
                "are"
            )

    def _copy(self, tensor: Tensor, *, clone: bool = False) -> Tensor:
        """The values of a tensor without its history, whole and in the dtype of the computation."""
        with torch.no_grad():
            values = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()
            if values.is_floating_point():
                values = values.to(self._dtype)
            return values.clone() if clone and values.data_ptr() == tensor.data_ptr() else values


def place(batch: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """A batch with its tensors on `device` and its floating-point ones in `dtype`.

    Tensors are found in mappings, lists, tuples, dataclasses, and objects with an `apply` such as a graph of PyTorch
    Geometric. Other objects pass as they are. Nothing of the batch is changed in place.

    Args:
        batch: Whatever the loss function takes.
        device: Of the model.
        dtype: None keeps the dtype of floating-point tensors.
    """
    return _map_tensors(batch, lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors that `place` finds in a batch, in order."""
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _map_tensors(batch, collect)
    return found


def _map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a batch with a function applied to each of its tensors."""
    match batch:
        case Tensor():
            return function(batch)
        case dict():
            return {key: _map_tensors(value, function) for key, value in batch.items()}
        case Mapping():
            mapped = copy.copy(batch)
            for key, value in batch.items():
                mapped[key] = _map_tensors(value, function)  # type: ignore[index]
            return mapped
        case tuple() if hasattr(batch, "_fields"):
            return type(batch)(*(_map_tensors(value, function) for value in batch))
        case list() | tuple():
            return type(batch)(_map_tensors(value, function) for value in batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        changed = {f.name: _map_tensors(getattr(batch, f.name), function) for f in fields(batch) if f.init}
        return replace(batch, **changed)
    if callable(getattr(batch, "apply", None)):
        return copy.copy(batch).apply(lambda value: _map_tensors(value, function))
    return batch


def check_model(model: nn.Module) -> None:
    """Reject attention without second derivatives, and dropout.

    Batch norm in train mode passes: the loss of a batch is then a smooth function of the parameters too, whose Hessian
    has terms between the samples of the batch. Its running statistics stay as they are, since products work on copies.

    Raises:
        ValueError: A fused attention of transformers, or a module that drops at random.
    """
    for name, module in model.named_modules():
        attention = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if isinstance(attention, str) and any(fused in attention for fused in _FUSED_ATTENTION):
            raise ValueError(
                f"{name or type(module).__name__} uses {attention}, which has no second derivatives: build the model "
                "with attn_implementation='sdpa' or 'eager'"
            )
        if module.training and (rate := _dropout_rate(module)):
            raise ValueError(
                f"{name or type(module).__name__} drops at random (rate {rate}), so that each product would have "
                "another Hessian: call model.eval() first"
            )


def _dropout_rate(module: nn.Module) -> float:
    is_layer = "drop" in type(module).__name__.lower()
    names = _DROPOUT_ATTRIBUTES if is_layer else _DROPOUT_ATTRIBUTES[2:]
    rates = [getattr(module, name, None) for name in names]
    return max((float(rate) for rate in rates if isinstance(rate, int | float)), default=0.0)


def check_batches(batches: Iterable[Any]) -> None:
    """Reject batches that are not the same on each pass.

    Raises:
        ValueError: An iterator, which one pass exhausts; a random sampler; or other tensors on a second pass.
    """
    if isinstance(batches, Iterator):
        raise ValueError("batches is an iterator, which one pass uses up: give a list of batches or a data loader")
    for source in (batches, getattr(batches, "batch_sampler", None)):
        sampler = getattr(source, "sampler", None)
        if isinstance(sampler, _RANDOM_SAMPLERS):
            raise ValueError(
                f"the data loader draws its samples at random ({type(sampler).__name__}), so that each product would "
                "have another Hessian: use shuffle=False, or a list of batches"
            )
    if isinstance(batches, Sequence):
        return
    first, second = (next(iter(batches), None) for _ in range(2))
    pairs = zip(tensors_of(first), tensors_of(second), strict=True)
    if not all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs):
        raise ValueError(
            "two passes over the data give different batches (shuffling or augmentation): turn it off, or give a list "
            "of batches"
        )


def _check_loss(loss: object, *, must_depend: bool) -> Tensor:
    """The loss as a scalar; it must be one, and depend on a parameter where `must_depend`."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn(model, batch) must return a scalar tensor, not {what}: return loss.mean() or .sum()")
    if must_depend and not loss.requires_grad:
        raise ValueError(
            "the loss does not depend on a trainable parameter: loss_fn must call the model that it is given, without "
            "no_grad or detach, and some parameter must have requires_grad=True"
        )
    return loss.reshape(())


class _AttentionSpy(TorchFunctionMode):
    """Notes whether `scaled_dot_product_attention` is called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen = self.seen or func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def _check_functions(loss: Tensor) -> None:
    """Reject operations whose second derivatives torch would leave out of a product without an error.

    A custom function that is marked `once_differentiable` raises only where its gradient is differentiated directly;
    with chosen inputs autograd skips it, and the product lacks its part.
    """
    stack: list[Any] = [loss.grad_fn]
    seen: set[Any] = {None}
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        stack.extend(following for following, _ in node.next_functions)
        function = getattr(node, "_forward_cls", None)
        if function is None:
            continue
        if getattr(getattr(function.backward, "__code__", None), "co_filename", "") == _ONCE_FILE:
            raise ValueError(
                f"{function.__name__} has no second derivative (once_differentiable), which Hessian-vector products "
                "need; use its plain PyTorch form"
            )
        warnings.warn(
            f"{function.__name__} is a custom function: the Hessian is right only if its backward pass is made of "
            "operations that autograd can differentiate; if not, use its plain PyTorch form",
            stacklevel=2,
        )


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Attention on torch's math kernel, and a clear error where another operation has no second derivative."""
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        if any(refusal in str(error) for refusal in _REFUSALS):
            raise ValueError(
                "an operation of the model has no second derivative, which Hessian-vector products need; use its plain "
                f"PyTorch form (attn_implementation='eager', no compiled, fused or cuDNN kernel): {error}"
            ) from error
        raise


def unwrap(model: Any) -> nn.Module:
    """The module under DDP and `torch.compile`, whose double backward torch does not support.

    FSDP2 leaves the parameters of the root gathered after a forward pass; they are sharded again here.

    Raises:
        ValueError: FSDP1, which flattens parameters, or tensor parallelism.
    """
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            break
    if any(hasattr(module, "_fsdp_wrapped_module") for module in model.modules()):
        raise ValueError("FSDP1 flattens parameters: shard the model with fully_shard (FSDP2), or use DDP")
    if _is_fully_sharded(model):
        _without_fsdp2(model)
    elif any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise ValueError(_TENSOR_PARALLEL)
    return model


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _is_fully_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded the module or one in it."""
    if "torch.distributed.fsdp" not in sys.modules:
        return False  # without the import, which is slow
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def _without_fsdp2(model: nn.Module) -> nn.Module:
    """A module tree with the same parameters and buffers, but without FSDP2 and its hooks.

    FSDP2's hooks free gathered parameters after the forward pass and reduce gradients outside of autograd: neither
    survives a double backward. The copy shares everything with the model but the containers that say what belongs to a
    module, so it costs no memory.

    Raises:
        ValueError: A module with hooks of tensor parallelism.
    """
    from torch.distributed.fsdp import FSDPModule

    copies: dict[int, nn.Module] = {}

    def copied(module: nn.Module) -> nn.Module:
        if id(module) in copies:
            return copies[id(module)]
        plain: Any = next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))
        twin: nn.Module = plain.__new__(plain)
        copies[id(module)] = twin
        twin.__dict__ = dict(module.__dict__)
        for name in ("_parameters", "_buffers"):
            twin.__dict__[name] = dict(module.__dict__[name])
        for name in _HOOKS:
            hooks = module.__dict__[name]
            twin.__dict__[name] = type(hooks)((key, hook) for key, hook in hooks.items() if not _is_fsdp2_hook(hook))
        twin.__dict__["_modules"] = {
            name: None if child is None else copied(child) for name, child in module._modules.items()
        }
        return twin

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return copied(model)


def _is_fsdp2_hook(hook: Callable[..., Any]) -> bool:
    home = getattr(getattr(hook, "func", hook), "__module__", None) or ""
    if home.startswith("torch.distributed.tensor"):
        raise ValueError(_TENSOR_PARALLEL)
    return home.startswith("torch.distributed.fsdp")
