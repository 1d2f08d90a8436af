"""Studies of networks' Hessians: their blocks and samples, and what they claim, at sizes of seconds."""

import csv
import math
import re

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("jsonargparse")
pytest.importorskip("lightning")
pytest.importorskip("matplotlib")
pytest.importorskip("mlxtend")
pytest.importorskip("timm")
pytest.importorskip("transformers")

from lightning_adam_mini.cli.hessian.pictures import shrunk
from lightning_adam_mini.cli.studies import heterogeneity, mlp_hessian, transformer_hessian
from lightning_adam_mini.cli.studies.common.networks import NETWORKS, NetworkSizes, blocks_to_compare, build_network
from lightning_adam_mini.cli.studies.common.study import load_study
from lightning_adam_mini.cli.studies.common.training import DivergedError
from lightning_adam_mini.cli.studies.heterogeneity import sample_eigenvalues, sampled_blocks, write_samples
from lightning_adam_mini.cli.studies.quadratic_cases import read_spectra
from lightning_adam_mini.hessian import HessianOperator, Tridiagonal, compare_spectra
from study_outcomes import claims_of, outcome_of

SIZES = NetworkSizes(layers=3, width=16, heads=2, channels=4, images=8, windows=2, context=12)
SMALL = ("layers=3", "width=16", "heads=2", "channels=4", "images=8", "windows=4", "context=16", "steps=8")


def diagonal(*eigenvalues):
    """What Lanczos finds of a matrix from one of its eigenvectors, for each of several starts."""
    return [Tridiagonal(torch.tensor([value], dtype=torch.float64), torch.zeros(0), 0.0, 0.0) for value in eigenvalues]


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_depends_on_its_seed_alone_and_all_of_its_blocks_have_curvature(name):
    first, again, other = (build_network(name, SIZES, seed) for seed in (0, 0, 1))
    losses = [network.loss(network.model, network.batch).item() for network in (first, again, other)]
    assert losses[0] == losses[1] != losses[2]
    operator = HessianOperator(first.model, first.loss, [first.batch])
    blocks = blocks_to_compare(first.model, 30)
    products = operator.block_products({block.name: torch.ones(operator.block_size(block)) for block in blocks}, blocks)
    assert not [name for name, product in products.items() if not product.any()]


@pytest.mark.parametrize(("name", "dimension"), [("GPT-2", 1), ("ViT", 0)])
def test_queries_keys_and_values_of_a_fused_matrix_are_blocks_apart(name, dimension):
    model = build_network(name, SIZES, 0).model
    fused = [block for block in blocks_to_compare(model, 30) if block.name.endswith("]")]
    assert len(fused) == 3 * SIZES.layers
    for block, part in zip(fused, (0, 1, 2) * SIZES.layers, strict=True):
        weight = model.get_parameter(block.parameter)
        assert_close(weight.flatten()[block.index], weight.chunk(3, dim=dimension)[part].flatten())
        assert block.name.endswith(f"[{'qkv'[part]}]")
    whole = [block.parameter for block in blocks_to_compare(model, 30) if block.index is None]
    assert not {block.parameter for block in fused} & set(whole)
    assert not [name for name in whole if "pos" in name or "wpe" in name]


def test_samples_are_quantiles_of_the_positive_part_and_the_largest():
    starts = {"sharp": diagonal(-5.0, 10.0, 20.0, 30.0, 40.0), "flat": diagonal(1e-6, 0.5, -1.0)}
    found = sample_eigenvalues(starts, count=5, condition_number=1000)
    assert_close(torch.tensor(found["sharp"]), torch.tensor([250.0, 500.0, 750.0, 1000.0, 1000.0]))
    assert found["flat"] == [1.0, 1.0, 12.5, 12.5, 12.5]
    with pytest.raises(ValueError, match="hollow has no positive eigenvalue"):
        sample_eigenvalues({"hollow": diagonal(-1.0, 0.0)}, count=5, condition_number=10)


def test_samples_are_written_as_quadratics_read_them(tmp_path):
    write_samples(tmp_path, "GPT-2", {"a": [1.0, 2.5], "b[q]": [3.0]})
    assert read_spectra(str(tmp_path / "gpt2.csv")) == [[1.0, 2.5], [3.0]]


