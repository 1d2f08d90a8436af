"""What `explain` tells before an optimizer is built: bytes to the byte, equal layers as one, and warnings."""

import json
import re
import warnings
from dataclasses import asdict

import pytest
import torch
from torch import nn

import tiny_models
from lightning_adam_mini import AdamMini, explain, partition_module
from lightning_adam_mini.measure import adamw_state_bytes, optimizer_state_bytes
from lightning_adam_mini.measure.explanation_table import collapse, collapse_names
from lightning_adam_mini.measure.memory import format_bytes
from lightning_adam_mini.partition import STRATEGIES, ModuleLayout, Role, Strategy, Structure

MODELS = {
    "gpt2": tiny_models.gpt2,
    "llama": tiny_models.llama,
    "mixtral": tiny_models.mixtral,
    "torch attention": tiny_models.attention,
    "torch encoder": tiny_models.encoder_layer,
    "convolutions": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)),
}


class Mystery(nn.Module):
    """Parameters of which no rule knows what they do."""

    def __init__(self):
        super().__init__()
        self.mixing, self.offsets = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(6))


def mystery():
    return nn.Sequential(nn.Embedding(5, 4), Mystery(), Mystery())


def rows(explanation):
    return {row.name: row for row in explanation.rows}


# Bytes


@pytest.mark.parametrize("exp_avg_dtype", [None, torch.bfloat16, torch.float32, torch.uint8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("model", MODELS)
def test_bytes_are_those_that_the_optimizer_holds(model, dtype, exp_avg_dtype):
    module = MODELS[model]().to(dtype)
    next(module.parameters()).requires_grad_(False)
    for partition in ("auto", *STRATEGIES):
        explanation = explain(module, partition, exp_avg_dtype=exp_avg_dtype)
        optimizer = AdamMini(module, partition=partition, exp_avg_dtype=exp_avg_dtype)
        assert explanation.totals.state_bytes == optimizer_state_bytes(optimizer)
        assert explanation.totals.adamw_state_bytes == adamw_state_bytes(module.parameters())
        of_one = {name: sum(v.nbytes for v in optimizer.state[p].values()) for name, p in named(module)}
        assert {row.name: row.state_bytes for row in explanation.rows} == of_one


def named(module):
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("model", MODELS)
def test_rows_are_those_of_the_partition(model):
    module = MODELS[model]()
    cuts = partition_module(module)
    explained = rows(explain(module))
    assert list(explained) == list(cuts)
    for name, parameter in module.named_parameters():
        row, cut = explained[name], cuts[name]
        assert (row.role, row.structure, row.blocks) == (cut.role.name, cut.structure, cut.blocks.num_values)
        assert (row.shape, row.elements, row.dtype) == (tuple(parameter.shape), parameter.numel(), "float32")
        assert row.why.startswith(cut.why)


def test_totals():
    module = tiny_models.llama()
    explanation = explain(module)
    totals = explanation.totals
    assert totals.tensors == len(list(module.parameters()))
    assert totals.elements == sum(parameter.numel() for parameter in module.parameters())
    assert totals.blocks == sum(row.blocks for row in explanation.rows)
    assert totals.saving_percent == pytest.approx(100 - 100 * totals.state_bytes / totals.adamw_state_bytes)
    assert totals.second_moment_removed_percent == pytest.approx(100 - 100 * totals.blocks / totals.elements)
    by_role = explanation.role_totals
    assert by_role["mlp"].tensors == 3
    assert sum(role.state_bytes for role in by_role.values()) == totals.state_bytes


def test_of_the_partition_of_adamw_nothing_is_saved():
    totals = explain(tiny_models.gpt2(), "element").totals
    assert totals.state_bytes == totals.adamw_state_bytes
    assert (totals.saving_percent, totals.second_moment_removed_percent) == (0, 0)


def test_llama2_7b_on_the_meta_device():
    with torch.device("meta"):
        module = tiny_models.transformers().LlamaForCausalLM(tiny_models.transformers().LlamaConfig())
    explanation = explain(module)
    assert (explanation.totals.elements, explanation.totals.blocks) == (6_738_415_616, 1_163_841)
    assert re.search(
        r"model\.layers\.\{0\.\.31\}\.self_attn\.q_proj\.weight +x32 +4096 x 4096 +query", str(explanation)
    )
    assert "second moment  1,163,841 numbers of 6,738,415,616, 99.98 % removed" in str(explanation)
    assert "state          26.96 GB, AdamW 53.91 GB: 49.99 % saved" in str(explanation)


# What is left out, and what is shared


def test_frozen_parameters_are_left_out():
    module = tiny_models.llama()
    module.model.embed_tokens.weight.requires_grad_(False)
    module.model.norm.weight.requires_grad_(False)
    explanation = explain(module)
    assert (explanation.frozen_tensors, explanation.frozen_elements) == (2, 11 * 8 + 8)
    assert not {"model.embed_tokens.weight", "model.norm.weight"} & rows(explanation).keys()
    assert "frozen         96 in 2 tensors, left out" in str(explanation)
    assert explanation.to_dict()["frozen"] == {"tensors": 2, "elements": 96}


def test_a_frozen_model():
    explanation = explain(nn.Linear(2, 3).requires_grad_(False))
    assert explanation.rows == ()
    assert (explanation.totals.saving_percent, explanation.totals.state_bytes) == (0, 0)
    assert "every parameter is frozen" in str(explanation).splitlines()[-1]


def test_a_model_without_parameters():
    explanation = explain(nn.ReLU())
    assert explanation.rows == ()
    assert explanation.warnings == (
        "the model has no parameters: there is nothing to train, and AdamMini refuses the model",
    )


def test_other_names_of_a_shared_parameter():
    explained = rows(explain(tiny_models.gpt2()))
    assert explained["transformer.wte.weight"].why == "nn.Embedding; also lm_head.weight"
    assert "lm_head.weight" not in explained


def test_a_module_that_is_used_twice():
    layer = nn.Linear(3, 3, bias=False)
    (row,) = explain(nn.Sequential(layer, nn.Linear(3, 3, bias=False).requires_grad_(False), layer)).rows
    assert row.why == "nn.Linear; also 2.weight"


def test_parameters_without_dimensions_or_elements():
    module = nn.Module()
    module.temperature, module.none = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.empty(0, 3))
    explained = rows(explain(module))
    assert explained["temperature"].shape == ()
    assert explained["none"].elements == 0
    assert explain(module).totals.state_bytes == optimizer_state_bytes(AdamMini(module))
    assert "()" in str(explain(module))


# The table


def test_equal_layers_are_one_row():
    lines = str(explain(tiny_models.llama(num_hidden_layers=3))).splitlines()
    (queries,) = [line for line in lines if "q_proj" in line]
    assert re.match(r"model\.layers\.\{0\.\.2\}\.self_attn\.q_proj\.weight +x3 +8 x 8 +query +head +4 ", queries)


def test_all_rows():
    explanation = explain(tiny_models.llama(num_hidden_layers=3))
    shown = [line.split()[0] for line in explanation.table(full=True).split("\n\n")[0].splitlines()[1:]]
    assert shown == [row.name for row in explanation.rows]


def test_layers_that_are_cut_otherwise_stand_apart():
    overrides = {"model.layers.1.self_attn.q_proj.weight": "row"}
    shown = str(explain(tiny_models.llama(num_hidden_layers=4), partition_overrides=overrides))
    assert "model.layers.{0,2,3}.self_attn.q_proj.weight" in shown
    assert "model.layers.1.self_attn.q_proj.weight" in shown
    assert "override 'model.layers.1.self_attn.q_proj.weight'" in shown


def test_layers_with_other_heads_stand_apart():
    layers = nn.ModuleList(nn.MultiheadAttention(8, heads) for heads in (2, 4, 4))
    shown = str(explain(layers))
    assert re.search(r"^0\.in_proj_weight .* head\+head\+row +12 ", shown, re.MULTILINE)
    assert re.search(r"^\{1,2\}\.in_proj_weight +x2 .* head\+head\+row +16 ", shown, re.MULTILINE)


def test_shared_parameters_of_equal_layers_are_one_row():
    blocks = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(3))
    shown = str(explain(nn.ModuleDict({"first": blocks, "second": blocks})))
    assert re.search(r"first\.\{0\.\.2\}\.weight +x3 .* nn\.Linear; also second\.\*\.weight", shown)


