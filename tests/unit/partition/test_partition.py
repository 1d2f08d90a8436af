"""Strategies, overrides and layouts of one's own: from roles to the cut of each parameter."""

import ast
import re

import pytest
import torch
from torch import nn

import tiny_models
from lightning_adam_mini import Blocks, partition_module
from lightning_adam_mini.blocks import Segment
from lightning_adam_mini.partition import (
    STRATEGIES,
    ModuleLayout,
    Role,
    Strategy,
    Structure,
    layouts,
    partition_tensors,
    register_layout,
    resolve_strategy,
)
from lightning_adam_mini.partition.layouts.orders import CONTIGUOUS
from tiny_models import DIM, HEADS, FusedAttention, SeparateAttention


def test_auto_is_the_default_without_attention():
    resnet = tiny_models.resnet18()
    assert resolve_strategy("auto", resnet) is STRATEGIES["default"]
    partition = partition_module(resnet)
    assert {cut.role.name for cut in partition.values()} == {"conv", "norm", "bias", "linear"}
    assert {cut.blocks.num_values for cut in partition.values()} == {1}


def test_auto_without_a_module_is_the_default():
    assert resolve_strategy("auto", None) is STRATEGIES["default"]


def test_a_strategy_of_ones_own():
    strategy = Strategy("mine", {Role.QUERY: Structure.ROW}, otherwise=Structure.WHOLE)
    assert resolve_strategy(strategy, None) is strategy
    partition = partition_module(SeparateAttention(), strategy)
    assert [cut.blocks.num_values for cut in partition.values()] == [8, 1, 1, 1]


@pytest.mark.parametrize(
    ("strategy", "cuts"),
    [
        (
            "transformer",
            {
                "token_embedding": "row",
                "position_embedding": "row",
                "output_head": "row",
                "query": "head",
                "key": "head",
                "value": "row",
                "attention_output": "row",
                "mlp": "row",
                "linear": "row",
                "expert": "row",
                "conv": "whole",
                "norm": "whole",
                "bias": "element",
                "lora": "row",
                "fused_qkv": "head",
                "other": "element",
            },
        ),
        (
            "transformer_early",
            {
                "token_embedding": "element",
                "position_embedding": "whole",
                "output_head": "element",
                "query": "head",
                "key": "head",
                "value": "whole",
                "attention_output": "whole",
                "mlp": "whole",
                "linear": "whole",
                "expert": "whole",
                "conv": "whole",
                "norm": "whole",
                "bias": "whole",
                "lora": "whole",
                "fused_qkv": "head",
                "other": "element",
            },
        ),
        ("default", dict.fromkeys(Role, "whole")),
        ("element", dict.fromkeys(Role, "element")),
    ],
)
def test_the_tables(strategy, cuts):
    assert {role: STRATEGIES[strategy].structure(role) for role in Role} == cuts


FUSED_NAMES = (
    "att_proj", "c_attn", "in_proj_qkv", "in_proj_qkvz", "linear_qkv", "proj_qkv", "qkv", "qkv_layer", "qkv_linear",
    "qkv_proj", "queries_keys_values", "query_key_value", "to_qkv", "w_pack", "w_qkv", "wqkv", "to_qvk", "attn_qkv",
    "kqv", "qkv_transform", "Wqkv", "QKV", "toQKV", "queryKeyValue", "fc_vqk",
)  # fmt: skip


@pytest.mark.parametrize("key", ["value", "v_proj.weight", r"re:v_proj\..*", "re:[a-z_]*v_proj.weight"])
def test_overrides_by_role_name_and_pattern(key):
    partition = partition_module(SeparateAttention(), "transformer", {key: "whole"})
    assert partition["v_proj.weight"].blocks == Blocks.whole((4, DIM))
    assert f"override {key!r}" in partition["v_proj.weight"].why
    assert partition["o_proj.weight"].blocks == Blocks.rows((DIM, DIM))
    assert "override" not in partition["o_proj.weight"].why


@pytest.mark.parametrize(
    ("cut", "blocks"),
    [
        ("head", Blocks.rows((8, 8), block_size=2)),
        ("row", Blocks.rows((8, 8))),
        ("column", Blocks.rows((8, 8), axis=1)),
        ("whole", Blocks.whole((8, 8))),
        ("element", Blocks.element((8, 8))),
        ("factored", Blocks.factored((8, 8))),
    ],
)
def test_every_cut(cut, blocks):
    assert partition_module(SeparateAttention(), "default", {"query": cut})["q_proj.weight"].blocks == blocks