def test_a_missing_block_that_is_to_be_sampled_is_refused():
    names = [f"layer{stage}.0.conv1.weight" for stage in (4, 2, 1)]
    with pytest.raises(ValueError, match=r"ResNet18: layer3.0.conv1.weight is not among the blocks: give fewer steps"):
        sampled_blocks("ResNet18", names)
    assert sampled_blocks("ResNet18", ["conv1.weight", "layer3.0.conv1.weight", *names]) == [
        f"layer{stage}.0.conv1.weight" for stage in (1, 2, 3, 4)
    ]


def test_spectra_of_networks_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="spectra are of GPT-2 and ResNet18: give networks one of them"):
        load_study("heterogeneity", ["networks=[ViT]", "spectra=found"])


def test_a_training_that_diverges_has_no_hessians():
    sizes = ("layers=1", "width=8", "heads=2", "bits=24", "context=6", "moments=[5]", "seeds=[0]")
    with pytest.raises(DivergedError, match="set a smaller rate"):
        outcome_of("transformer_hessian", *sizes, "rate=1e200")


def test_networks_that_are_too_small_are_refused_before_the_work(monkeypatch):
    def work(*_):
        raise AssertionError("the work began")

    monkeypatch.setattr(heterogeneity, "block_tridiagonals", work)
    for networks, steps, message in (
        ("[GPT-2, ViT]", 2000, "GPT-2 has 1 blocks of 2000 elements or more: give fewer steps"),
        ("[ViT, GPT-2]", 900, "GPT-2: h.2.attn.c_attn.weight"),
    ):
        changes = (*SMALL, "seeds=[0]", f"networks={networks}", f"steps={steps}", "spectra=found")
        with pytest.raises(ValueError, match=re.escape(message)):
            outcome_of("heterogeneity", *changes)


def test_units_of_the_block_of_the_network_and_none_differ():
    """A unit of its own hides that one block is sharper than the other; one of the network hides how sharp both are."""
    found = {}
    for scale in (1.0, 1e-5):
        spectra = {"sharp": diagonal(scale), "flat": diagonal(scale / 2)}
        for unit in heterogeneity.UNITS:
            found[unit, scale] = compare_spectra(spectra, scale=heterogeneity.SCALES[unit]).js0
    apart = pytest.approx(math.log(2), abs=1e-6)
    assert (found["none", 1.0], found["network", 1.0]) == (apart, apart)
    assert found["network", 1e-5] == apart
    assert found["none", 1e-5] < 1e-3
    assert max(found["block", 1.0], found["block", 1e-5]) < 1e-9


@pytest.mark.slow
def test_blocks_of_transformers_are_more_heterogeneous_than_those_of_cnns(tmp_path):
    networks = "networks=[ResNet18, VGG16, GPT-2]"
    outcome = outcome_of("heterogeneity", *SMALL, "seeds=[0]", networks, f"spectra={tmp_path}", "samples=4")
    assert claims_of(outcome, "unit none: JS0 of every CNN is below")[0].holds
    assert claims_of(outcome, "unit block: JS0 of every CNN is below")[0].holds
    assert claims_of(outcome, "10 times smaller for CNNs")[0].holds
    assert all(0 <= row["js0"] <= row["js0_distance"] < 0.833 for row in outcome.rows)
    for file, blocks in (("gpt2.csv", "wte c_attn c_attn c_fc"), ("resnet18.csv", "layer1 layer2 layer3 layer4")):
        with (tmp_path / file).open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        assert len(rows) == 16
        names = dict.fromkeys(row["block"] for row in rows)
        assert all(part in name for part, name in zip(blocks.split(), names, strict=True))
        values = [float(row["eigenvalue"]) for row in rows]
        assert (min(values), max(values)) == (1.0, pytest.approx(5000))


def test_a_matrix_is_taken_with_its_outputs_first():
    settings = load_study("transformer_hessian", ["layers=1"]).settings
    model = transformer_hessian.build(settings, 0)
    layer = model.transformer.h[0]
    query, key, value = layer.attn.c_attn.weight.T.chunk(3)
    expected = (query, key, value, layer.attn.c_proj.weight.T, layer.mlp.c_fc.weight.T, layer.mlp.c_proj.weight.T)
    found = transformer_hessian.matrices(model, settings)
    assert [matrix.kind for matrix in found] == list(transformer_hessian.KINDS)
    for matrix, weight in zip(found, expected, strict=True):
        parameter = model.get_parameter(matrix.block.parameter)
        assert_close(parameter.flatten()[matrix.block.index].view(matrix.shape), weight)


