"""Modules that no class layout knows: what names and shapes may decide, and what raises instead."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_adam_mini import AdamMini, explain, partition_module, register_layout
from lightning_adam_mini.blocks import Kind
from lightning_adam_mini.partition import ModuleLayout, Role, Rows, Span, layouts, resolve_strategy
from lightning_adam_mini.partition.layer_roles import found_output_axis

QKV = "query+key+value"


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
    return found.role.name, found.structure, found.blocks.num_values


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
    with pytest.raises(ValueError, match=r"k_proj.weight: its 24 rows are not a multiple of the query's head size 16"):
        partition_module(module)


@pytest.mark.parametrize("attributes", [{"num_heads": 8}, {"head_dim": 8}, {"num_heads": 8, "head_dim": 8}])
def test_queries_with_gates_that_no_layout_names(attributes):
    module = Attention({"q_proj": 128, "k_proj": 64, "v_proj": 64, "o_proj": 64}, **attributes)
    with pytest.raises(ValueError, match=r"q_proj.weight: its 128 rows are (twice the inputs|not 8 heads)"):
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
    with pytest.raises(ValueError, match="no layout knows how Attention orders"):
        partition_module(module)
    if expected:
        assert cut(module, f"{name}.weight", layouts={"Attention": order}) == expected


def test_advice_names_what_a_layout_leaves_open_in_other_modules_of_the_class():
    """The square matrix keeps a full second moment without a layout; with one, its rows do not fit the heads."""
    square = nn.Parameter(torch.randn(16, 16))
    first, second = (
        Attention({"kv": 32, "out": 16}, 16, num_heads=4),
        Attention({"out": 16}, 16, num_heads=4, qkv=square),
    )
    model = nn.Sequential(first, second)
    advice = r"0\.kv\.weight: .*partition_layouts=.*\(which leaves 1\.qkv open\)"
    with pytest.raises(ValueError, match=advice):
        partition_module(model)
    with pytest.raises(ValueError, match=r"1\.qkv: its 16 rows"):
        partition_module(model, layouts={"Attention": "fused_contiguous"})
    overrides = {"1.qkv": "element"}
    found = partition_module(model, overrides=overrides, layouts={"Attention": "fused_contiguous"})
    assert found["0.kv.weight"].structure == "head+row"


def test_classes_of_one_name_get_advice_by_their_qualified_names():
    other = type("Attention", (nn.Module,), {"__module__": "elsewhere"})()
    other.qkv, other.num_heads = nn.Linear(64, 192), 4
    model = nn.Sequential(Attention({"qkv": 192}, num_heads=8), other)
    with pytest.raises(ValueError, match=r"partition_layouts=\{'[\w.]+\.Attention': .*, 'elsewhere\.Attention': "):
        partition_module(model)


def test_patterns_of_a_layout_leave_scalars_alone():
    module = nn.Module()
    module.scale, module.layer = nn.Parameter(torch.tensor(1.0)), nn.Linear(4, 6)
    found = partition_module(module, "transformer", layouts={"Module": ModuleLayout("all", {"*": Role.MLP})})
    assert found["scale"].role.name == "other"
    assert found["layer.weight"].role.name == "mlp"


@pytest.mark.parametrize("name", ["linear_qkv", "W_pack", "w_qkv", "QKV", "qkv_layer", "proj_qkv", "W_kv"])
def test_usual_names_of_fused_matrices_raise(name):
    with pytest.raises(ValueError, match="no layout knows how"):
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


class Stacked(nn.Module):
    """A layer of several matrices, as mixtures of experts and models of several codebooks have."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))


