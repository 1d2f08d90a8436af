"""The command line of `adam-mini bench`: it measures in a process whose threads are set before torch is loaded."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ..arguments import Parser, check_place

__all__ = ["main"]

MIN_ROUNDS = 3
"""Quartiles of fewer rounds mean nothing."""

STEP = """Time one step of several optimizers on the same parameters and random gradients, in turn, in one process. The
model has random weights; no data are read and nothing is downloaded."""
THROUGHPUT = """The largest micro-batch of a language model that fits into the memory of one device, for each optimizer.
It is predicted from shapes, without the memory; --measure runs it on this machine and times it."""


def main(arguments: Sequence[str]) -> int:
    """Measure steps, or predict and measure batches.

    Returns:
        The exit code.

    Raises:
        ArgumentError: The command line is wrong.
        ValueError: There is no such model or optimizer, a package is missing, or the memory is too small.
        OSError: The results cannot be written.
    """
    is_throughput = arguments[:1] == ["throughput"]
    options = _parse_throughput(arguments[1:]) if is_throughput else _parse_step(arguments)
    options.command = shlex.join(["adam-mini", "bench", *arguments])
    if options.out is not None:
        check_place(options.out)
    variables = _variables(options)
    if "torch" not in sys.modules and variables:
        again = [sys.executable, "-m", "lightning_adam_mini.cli.main", "bench", *arguments]
        return subprocess.call(again, env={**os.environ, **variables})
    if is_throughput:
        from .throughput import run as run_throughput

        run_throughput(options)
    else:
        from .steps import run as run_steps

        run_steps(options)
    return 0


def _variables(options: Namespace) -> dict[str, str]:
    """Environment variables that OpenMP and torch read once, when they are loaded, and that have another value now.

    Waiting threads must not spin: their CPU time would count as the step's. The user's own choice is kept.
    """
    wanted = {
        "OMP_NUM_THREADS": str(options.threads),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "KINETO_LOG_LEVEL": os.environ.get("KINETO_LOG_LEVEL", "99"),  # silences torch's profiler
    }
    return {name: value for name, value in wanted.items() if os.environ.get(name) != value}


def _parse_step(arguments: Sequence[str]) -> Namespace:
    parser = Parser(
        prog="adam-mini bench",
        description=STEP,
        epilog=f"The largest batch that fits into a memory:\n\n{_throughput_parser().format_usage()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_model("hf", "timm", "diffusers")
    parser.add_argument(
        "--optimizers",
        nargs="+",
        metavar="NAME",
        help="adamw-fused, adamw-foreach, adamw-8bit (torchao), authors (the package adam-mini), adam-mini-NAME for "
        "each implementation of AdamMini, and adam-mini-8bit, with an 8-bit first moment. All by default; "
        "adamw-fused, the baseline of the ratios, always runs.",
    )
    parser.add_argument(
        "--partition",
        nargs="+",
        metavar="NAME",
        default=[],
        help="Partitions of AdamMini; auto by default, or that of the recipe. Each gets its own row.",
    )
    _add_machine(parser)
    parser.add_argument(
        "--ranks",
        type=int,
        default=1,
        metavar="N",
        help="Ranks that FSDP2 shards over. Only the first exists: its step is timed and its collectives are counted, "
        "which send nothing.",
    )
    parser.add_argument("--rounds", type=int, default=15, help="Timed steps of each optimizer; 15 by default.")
    parser.add_argument("--seed", type=int, default=0, help="Of weights, gradients and the order; 0 by default.")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="Of parameters; the model's own by default.")
    _add_out(parser, "bench.json and bench.png")
    options = parser.parse_args(arguments)
    _check(parser, options, ranks=1)
    if options.rounds < MIN_ROUNDS:
        parser.error(f"--rounds {options.rounds}: quartiles need at least {MIN_ROUNDS}; 15 usually resolve 5 %")
    return options


def _parse_throughput(arguments: Sequence[str]) -> Namespace:
    """Parse the options of `adam-mini bench throughput`; `memory` becomes a number of bytes."""
    parser = _throughput_parser()
    options = parser.parse_args(arguments)
    options.memory_text, options.memory = options.memory, parser.memory(options.memory, least=1)
    _check(parser, options, ranks=1, context=1, sequences=1)
    if options.measure and (options.ranks or 1) > 1:
        parser.error(f"--measure runs on one device: leave out --ranks {options.ranks}")
    return options


def _throughput_parser() -> Parser:
    parser = Parser(prog="adam-mini bench throughput", description=THROUGHPUT)
    parser.add_model("hf")
    parser.add_argument(
        "--memory", required=True, metavar="SIZE", help="Memory of one device: 80GB (1e9), 80GiB, 500MB."
    )
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="Devices that FSDP2 shards over; those of the recipe's FSDP2, else 1."
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="TOKENS",
        help="Tokens of a sequence; the recipe's, else as many as the model has positions, 4096 at most.",
    )
    parser.add_argument(
        "--precision",
        choices=("32-true", "bf16-mixed", "bf16-true"),
        help="As Lightning names it; the recipe's, else 32-true.",
    )
    parser.add_argument(
        "--checkpointing", choices=("on", "off"), help="Activation checkpointing; the recipe's, else off."
    )
    parser.add_argument(
        "--optimizers",
        nargs="+",
        metavar="NAME",
        default=["AdamW", "AdamMini"],
        help="Optimizers of recipes; AdamW and AdamMini by default.",
    )
    parser.add_argument("--partition", metavar="NAME", help="Partition of AdamMini; the recipe's, else auto.")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="Run it here, on one device, starting with the predicted batch; each batch is a process of its own.",
    )
    parser.add_argument(
        "--sequences",
        type=int,
        default=256,
        help="Sequences of a whole step, accumulated from micro-batches, for tokens/s; 256 by default.",
    )
    _add_machine(parser)
    _add_out(parser, "throughput.json")
    return parser


def _add_machine(parser: Parser) -> None:
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="CPU threads; 1 by default, which is least disturbed."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda by default if there is a GPU.")


def _add_out(parser: Parser, files: str) -> None:
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"Write {files} there; older ones are replaced.")


def _check(parser: Parser, options: Namespace, **least: int) -> None:
    """Check what both commands have in common."""
    parser.check_model(options)
    parser.check_least(options, threads=1, **least)
    for name in ("optimizers", "partition"):
        given = getattr(options, name)
        if isinstance(given, list) and len(set(given)) < len(given):
            parser.error(f"--{name} {' '.join(given)}: give each name once")
    if options.out is not None:
        options.out = parser.folder(options.out)
