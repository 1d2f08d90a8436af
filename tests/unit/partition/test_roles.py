"""Roles from the module tree: the families that the library knows, and what it does not know."""

import pytest
import torch
from torch import nn

import tiny_models
from lightning_adam_mini import Blocks, partition_module
from lightning_adam_mini.blocks import Kind, Segment
from lightning_adam_mini.partition import STRATEGIES, resolve_strategy
from tiny_models import DIM

QKV = "query+key+value"

# Role and number of blocks of every parameter under `auto`, which is `transformer` for these.
LLAMA = {
    "model.embed_tokens.weight": ("token_embedding", 11),
    "model.layers.0.self_attn.q_proj.weight": ("query", 4),
    "model.layers.0.self_attn.k_proj.weight": ("key", 2),
    "model.layers.0.self_attn.v_proj.weight": ("value", 4),
    "model.layers.0.self_attn.o_proj.weight": ("attention_output", 8),
    "model.layers.0.mlp.gate_proj.weight": ("mlp", 12),
    "model.layers.0.mlp.up_proj.weight": ("mlp", 12),
    "model.layers.0.mlp.down_proj.weight": ("mlp", 8),
    "model.layers.0.input_layernorm.weight": ("norm", 1),
    "model.layers.0.post_attention_layernorm.weight": ("norm", 1),
    "model.norm.weight": ("norm", 1),
    "lm_head.weight": ("output_head", 11),
}
GPT2 = {
    "transformer.wte.weight": ("token_embedding", 11),
    "transformer.wpe.weight": ("position_embedding", 5),
    "transformer.h.0.ln_1.weight": ("norm", 1),
    "transformer.h.0.ln_1.bias": ("bias", 8),
    "transformer.h.0.attn.c_attn.weight": (QKV, 4 + 4 + 8),
    "transformer.h.0.attn.c_attn.bias": ("bias", 24),
    "transformer.h.0.attn.c_proj.weight": ("attention_output", 8),
    "transformer.h.0.attn.c_proj.bias": ("bias", 8),
    "transformer.h.0.ln_2.weight": ("norm", 1),
    "transformer.h.0.ln_2.bias": ("bias", 8),
    "transformer.h.0.mlp.c_fc.weight": ("mlp", 12),
    "transformer.h.0.mlp.c_fc.bias": ("bias", 12),
    "transformer.h.0.mlp.c_proj.weight": ("mlp", 8),
    "transformer.h.0.mlp.c_proj.bias": ("bias", 8),
    "transformer.ln_f.weight": ("norm", 1),
    "transformer.ln_f.bias": ("bias", 8),
}
FAMILIES = {
    "llama": (tiny_models.llama, LLAMA),
    "llama with biases": (
        lambda: tiny_models.llama(attention_bias=True),
        {
            **LLAMA,
            "model.layers.0.self_attn.q_proj.bias": ("bias", 8),
            "model.layers.0.self_attn.k_proj.bias": ("bias", 4),
            "model.layers.0.self_attn.v_proj.bias": ("bias", 4),
            "model.layers.0.self_attn.o_proj.bias": ("bias", 8),
        },
    ),
    "qwen3": (
        tiny_models.qwen3,
        {
            **LLAMA,
            "model.layers.0.self_attn.q_proj.weight": ("query", 4),
            "model.layers.0.self_attn.k_proj.weight": ("key", 2),
            "model.layers.0.self_attn.v_proj.weight": ("value", 12),
            "model.layers.0.self_attn.q_norm.weight": ("norm", 1),
            "model.layers.0.self_attn.k_norm.weight": ("norm", 1),
        },
    ),
    "gpt2": (tiny_models.gpt2, GPT2),
    "gpt2 with cross-attention": (
        lambda: tiny_models.gpt2(add_cross_attention=True),
        {
            **GPT2,
            "transformer.h.0.ln_cross_attn.weight": ("norm", 1),
            "transformer.h.0.ln_cross_attn.bias": ("bias", 8),
            "transformer.h.0.crossattention.q_attn.weight": ("query", 4),
            "transformer.h.0.crossattention.q_attn.bias": ("bias", 8),
            "transformer.h.0.crossattention.c_attn.weight": ("key+value", 4 + 8),
            "transformer.h.0.crossattention.c_attn.bias": ("bias", 16),
            "transformer.h.0.crossattention.c_proj.weight": ("attention_output", 8),
            "transformer.h.0.crossattention.c_proj.bias": ("bias", 8),
        },
    ),
    "attention": (
        tiny_models.attention,
        {
            "in_proj_weight": (QKV, 4 + 4 + 8),
            "in_proj_bias": ("bias", 24),
            "out_proj.weight": ("attention_output", 8),
            "out_proj.bias": ("bias", 8),
        },
    ),
    "attention with kdim and vdim": (
        tiny_models.cross_attention,
        {
            "q_proj_weight": ("query", 4),
            "k_proj_weight": ("key", 4),
            "v_proj_weight": ("value", 8),
            "in_proj_bias": ("bias", 24),
            "out_proj.weight": ("attention_output", 8),
            "out_proj.bias": ("bias", 8),
        },
    ),
    "encoder layer": (
        tiny_models.encoder_layer,
        {
            "self_attn.in_proj_weight": (QKV, 4 + 4 + 8),
            "self_attn.in_proj_bias": ("bias", 24),
            "self_attn.out_proj.weight": ("attention_output", 8),
            "self_attn.out_proj.bias": ("bias", 8),
            "linear1.weight": ("mlp", 12),
            "linear1.bias": ("bias", 12),
            "linear2.weight": ("mlp", 8),
            "linear2.bias": ("bias", 8),
            "norm1.weight": ("norm", 1),
            "norm1.bias": ("bias", 8),
            "norm2.weight": ("norm", 1),
            "norm2.bias": ("bias", 8),
        },
    ),
}


