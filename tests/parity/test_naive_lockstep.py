"""AdamMini equals the naive transcription on every family of models that the library knows."""

import pytest
import torch

import tiny_models
from reference.lockstep import LLAMA, MODELS, heads_of, lockstep
from reference.naive import elements, rows, whole
from tiny_models import DIM, HEADS, KV_HEADS


@pytest.mark.parametrize("implementation", ["reference", "foreach"])  # the kernels are for float32
@pytest.mark.parametrize("model", MODELS)
def test_equals_the_naive_transcription(model, implementation, tolerances):
    ours, naive = lockstep(*MODELS[model], implementation=implementation)
    for name in naive:
        torch.testing.assert_close(
            ours[name], naive[name], **tolerances[torch.float64], msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("ending", "mistake"),
    [
        ("q_proj.weight", rows),
        ("k_proj.weight", heads_of(KV_HEADS * 2)),
        ("v_proj.weight", whole),
        ("o_proj.weight", lambda shape: rows(shape, axis=1)),
        ("embed_tokens.weight", whole),
        ("norm.weight", elements),
    ],
)
def test_a_mistaken_cut_shows(ending, mistake, tolerances):
    ours, naive = lockstep(tiny_models.llama, {**LLAMA, ending: mistake})
    for name in naive:
        equal = torch.allclose(ours[name], naive[name], **tolerances[torch.float64])
        assert equal is not name.endswith(ending), name


def test_the_early_partition(tolerances):
    """Query and key by head, embedding and output head by element, everything else whole."""
    endings = {
        **dict.fromkeys(LLAMA, whole),
        "embed_tokens.weight": elements,
        "lm_head.weight": elements,
        "q_proj.weight": heads_of(2),
        "k_proj.weight": heads_of(2),
    }
    ours, naive = lockstep(
        lambda: tiny_models.llama(attention_bias=True), endings, partition="transformer_early", steps=5
    )
    for name in naive:
        torch.testing.assert_close(ours[name], naive[name], **tolerances[torch.float64])


def test_values_as_a_whole(tolerances):
    """The override that the authors use, also inside a fused matrix."""

    def cut(shape):
        return [*rows(shape, 2, 1, 0, 2 * DIM), *rows(shape, DIM, 1, 2 * DIM, 3 * DIM)]

    factory, endings = MODELS["gpt2"]
    ours, naive = lockstep(factory, {**endings, "attn.c_attn.weight": cut}, partition_overrides={"value": "whole"})
    for name in naive:
        torch.testing.assert_close(ours[name], naive[name], **tolerances[torch.float64])


def test_the_models_have_the_sizes_that_the_cuts_assume():
    assert HEADS * 2 == DIM
    assert KV_HEADS < HEADS
