"""Bytes on one rank of a language model that FSDP2 shards: predicted from shapes, and measured on one rank of many.

    python benchmarks/sharded_memory.py --world 8 --out benchmarks/results/sharded_memory_7b.json

The other ranks are a fake process group: collectives return at once, and nothing is sent. So one machine without GPUs
holds one rank of eight as it would be, in float32: its shards, their gradients and the optimizer's state after a step.
No forward pass is run. Predictions come from the model on the meta device. Each optimizer runs in a process of its own,
whose largest resident memory is measured beside the sum of the tensors. Llama 2 7B over 8 ranks takes up to
18 GB and a minute.
"""

from __future__ import annotations

import argparse
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from children import measure, save, tell
from lightning_adam_mini import AdamMini, partition_module
from lightning_adam_mini.optim.distributed import local, shard_dtensor

LLAMA_2 = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
OPTIMIZERS = ("AdamW", "AdamMini")


def model_on_meta(size: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(vocab_size=32000, tie_word_embeddings=False, **LLAMA_2[size]))


def shard(model: nn.Module, world: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def local_bytes(tensors: Any) -> int:
    return sum(local(tensor).numel() * tensor.dtype.itemsize for tensor in tensors)


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def child(name: str, size: str, world: int, on: str) -> None:
    """One rank: its bytes on the meta device, or after a step on the CPU."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    model = shard(model_on_meta(size), world)
    figures: dict[str, Any] = {}
    if on == "cpu":
        model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                local(parameter).fill_(0.01)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if on == "meta" else torch.full_like(parameter, 0.01)
    optimizer = AdamMini(model) if name == "AdamMini" else torch.optim.AdamW(parameters, foreach=True)
    if on == "cpu":
        optimizer.step()
        figures["peak_resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        figures["resident_bytes_with_parameters"] = before
    figures |= {
        "parameter_bytes": local_bytes(parameters),
        "gradient_bytes": local_bytes(parameter.grad for parameter in parameters),
        "state_bytes": local_bytes(state_tensors(optimizer)) if on == "cpu" else predict(model, name),
    }
    tell(figures)


def predict(model: nn.Module, name: str) -> int:
    """Bytes of state from shapes: a shard of the first moment, and what this rank keeps of the second."""
    parameters = dict(model.named_parameters())
    if name == "AdamW":
        return sum(8 * local(parameter).numel() + 4 for parameter in parameters.values())
    cuts = partition_module(model)
    return sum(
        4 * local(parameter).numel() + 4 + shard_dtensor(key, parameter, cuts[key].blocks).frame.num_bytes()
        for key, parameter in parameters.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(LLAMA_2), default="7B")
    parser.add_argument("--world", type=int, default=8)
    parser.add_argument("--predict-only", action="store_true", help="shapes alone, on the meta device")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    for name in OPTIMIZERS:
        row = {"optimizer": name, "predicted": measure(__file__, name, options.size, options.world, "meta")}
        if not options.predict_only:
            row["measured"] = measure(__file__, name, options.size, options.world, "cpu")
        rows.append(row)
        for kind in ("predicted", "measured"):
            if kind in row:
                print(f"{name:<9} {kind:<10}", "  ".join(f"{key} {value:,}" for key, value in row[kind].items()))
    save(options.out, {"model": f"Llama 2 {options.size}", "world": options.world, "rows": rows})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
    else:
        main()