def roles_and_blocks(module, *args, **options):
    partition = partition_module(module, *args, **options)
    return {name: (cut.role.name, cut.blocks.num_values) for name, cut in partition.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_and_number_of_blocks(family):
    factory, expected = FAMILIES[family]
    module = factory()
    assert roles_and_blocks(module) == expected
    assert list(partition_module(module)) == [name for name, _ in module.named_parameters()]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_of_a_partition_tells_its_shape_and_why(family):
    module = FAMILIES[family][0]()
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    for name, cut in partition_module(module).items():
        assert (cut.name, cut.blocks.shape) == (name, shapes[name])
        assert cut.why


def test_the_output_axis_of_a_transposed_linear_layer():
    partition = partition_module(tiny_models.gpt2())
    assert partition["transformer.h.0.mlp.c_fc.weight"].blocks == Blocks.rows((8, 12), axis=1)
    fused = Blocks.segmented((8, 24), (Segment(8, 2), Segment(8, 2), Segment(8, 1)), axis=1)
    assert partition["transformer.h.0.attn.c_attn.weight"].blocks == fused


def test_heads_follow_the_head_size_that_the_model_tells():
    """Not dim / heads, which is 2 for this model and would cut each head in three."""
    partition = partition_module(tiny_models.qwen3())
    assert partition["model.layers.0.self_attn.q_proj.weight"].blocks == Blocks.rows((24, 8), block_size=6)
    assert partition["model.layers.0.self_attn.k_proj.weight"].blocks == Blocks.rows((12, 8), block_size=6)


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_is_transformer_with_attention(family):
    assert resolve_strategy("auto", FAMILIES[family][0]()) is STRATEGIES["transformer"]


class Unknown(nn.Module):
    """A Transformer with parameters that no rule knows."""

    def __init__(self):
        super().__init__()
        self.attention = tiny_models.attention()
        self.positions = nn.Parameter(torch.randn(1, 5, DIM))
        self.class_token = nn.Parameter(torch.randn(1, 1, DIM))
        self.experts = nn.Parameter(torch.randn(3, 4, DIM))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.gain = nn.Parameter(torch.ones(DIM))


@pytest.mark.parametrize("strategy", ["transformer", "transformer_early", "factored"])
def test_an_unknown_parameter_of_a_transformer_keeps_every_element(strategy):
    for name, cut in partition_module(Unknown(), strategy).items():
        if not name.startswith("attention."):
            assert cut.role.name == "other"
            assert cut.blocks.kind is Kind.ELEMENT
            assert cut.role.known == (name in ("class_token", "scale"))


def test_raw_expert_parameters_are_cut_by_expert_and_output():
    partition = partition_module(tiny_models.mixtral())
    for name, shape in (("gate_up_proj", (3, 24, 8)), ("down_proj", (3, 8, 12))):
        cut = partition[f"model.layers.0.mlp.experts.{name}"]
        assert (cut.role.name, cut.blocks) == ("expert", Blocks.rows(shape, axis=1, batch_axes=(0,)))


def test_layer_norms_below_an_embedding_or_output_are_norms():
    partition = partition_module(tiny_models.bert(), "transformer")
    norms = {name: cut for name, cut in partition.items() if name.endswith("LayerNorm.weight")}
    assert {name.split(".LayerNorm")[0] for name in norms} >= {"embeddings", "encoder.layer.0.output"}
    for cut in norms.values():
        assert (cut.role.name, cut.blocks) == ("norm", Blocks.whole((DIM,)))


def test_low_rank_matrices_are_cut_by_row():
    """Under names of queries, which the rank divides into no heads."""

    class LowRank(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.ModuleDict({"lora_A": nn.Linear(DIM, 3, bias=False), "lora_B": nn.Linear(3, DIM)})

    partition = partition_module(nn.Sequential(tiny_models.attention(), LowRank()))
    assert partition["1.q_proj.lora_A.weight"].blocks == Blocks.rows((3, DIM))
    assert partition["1.q_proj.lora_B.weight"].blocks == Blocks.rows((DIM, 3))


def test_patch_convolutions_are_whole():
    torchvision = pytest.importorskip("torchvision")
    vit = torchvision.models.VisionTransformer(8, 4, 1, 2, 8, 12, num_classes=3)
    partition = partition_module(vit)
    # A name that holds "v_proj".
    assert partition["conv_proj.weight"].blocks == Blocks.whole((8, 3, 4, 4))
    assert partition["encoder.pos_embedding"].blocks == Blocks.rows((1, 5, 8), axis=1, batch_axes=(0,))
    assert partition["encoder.layers.encoder_layer_0.self_attention.in_proj_weight"].role.name == QKV


def test_transposed_convolutions_have_their_output_axis_second():
    partition = partition_module(nn.ConvTranspose2d(3, 5, 2), "transformer", {"conv": "row"})
    assert partition["weight"].blocks == Blocks.rows((3, 5, 2, 2), axis=1)


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4), nn.BatchNorm2d(4), nn.SyncBatchNorm(4)]
)
def test_norms(norm):
    roles = {name: cut.role.name for name, cut in partition_module(norm).items()}
    assert roles.items() <= {"weight": "norm", "bias": "bias"}.items()


