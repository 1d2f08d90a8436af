"""What a Hessian-vector product costs: its time against two training passes, and the memory of a whole-model spectrum.

    OMP_NUM_THREADS=1 python benchmarks/hessian_products.py --out benchmarks/results/hessian_products.json

Times: a product of `HessianOperator` on one batch, as one of many that share graphs and memory, and as the only one,
against two forward and backward passes, and against the double backward written down with nothing around it, each once
a round in random order; medians of ratios within a round.
Memory: the most that torch allocates during three steps of Lanczos by the three-term recurrence with GPT-2 (124M,
float32, one sequence of 16 tokens), in copies of the parameters; the activations are in it. Needs `transformers` and
`torchvision`, 6 GB, and about five minutes on one core.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from children import measure, save, tell
from lightning_adam_mini.hessian import HessianOperator, model_tridiagonals
from lightning_adam_mini.measure.memory import peak_extra_bytes
from lightning_adam_mini.measure.timing import choose_clock, interleave

CPU = torch.device("cpu")
SMALL_GPT2 = {"n_layer": 4, "n_embd": 256, "n_head": 4, "n_positions": 128, "vocab_size": 4096}


def gpt2(batch: int, length: int, **options: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(**options, bos_token_id=0, eos_token_id=0)).eval()
    tokens = torch.randint(model.config.vocab_size, (batch, length))
    return model, (tokens, tokens)


def resnet18(batch: int, size: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    from torchvision.models import resnet18

    return resnet18(num_classes=10).eval(), (torch.randn(batch, 3, size, size), torch.randint(10, (batch,)))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, labels = batch
    out = model(inputs)
    logits = getattr(out, "logits", out)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, Tensor]]]] = {
    "GPT-2, 4 layers of 256, 4 x 128 tokens": lambda: gpt2(4, 128, **SMALL_GPT2),
    "ResNet18, 8 images of 64 x 64": lambda: resnet18(8, 64),
    "ResNet18, 64 images of 64 x 64": lambda: resnet18(64, 64),
}


def times(name: str, rounds: int) -> None:
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    parameters = list(model.parameters())
    operator = HessianOperator(model, loss_of, [batch])
    vector = operator.layout.random(0)
    pieces = [piece for _, piece in operator.layout.pieces(vector)]

    def two_passes() -> None:
        for _ in range(2):
            torch.autograd.grad(loss_of(model, batch), parameters)

    def bare_product() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            grads = torch.autograd.grad(loss_of(model, batch), parameters, create_graph=True)
            torch.autograd.grad(grads, parameters, pieces)

    alone, out = HessianOperator(model, loss_of, [batch]), torch.empty_like(vector)
    calls = {
        "product": lambda: operator.product(vector, out=out),
        "product_alone": lambda: alone.product(vector),
        "two_passes": two_passes,
        "bare_product": bare_product,
    }
    with operator.keep_graphs(2**32):
        found = interleave(calls, CPU, rounds=rounds)
    clock = choose_clock(CPU)
    seconds = {name: [getattr(one, clock) for one in some] for name, some in found.items()}
    figures: dict[str, Any] = {"clock": clock, "rounds": rounds, "parameters": operator.size}
    figures["median_seconds"] = {name: statistics.median(some) for name, some in seconds.items()}
    for one, other in (("product", "two_passes"), ("product_alone", "two_passes"), ("product_alone", "bare_product")):
        ratios = [a / b for a, b in zip(seconds[one], seconds[other], strict=True)]
        figures[f"{one}_over_{other}"] = statistics.median(ratios)
    tell(figures)


def memory(steps: int) -> None:
    torch.manual_seed(0)
    model, batch = gpt2(1, 16)
    operator = HessianOperator(model, loss_of, [batch])
    extra = peak_extra_bytes(lambda: model_tridiagonals(operator, steps=steps, probes=1, budget_bytes=0), CPU)
    copy_bytes = 4 * operator.size
    tell({"parameters": operator.size, "steps": steps, "peak_extra_bytes": extra, "copies": extra / copy_bytes})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    result: dict[str, Any] = {"times": {}}
    for name in MODELS:
        result["times"][name] = measure(__file__, "times", name, options.rounds)
        print(name, result["times"][name])
    result["memory_gpt2_124m"] = measure(__file__, "memory", 3)
    print(result["memory_gpt2_124m"])
    save(options.out, result)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        if sys.argv[2] == "times":
            times(sys.argv[3], int(sys.argv[4]))
        else:
            memory(int(sys.argv[3]))
    else:
        main()