@pytest.mark.parametrize("shape", [(8, 6, 4), (2, 3, 6, 4)])
def test_stacked_matrices_under_names_of_single_ones_stay_unknown(shape):
    model = nn.Sequential(nn.Embedding(5, 4), nn.ModuleDict({"fc1": Stacked(*shape), "fc2": nn.Linear(6, 4)}))
    name = "1.fc1.weight"
    assert cut(model, name) == ("other", "element", math.prod(shape))
    rows = math.prod(shape[:-1])
    assert cut(model, name, overrides={name: "row"}) == ("other", "row", rows)
    assert cut(model, name, overrides={name: "whole"}) == ("other", "whole", math.prod(shape[:-2]))
    assert partition_module(model, "transformer", {name: "factored"})[name].blocks.num_values >= rows
    with pytest.raises(ValueError, match=r"1.fc1.weight: other has no heads.*'row'\}"):
        partition_module(model, "transformer", {name: "head"})
    assert partition_module(model, "default")[name].blocks.num_values == 1


def test_a_layout_of_the_users_keeps_stacked_matrices_apart():
    layout = ModuleLayout("stack", {"weight": Role.EXPERT})
    model = nn.Sequential(nn.Embedding(5, 4), Stacked(3, 6, 4))
    assert cut(model, "1.weight", layouts={"Stacked": layout}) == ("expert", "row", 18)


def test_a_grouped_transposed_convolution_is_cut_within_its_groups():
    blocks = partition_module(nn.ConvTranspose2d(8, 8, 3, groups=4), "transformer", {"conv": "row"})["weight"].blocks
    index = blocks.block_index()
    for group in range(4):
        inside, outside = index[2 * group : 2 * group + 2], torch.cat([index[: 2 * group], index[2 * group + 2 :]])
        assert not torch.isin(inside, outside).any()
    assert partition_module(nn.ConvTranspose2d(8, 8, 3, groups=4), "transformer")["weight"].blocks.num_values == 1


def test_what_the_user_says_comes_before_types():
    conv = Attention({}, num_heads=4)
    conv.qkv, conv.proj = nn.Conv2d(8, 24, 3, groups=8), nn.Conv2d(8, 8, 1)
    model = nn.Sequential(nn.Embedding(5, 8), conv)
    assert cut(model, "1.qkv.weight", layouts={"Attention": "fused_contiguous"}) == (QKV, "head+head+row", 4 + 4 + 8)
    mine = ModuleLayout("mine", {"qkv.weight": Role.LINEAR, "proj.bias": Role.LINEAR})
    assert cut(model, "1.qkv.weight", layouts={"Attention": mine}) == ("linear", "row", 24)
    assert cut(model, "1.proj.bias", layouts={"Attention": mine}) == ("linear", "row", 8)


@pytest.mark.parametrize("name", ["Wqkv", "QKV", "in_proj", "to_qvk", "attn_qkv", "kqv", "qkv_transform", "mix_up"])
@pytest.mark.parametrize("kind", ["linear", "Conv1D", "1x1", "bare"])
def test_a_layout_finds_the_fused_matrix_of_a_class_whatever_its_name(name, kind):
    module = Attention({"out": 64}, num_heads=4)
    transposed = pytest.importorskip("transformers.pytorch_utils").Conv1D
    make = {
        "linear": lambda: nn.Linear(64, 192, bias=False),
        "Conv1D": lambda: transposed(192, 64),
        "1x1": lambda: nn.Conv1d(64, 192, 1),
        "bare": lambda: nn.Parameter(torch.randn(64, 192)),
    }
    setattr(module, name, make[kind]())
    found = partition_module(module, layouts={"Attention": "fused_contiguous"})
    fused = found[name if kind == "bare" else f"{name}.weight"]
    assert (fused.role.name, fused.blocks.num_values) == (QKV, 4 + 4 + 64)
    assert fused.blocks.axis == (1 if kind in ("Conv1D", "bare") else 0)


