"""Statistics of second moments against plain formulas of numpy, and the rules on statistics made by hand."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import tiny_models
from lightning_adam_mini import AdamMini, partition_module
from lightning_adam_mini.blocks import Blocks, Segment
from lightning_adam_mini.measure import (
    MatrixStatistics,
    SecondMomentRecord,
    StructureStatistics,
    least_memory_rule,
    log_deviation,
    signal_to_noise,
    slimadam_rule,
)

SHAPE = (6, 4)
BLOCKS = {
    "row": Blocks.rows(SHAPE),
    "column": Blocks.rows(SHAPE, axis=1),
    "head": Blocks.rows(SHAPE, block_size=3),
    "whole": Blocks.whole(SHAPE),
    "segments": Blocks.segmented(SHAPE, (Segment(4, 2), Segment(2, 1))),
}


def second_moment(shape=SHAPE, seed=0):
    """Positive values over several orders of magnitude."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(2).exp() * 1e-8


def groups(blocks, v):
    """The elements of each block, as float64 arrays."""
    index, values = blocks.block_index().flatten().numpy(), v.double().flatten().numpy()
    return [values[index == number] for number in range(blocks.num_values)]


@pytest.mark.parametrize("name", BLOCKS)
def test_signal_to_noise_is_the_mean_over_blocks(name):
    v = second_moment()
    expected = np.mean([group.mean() ** 2 / group.var() for group in groups(BLOCKS[name], v)])
    assert signal_to_noise(v, BLOCKS[name]) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", BLOCKS)
def test_log_deviation_is_that_from_the_mean_of_the_block(name):
    v = second_moment()
    logs = np.concatenate([np.log(group / group.mean()) for group in groups(BLOCKS[name], v)])
    assert log_deviation(v, BLOCKS[name]) == pytest.approx(logs.std(), rel=1e-10)


def test_log_deviation_of_a_factored_second_moment():
    v = second_moment()
    wide = v.double().numpy()
    estimate = wide.mean(1, keepdims=True) * wide.mean(0, keepdims=True) / wide.mean()
    expected = np.log(wide / estimate).std()
    assert log_deviation(v, Blocks.factored(SHAPE)) == pytest.approx(expected, rel=1e-10)
    product = torch.tensor([[1.0], [3.0]]) * torch.tensor([[1.0, 10.0, 100.0]])
    assert log_deviation(product, Blocks.factored((2, 3))) == pytest.approx(0, abs=1e-10)
    assert log_deviation(v, Blocks.element(SHAPE)) == 0


def test_rows_that_saw_nothing_are_left_out():
    v = second_moment()
    v[[1, 4]] = 0
    seen = v[[0, 2, 3, 5]]
    rows = Blocks.rows(seen.shape)
    assert signal_to_noise(v, BLOCKS["row"]) == pytest.approx(signal_to_noise(seen, rows), rel=1e-10)
    assert log_deviation(v, BLOCKS["row"]) == pytest.approx(log_deviation(seen, rows), rel=1e-10)
    nothing = torch.zeros(SHAPE)
    assert math.isnan(signal_to_noise(nothing, BLOCKS["row"]))
    assert math.isnan(log_deviation(nothing, Blocks.factored(SHAPE)))


def test_equal_elements_have_no_noise_and_single_ones_no_ratio():
    v = torch.tensor([[0.1], [0.3]]).expand(2, 7)
    assert signal_to_noise(v, Blocks.rows((2, 7))) == math.inf
    assert signal_to_noise(v, Blocks.rows((2, 7), axis=1)) == pytest.approx(0.2**2 / 0.1**2, rel=1e-6)
    assert math.isnan(signal_to_noise(v[:, :1], Blocks.rows((2, 1))))


@pytest.mark.parametrize("blocks", [Blocks.element(SHAPE), Blocks.factored(SHAPE)])
def test_a_ratio_needs_blocks(blocks):
    with pytest.raises(ValueError, match="a signal-to-noise ratio is one of blocks"):
        signal_to_noise(second_moment(), blocks)


def matrix(**found):
    """A matrix from pairs of a signal-to-noise ratio and a log-deviation, with more numbers from one to the next."""
    structures = {
        name: StructureStatistics(10**number, ratio, deviation)
        for number, (name, (ratio, deviation)) in enumerate(found.items())
    }
    return MatrixStatistics("layer.weight", (8, 8), "mlp", structures)


