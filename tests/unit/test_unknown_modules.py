"""Modules that no class layout knows: what names and shapes may decide, and what raises instead."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_adam_mini import AdamMini, partition_module, register_layout
from lightning_adam_mini.partition import ModuleLayout, Role, Rows, Span, layouts, resolve_strategy


@pytest.fixture(autouse=True)
def _no_layout_stays(monkeypatch):
    monkeypatch.setattr(layouts, "REGISTERED", [])


class Attention(nn.Module):
    """Linear layers of any names and numbers of rows, with the attributes given."""

    def __init__(self, rows, width=64, **attributes):
        super().__init__()
        for name, number in rows.items():
            setattr(self, name, nn.Linear(width, number, bias=False))
        for name, value in attributes.items():
            setattr(self, name, value)


def cut(module, name, **options):
    found = partition_module(module, "transformer", **options)[name]
    return found.role.name, found.cut, found.blocks.num_values


@pytest.mark.parametrize(
    ("rows", "attributes", "key", "heads"),
    [
        (
            {"q_proj": 64, "k_proj": 16, "v_proj": 16, "o_proj": 64},
            {"num_heads": 8, "num_query_groups": 2},
            "k_proj",
            2,
        ),
        ({"q_proj": 64, "k_proj": 16, "v_proj": 16, "o_proj": 64}, {"num_heads": 8, "own_name": 2}, "k_proj", 2),
        ({"to_q": 64, "to_k": 8, "to_v": 8, "to_out": 64}, {"heads": 8}, "to_k", 1),
        ({"q": 64, "k": 16, "v": 16, "o": 64}, {"n_heads": 8, "n_kv_heads": 2}, "k", 2),
        ({"q_proj": 64, "k_proj": 64, "v_proj": 64}, {"nhead": 4}, "k_proj", 4),
    ],
)
def test_keys_have_heads_of_the_size_of_the_querys(rows, attributes, key, heads):
    assert cut(Attention(rows, **attributes), f"{key}.weight") == ("key", "head", heads)


def test_keys_that_are_no_multiple_of_the_querys_heads():
    module = Attention({"q_proj": 64, "k_proj": 24, "v_proj": 24, "o_proj": 64}, num_heads=4)
    with pytest.raises(ValueError, match=r"k_proj.weight: its 24 rows are no multiple of the query's head size 16"):
        partition_module(module)


@pytest.mark.parametrize("attributes", [{"num_heads": 8}, {"head_dim": 8}, {"num_heads": 8, "head_dim": 8}])
def test_queries_with_gates_that_no_layout_names(attributes):
    module = Attention({"q_proj": 128, "k_proj": 64, "v_proj": 64, "o_proj": 64}, **attributes)
    with pytest.raises(ValueError, match=r"q_proj.weight: its 128 rows are (twice what the output|not 8 heads)"):
        partition_module(module)


def test_a_configuration_that_counts_half_of_the_querys_rows():
    class Config:
        num_attention_heads = 8

    module = Attention({"q_proj": 128, "k_proj": 64, "v_proj": 64}, head_dim=8, config=Config())
    with pytest.raises(ValueError, match=r"q_proj.weight: its 128 rows are not 8 heads of 8 rows"):
        partition_module(module)


@pytest.mark.parametrize(
    ("name", "order", "expected"),
    [
        ("kv", "fused_contiguous", ("key+value", "head+row", 4 + 64)),
        ("to_kv", "fused_per_head", ("key+value", "head+row", 4 + 64)),
        ("qk", "fused_contiguous", ("query+key", "head", 4 + 4)),
        ("QKV", "fused_per_head", None),
    ],
)
def test_pairs_have_orders_of_their_own(name, order, expected):
    module = Attention({name: 128}, num_heads=4)
    with pytest.raises(ValueError, match="no layout tells how Attention orders"):
        partition_module(module)
    if expected:
        assert cut(module, f"{name}.weight", layouts={"Attention": order}) == expected


@pytest.mark.parametrize("name", ["linear_qkv", "W_pack", "w_qkv", "QKV", "qkv_layer", "proj_qkv", "W_kv"])
def test_usual_names_of_fused_matrices_raise(name):
    with pytest.raises(ValueError, match="no layout tells how"):
        partition_module(Attention({name: 192}, num_heads=8))


class ConditionalLayerNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 16))
        self.temperature = nn.Parameter(torch.randn(16))


class EmbeddingNorm(nn.Embedding):
    pass


class GRN(nn.Linear):
    pass


class Scales(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight_scale = nn.Parameter(torch.randn(6, 6))
        self.gamma = nn.Parameter(torch.randn(6))
        self.gate_up_proj = nn.Parameter(torch.randn(6, 8))
        self.down_proj = nn.Parameter(torch.randn(4, 6))


class Product(nn.Module):
    def forward(self, left, right):
        return left @ right

    def right_inverse(self, weight):
        return weight[:, :2], weight[:2]


def parametrized():
    layer = nn.Linear(8, 8)
    parametrize.register_parametrization(layer, "weight", Product())
    return layer


@pytest.mark.parametrize(
    "factory", [ConditionalLayerNorm, lambda: EmbeddingNorm(10, 4), lambda: GRN(4, 6), Scales, parametrized]
)
def test_names_never_make_one_number_of_a_matrix(factory):
    module = nn.Sequential(nn.Embedding(5, 4), factory())
    for name, found in partition_module(module, "transformer").items():
        assert found.blocks.num_values >= min(found.blocks.shape), name
        if not found.role.known:
            assert found.blocks.num_values == found.blocks.block_index().numel()


def test_a_token_table_that_is_tied_to_a_layer_stays_one():
    module = nn.ModuleDict({"tokens": nn.Embedding(10, 4), "fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 10)})
    module["fc2"].weight = module["tokens"].weight
    assert cut(module, "tokens.weight") == ("token_embedding", "row", 10)
    memory = Attention({"query": 64}, num_heads=4)
    memory.key, memory.value = nn.Embedding(100, 64), nn.Embedding(100, 64)
    assert cut(memory, "key.weight") == ("token_embedding", "row", 100)


def test_only_the_last_layer_of_the_shape_of_a_table_is_the_output_head():
    module = nn.ModuleDict(
        {"tokens": nn.Embedding(12, 4), "up": nn.Linear(4, 12), "down": nn.Linear(12, 4), "out": nn.Linear(4, 12)}
    )
    roles = {name: found.role.name for name, found in partition_module(module).items()}
    assert (roles["up.weight"], roles["out.weight"]) == ("linear", "output_head")


def test_tables_outside_of_the_model_that_declares_are_no_positions():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Embedding(10, 4), nn.Embedding(6, 4)

        def get_input_embeddings(self):
            return self.words

    roles = {
        name: found.role.name for name, found in partition_module(nn.ModuleList([Model(), nn.Embedding(7, 3)])).items()
    }
    assert roles == {
        "0.words.weight": "token_embedding",
        "0.places.weight": "position_embedding",
        "1.weight": "token_embedding",
    }


def test_bags_of_tokens_are_tokens():
    module = nn.Sequential(nn.EmbeddingBag(10, 4), nn.Linear(4, 2))
    assert resolve_strategy("auto", module).name == "transformer"
    assert cut(module, "0.weight") == ("token_embedding", "row", 10)


class Raises(nn.Module):
    """Attributes and methods that raise whatever they like."""

    def __init__(self, error):
        super().__init__()
        self.error = error
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    @property
    def num_heads(self):
        raise self.error

    def get_input_embeddings(self):
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError(), NotImplementedError(), KeyError("x"), ZeroDivisionError()])
def test_modules_that_raise_when_they_are_asked(error):
    with pytest.raises(ValueError, match=r"q_proj.weight: its module tells neither"):
        partition_module(Raises(error))


@pytest.mark.parametrize("attributes", [{"inner_dim": None}, {"inner_dim": 64, "heads": 0}, {"heads": [8]}])
def test_attributes_that_are_no_sizes(attributes):
    with pytest.raises(ValueError, match=r"to_[qk].weight: its module tells neither"):
        partition_module(Attention({"to_q": 64, "to_k": 64, "to_v": 64}, **attributes))


def test_parts_of_no_rows_are_left_out():
    class Latent(nn.Module):
        def __init__(self, rope):
            super().__init__()
            self.num_heads, self.qk_head_dim, self.v_head_dim = 4, 6 + rope, 5
            self.qk_nope_head_dim, self.qk_rope_head_dim = 6, rope
            self.q_proj = nn.Linear(16, 4 * (6 + rope))
            self.kv_a_proj_with_mqa = nn.Linear(16, 9 + rope)
            self.kv_b_proj = nn.Linear(9, 4 * (6 + 5))

    assert cut(Latent(2), "kv_a_proj_with_mqa.weight") == ("linear+key", "row+head", 9 + 1)
    assert cut(Latent(0), "kv_a_proj_with_mqa.weight") == ("linear", "row", 9)
    assert cut(Latent(0), "kv_b_proj.weight") == ("key+value", "head+row", 4 + 4 * 5)


def laid_out(rows, **layouts):
    return partition_module(Attention(rows), layouts=layouts)


def mine(name="mine", **fields):
    return ModuleLayout(name, **{"parameters": {"qkv.weight": Role.LINEAR}, **fields})


def test_a_registered_layout_for_names_comes_before_the_table():
    register_layout(mine(children=("q_proj",), parameters={"q_proj.weight": Role.LINEAR}))
    model = nn.Sequential(
        nn.MultiheadAttention(8, 2), Attention({"q_proj": 64, "k_proj": 64, "v_proj": 64}, num_heads=4)
    )
    assert cut(model, "1.q_proj.weight") == ("linear", "row", 64)


def test_a_layout_that_is_registered_again_replaces_the_former():
    classes = (f"{Attention.__module__}.Attention",)
    register_layout(mine(classes=classes))
    register_layout(mine(classes=classes, parameters={"qkv.weight": Rows(Span(Role.VALUE))}))
    assert len(layouts.REGISTERED) == 1
    assert cut(Attention({"qkv": 12}), "qkv.weight") == ("value", "row", 12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: register_layout(mine(classes=("Attention",))), "'Attention' is no qualified name"),
        (lambda: register_layout(mine("t5", classes=("a.B",))), "there is a layout 't5' already"),
        (lambda: register_layout(mine()), "names neither classes nor children"),
        (lambda: mine(classes="a.B"), "classes must be a tuple of names"),
        (lambda: mine(parameters={"w": "query"}), "'w' must have a Role or Rows, not 'query'"),
        (lambda: laid_out({"qkv": 12}, Attention=3), "must have the name of a layout"),
        (
            lambda: laid_out({"qkv": 12}, Attention="fused"),
            "there is no layout 'fused'",
        ),
        (
            lambda: laid_out({"qkv": 12}, Attn="fused_per_head"),
            "no module of this model",
        ),
        (lambda: laid_out({"own": 12}, Attention="fused_per_head"), "names none of"),
        (
            lambda: partition_module(
                Attention({"qkv": 12}),
                layouts={"Attention": mine(parameters={"qkv.weight": Role.LINEAR, "owt.weight": Role.LINEAR})},
            ),
            "has no owt.weight",
        ),
        (lambda: partition_module(Attention({"qkv": 12}), overrides={3: "row"}), "3 is no role, name or pattern"),
        (lambda: partition_module(Attention({"qkv": 12}), ["auto"]), "partition must be the name of a strategy"),
        (lambda: AdamMini(list(nn.Linear(2, 2).parameters()), partition_layouts={"A": "t5"}), "need the model"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