def test_warnings_come_last():
    *_, last = str(explain(mystery())).splitlines()
    assert last.startswith("warning: no rule knows")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.0.w", "a.1.w", "a.2.w"], "a.{0..2}.w"),
        (["a.0.w", "b", "a.1.w"], "a.{0,1}.w, b"),
        (["a.0.w", "a.2.w", "a.4.w", "a.5.w", "a.6.w"], "a.{0,2,4..6}.w"),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.1"], "a.{0,1}.b.{0,1}"),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0"], "a.0.b.{0,1}, a.1.b.0"),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.2.b.0", "a.2.b.1"], "a.{0,2}.b.{0,1}, a.1.b.0"),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.2"], "a.0.b.{0,1}, a.1.b.{0,2}"),
        (["layer1.w", "layer2.w"], "layer1.w, layer2.w"),
        (["a.00", "a.0"], "a.00, a.0"),
        (["0", "1", "10"], "{0,1,10}"),
        ([f"a.{2 * n}" for n in range(20)], "a.{0,2,...,38}"),
        ([f"p{n}" for n in range(9)], "p0, p1, p2, p3, p4, p5 and 3 more"),
    ],
)
def test_names_of_equal_layers(names, expected):
    assert collapse_names(names) == expected


def test_items_that_are_not_alike_are_not_collapsed():
    items = [("a.0", 1), ("a.1", 2), ("a.2", 1)]
    collapsed = collapse(items, name=lambda item: item[0], alike=lambda item: item[1])
    assert collapsed == [("a.{0,2}", [items[0], items[2]]), ("a.1", [items[1]])]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.50 kB"), (2_000_000, "2.00 MB"), (26_958_317_636, "26.96 GB")],
)
def test_bytes_as_text(number, text):
    assert format_bytes(number) == text