@pytest.mark.parametrize("order", ["fused_contiguous", "fused_per_head", "fused_per_group", "torchvision_contiguous"])
def test_sizes_that_do_not_determine_the_rows_raise(order):
    """Four heads of eight rows with one key and value, or of four rows with four: the module does not tell."""
    module = Attention({"qkv": 48, "proj": 32}, width=32, num_heads=4, own_name=1)
    with pytest.raises(ValueError, match=r"48 rows do not determine .* head_dim .* num_key_value_heads"):
        partition_module(module, layouts={"Attention": order})


@pytest.mark.parametrize(
    "told",
    [
        *({name: 1} for name in ("n_kv_head", "num_kv_heads", "kv_heads", "n_head_kv", "num_groups", "n_query_groups")),
        {"multi_query": True},
        {"config": SimpleNamespace(n_kv_heads=1)},
    ],
)
def test_key_value_heads_under_many_names(told):
    module = Attention({"qkv": 48, "proj": 32}, width=32, num_heads=4, **told)
    found = partition_module(module, layouts={"Attention": "fused_contiguous"})["qkv.weight"]
    assert (found.role.parts[0].head_dim, found.blocks.num_values) == (8, 4 + 1 + 8)


def test_head_sizes_that_contradict_each_other_raise():
    two = Attention({"qkv": 96, "proj": 64}, width=64, num_heads=8, num_kv_heads=2)
    with pytest.raises(ValueError, match="8 query heads and 2 key-value heads, so its rows cannot come head by head"):
        partition_module(two, layouts={"Attention": "fused_per_head"})
    other = Attention({"qkv": 96, "proj": 32}, width=32, num_heads=4, d_k=16)
    with pytest.raises(ValueError, match="would be heads 4, kv_heads 4 of 8 rows, but d_k of Attention is 16"):
        partition_module(other, layouts={"Attention": "fused_contiguous"})


def test_a_bare_fused_matrix_lies_where_its_size_allows():
    """Six heads of queries, keys and values in thirty columns; twenty-four rows would be heads that nothing takes."""
    module = Attention({}, num_heads=4, n_kv_heads=1)
    module.w_qkv, module.proj = nn.Parameter(torch.randn(24, 30)), nn.Linear(20, 24)
    found = partition_module(module, "transformer", layouts={"Attention": "fused_contiguous"})["w_qkv"]
    assert (found.blocks.axis, found.blocks.num_values) == (1, 4 + 1 + 5)
    module.w_qkv, module.proj = nn.Parameter(torch.randn(72, 72)), nn.Linear(24, 72)
    module.n_kv_heads = 4
    with pytest.raises(ValueError, match=r"w_qkv: .*(output dimension is unknown|do not determine)"):
        partition_module(module, "transformer", layouts={"Attention": "fused_contiguous"})


@pytest.mark.parametrize("told", [{}, {"head_dim": 5}])
def test_bare_matrices_are_placed_by_counts_alone(told):
    """Never by heads that go into the inputs: 24 is a multiple of four heads, and the 5 columns are one key head."""
    module = Attention({}, num_heads=4, n_kv_heads=1, **told)
    for name, shape in {"w_q": (24, 20), "w_k": (24, 5), "w_v": (24, 5), "w_o": (20, 24)}.items():
        setattr(module, name, nn.Parameter(torch.randn(shape)))
    for name, found in partition_module(module, "transformer").items():
        assert found.blocks.kind is Kind.ELEMENT or (told and found.blocks.axis == 1), name


def test_advice_finds_layouts_of_other_names():
    """Only sizes under names of its own make an entry of the table a candidate."""
    module = Attention({"in_proj_qkv": 64}, num_k_heads=2, head_k_dim=8, num_v_heads=4, head_v_dim=8)
    with pytest.raises(ValueError, match=r"partition_layouts=.*'gated_delta_net_contiguous'") as error:
        partition_module(module)
    assert "fused" not in str(error.value).partition("partition_overrides")[0]
    found = cut(module, "in_proj_qkv.weight", layouts={"Attention": "gated_delta_net_contiguous"})
    assert found == (QKV, "head+head+row", 2 + 2 + 32)