def test_a_linear_layer_onto_the_vocabulary_is_the_output_head():
    module = nn.ModuleDict({"tokens": nn.Embedding(11, 4), "mlp": nn.Linear(4, 4), "out": nn.Linear(4, 11)})
    roles = {name: cut.role.name for name, cut in partition_module(module).items()}
    assert roles["out.weight"] == "output_head"
    assert roles["mlp.weight"] == "linear"


def test_tied_weights_are_one_token_embedding():
    partition = partition_module(tiny_models.gpt2(tie_word_embeddings=True))
    assert "lm_head.weight" not in partition
    assert partition["transformer.wte.weight"].role.name == "token_embedding"


def test_untied_weights_are_two():
    partition = partition_module(tiny_models.gpt2(tie_word_embeddings=False))
    assert partition["lm_head.weight"].role.name == "output_head"


@pytest.mark.parametrize("first", ["out", "tokens"])
def test_tied_weights_are_an_embedding_whichever_name_comes_first(first):
    layers = {"out": nn.Linear(4, 11, bias=False), "tokens": nn.Embedding(11, 4)}
    layers["out"].weight = layers["tokens"].weight
    module = nn.ModuleDict({first: layers.pop(first), **layers})
    assert roles_and_blocks(module, "transformer") == {f"{first}.weight": ("token_embedding", 11)}


def test_frozen_parameters_are_cut_too():
    module = tiny_models.llama()
    module.model.requires_grad_(False)
    assert roles_and_blocks(module) == LLAMA


@pytest.mark.parametrize("family", ["llama", "gpt2", "attention"])
def test_a_compiled_module_has_the_same_roles(family):
    factory, expected = FAMILIES[family]
    compiled = torch.compile(factory())
    assert roles_and_blocks(compiled) == {f"_orig_mod.{name}": row for name, row in expected.items()}
