"""The largest micro-batch of a language model on one device: predicted, and measured if asked.

The form of Table 2 of Zhang et al. 2024, "Adam-mini: Use Fewer Learning Rates To Gain More": the memory that the
optimizer saves is free for a larger micro-batch, and a larger one gives more tokens a second.
"""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from lightning_adam_mini import factory
from lightning_adam_mini.factory import OptimizerFactory
from lightning_adam_mini.hints import did_you_mean
from lightning_adam_mini.measure.memory import (
    RankMemory,
    activation_peak,
    format_bytes,
    largest_batch,
    peak_extra_bytes,
    resident_bytes,
    resident_peak_bytes,
    stored_state_bytes,
)
from lightning_adam_mini.measure.timing import choose_clock, time_call

from ...tasks.parallel.sharding import checkpoint_activations, repeated_blocks
from ..arguments import UsageError
from ..messages import quiet
from ..models import SOURCES, Source, check_partition
from ..recipes import find_recipe, read_yaml
from ..runnable_models import choose_device, give_memory, trained_bytes
from .results import throughput_table, write_results

__all__ = ["predict", "run"]

LONGEST = 4096
"""Tokens of a sequence if neither the options nor the recipe say it, and the model has more positions."""
REPEATS = 3


def run(options: Namespace) -> None:
    """Predict, measure if asked, print the table and write the file.

    Raises:
        ValueError: There is no such model or optimizer, or the model is no language model.
    """
    device = choose_device(options.device)
    load = workload(options)
    result = predict(load, factories(options, load.source), options.memory)
    if options.measure:
        for row in result["rows"]:
            row["measured"] = measure_largest(options, row["optimizer"], str(device), row["predicted"]["batch"])
        result |= {"device": str(device), "threads": options.threads, "sequences": options.sequences}
    write_results(options, result, throughput_table(result, options.memory_text), "throughput")


def predict(load: Workload, optimizers: dict[str, OptimizerFactory], memory: int) -> dict[str, Any]:
    """Bytes on one rank with each optimizer, and the largest micro-batch that fits.

    Args:
        load: What is trained.
        optimizers: Factories by name.
        memory: Bytes of one device.
    """
    model, dtype = load.source.model, load.parameter_dtype
    if dtype is not torch.float32:
        model.to(dtype)
    parameters = trained_bytes(model)
    blocks = [trained_bytes(block) for block in repeated_blocks(load.network).values()]
    states = {name: made.predict_state_bytes(model) for name, made in optimizers.items()}
    with FakeTensorMode():
        give_memory(model, torch.device("cpu"))

        @cache
        def activations(batch: int) -> int:
            tokens = torch.zeros(batch, load.context, dtype=torch.long)
            with quiet():
                return activation_peak(load.network, load.loss(tokens), [tokens])

        rows = []
        for name, state in states.items():
            if state is None:
                reason = "its state cannot be predicted"
                rows.append({"optimizer": name, "predicted": {"batch": 0, "reason": reason}})
                continue
            rank = RankMemory(parameters, state, parameters - sum(blocks), max(blocks, default=0), load.ranks)
            rows.append({"optimizer": name, "predicted": _fitted(rank, activations, memory)})
    return {
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "memory_bytes": memory,
        "ranks": load.ranks,
        "context": load.context,
        "precision": load.precision,
        "activation_checkpointing": load.checkpointing,
        "rows": rows,
        "warnings": list(load.warnings),
    }


def _fitted(rank: RankMemory, activations: Any, memory: int) -> dict[str, Any]:
    one, two = activations(1), activations(2)
    guess = 1 + (memory - rank.total - one) // max(two - one, 1)
    batch = largest_batch(lambda size: rank.total + activations(size) <= memory, start=guess)
    predicted = {
        "batch": batch,
        "parameter_bytes": rank.parameters // rank.ranks,
        "gradient_bytes": rank.parameters // rank.ranks,
        "state_bytes": rank.state // rank.ranks,
        "gathered_bytes": rank.gathered,
        "activation_bytes": activations(max(batch, 1)),
        "activation_bytes_of_a_further_sequence": two - one,
        "total_bytes": rank.total + activations(max(batch, 1)),
    }
    if batch == 0:
        predicted["reason"] = f"even one sequence needs {format_bytes(rank.total + one)}"
    return predicted