def test_a_memory_of_keys_and_values_is_no_attention():
    """Nor are two encoders, or heads of several tasks without a count of heads."""
    memory, towers = Attention({"key": 256, "value": 64}), Attention({"query_encoder": 8, "key_encoder": 8})
    for module in (memory, towers):
        assert resolve_strategy("auto", module).name == "default"
        assert {found.role.name for found in partition_module(module, "transformer").values()} == {"linear"}


def test_what_is_taken_for_an_ordinary_matrix_is_told():
    module = Attention({"W_q": 64, "W_k": 64, "W_v": 64, "W_o": 64, "side": 64, "q_norms_of": 64}, num_heads=4)
    with pytest.warns(UserWarning, match="module that attends|the module attends") as caught:
        optimizer = AdamMini(module)
    ordinary, unclear = sorted((str(warning.message) for warning in caught), key=lambda text: "full second" in text)
    assert ordinary.startswith("side.weight: treated as ordinary matrices")
    assert unclear.startswith("q_norms_of.weight: the module attends, and its name says more than query, key or value")
    assert optimizer.partition["q_norms_of.weight"].blocks.num_values == 64 * 64
    assert set(explain(module).warnings) == {ordinary, unclear}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdamMini(module, partition_overrides={"side.weight": "row", "q_norms_of.weight": "row"})
        AdamMini(module, partition="default")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(6, 6), (6, 4), (3000, 2000)])
def test_the_output_axis_of_an_unknown_layer_is_found_out(shape, transposed):
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(shape))

        def forward(self, tokens):
            weight = self.weight if transposed else self.weight.T
            return nn.functional.dropout(tokens @ weight, 0.5)

    layer, state = Dense(), torch.get_rng_state()
    assert found_output_axis(layer, "weight") == int(transposed)
    assert torch.equal(torch.get_rng_state(), state)
    layer.register_forward_hook(lambda *_: None)
    assert found_output_axis(layer, "weight") is None


def test_a_feed_forward_of_the_shape_of_a_table_is_no_head():
    feed = {"gate": nn.Linear(4, 12), "rise": nn.Linear(4, 12), "fall": nn.Linear(12, 4)}
    for names in (("gate", "rise", "fall"), ("fall", "gate", "rise")):
        model = nn.ModuleDict({"tokens": nn.Embedding(12, 4), "mlp": nn.ModuleDict({n: feed[n] for n in names})})
        assert "output_head" not in {found.role.name for found in partition_module(model, "transformer").values()}


@pytest.mark.parametrize("name", ["wpe", "pos_emb", "position_embedding_table", "positions"])
def test_tables_of_positions(name):
    model = nn.ModuleDict({"wte": nn.Embedding(12, 4), name: nn.Embedding(6, 4)})
    assert partition_module(model, "transformer_early")[f"{name}.weight"].role.name == "position_embedding"
    assert cut(model, "wte.weight") == ("token_embedding", "row", 12)


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
    with pytest.raises(ValueError, match=r"q_proj.weight: its module has neither"):
        partition_module(Raises(error))


@pytest.mark.parametrize("attributes", [{"inner_dim": None}, {"inner_dim": 64, "heads": 0}, {"heads": [8]}])
def test_attributes_that_are_no_sizes(attributes):
    with pytest.raises(ValueError, match=r"to_[qk].weight: its module has neither"):
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
        (lambda: register_layout(mine(classes=("Attention",))), "'Attention' is not a qualified name"),
        (lambda: register_layout(mine("t5", classes=("a.B",))), "there is already a layout 't5'"),
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
        (lambda: partition_module(Attention({"qkv": 12}), overrides={3: "row"}), "3 is not a role, name or pattern"),
        (lambda: partition_module(Attention({"qkv": 12}), ["auto"]), "partition must be the name of a strategy"),
        (lambda: AdamMini(list(nn.Linear(2, 2).parameters()), partition_layouts={"A": "t5"}), "need the model"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