# As data


@pytest.mark.parametrize("model", [tiny_models.gpt2, mystery])
def test_as_a_dict_for_json(model):
    explanation = explain(model())
    data = explanation.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["partition"] == "transformer"
    assert data["totals"] == asdict(explanation.totals)
    assert data["warnings"] == list(explanation.warnings)
    for row, told in zip(explanation.rows, data["rows"], strict=True):
        assert told == {**asdict(row), "shape": list(row.shape)}


# Warnings


@pytest.mark.parametrize(
    "model", [tiny_models.gpt2, tiny_models.llama, tiny_models.encoder_layer, MODELS["convolutions"]]
)
def test_what_every_rule_knows_is_not_warned_about(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert explain(model()).warnings == ()


def test_parameters_that_no_rule_knows():
    (warning,) = explain(mystery()).warnings
    assert "{1,2}.mixing, {1,2}.offsets (75 % of the parameters), which keep a full second moment" in warning
    assert "partition_layouts, or choose their blocks with partition_overrides={'1.mixing': 'row'}" in warning
    assert explain(mystery(), "element").warnings == ()


def test_parameters_that_the_user_cuts_need_no_rule():
    overrides = {r"re:\d\.mixing": "row", r"re:\d\.offsets": "element"}
    assert explain(mystery(), partition_overrides=overrides).warnings == ()


def test_unknown_parameters_of_a_strategy_of_ones_own():
    strategy = Strategy("mine", {Role.TOKEN_EMBEDDING: Structure.ROW}, otherwise=Structure.WHOLE)
    (warning,) = explain(mystery(), strategy).warnings
    assert "which get the block structure 'whole'" in warning


def test_a_fused_matrix_that_the_user_overrides():
    (warning,) = explain(tiny_models.FusedAttention(), partition_overrides={"fused_qkv": "row"}).warnings
    assert warning.startswith("qkv.weight: no layout knows how FusedAttention orders query, key and value")
    assert (
        "your override uses the block structure 'row' instead of heads: give the order with partition_layouts={"
        in warning
    )


@pytest.mark.parametrize(("partition", "cut"), [("factored", "factored"), ("default", "whole")])
def test_a_fused_matrix_where_heads_are_not_needed(partition, cut):
    told = [warning for warning in explain(tiny_models.FusedAttention(), partition).warnings if "no layout" in warning]
    assert len(told) == 1
    assert f"'{partition}' uses the block structure '{cut}' instead of heads" in told[0]


def test_one_number_for_a_whole_embedding():
    (warning,) = explain(tiny_models.gpt2(), "default").warnings
    assert "the embeddings and heads transformer.wte.weight, transformer.wpe.weight" in warning
    assert "partition='transformer'" in warning
    overridden = {"token_embedding": "row", "position_embedding": "row"}
    assert explain(tiny_models.gpt2(), "default", overridden).warnings == ()


def test_one_number_for_what_no_rule_knows():
    explanation = explain(Mystery())
    assert explanation.partition == "default"
    (warning,) = explanation.warnings
    assert "also for mixing, which no rule knows" in warning
    assert "offsets" not in warning


def test_half_precision_without_blocks_takes_more_than_adamw():
    explanation = explain(nn.Linear(4, 4).bfloat16(), "element")
    assert "'element' keeps more than AdamW here" in explanation.warnings[-1]
    assert "% more" in str(explanation)


# What is refused


def shapeless():
    return nn.LazyLinear(3)


@pytest.mark.parametrize(
    ("build", "options", "told"),
    [
        (tiny_models.gpt2, {"partition": "foo"}, "unknown partition 'foo'; choose from auto"),
        (tiny_models.gpt2, {"partition_overrides": {"value": "hole"}}, "unknown block structure 'hole'"),
        (tiny_models.gpt2, {"partition_overrides": {"vale": "row"}}, "'vale' matches no parameter"),
        (
            tiny_models.gpt2,
            {"partition_layouts": {"NoSuchClass": "gpt2"}},
            "no module of this model is of class 'NoSuchClass'",
        ),
        (
            tiny_models.gpt2,
            {"exp_avg_dtype": torch.int8},
            "floating dtype, such as .*, torch.uint8 for 8 bits, or None, not torch",
        ),
        (
            tiny_models.gpt2,
            {"exp_avg_dtype": "bfloat16"},
            "floating dtype, such as .*, torch.uint8 for 8 bits, or None, not 'bf",
        ),
        (
            tiny_models.gpt2,
            {"exp_avg_dtype": float},
            "floating dtype, such as .*, torch.uint8 for 8 bits, or None, not <class 'fl",
        ),
        (nn.Linear(2, 2).parameters, {}, r"explain takes a model, an instance of nn.Module .*, not a generator$"),
        (nn.Linear(2, 2).state_dict, {}, r"explain takes a model, an instance of nn.Module .*, not a OrderedDict$"),
        (lambda: None, {}, r"explain takes a model, an instance of nn.Module .*, not a NoneType$"),
        (lambda: nn.Linear, {}, r"explain takes a model, an instance of nn.Module .*, not the class Linear$"),
        (tiny_models.FusedAttention, {"partition": "transformer"}, "no layout knows how FusedAttention"),
        (shapeless, {}, "has no shape yet"),
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), {}, "complex parameters are not supported"),
    ],
)
def test_refused(build, options, told):
    with pytest.raises(ValueError, match=told) as error:
        explain(build(), **options)
    assert "\n" not in str(error.value)


