"""Rows of the table of layouts: convolutions of size 1, classes of scripts, and what looks like them."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import zoo_scripts
from lightning_adam_mini import AdamMini, explain, partition_module
from lightning_adam_mini.partition import ModuleLayout, Role, layouts, resolve_strategy
from lightning_adam_mini.partition.inference import infer_roles


def _cut(model, name, **options):
    found = partition_module(model, "transformer", **options)[name]
    return found.role.name, found.structure, found.blocks.num_values


def _attention(projection, **attributes):
    module = nn.Module()
    module.qkv = projection
    for name, value in attributes.items():
        setattr(module, name, value)
    return nn.Sequential(nn.Embedding(5, 32), module)


POINTWISE = {
    "1d": nn.Conv1d(8, 12, 1),
    "2d": nn.Conv2d(8, 12, 1),
    "2d with a stride": nn.Conv2d(8, 12, (1, 1), stride=2, padding=1),
    "3d": nn.Conv3d(8, 12, 1),
}
NOT_POINTWISE = {
    "one dimension": nn.Conv2d(8, 12, (1, 3)),
    "three pixels": nn.Conv1d(8, 12, 3),
    "grouped": nn.Conv1d(8, 12, 1, groups=2),
    "grouped, transposed": nn.ConvTranspose2d(8, 12, 1, groups=2),
    "transposed": nn.ConvTranspose2d(8, 12, 2),
}


@pytest.mark.parametrize("layer", POINTWISE.values(), ids=POINTWISE)
def test_a_convolution_of_size_1_is_a_linear_layer(layer):
    assert _cut(layer, "weight") == ("linear", "row", 12)
    assert _cut(nn.Sequential(layer), "0.weight") == _cut(nn.Linear(8, 12), "weight")


def test_a_transposed_convolution_of_size_1_has_its_outputs_second():
    layer = nn.ConvTranspose2d(8, 12, 1)
    cut = partition_module(layer, "transformer")["weight"]
    assert (cut.role.name, cut.role.axis, cut.blocks.num_values) == ("linear", 1, 12)
    rows = cut.blocks.block_index()
    assert all(len(rows[:, output].unique()) == 1 for output in range(12))


@pytest.mark.parametrize("layer", NOT_POINTWISE.values(), ids=NOT_POINTWISE)
def test_other_convolutions_stay_what_they_were(layer):
    assert _cut(layer, "weight") == ("conv", "whole", 1)


@pytest.mark.parametrize(
    ("layout", "values"), [("fused_contiguous", 4 + 4 + 32), ("fused_per_head", 40), ("fused_per_group", 40)]
)
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_layouts_hold_for_convolutions_of_size_1(kind, layout, values):
    class G(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads = 4
            self.qkv = kind(32, 96, 1)

    model = nn.Sequential(nn.Embedding(5, 32), G())
    optimizer = AdamMini(model, lr=1e-3, partition_layouts={"G": layout})
    assert optimizer.partition["1.qkv.weight"].blocks.num_values == values


def test_an_unknown_fused_convolution_raises_like_a_linear_layer():
    with pytest.raises(ValueError, match=r"1\.qkv\.weight: .*orders query, key and value"):
        partition_module(_attention(nn.Conv2d(32, 96, 1), num_heads=4), "transformer")


def test_convolutional_networks_stay_what_they_were():
    unknown = nn.Sequential(nn.Conv2d(3, 32, 3), _attention(nn.Conv2d(32, 96, 1), num_heads=4)[1])
    single = nn.Module()
    single.q, single.k, single.v = (nn.Conv2d(8, 8, 1) for _ in range(3))
    nameless = nn.Module()
    nameless.num_heads = 4
    nameless.a, nameless.b, nameless.c, nameless.d = (nn.Conv2d(8, 8, 1) for _ in range(4))
    blocks = (nn.Sequential(nn.Conv2d(3, 8, 3), block) for block in (single, nameless))
    for model in (unknown, *blocks, zoo_scripts.latent_diffusion(8)):
        assert resolve_strategy("auto", model).name == "default"
        cuts = partition_module(model)
        assert all(cut.blocks.num_values == 1 for cut in cuts.values())


def test_heads_that_auto_takes_for_convolutions_are_named():
    model = nn.Sequential(nn.Conv2d(3, 32, 3), _attention(nn.Conv2d(32, 96, 1), num_heads=4)[1])
    with pytest.warns(UserWarning, match=r"1\.qkv\.weight: queries, keys and values of several heads are one block"):
        AdamMini(model)
    assert "1.qkv.weight" in " ".join(explain(model).warnings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdamMini(model, partition="default")


def test_a_convolutional_attention_that_counts_its_heads_attends():
    module = nn.Module()
    module.num_heads = 2
    module.q_proj, module.k_proj, module.v_proj = (nn.Conv2d(8, 8, 1) for _ in range(3))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), module)
    assert resolve_strategy("auto", model).name == "transformer"
    assert _cut(model, "1.q_proj.weight") == ("query", "head", 2)
    assert _cut(model, "1.v_proj.weight") == ("value", "row", 8)


def test_grouped_projections_are_named_as_linear_ones_are():
    module = nn.Module()
    module.num_heads = 4
    module.q_proj, module.k_proj, module.v_proj = (nn.Conv1d(8, 8, 1, groups=2) for _ in range(3))
    model = nn.Sequential(nn.Embedding(5, 8), module)
    assert _cut(model, "1.q_proj.weight") == ("query", "head", 4)
    assert _cut(model, "1.v_proj.weight") == ("value", "row", 8)
    module.q_proj = nn.Conv1d(8, 8, 3, groups=2)
    assert _cut(model, "1.q_proj.weight") == ("conv", "whole", 1)


class Projected(nn.Module):
    """Queries from a convolution over three tokens."""

    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.query = nn.Conv1d(8, 8, 3)
        self.key = nn.Conv1d(8, 8, 3, groups=2)


def test_a_class_may_name_larger_and_grouped_convolutions_as_projections(monkeypatch):
    monkeypatch.setattr(layouts, "REGISTERED", [])
    layouts.register_layout(
        ModuleLayout(
            "projected",
            classes=(f"{Projected.__module__}.Projected",),
            parameters={"query.weight": Role.QUERY, "key.*": Role.KEY},
        )
    )
    assert _cut(Projected(), "query.weight") == ("query", "head", 2)
    assert _cut(Projected(), "key.weight") == ("conv", "whole", 1)  # a pattern names no convolution


def _builders():
    return {
        "nanogpt": (zoo_scripts.NanoGPT.CausalSelfAttention, "c_attn"),
        "litgpt": (zoo_scripts.LitGPT.CausalSelfAttention, "qkv"),
        "lit_gpt": (zoo_scripts.OldLitGPT.CausalSelfAttention, "attn"),
    }


CONFIG = SimpleNamespace(n_embd=24, n_head=4, bias=True, dropout=0.0, n_query_groups=2, head_size=6)


@pytest.mark.parametrize("name", _builders())
def test_the_row_of_a_script_wants_its_sizes(name):
    cls, fused = _builders()[name]
    module = cls(CONFIG)
    assert infer_roles(module)[f"{fused}.weight"].problem == ""
    rows = getattr(module, fused).out_features
    setattr(module, fused, nn.Linear(24, rows + 12))
    assert f"its {rows + 12} rows" in infer_roles(module)[f"{fused}.weight"].problem


def test_a_class_of_the_same_name_and_other_children_has_no_row():
    class CausalSelfAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.n_head = 4
            self.c_attn = nn.Linear(24, 72)

    assert not [layout for layout in layouts.find_layouts(CausalSelfAttention()) if layout.classes]
    with pytest.raises(ValueError, match="orders query, key and value"):
        partition_module(nn.Sequential(CausalSelfAttention()), "transformer")


def test_the_script_of_the_annotated_transformer():
    model = zoo_scripts.annotated_transformer(12, h=3)
    found = {name: cut.structure for name, cut in partition_module(model, "transformer").items() if "linears" in name}
    assert [found[f"layer.linears.{number}.weight"] for number in range(4)] == ["head", "head", "row", "row"]
    model(torch.arange(6).view(2, 3)).sum().backward()


def test_gates_named_query_and_key_have_no_heads():
    pytest.importorskip("torch_geometric")
    from torch_geometric.nn import ResGatedGraphConv

    for options in ({}, {"edge_dim": 2}):
        model = ResGatedGraphConv(6, 5, **options)
        assert resolve_strategy("auto", model).name == "default"
        for name in ("key", "query", "value"):
            assert _cut(model, f"lin_{name}.weight") == ("linear", "row", 5)


def test_deformable_attention_has_no_keys():
    """Where to look and how much are computed from the query alone: ordinary rows."""
    module = nn.Module()
    module.n_heads = 2
    module.sampling_offsets, module.attention_weights = nn.Linear(8, 32), nn.Linear(8, 16)
    module.value_proj, module.output_proj = nn.Linear(8, 8), nn.Linear(8, 8)
    model = nn.Sequential(nn.Embedding(5, 8), module)
    assert _cut(model, "1.sampling_offsets.weight") == ("linear", "row", 32)
    assert _cut(model, "1.attention_weights.weight") == ("linear", "row", 16)
    assert _cut(model, "1.value_proj.weight") == ("value", "row", 8)


@pytest.mark.parametrize(("family", "blocks"), [("ibert", 12), ("mobilevitv2", 1 + 1 + 128)])
def test_families_with_layers_of_their_own(family, blocks):
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(family))
    cuts = partition_module(model, "transformer")
    assert all(cut.role.known for cut in cuts.values())
    first = next(cut for cut in cuts.values() if {Role.QUERY, Role.KEY} & set(cut.role.roles))
    assert first.blocks.num_values == blocks
