"""Bytes of optimizer state, and the share of embeddings, of published models beside the paper's own tables.

    python benchmarks/memory_tables.py --out benchmarks/results/memory_tables.json

Nothing is trained or allocated: the models are built on torch's meta device, and the figures follow from their shapes
and from the partition alone, so that they hold for every machine. Half a minute on one core. The Markdown tables are
written beside the JSON and are those of `docs/memory.md`. The paper is Zhang et al., "Adam-mini: Use Fewer Learning
Rates To Gain More", arXiv 2406.16793: its first version of June 2024, and its final one.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from lightning_adam_mini import explain
from lightning_adam_mini.partition import Role


def _config(
    model_type: str, vocabulary: int, width: int, feed_forward: int, layers: int, heads: int, **others: object
) -> dict[str, object]:
    """A configuration under the names that most families of transformers share."""
    return {
        "model_type": model_type,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": False,
        **others,
    }


# Shapes alone, as in the `config.json` that the authors publish beside the weights (gpt2-xl, TinyLlama-1.1B,
# Phi-3-mini-4k, Llama-2, Meta-Llama-3, gemma-7b) and, for LLaMA, in Touvron et al. 2023, Table 2. What no shape depends
# on is left at its default.
CONFIGS: dict[str, dict[str, object]] = {
    "GPT2-1.5B": {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 1600,
        "n_layer": 48,
        "n_head": 25,
        "tie_word_embeddings": True,
    },
    "TinyLlama-1.1B": _config("llama", 32000, 2048, 5632, 22, 32, num_key_value_heads=4),
    "Phi-3-mini": _config("phi3", 32064, 3072, 8192, 32, 32),
    "Llama2-7B": _config("llama", 32000, 4096, 11008, 32, 32),
    "Llama3-8B": _config("llama", 128256, 4096, 14336, 32, 32, num_key_value_heads=8),
    "Gemma-7B": _config(
        "gemma", 256000, 3072, 24576, 28, 16, num_key_value_heads=16, head_dim=256, tie_word_embeddings=True
    ),
    "Llama2-13B": _config("llama", 32000, 5120, 13824, 40, 40),
    "LLaMA-33B": _config("llama", 32000, 6656, 17920, 60, 52),
    "LLaMA-65B": _config("llama", 32000, 8192, 22016, 80, 64),
    "Llama2-70B": _config("llama", 32000, 8192, 28672, 80, 64, num_key_value_heads=8),
    "Llama3-70B": _config("llama", 128256, 8192, 28672, 80, 64, num_key_value_heads=8),
}
SHARE_ONLY = ("LLaMA-33B", "LLaMA-65B", "Llama2-70B")
"""Models of the table of embedding shares alone."""

PARTITIONS: dict[str, tuple[str, dict[str, str]]] = {
    "early": ("transformer_early", {}),
    "final": ("transformer", {}),
    "value whole": ("transformer", {"value": "whole"}),
    "factored": ("factored", {}),
}

# What the paper prints, as far as we have its text. Memory in GB; shares in percent.
PAPER_ADAMW = {"GPT2-1.5B": "12.48", "TinyLlama-1.1B": "8.80", "Llama2-7B": "53.92"}
PAPER_EARLY = {"GPT2-1.5B": "6.56", "TinyLlama-1.1B": "4.92", "Llama2-7B": "28.04"}
PAPER_FINAL = {"Llama2-7B": "26.96"}
PAPER_SHARE = {"Gemma-7B": "9.83 %", "Llama3-70B": "0.15 % (0.75 % by Section 2.4)"}
PAPER_WIDTH = dict.fromkeys(("Llama2-13B", "LLaMA-33B", "LLaMA-65B", "Llama2-70B", "Llama3-70B"), 4096)
"""Models of whose embedding the paper takes another width than they have."""
NOT_GIVEN = "not given"

MEMORY_HEADER = (
    *("model", "parameters", "AdamW", "the paper's", "`transformer_early`", "the paper's"),
    *("`transformer`", "the paper's", "value `whole`", "`factored`"),
)
KEPT_HEADER = ("model", "`transformer_early`", "`transformer`", "value `whole`", "`factored`")
SHARE_HEADER = (
    *("model", "vocabulary x width", "output head", "parameters", "embedding", "with output head"),
    *("embedding at width 4,096", "the paper's"),
)


@dataclass(frozen=True)
class Figures:
    """What a model's shapes and partitions tell.

    Args:
        parameters: Number of parameters.
        adamw_bytes: Bytes of AdamW's two moments in float32.
        state_bytes: Bytes of Adam-mini's momentum and second moments in float32, by partition.
        second_moments: Numbers kept in place of AdamW's second moment, by partition.
        embedding: Number of parameters in the token embedding.
        output_head: Number of parameters in the output head; 0 where it is the token embedding.
        vocabulary: Number of tokens.
        width: Width of the token embedding.
    """

    parameters: int
    adamw_bytes: int
    state_bytes: Mapping[str, int]
    second_moments: Mapping[str, int]
    embedding: int
    output_head: int
    vocabulary: int
    width: int

    def removed(self, partition: str) -> float:
        """Share of AdamW's second moments that a partition does without."""
        return 1 - self.second_moments[partition] / self.parameters


