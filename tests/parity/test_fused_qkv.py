"""A fused query, key and value is updated like three matrices."""

import pytest
import torch
from torch import nn

import tiny_models
from lightning_adam_mini import AdamMini
from lightning_adam_mini.partition import ModuleLayout, Role, layouts, register_layout
from lightning_adam_mini.partition.layouts.orders import CONTIGUOUS
from tiny_models import DIM, HEADS, KV_HEADS, FusedAttention, SeparateAttention, random_gradient

STRATEGIES = ["transformer", "transformer_early", "factored", "element"]
HEAD_DIM = 2


class FusedConv1D(nn.Module):
    """The attention of GPT-2, whose weights are transposed."""

    def __init__(self):
        super().__init__()
        self.inner = tiny_models.gpt2().transformer.h[0].attn


@pytest.fixture
def own_layout(monkeypatch):
    monkeypatch.setattr(layouts, "REGISTERED", [])
    register_layout(
        ModuleLayout(
            "mine",
            classes=(f"{FusedAttention.__module__}.FusedAttention",),
            parameters={"qkv.weight": CONTIGUOUS, "proj.weight": Role.ATTENTION_OUTPUT},
        )
    )


def three_steps(fused, weight, transposed, separate, strategy):
    """The fused weight after three steps, and the three weights of `separate` one below another."""
    options = {"lr": 1e-2, "weight_decay": 0.1, "partition": strategy}
    weights = [separate.q_proj.weight, separate.k_proj.weight, separate.v_proj.weight]
    lengths = [w.shape[0] for w in weights]
    with torch.no_grad():
        rows = weight.t() if transposed else weight
        for w, part in zip(weights, rows.split(lengths), strict=True):
            w.copy_(part)
    optimizers = [AdamMini(module, **options) for module in (fused, separate)]
    for _ in range(3):
        weight.grad = random_gradient(weight)
        rows = weight.grad.t() if transposed else weight.grad
        for w, part in zip(weights, rows.split(lengths), strict=True):
            w.grad = part.clone()
        for optimizer in optimizers:
            optimizer.step()
    return (weight.t() if transposed else weight).detach(), torch.cat(weights).detach()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_multihead_attention(strategy, tolerances):
    fused = nn.MultiheadAttention(DIM, HEADS).double()
    separate = SeparateAttention(num_key_value_heads=HEADS).double()
    actual, expected = three_steps(fused, fused.in_proj_weight, False, separate, strategy)
    torch.testing.assert_close(actual, expected, **tolerances[torch.float64])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_transposed_gpt2(strategy, tolerances):
    fused = FusedConv1D().double()
    separate = SeparateAttention(num_key_value_heads=HEADS).double()
    actual, expected = three_steps(fused, fused.inner.c_attn.weight, True, separate, strategy)
    torch.testing.assert_close(actual, expected, **tolerances[torch.float64])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.usefixtures("own_layout")
def test_grouped_queries_of_a_class_of_ones_own(strategy, tolerances):
    fused, separate = FusedAttention().double(), SeparateAttention().double()
    assert fused.num_key_value_heads == KV_HEADS
    actual, expected = three_steps(fused, fused.qkv.weight, False, separate, strategy)
    torch.testing.assert_close(actual, expected, **tolerances[torch.float64])


def test_one_cut_for_the_whole_matrix_differs(tolerances):
    fused = nn.MultiheadAttention(DIM, HEADS).double()
    separate = SeparateAttention(num_key_value_heads=HEADS).double()
    actual, expected = three_steps(fused, fused.in_proj_weight, False, separate, "default")
    assert not torch.allclose(actual, expected, **tolerances[torch.float64])
