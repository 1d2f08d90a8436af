"""Count what one optimizer step costs in Python: calls, functions, files and depth, on nine parameters.

    python benchmarks/count_calls.py

Prints JSON with an entry for each implementation of AdamMini, in its first step and in a repeated one, and for torch's
AdamW. Only functions of this package and of `torch.optim` count. `frames_to_square` are the frames on the stack, from
`AdamMini.step` to the function that squares the gradient, both included, and `files_to_square` their files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_adam_mini
from lightning_adam_mini import AdamMini

PACKAGE = str(Path(lightning_adam_mini.__file__).parent)
COUNTED = (PACKAGE, str(Path(torch.optim.__file__).parent))
WARM_UP = 3
"""Steps before one that is repeated."""


def model() -> nn.Module:
    """Nine parameters: an embedding, fused attention with its output, a norm and a linear layer."""
    parts = {"embedding": nn.Embedding(11, 8), "attention": nn.MultiheadAttention(8, 4)}
    return nn.ModuleDict({**parts, "norm": nn.LayerNorm(8), "linear": nn.Linear(8, 12)})


def count_step(build: Callable[[nn.Module], Optimizer], *, warm_up: int = WARM_UP) -> dict[str, int]:
    """Python calls, distinct functions, files and depth of one step.

    Args:
        build: Makes the optimizer of a model.
        warm_up: Steps before the one that is counted.
    """
    module = model()
    optimizer = build(module)
    for _ in range(warm_up):
        _set_gradients(module)
        optimizer.step()
    _set_gradients(module)
    codes: list[CodeType] = []
    depth, deepest = 0, 0

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal depth, deepest
        if not frame.f_code.co_filename.startswith(COUNTED):
            return
        if event == "call":
            codes.append(frame.f_code)
            depth += 1
            deepest = max(deepest, depth)
        elif event == "return":
            depth -= 1

    sys.setprofile(profile)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    files = {code.co_filename for code in codes}
    return {"calls": len(codes), "functions": len(set(codes)), "files": len(files), "depth": deepest}


class _SquareFrames(TorchDispatchMode):
    """Looks at the stack where a gradient is first squared: `square`, `pow` or a norm."""

    frames: tuple[CodeType, ...] = ()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        words = ("square", "pow.Tensor_Scalar", "norm.Scalar", "vector_norm")
        if not self.frames and any(word in str(function) for word in words):
            frame, codes = sys._getframe(1), []
            while frame is not None and frame.f_code.co_qualname != "AdamMini.step":
                if frame.f_code.co_filename.startswith(PACKAGE):
                    codes.append(frame.f_code)
                frame = frame.f_back  # type: ignore[assignment]
            self.frames = (*codes, frame.f_code) if frame is not None else ()
        return function(*args, **(kwargs or {}))


def frames_to_square(implementation: str) -> dict[str, int]:
    """Frames and files between `AdamMini.step` and the squared gradient of a matrix, both ends included."""
    module = nn.Linear(8, 4, bias=False)
    optimizer = AdamMini(module, partition="default", implementation=implementation)  # type: ignore[arg-type]
    _set_gradients(module)
    optimizer.step()
    _set_gradients(module)
    with _SquareFrames() as found:
        optimizer.step()
    return {"frames_to_square": len(found.frames), "files_to_square": len({c.co_filename for c in found.frames})}


def _set_gradients(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)


def measure() -> dict[str, dict[str, int]]:
    """The counts of every implementation of AdamMini, and of AdamW."""
    found: dict[str, dict[str, int]] = {}
    for how in ("reference", "foreach", "fused"):

        def build(module: nn.Module, how: str = how) -> Optimizer:
            return AdamMini(module, implementation=how)  # type: ignore[arg-type]

        found[f"{how}, first step"] = count_step(build, warm_up=0)
        found[f"{how}, repeated"] = count_step(build)
        if how != "fused":
            found[f"{how}, repeated"] |= frames_to_square(how)
    for name, options in (
        ("single tensor", {"foreach": False}),
        ("foreach", {"foreach": True}),
        ("fused", {"fused": True}),
    ):
        found[f"AdamW, {name}"] = count_step(lambda m, o=options: AdamW(m.parameters(), **o))  # type: ignore[misc]
    return found


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
