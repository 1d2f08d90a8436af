"""AdamMini in the Trainer of transformers, and in those of TRL and axolotl, which are made of it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainingArguments, __version__

from lightning_adam_mini.optim import AdamMini

__all__ = ["AdamMiniFactory"]

FACTORIES_SINCE = "5.2"
"""The first version of transformers whose Trainer calls factories."""


class AdamMiniFactory:
    """Builds AdamMini from the model of a Trainer: `optimizer_cls_and_kwargs=(AdamMiniFactory, {"args": args, ...})`.

    A Trainer gives a factory the model and the options, and nothing of its `TrainingArguments`. So these are an option.

    Raises:
        ValueError: This version of transformers knows no factories.

    Example:
        >>> args = TrainingArguments("runs", learning_rate=1e-4, weight_decay=0.1)
        >>> optimizer = AdamMiniFactory()(nn.Linear(4, 2), args, partition="factored")
        >>> optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]
        (0.0001, 0.1)
    """

    def __init__(self, *given: Any, **options: Any) -> None:
        if given or options:  # as an optimizer class gets them
            raise ValueError(
                f"transformers {__version__} takes AdamMiniFactory for an optimizer class; factories need transformers "
                f"{FACTORIES_SINCE}, or call annotate(model) and pass optimizer_cls_and_kwargs=(AdamMini, ...)"
            )

    def __call__(self, model: nn.Module, args: TrainingArguments | None = None, **options: Any) -> AdamMini:
        """Build the optimizer of a model.

        Args:
            model: The model, wrapped or not.
            args: What `lr`, `betas`, `eps` and `weight_decay` are taken from where `options` do not have them. axolotl
                gives it by itself.
            options: Arguments of `AdamMini`.

        Returns:
            The optimizer.

        Raises:
            ValueError: Neither `args` nor a learning rate and a weight decay are given, no parameter requires a
                gradient, or what `AdamMini` refuses.
        """
        if args is None:
            if missing := [name for name in ("lr", "weight_decay") if name not in options]:
                raise ValueError(
                    f"AdamMiniFactory got no {' and no '.join(missing)}, since a Trainer does not hand over its "
                    'TrainingArguments: pass optimizer_cls_and_kwargs=(AdamMiniFactory, {"args": args, ...})'
                )
        elif not isinstance(args, TrainingArguments):
            raise ValueError(f"args must be the TrainingArguments of the Trainer, not an object of {type(args)}")
        else:
            options = {
                "lr": args.learning_rate,
                "betas": (args.adam_beta1, args.adam_beta2),
                "eps": args.adam_epsilon,
                "weight_decay": args.weight_decay,
            } | options
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("no parameter of the model requires a gradient: call requires_grad_() on what is trained")
        return AdamMini(model, **options)