def test_the_first_override_that_matches_wins():
    rules = {"q_proj.weight": "row", "re:[qk]_proj.*": "whole"}
    partition = partition_module(SeparateAttention(), "transformer", rules)
    assert partition["q_proj.weight"].blocks.num_values == 8
    assert partition["k_proj.weight"].blocks.num_values == 1


def test_an_override_inside_a_fused_matrix():
    partition = partition_module(tiny_models.attention(), overrides={"value": "whole"})
    fused = Blocks.segmented((24, 8), (Segment(8, 2), Segment(8, 2), Segment(8, 8)))
    assert partition["in_proj_weight"].blocks == fused


def test_vectors_are_never_factored():
    partition = partition_module(nn.Linear(3, 4), "default", {"re:.*": "factored"})
    assert partition["weight"].blocks == Blocks.factored((4, 3))
    assert partition["bias"].blocks == Blocks.element((4,))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"value": "rows"},
            "block structure 'rows' for 'value'; choose from head, row, column, whole, element, factored",
        ),
        ({"re:(": "row"}, r"'re:\(' is not a valid regular expression"),
        ({"expert": "row"}, "'expert' matches no parameter; this model has the roles query, key, value"),
        ({"q_prj.weight": "row"}, "matches no parameter; did you mean q_proj.weight"),
        ({"re:q_proj": "row"}, "'re:q_proj' matches no parameter"),
        ({"re:.*": "row", "query": "whole"}, "'query' has no effect: earlier overrides match all it matches"),
        ({"attention_output": "head"}, "o_proj.weight: attention_output has no heads"),
    ],
)
def test_overrides_that_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        partition_module(SeparateAttention(), "transformer", overrides)


@pytest.mark.parametrize("cut", ["element", "factored"])
def test_parts_of_a_fused_matrix_that_one_tensor_cannot_hold(cut):
    with pytest.raises(ValueError, match=r"in_proj_weight: the parts of a fused parameter .* cannot combine") as error:
        partition_module(tiny_models.attention(), "transformer", {"value": cut})
    assert_the_named_override_settles(tiny_models.attention(), error)


def assert_the_named_override_settles(module, error):
    """The message tells `partition_overrides={'name': 'cut', ...}`."""
    told = re.search(r"partition_overrides=(\{.*?\})", str(error.value)).group(1)
    partition = partition_module(module, "transformer", ast.literal_eval(told))
    settled = [row for row in partition.values() if "override" in row.why]
    assert settled
    assert all(row.blocks.num_values > 1 for row in settled)


@pytest.mark.parametrize("leaf", FUSED_NAMES)
def test_an_unknown_order_of_query_key_and_value_raises(leaf):
    module = nn.ModuleDict({"attention": nn.ModuleDict({leaf: nn.Linear(4, 12)})})
    with pytest.raises(ValueError, match=f"attention.{leaf}.weight: no layout knows how ModuleDict orders") as error:
        partition_module(module, "transformer")
    assert_the_named_override_settles(module, error)
    partition = partition_module(module, "default")
    assert partition[f"attention.{leaf}.weight"].role.name == "fused_qkv"


@pytest.mark.parametrize("strategy", ["transformer", "transformer_early"])
def test_strategies_that_need_heads_refuse_what_tells_none(strategy):
    class Headless(SeparateAttention):
        def __init__(self):
            super().__init__()
            del self.head_dim, self.num_heads, self.num_key_value_heads

    with pytest.raises(ValueError, match=r"q_proj.weight: its module has neither the size of a head") as error:
        partition_module(Headless(), strategy)
    assert_the_named_override_settles(SeparateAttention(), error)
    factored = partition_module(Headless(), "factored")
    assert factored["q_proj.weight"].blocks == Blocks.factored((8, 8))


def test_queries_derive_the_head_size_from_their_heads():
    class Heads(SeparateAttention):
        def __init__(self):
            super().__init__(num_key_value_heads=HEADS)
            del self.head_dim

    query = partition_module(Heads(), "transformer", {"key": "row"})["q_proj.weight"]
    assert query.blocks == Blocks.rows((8, 8), block_size=2)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (SeparateAttention(head_dim=3), "12 rows are not a multiple of the head size 5"),
        (tiny_models.attention(), "24 rows do not match MultiheadAttention .heads 4, kv_heads 4, head_dim 5"),
    ],
)
def test_head_sizes_that_do_not_divide(module, message):
    module.head_dim = 5
    with pytest.raises(ValueError, match=message):
        partition_module(module)


