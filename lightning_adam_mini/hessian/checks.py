"""Bad input to the Hessian: each is one line, before the work starts, that says what to do instead."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from lightning_adam_mini.hessian.batches import tensors_of

__all__ = [
    "check_batches",
    "check_block_names",
    "check_finite",
    "check_index",
    "check_loss",
    "check_model",
    "check_same_loss",
    "check_steps",
    "check_vector",
]

_RANDOM_SAMPLERS = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
# As transformers names them; "sdpa" and "eager" have second derivatives.
_FUSED_ATTENTION = ("flash", "flex", "paged", "kernels-community")
_DROPOUT_ATTRIBUTES = ("p", "drop_prob", "dropout", "attention_dropout", "attn_dropout", "dropout_p")
SAME_LOSS = 1e-3
"""Relative change of a batch's loss between two passes that rounding on a GPU explains; dropout changes it more."""


def check_model(model: nn.Module) -> None:
    """Refuse attention without second derivatives and dropout.

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
        if module.training and (rate := _dropout(module)):
            raise ValueError(
                f"{name or type(module).__name__} drops at random (rate {rate}), so that each product would have "
                "another Hessian: call model.eval() first"
            )


def _dropout(module: nn.Module) -> float:
    is_layer = "drop" in type(module).__name__.lower()
    names = _DROPOUT_ATTRIBUTES if is_layer else _DROPOUT_ATTRIBUTES[2:]
    rates = [getattr(module, name, None) for name in names]
    return max((float(rate) for rate in rates if isinstance(rate, int | float)), default=0.0)


def check_batches(batches: Iterable[Any]) -> None:
    """Refuse what does not give the same batches on each pass.

    Raises:
        ValueError: An iterator that is used up, a sampler that draws, no batches, or other tensors on a second pass.
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


def check_loss(loss: object, *, depends: bool) -> Tensor:
    """The loss, if it is a scalar tensor that can be differentiated.

    Args:
        loss: What the loss function returned.
        depends: Whether it must depend on a parameter.

    Raises:
        ValueError: It is something else, or does not depend on the model's parameters.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn(model, batch) must return a scalar tensor, not {what}: return loss.mean() or .sum()")
    if depends and not loss.requires_grad:
        raise ValueError(
            "the loss does not depend on a parameter that takes a gradient: loss_fn must call the model that it is "
            "given, without no_grad or detach, and some parameter must have requires_grad=True"
        )
    return loss.reshape(())


def check_same_loss(number: int, before: float, after: float) -> None:
    """Refuse a batch whose loss changes between passes, where neither parameters nor data should.

    Raises:
        ValueError: The loss of batch `number` changed, or is not finite.
    """
    if not math.isfinite(after):
        raise ValueError(f"the loss of batch {number} is {after}: check the weights and the batch, or use float64")
    if abs(after - before) > SAME_LOSS * max(abs(before), abs(after)):
        raise ValueError(
            f"the loss of batch {number} changed from {before:.8g} to {after:.8g} between two passes with the same "
            "parameters: turn off dropout (model.eval()), shuffling and augmentation, and keep the weights as they are"
        )


def check_finite(product: Tensor, what: str) -> None:
    """Refuse a product with infinities or NaN.

    Raises:
        ValueError: The product is not finite, although the losses are.
    """
    if product.numel() and not all(math.isfinite(extreme.item()) for extreme in torch.aminmax(product)):
        raise ValueError(
            f"{what} is not finite although the loss is: a second derivative overflows or does not exist at a point "
            "(a norm or square root at 0); use float64, or add an epsilon under the root"
        )


def check_steps(steps: int, sizes: dict[str, int]) -> None:
    """Refuse more Lanczos steps than a matrix has rows.

    Args:
        steps: Lanczos steps.
        sizes: Rows by the name of the block.

    Raises:
        ValueError: Less than one step, or a block is smaller.
    """
    if steps < 1:
        raise ValueError(f"Lanczos needs at least one step, not {steps}")
    small = {name: size for name, size in sizes.items() if size < steps}
    if small:
        name, size = min(small.items(), key=lambda item: item[1])
        more = f" (and {len(small) - 1} more blocks)" if len(small) > 1 else ""
        raise ValueError(f"{steps} Lanczos steps for {name}, which has {size} parameters{more}: use at most {size}")


def check_block_names(names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a parameter that the model does not have.

    Args:
        names: Names that are asked for.
        known: Names of the trainable parameters.

    Raises:
        ValueError: One is not known; the message names the close ones.
    """
    available = list(known)
    for name in names:
        if name not in available:
            close = get_close_matches(name, available, n=3, cutoff=0.4) or available[:3]
            raise ValueError(
                f"there is no trainable parameter {name!r} (tied ones go by their first name); close ones: "
                f"{', '.join(close)}"
            )


def check_index(block: str, index: Tensor | None, numel: int) -> None:
    """Refuse positions outside of a parameter.

    Raises:
        ValueError: The largest position is not below `numel`, or the smallest is negative.
    """
    if index is not None and (int(index.max()) >= numel or int(index.min()) < 0):
        raise ValueError(f"{block}: positions {int(index.min())} to {int(index.max())} of {numel} elements")


def check_vector(name: str, vector: Tensor, size: int, dtype: torch.dtype, *, rows: bool = False) -> None:
    """Refuse a vector of the wrong shape or dtype.

    Args:
        name: What it is multiplied by, for the message.
        vector: `(size,)`, or `(k, size)` where `rows`.
        size: Number of elements.
        dtype: Of the operator.
        rows: Whether several vectors may come as rows.

    Raises:
        ValueError: The shape or the dtype is another.
    """
    fits = vector.dim() in ((1, 2) if rows else (1,)) and vector.shape[-1] == size
    if not fits or vector.dtype is not dtype:
        raise ValueError(
            f"{name} takes a vector ({size},){f' or rows (k, {size})' if rows else ''} in {dtype}, not "
            f"{tuple(vector.shape)} in {vector.dtype}"
        )