@pytest.mark.parametrize(
    ("whole", "row", "column", "expected"),
    [
        (0.1, 3.0, 2.0, "row"),
        (0.1, 2.0, 3.0, "column"),
        (4.0, 2.0, 3.0, "whole"),
        (1.5, 2.0, 0.3, "row"),
        (0.9, 1.0, 0.3, "element"),
        (math.nan, math.nan, 1.1, "column"),
        (1.1, math.inf, 5.0, "row"),
    ],
)
def test_slimadam_takes_the_largest_ratio_above_one(whole, row, column, expected):
    found = matrix(whole=(whole, 1), row=(row, 1), column=(column, 1), element=(math.nan, 0), head=(99, 0))
    assert slimadam_rule(found) == expected


@pytest.mark.parametrize(
    ("bound", "expected"), [(9, "whole"), (1.0, "head"), (0.5, "row"), (0.3, "factored"), (0.1, "element")]
)
def test_the_least_memory_within_a_bound(bound, expected):
    found = matrix(whole=(0, 2), head=(0, 0.9), row=(0, 0.4), factored=(math.nan, 0.2), element=(math.nan, 0))
    assert least_memory_rule(found, bound) == expected
    assert least_memory_rule(matrix(row=(1, math.nan)), bound) == "element"


def record_of(model, change=lambda name, v: v):
    record = SecondMomentRecord(model)
    named = dict(model.named_parameters())
    for seed in (0, 1):
        record.observe({name: change(name, second_moment(named[name].shape, seed)) for name in record.names})
    return record


def test_a_record_averages_observations_of_all_matrices():
    model = tiny_models.llama()
    found = {each.name: each for each in record_of(model).matrices()}
    assert set(found) == {name for name, p in model.named_parameters() if p.dim() > 1}
    query = found["model.layers.0.self_attn.q_proj.weight"]
    assert query.role == "query"
    assert list(query.structures) == ["head", "row", "column", "whole", "element", "factored"]
    assert "head" not in found["lm_head.weight"].structures
    rows = partition_module(model, "transformer", {"query": "row"})[query.name].blocks
    ratios = [signal_to_noise(second_moment(query.shape, seed), rows) for seed in (0, 1)]
    assert query.structures["row"].signal_to_noise == pytest.approx(sum(ratios) / 2)
    assert query.structures["row"].num_values == query.shape[0]
    assert math.isnan(query.structures["factored"].signal_to_noise)
    assert query.structures["element"].log_deviation == 0


def test_equal_layers_get_one_override_and_exceptions_come_first():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)], nn.LayerNorm((4, 4)), nn.Linear(4, 3))
    record = record_of(model)
    asked = {"0.weight": "row", "1.weight": "row", "2.weight": "row", "3.weight": "column", "5.weight": "row"}
    overrides = record.overrides(lambda each: asked[each.name])
    assert overrides == {"3.weight": "column", "4.weight": "element", r"re:\d+\.weight": "row"}
    found = AdamMini(model, partition="element", partition_overrides=overrides).partition
    assert {name: found[name].structure for name in found if name.endswith("weight")} == {
        **asked,
        "4.weight": "element",
    }
    assert record.overrides(lambda _: "element") == {}
    one = record.overrides(lambda each: "row" if each.name == "2.weight" else "element")
    assert one == {"2.weight": "row"}


def test_a_parameter_that_is_named_as_a_role_alone_gets_its_override():
    model = nn.ParameterDict({name: nn.Parameter(torch.ones(4, 4)) for name in ("other", "weight")})
    overrides = record_of(model).overrides(lambda each: "row" if each.name == "other" else "element")
    found = partition_module(model, "element", overrides)
    assert [found[name].structure for name in ("other", "weight")] == ["row", "element"]


def test_vectors_of_any_shape_norms_and_frozen_matrices_are_left_out():
    model = nn.ModuleDict({"norm": nn.LayerNorm((4, 4)), "one": nn.Linear(4, 1), "two": nn.Linear(4, 2)})
    model["token"] = nn.ParameterList([nn.Parameter(torch.ones(1, 1, 8))])
    model["frozen"] = nn.Linear(4, 4).requires_grad_(False)
    assert SecondMomentRecord(model).names == ("two.weight",)


def test_a_record_without_an_observation_has_no_advice():
    with pytest.raises(ValueError, match="no second moment was observed: train for some steps first") as raised:
        SecondMomentRecord(nn.Linear(2, 2)).overrides(slimadam_rule)
    assert "\n" not in str(raised.value)