def test_head_counts_that_do_not_add_up():
    module = tiny_models.attention()
    module.num_heads = 2
    with pytest.raises(
        ValueError, match=r"24 rows do not match MultiheadAttention \(heads 2, kv_heads 2, head_dim 2\)"
    ):
        partition_module(module)


def test_an_unknown_strategy():
    with pytest.raises(ValueError, match="unknown partition 'transfomer'; choose from auto, transformer, "):
        partition_module(nn.Linear(2, 2), "transfomer")


def test_overrides_see_through_wrappers():
    compiled = nn.DataParallel(torch.compile(SeparateAttention()))
    for key in ("q_proj.weight", "re:q_.*", "module._orig_mod.q_proj.weight"):
        partition = partition_module(compiled, "transformer", {key: "whole"})
        assert partition["module._orig_mod.q_proj.weight"].blocks.num_values == 1


@pytest.fixture
def no_layout_stays(monkeypatch):
    monkeypatch.setattr(layouts, "REGISTERED", [])


@pytest.mark.usefixtures("no_layout_stays")
def test_a_registered_layout_settles_a_fused_matrix():
    with pytest.raises(ValueError, match="no layout knows how FusedAttention orders"):
        partition_module(FusedAttention(), "transformer")
    register_layout(
        ModuleLayout(
            "mine",
            classes=(f"{FusedAttention.__module__}.FusedAttention",),
            parameters={"qkv.weight": CONTIGUOUS, "proj.weight": Role.ATTENTION_OUTPUT},
        )
    )
    partition = partition_module(FusedAttention())
    assert partition["qkv.weight"].role.name == "query+key+value"
    assert partition["qkv.weight"].blocks.num_values == 4 + 2 + 4


@pytest.mark.usefixtures("no_layout_stays")
def test_a_registered_layout_takes_precedence_and_holds_for_subclasses():
    register_layout(
        ModuleLayout(
            "mine",
            classes=("torch.nn.modules.activation.MultiheadAttention",),
            parameters={"in_proj_weight": Role.LINEAR},
        )
    )

    class Mine(nn.MultiheadAttention):
        pass

    assert partition_module(Mine(8, 2), "transformer")["in_proj_weight"].blocks == Blocks.rows((24, 8))


def test_tensors_of_which_only_shapes_are_known():
    shapes = {"weight": (4, 3), "scale": ()}
    assert {n: c.blocks.num_values for n, c in partition_tensors(shapes).items()} == {"weight": 1, "scale": 1}
    assert partition_tensors(shapes, "element")["weight"].blocks == Blocks.element((4, 3))
    assert partition_tensors(shapes, overrides={"weight": "row"})["weight"].blocks == Blocks.rows((4, 3))


@pytest.mark.parametrize("strategy", ["transformer", "transformer_early", "factored"])
def test_strategies_by_role_need_the_module(strategy):
    with pytest.raises(ValueError, match=f"partition '{strategy}' needs the role of each parameter: pass the model"):
        partition_tensors({"weight": (4, 3)}, strategy)


def test_auto_takes_unknown_attention_for_a_transformer():
    """A class that no layout knows must not make `auto` give each tensor one number."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    model = nn.Sequential(Attention(), nn.Linear(8, 4))
    assert resolve_strategy("auto", model).name == "transformer"
    with pytest.raises(ValueError, match=r"0.query.weight: its module has neither the size of a head") as error:
        partition_module(model)
    assert_the_named_override_settles(model, error)
    partition = partition_module(model, overrides={"query": "row", "key": "row"})
    assert partition["0.query.weight"].blocks.num_values == 8


def test_auto_never_gives_a_token_table_one_number():
    model = nn.Sequential(nn.Embedding(16, 8), nn.LSTM(8, 8), nn.Linear(8, 16))
    assert partition_module(model)["0.weight"].blocks.num_values == 16


def test_norms_of_several_dimensions_are_norms():
    partition = partition_module(nn.LayerNorm((3, 8)), "transformer")
    assert [row.role.name for row in partition.values()] == ["norm", "bias"]