@dataclass(frozen=True)
class Workload:
    """A language model and how it is trained, as far as memory and throughput depend on it.

    Args:
        source: The task or model on the meta device, as the optimizer gets it.
        network: The network within, which turns tokens into logits.
        context: Tokens of a sequence.
        precision: As Lightning names it.
        checkpointing: Whether the backward pass recomputes activations of blocks.
        ranks: Devices that FSDP2 shards over.
        warnings: How a run may differ.
    """

    source: Source
    network: nn.Module
    context: int
    precision: str
    checkpointing: bool
    ranks: int
    warnings: tuple[str, ...]

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary."""
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
    """The workload of a recipe or a configuration, with the changes of the options.

    Raises:
        ValueError: It is no language model, the context exceeds its positions, or the precision is not supported.
    """
    source = SOURCES[options.source](options.model)
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
                module.p = 0.0  # its masks differ between devices, and the recipes of language models use none
        if checkpointing:
            checkpoint_activations(network)
    ranks = options.ranks or (1 if options.measure else own["ranks"])
    warnings = (*source.warnings, *own["warnings"])
    return Workload(source, network, context, precision, checkpointing, ranks, warnings)


def factories(options: Namespace, source: Source) -> dict[str, OptimizerFactory]:
    """The optimizers by name; AdamMini with the partition of the recipe.

    Raises:
        ValueError: There is no such optimizer, or --partition is given and AdamMini is not among them.
    """
    known = [name for name in factory.__all__ if name != "OptimizerFactory"]
    found: dict[str, OptimizerFactory] = {}
    if options.partition:
        check_partition(options.partition)
    for name in options.optimizers:
        if name not in known:
            raise UsageError(f"--optimizers {name}: choose from {', '.join(known)}{did_you_mean(name, known)}")
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
        raise ValueError("--partition is for AdamMini, and it is not among --optimizers")
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
    """Context, precision, checkpointing and ranks of a recipe; defaults for a bare model."""
    own: dict[str, Any] = {"context": None, "precision": "32-true", "checkpointing": False, "ranks": 1, "warnings": []}
    if options.source != "recipe":
        return own
    content = read_yaml(find_recipe(options.model, given_as="recipe"))
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
        own["warnings"].append("the recipe frees gradients during the backward pass; here they count in full")
    if task.get("compile"):
        own["warnings"].append("the recipe compiles its network, which may need less memory; here it runs eagerly")
    return own


# Measured


def measure_largest(options: Namespace, optimizer: str, device: str, start: int) -> dict[str, Any]:
    """The largest micro-batch that fits into the memory of the options, and its throughput.

    Args:
        options: Of the command line.
        optimizer: Name of the optimizer.
        device: Where to run.
        start: The predicted batch, with which the search begins.
    """
    runs: dict[int, dict[str, Any]] = {}

    def fits(batch: int) -> bool:
        runs[batch] = _in_own_process(options, optimizer, device, batch)
        return runs[batch].get("peak_bytes", options.memory + 1) <= options.memory

    batch = largest_batch(fits, start=start)
    if batch == 0:
        peak = runs[1].get("peak_bytes")
        return {"batch": 0, "reason": f"even one sequence needs {format_bytes(peak)}" if peak else runs[1]["reason"]}
    values = runs[batch]
    # As many whole micro-batches as the sequences need, and one optimizer step.
    number = -(-options.sequences // batch)
    tokens = number * batch * values["context"]
    seconds = number * values["micro_batch_seconds"] + values["step_seconds"]
    return {"batch": batch, **values, "tokens_per_second": tokens / seconds}


def run_batch(options: Namespace, optimizer: str, device_name: str, batch: int) -> dict[str, Any]:
    """Train for a few micro-batches and steps, and measure this process.

    Returns:
        `peak_bytes`: on CUDA the bytes that torch allocated, else the growth of resident memory since before the model
        was made, which includes what the allocator holds back; `allocated_bytes`, those of torch's tensors at the peak
        of a pass; `micro_batch_seconds` of a forward and backward pass and `step_seconds`, medians; `context`. Or the
        `reason` why there are none.
    """
    device = torch.device(device_name)
    torch.set_num_threads(options.threads)
    load = workload(options)
    model = load.source.model
    partition = options.partition if optimizer == "AdamMini" else None
    made = factories(Namespace(optimizers=[optimizer], partition=partition), load.source)
    torch.manual_seed(0)
    _load_libraries(device)
    clock = choose_clock(device)
    passes: list[float] = []
    steps: list[float] = []
    try:
        before = 0 if device.type == "cuda" else resident_bytes()
        if load.parameter_dtype is not torch.float32:
            model.to(load.parameter_dtype)
        give_memory(model, device)
        tokens = torch.randint(0, load.vocab_size, (batch, load.context), device=device)
        loss, stepper = load.loss(tokens), made[optimizer].build(model)

        def run_pass() -> None:
            loss().backward()

        for _ in range(1 + REPEATS):
            # The second pass accumulates into existing gradients, as later micro-batches of a step do.
            passes += [getattr(time_call(run_pass, device), clock) for _ in range(2)]
            steps.append(getattr(time_call(stepper.step, device), clock))
            stepper.zero_grad()
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_peak_bytes() - before
        run_pass()
        allocated = 2 * trained_bytes(model) + stored_state_bytes(stepper) + peak_extra_bytes(run_pass, device)
    except torch.OutOfMemoryError as error:
        return {"reason": " ".join(str(error).split())[:200]}
    seconds = {"micro_batch_seconds": median(passes[2:]), "step_seconds": median(steps[1:])}
    return {"peak_bytes": peak, "allocated_bytes": allocated, "context": load.context, "clock": clock, **seconds}


def _in_own_process(options: Namespace, optimizer: str, device: str, batch: int) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(run_batch, options, optimizer, device, batch).result()
        except BrokenProcessPool:
            return {"reason": "the process was killed, probably for lack of memory"}


def _load_libraries(device: torch.device) -> None:
    """Make torch load what its first matrix product, backward pass and step need, before memory is counted."""
    weight = torch.ones(64, 64, device=device, requires_grad=True)
    (weight @ weight).sum().backward()
    torch.optim.AdamW([weight]).step()