@pytest.mark.slow
def test_queries_and_keys_fall_into_heads_and_the_mlp_into_neurons():
    sizes = ("layers=1", "width=8", "heads=2", "bits=24", "context=6", "moments=[0, 10]", "seeds=[0]")
    outcome = outcome_of("transformer_hessian", *sizes)
    for kind in ("query", "key"):
        assert claims_of(outcome, f"0 steps, {kind}: blocks by head")[0].holds
    for kind in ("attention output", "MLP in", "MLP out"):
        assert claims_of(outcome, f"0 steps, {kind}: blocks by neuron")[0].holds
    expected = {row["structure"]: row["expected"] for row in outcome.rows if row["kind"] == "query"}
    assert expected == {"head": pytest.approx(1 / 2), "neuron": pytest.approx(1 / 8), "input": pytest.approx(1 / 8)}
    assert {row["steps"] for row in outcome.rows} == {0, 10}


def test_a_perceptrons_hessian_falls_into_its_neurons_the_more_so_with_more_classes():
    sizes = ("seeds=[0]", "hidden=4", "images=100", "steps=60", "inputs=10", "samples=100", "classes=[2, 10, 50]")
    outcome = outcome_of("mlp_hessian", *sizes)
    assert claims_of(outcome, "rises with the number of classes")[0].holds
    (end,) = claims_of(outcome, "hidden layer, 100% of the steps")
    assert end.holds
    fitted = [row for row in outcome.rows if row["data"] == mlp_hessian.DIGITS]
    assert len(fitted) == 6
    expected = {row["layer"]: row["expected"] for row in fitted}
    assert expected == {mlp_hessian.HIDDEN: pytest.approx(1 / 4), mlp_hessian.OUTPUT: pytest.approx(1 / 10)}
    assert fitted[-1]["loss"] < fitted[0]["loss"]


def test_a_large_matrix_is_shrunk_by_the_largest_of_a_square():
    matrix = torch.zeros(600, 600, dtype=torch.float64)
    matrix[5, 599] = -7.0
    small = shrunk(matrix)
    assert small.shape == (200, 200)
    assert small[1, 199] == 7
    assert small.sum() == 7
    assert_close(shrunk(-torch.eye(3)), torch.eye(3))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("heterogeneity", "networks=[LeNet]", "there is no network 'LeNet'; networks are ResNet18"),
        ("heterogeneity", "width=30", "width 30 must be a multiple of heads, 4"),
        ("heterogeneity", "images=0", "images must be at least 1, not 0"),
        ("heterogeneity", "steps=1", "steps must be at least 2, not 1"),
        ("transformer_hessian", "heads=1", "heads must be at least 2, not 1"),
        ("transformer_hessian", "heads=16", "width must be twice the heads, 16, or a larger multiple, not 16"),
        ("transformer_hessian", "bits=8", "bits must be more than context, 8, not 8"),
        ("transformer_hessian", "moments=[50,0]", "moments must be ascending"),
        ("transformer_hessian", "heads=3", "width must be twice the heads, 3"),
        ("transformer_hessian", "rate=-1", "rate must be above 0, not -1"),
        ("transformer_hessian", "width=1024", "takes .* GB .* and the budget is"),
        ("mlp_hessian", "hidden=1", "hidden must be at least 2"),
        ("mlp_hessian", "parts=[0,2]", "parts must ascend from 0"),
        ("mlp_hessian", "classes=[1]", "classes must be at least 2, not 1"),
        ("mlp_hessian", "steps=0", "steps must be at least 1, not 0"),
        ("mlp_hessian", "parts=[0,0.0001,1]", "two of parts .* are the same of 1000 steps"),
        ("mlp_hessian", "classes=[10,2]", "classes must ascend"),
        ("mlp_hessian", "hidden=1000", "the perceptron, which has 59,000 parameters, takes"),
        ("mlp_hessian", "rate=0", "rate must be above 0, not 0"),
        ("heterogeneity", "condition_number=1", "condition_number must be above 1"),
        ("heterogeneity", "spectra=/dev/null", "spectra /dev/null: this is a file; give a folder"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(name, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_study(name, [change])
    assert "\n" not in str(caught.value)
