"""Small models of the families the library knows, and gradients for them."""

import pytest
import torch
from torch import nn

DIM, HEADS, KV_HEADS, HIDDEN, VOCAB, POSITIONS = 8, 4, 2, 12, 11, 5
_TOKENS = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_LLAMA = {
    **_TOKENS,
    "hidden_size": DIM,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
}


def transformers():
    return pytest.importorskip("transformers")


def gpt2(**options):
    """Heads of 2 rows in a Conv1D, whose output axis is dimension 1; the output head is tied to the embedding."""
    config = {**_TOKENS, "n_positions": POSITIONS, "n_embd": DIM, "n_layer": 1, "n_head": HEADS, "n_inner": HIDDEN}
    return transformers().GPT2LMHeadModel(transformers().GPT2Config(**{**config, **options}))


def llama(**options):
    """Grouped-query attention: 4 query heads and 2 key heads of 2 rows."""
    return transformers().LlamaForCausalLM(transformers().LlamaConfig(**{**_LLAMA, **options}))


def qwen3(**options):
    """Heads of 6 rows, where dim / heads would say 2."""
    return transformers().Qwen3ForCausalLM(transformers().Qwen3Config(**{**_LLAMA, "head_dim": 6, **options}))


def bert(**options):
    config = {**_TOKENS, "hidden_size": DIM, "intermediate_size": HIDDEN, "num_hidden_layers": 1}
    config |= {"num_attention_heads": HEADS, "max_position_embeddings": POSITIONS}
    return transformers().BertModel(transformers().BertConfig(**{**config, **options}))


def mixtral(**options):
    config = {**_LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2}
    return transformers().MixtralForCausalLM(transformers().MixtralConfig(**{**config, **options}))


def attention():
    return nn.MultiheadAttention(DIM, HEADS)


def cross_attention():
    """Keys and values of other widths, so that projections are separate."""
    return nn.MultiheadAttention(DIM, HEADS, kdim=6, vdim=3)


def encoder_layer():
    return nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN)


def resnet18():
    """Without its two wide stages, which hold 95% of the weights."""
    model = pytest.importorskip("torchvision").models.resnet18()
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 3)
    return model


class SeparateAttention(nn.Module):
    """Projections under the names of Llama, with heads of their own size."""

    def __init__(self, dim=DIM, *, head_dim=2, num_heads=HEADS, num_key_value_heads=KV_HEADS):
        super().__init__()
        self.head_dim, self.num_heads, self.num_key_value_heads = head_dim, num_heads, num_key_value_heads
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(dim, num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(dim, num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, dim, bias=False)


class FusedAttention(nn.Module):
    """The same in one matrix; no layout of the library knows it."""

    def __init__(self, dim=DIM, *, head_dim=2, num_heads=HEADS, num_key_value_heads=KV_HEADS):
        super().__init__()
        self.head_dim, self.num_heads, self.num_key_value_heads = head_dim, num_heads, num_key_value_heads
        self.qkv = nn.Linear(dim, (num_heads + 2 * num_key_value_heads) * head_dim, bias=False)
        self.proj = nn.Linear(num_heads * head_dim, dim, bias=False)


def randomize(module):
    """Parameters without the equal rows that initialisation leaves in norms and biases."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def random_gradient(parameter):
    """Elements of very different sizes, so that it matters which of them share a block."""
    return torch.randn_like(parameter) * torch.randn_like(parameter).exp()


def set_gradients(*modules):
    """The same random gradients for models with the same parameters."""
    for parameters in zip(*(module.parameters() for module in modules), strict=True):
        gradient = random_gradient(parameters[0])
        for parameter in parameters:
            parameter.grad = gradient.to(parameter.dtype, copy=True)
