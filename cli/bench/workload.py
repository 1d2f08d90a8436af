"""What a language model is trained with, as far as memory and throughput depend on it."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_adam_mini import factory
from lightning_adam_mini.factory import OptimizerFactory

from ...tasks.parallel.sharding import checkpoint_activations
from ..model_building import Source, quiet
from ..recipes import find_recipe, read_yaml
from .models import outline

__all__ = ["Workload", "factories", "workload"]

LONGEST = 4096


@dataclass(frozen=True)
class Workload:
    """A language model and how it is trained.

    Args:
        source: The task or model on the meta device, as the optimizer gets it.
        network: The network within, which turns tokens into logits.
        context: Tokens of a sequence.
        precision: As Lightning names it.
        checkpointing: Whether blocks are computed again in the backward pass.
        ranks: Devices that FSDP2 shards over.
        told: What may differ in a run.
    """

    source: Source
    network: nn.Module
    context: int
    precision: str
    checkpointing: bool
    ranks: int
    told: tuple[str, ...]

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the network knows."""
        network: Any = self.network
        return int(network.get_input_embeddings().num_embeddings)

    @property
    def parameter_dtype(self) -> torch.dtype:
        """Dtype of parameters, gradients and most of the state."""
        return torch.bfloat16 if self.precision == "bf16-true" else torch.float32

    def loss(self, tokens: Tensor) -> Callable[[], Tensor]:
        """The loss of a batch of tokens `(B, T)`: mean cross-entropy in float32, as the task computes it."""

        def compute() -> Tensor:
            is_mixed = self.precision.endswith("-mixed")
            cast = torch.autocast(tokens.device.type, torch.bfloat16) if is_mixed else contextlib.nullcontext()
            with cast:
                logits = self.network(input_ids=tokens, use_cache=False).logits
            return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())

        return compute


def workload(options: Namespace) -> Workload:
    """The workload of a recipe or a configuration; what the options say wins.

    Raises:
        ValueError: No language model, a context longer than its positions, or a precision that is not predicted.
    """
    source = outline(options)
    network: Any = _language_model(source.model)
    own = _settings(options, network)
    positions = getattr(network.config, "max_position_embeddings", None)
    context = options.context or own["context"] or min(positions or LONGEST, LONGEST)
    if positions is not None and context > positions:
        raise ValueError(f"--context {context}: the model has {positions} positions; give that many at most")
    precision = options.precision or own["precision"]
    if precision not in ("32-true", "bf16-mixed", "bf16-true"):
        raise ValueError(
            f"precision {precision} of the recipe is not predicted; give --precision bf16-mixed or 32-true"
        )
    checkpointing = own["checkpointing"] if options.checkpointing is None else options.checkpointing == "on"
    with quiet():
        network.set_attn_implementation("sdpa" if network._supports_sdpa else "eager")
        network.train()
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # its masks differ between devices; recipes of language models have none
        if checkpointing:
            checkpoint_activations(network)
    ranks = options.ranks or (1 if options.measure else own["ranks"])
    told = (*source.warnings, *own["told"])
    return Workload(source, network, context, precision, checkpointing, ranks, told)


def factories(options: Namespace, source: Source) -> dict[str, OptimizerFactory]:
    """The optimizers by name; AdamMini as the recipe cuts.

    Raises:
        ValueError: There is no such optimizer, or --partition is given and AdamMini is not among them.
    """
    known = [name for name in factory.__all__ if name != "OptimizerFactory"]
    found: dict[str, OptimizerFactory] = {}
    for name in options.optimizers:
        if name not in known:
            raise ValueError(f"--optimizers {name}: choose from {', '.join(known)}")
        own: dict[str, Any] = {}
        if name == "AdamMini":
            dtype = source.exp_avg_dtype
            own = {
                "partition": options.partition or source.partition,
                "partition_overrides": dict(source.overrides),
                "partition_layouts": dict(source.layouts),
                "exp_avg_dtype": None if dtype is None else str(dtype).removeprefix("torch."),
            }
        found[name] = getattr(factory, name)(**own)
    if options.partition and "AdamMini" not in found:
        raise ValueError("--partition cuts AdamMini's blocks, and it is not among --optimizers")
    return found


def _language_model(model: nn.Module) -> nn.Module:
    """The network of transformers within a task, or the model itself.

    Raises:
        ValueError: It gives no logits of tokens.
    """
    network: Any = model.model if hasattr(model, "batch_units") else model
    head = getattr(network, "get_output_embeddings", None)
    if head is None or head() is None or not hasattr(network, "config"):
        raise ValueError(
            f"bench throughput counts tokens, and {type(network).__name__} is no causal language model; give a recipe "
            "of llm/ or such a configuration (`adam-mini bench` without `throughput` times a step of any model)"
        )
    return network


def _settings(options: Namespace, network: Any) -> dict[str, Any]:
    """Context, precision, checkpointing and ranks that a recipe says; defaults for a bare model."""
    own: dict[str, Any] = {"context": None, "precision": "32-true", "checkpointing": False, "ranks": 1, "told": []}
    if options.source != "recipe":
        return own
    content = read_yaml(find_recipe(options.recipe, given_as="recipe"))
    trainer, data = content.get("trainer") or {}, content.get("data") or {}
    task = (content.get("model") or {}).get("init_args") or {}
    strategy = trainer.get("strategy") or ""
    shards = "FSDP2" in str(strategy.get("class_path", "") if isinstance(strategy, dict) else strategy).upper()
    devices = trainer.get("devices", 1)
    own["context"] = (data.get("init_args") or {}).get("context_length")
    own["precision"] = str(trainer.get("precision", "32-true"))
    own["checkpointing"] = bool(task.get("activation_checkpointing"))
    if shards and isinstance(devices, int):
        own["ranks"] = devices * int(trainer.get("num_nodes", 1))
    if task.get("gradient_release"):
        own["told"].append("the recipe releases gradients as they come; here they count in full")
    if task.get("compile"):
        own["told"].append("the recipe compiles its network, which may need less; here operations run one by one")
    return own