def build(name: str) -> nn.Module:
    """A model of the table, without memory for its parameters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIGS[name]), dtype=torch.float32)


def measure(module: nn.Module) -> Figures:
    """The figures of a model, without the 4 bytes a tensor for step counters, which the paper leaves out too."""
    explanations = {key: explain(module, name, overrides) for key, (name, overrides) in PARTITIONS.items()}
    totals = {key: explanation.totals for key, explanation in explanations.items()}
    of_model = totals["final"]
    step_bytes = 4 * of_model.tensors
    by_role = explanations["final"].role_totals
    ((vocabulary, width),) = (row.shape for row in explanations["final"].rows if row.role == Role.TOKEN_EMBEDDING)
    return Figures(
        parameters=of_model.elements,
        adamw_bytes=of_model.adamw_state_bytes - step_bytes,
        state_bytes={key: found.state_bytes - step_bytes for key, found in totals.items()},
        second_moments={key: found.blocks for key, found in totals.items()},
        embedding=vocabulary * width,
        output_head=by_role[Role.OUTPUT_HEAD].elements if Role.OUTPUT_HEAD in by_role else 0,
        vocabulary=vocabulary,
        width=width,
    )


def percent(share: float, digits: int) -> str:
    """A share as the pages of `docs/` write it."""
    return f"{100 * share:.{digits}f} %"


def memory_row(name: str, figures: Figures) -> list[str]:
    """State in GB of 1e9 bytes, and the share of AdamW's that is saved."""
    gigabytes = {
        key: f"{count / 1e9:.2f} ({percent(1 - count / figures.adamw_bytes, 1)})"
        for key, count in figures.state_bytes.items()
    }
    return [
        *(name, f"{figures.parameters:,}", f"{figures.adamw_bytes / 1e9:.2f}", PAPER_ADAMW.get(name, NOT_GIVEN)),
        *(gigabytes["early"], PAPER_EARLY.get(name, NOT_GIVEN), gigabytes["final"], PAPER_FINAL.get(name, NOT_GIVEN)),
        *(gigabytes["value whole"], gigabytes["factored"]),
    ]


def kept_row(name: str, figures: Figures) -> list[str]:
    """Second moments that are kept, and the percentage of AdamW's that is gone."""
    return [name, *(f"{figures.second_moments[key]:,} ({percent(figures.removed(key), 3)})" for key in PARTITIONS)]


def share_row(name: str, figures: Figures) -> list[str]:
    """Share of the token embedding, alone and with the output head."""
    return [
        *(name, f"{figures.vocabulary:,} x {figures.width:,}", "untied" if figures.output_head else "tied"),
        *(f"{figures.parameters:,}", percent(figures.embedding / figures.parameters, 2)),
        percent((figures.embedding + figures.output_head) / figures.parameters, 2),
        percent(figures.vocabulary * PAPER_WIDTH[name] / figures.parameters, 2) if name in PAPER_WIDTH else "",
        PAPER_SHARE.get(name, NOT_GIVEN),
    ]


def markdown_row(cells: Sequence[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


def tables(figures: Mapping[str, Figures]) -> str:
    """The three tables in Markdown."""
    in_memory = {name: found for name, found in figures.items() if name not in SHARE_ONLY}
    parts = (
        (MEMORY_HEADER, [memory_row(name, found) for name, found in in_memory.items()]),
        (KEPT_HEADER, [kept_row(name, found) for name, found in in_memory.items()]),
        (SHARE_HEADER, [share_row(name, found) for name, found in figures.items()]),
    )
    return "\n\n".join(
        "\n".join([markdown_row(header), "|" + "---|" * len(header), *map(markdown_row, rows)])
        for header, rows in parts
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="JSON file; the tables go beside it, as .md")
    parser.add_argument("--models", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    options = parser.parse_args()

    figures = {name: measure(build(name)) for name in options.models}
    sys.stdout.write(tables(figures) + "\n")
    if options.out:
        result = {
            "device": "meta: shapes alone, on any hardware",
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "transformers", "lightning-adam-mini")},
            },
            "rows": [{"model": name, **asdict(found), "config": CONFIGS[name]} for name, found in figures.items()],
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(tables(figures) + "\n")


if __name__ == "__main__":
    main()
