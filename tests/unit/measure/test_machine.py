"""FLOPs and peaks of devices, against counts by hand."""

import pytest
import torch

from lightning_adam_mini.measure import (
    peak_flops,
    transformer_flops_per_token,
)
from lightning_adam_mini.tasks.llm.model import active_parameters
from tiny_models import gpt2, llama, mixtral

GPT2_124M = {"num_layers": 12, "hidden_size": 768}


def test_flops_of_gpt2_124m():
    """Every product of a forward pass has 2 FLOPs an element, and the backward pass has twice as many."""
    width, layers, vocab, length = 768, 12, 50257, 1024
    matrices = 12 * width * width  # QKV 3, output 1, MLP 8
    attention = 2 * width * length  # scores and their sum over values, for one token against all
    forward = layers * 2 * (matrices + attention) + 2 * vocab * width
    active = 85_056_000 + vocab * width  # with biases and norms, 0.1 % of the whole, and the tied head
    own = transformer_flops_per_token(num_parameters=active, context_length=length, **GPT2_124M)
    assert own == pytest.approx(3 * forward, rel=2e-3)
    assert own == pytest.approx(8.5e8, rel=0.01)


def test_active_parameters_of_gpt2_124m():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    assert active_parameters(model) == 124_439_808 - 1024 * 768, "all but the position table: the head multiplies"


@pytest.mark.parametrize("build", [gpt2, llama, mixtral])
def test_tied_and_untied_tables(build):
    """A table that is only looked up does not count; one that is the head, too, counts once."""
    tied, untied = build(tie_word_embeddings=True), build(tie_word_embeddings=False)
    table = tied.get_input_embeddings().weight.numel()
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == table
    assert active_parameters(tied) == active_parameters(untied)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("Tesla T4", 65e12),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA A10", None),
        ("NVIDIA L40", None),
        ("NVIDIA GB200", None),
        ("NVIDIA T400", None),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_peaks_by_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak


def test_the_peak_of_a_cpu_is_measured():
    assert 1e8 < peak_flops(torch.device("cpu")) < 1e14


def test_no_peak_of_other_devices():
    assert peak_flops(torch.device("meta")) is None