def test_layouts_of_the_user():
    layout = ModuleLayout("mine", {"qkv.weight": Role.LINEAR, "proj.weight": Role.ATTENTION_OUTPUT})
    options = {"partition": "transformer", "partition_layouts": {"FusedAttention": layout}}
    explanation = explain(tiny_models.FusedAttention(), **options)
    assert [row.role for row in explanation.rows] == ["linear", "attention_output"]
    optimizer = AdamMini(tiny_models.FusedAttention(), **options)
    assert explanation.totals.state_bytes == optimizer_state_bytes(optimizer)


@pytest.mark.parametrize("build", [tiny_models.gpt2, tiny_models.mixtral, tiny_models.resnet18])
@pytest.mark.parametrize("partition", ["auto", "transformer_early", "default"])
def test_what_the_recommended_partition_would_keep(build, partition):
    model = build()
    found = explain(model, partition, {"re:.*": "whole"}).recommended
    assert found == explain(model, "factored").totals
    assert found.state_bytes == optimizer_state_bytes(AdamMini(model, partition="factored"))
    text = str(explain(model, partition))
    assert f"recommended    partition factored: {found.blocks:,} numbers" in text
    assert explain(model, partition).to_dict()["recommended"]["partition"] == "factored"


@pytest.mark.parametrize("partition", ["factored", "element", "slimadam", Strategy("mine", {})])
def test_only_the_partitions_of_the_papers_have_another_beside_them(partition):
    explanation = explain(tiny_models.llama(), partition)
    assert explanation.recommended is None
    assert "recommended" not in str(explanation)
