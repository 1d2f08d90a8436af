"""Products of the Hessian operator against dense Hessians in float64, and what it leaves alone."""

import copy
import gc

import pytest
import torch
from torch import nn

from hessian_models import (
    MODELS,
    build,
    classify,
    dense_hessian,
    difference_of_gradients,
    image_batches,
    known_hessian,
    offsets,
    relative_error,
)
from lightning_adam_mini.blocks import Blocks, Segment
from lightning_adam_mini.hessian import HessianOperator, ParameterBlock, block_of, blocks_of, parameter_blocks
from lightning_adam_mini.hessian.batches import place

EXACT = 1e-10
# Rounding of a float32 double backward of a few layers.
SINGLE = 1e-4


def products_with_unit_vectors(operator):
    return torch.stack([operator.product(row) for row in torch.eye(operator.size, dtype=operator.dtype)])


def snapshot(model):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    return {name: (id(t), t.clone(), t.dtype, t.requires_grad) for name, t in tensors}, grads, modes


def assert_untouched(model, before):
    tensors, grads, modes = before
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        identity, values, dtype, requires_grad = tensors[name]
        assert id(tensor) == identity
        assert (tensor.dtype, tensor.requires_grad) == (dtype, requires_grad)
        assert torch.equal(tensor, values), name
    assert all(parameter.grad is grads[name] for name, parameter in model.named_parameters())
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_products_equal_the_dense_hessian(name, reduction):
    model, batches = build(name)
    before = snapshot(model)
    operator = HessianOperator(model, classify, batches, dtype=torch.float64, reduction=reduction)
    dense = known_hessian(name) * (1 if reduction == "mean" else len(batches))
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        vector = torch.randn(operator.size, dtype=torch.float64, generator=generator)
        assert relative_error(operator.product(vector), dense @ vector) < EXACT
    assert_untouched(model, before)


@pytest.mark.parametrize("name", MODELS)
def test_products_equal_differences_of_gradients(name):
    """A reference without any second derivative: central differences, exact to 1e-8 or so."""
    model, batches = build(name)
    model, batches = model.double(), [place(batch, torch.device("cpu"), torch.float64) for batch in batches]
    vector = torch.randn(HessianOperator(model, classify, batches).size, dtype=torch.float64)
    found = HessianOperator(model, classify, batches).product(vector)
    assert relative_error(found, difference_of_gradients(model, classify, batches, vector)) < 1e-6


def test_in_float32_the_model_is_not_copied_and_products_agree_to_rounding():
    model, batches = build("gpt2")
    operator = HessianOperator(model, classify, batches)
    assert operator.dtype is torch.float32
    vector = torch.randn(operator.size)
    assert relative_error(operator.product(vector), known_hessian("gpt2") @ vector.double()) < SINGLE
    with operator._graphs.open(operator.layout.shapes) as (leaves, _):
        assert all(leaves[name].data_ptr() == parameter.data_ptr() for name, parameter in model.named_parameters())


def test_every_column_with_tied_frozen_and_unreached_parameters():
    model, batches = build("tied")
    operator = HessianOperator(model, classify, batches, dtype=torch.float64)
    assert operator.size == sum(p.numel() for p in model.parameters() if p.requires_grad), "tied once, frozen out"
    found = products_with_unit_vectors(operator)
    assert relative_error(found, known_hessian("tied")) < EXACT
    start = offsets(model)["unused.weight"]
    assert not found[start : start + 6].any(), "zero rows"
    assert not found[:, start : start + 6].any()


def test_a_loss_that_is_linear_in_its_parameters_has_the_zero_hessian():
    model = nn.Linear(3, 1)
    operator = HessianOperator(model, lambda m, x: m(x).sum(), [torch.ones(2, 3)])
    assert not operator.product(torch.ones(4)).any()
    (block,) = [b for b in parameter_blocks(model) if b.name == "weight"]
    assert not operator.block_products({"weight": torch.ones(3)}, [block])["weight"].any()


@pytest.mark.parametrize("name", ["tied", "gpt2", "normed in training"])
def test_blocks_share_a_pass_and_equal_slices_of_the_dense_hessian(name):
    model, batches = build(name)
    calls = []

    def counted(model, batch):
        calls.append(batch)
        return classify(model, batch)

    operator = HessianOperator(model, counted, batches, dtype=torch.float64)
    dense, starts = known_hessian(name), offsets(model)
    blocks = parameter_blocks(model)
    generator = torch.Generator().manual_seed(0)
    vectors = {b.name: torch.randn(2, operator.block_size(b), dtype=torch.float64, generator=generator) for b in blocks}
    for _ in range(2):  # the second pass follows other rules of which leaves require gradients
        calls.clear()
        products = operator.block_products(vectors, blocks)
        assert len(calls) == len(batches), "one forward pass of each batch for all blocks"
        for block in blocks:
            start, size = starts[block.parameter], operator.block_size(block)
            expected = vectors[block.name] @ dense[start : start + size, start : start + size]
            torch.testing.assert_close(products[block.name], expected, rtol=1e-10, atol=1e-13)


SUB_BLOCKS = {
    "head": lambda: block_of("transformer.h.0.attn.c_attn.weight", Blocks.rows((8, 24), axis=1, block_size=2), 1),
    "fused": lambda: block_of(
        "transformer.h.0.attn.c_attn.weight", Blocks.segmented((8, 24), (Segment(16, 2), Segment(8, 1)), axis=1), 9
    ),
    "row": lambda: block_of("transformer.wte.weight", Blocks.rows((5, 8)), 3),
    "column": lambda: block_of("transformer.wte.weight", Blocks.rows((5, 8), axis=1), 2),
    "expert": lambda: block_of("transformer.h.0.mlp.c_fc.weight", Blocks.whole((8, 6), batch_axes=(0,)), 4),
    "whole": lambda: block_of("transformer.ln_f.bias", Blocks.whole((8,)), 0),
    "scattered": lambda: ParameterBlock("some", "transformer.h.0.mlp.c_fc.weight", torch.tensor([40, 3, 17])),
}


@pytest.mark.parametrize("kind", SUB_BLOCKS)
def test_a_sub_tensor_block_equals_the_slice_of_the_dense_hessian(kind):
    model, batches = build("gpt2")
    block = SUB_BLOCKS[kind]()
    operator = HessianOperator(model, classify, batches, dtype=torch.float64)
    positions = offsets(model)[block.parameter] + block.index
    expected = known_hessian("gpt2")[positions][:, positions]
    eye = torch.eye(len(positions), dtype=torch.float64)
    found = operator.block_products({block.name: eye}, [block])[block.name]
    assert expected.any()
    assert relative_error(found, expected) < EXACT


def test_a_head_has_its_own_rows():
    block = SUB_BLOCKS["head"]()
    expected = torch.zeros(8, 24)
    expected[:, 2:4] = 1
    assert torch.equal(torch.zeros(8, 24).view(-1).index_fill(0, block.index, 1).view(8, 24), expected)


@pytest.mark.parametrize(
    "blocks",
    [
        Blocks.rows((6, 4), block_size=2),
        Blocks.segmented((12, 3), (Segment(4, 2), Segment(2, 1)), repeats=2),
        Blocks.rows((2, 4, 3), axis=1, batch_axes=(0,)),
        Blocks.element((3, 2)),
    ],
)
def test_all_blocks_of_a_cut_tile_the_parameter(blocks):
    index = blocks.block_index().flatten()
    found = list(blocks_of("w", blocks))
    assert [block.name for block in found] == [f"w[{k}]" for k in range(blocks.num_values)]
    for number, block in enumerate(found):
        assert (index[block.index] == number).all()
        assert torch.equal(block.index, block_of("w", blocks, number).index)
    assert sum(block.index.numel() for block in found) == index.numel()


def test_batches_are_weighted():
    model, batches = build("tied")
    weights = {id(batch[0]): weight for batch, weight in zip(batches, (1.0, 2.0, 5.0), strict=True)}
    dense = [dense_hessian(model, classify, [batch]) for batch in batches]
    operator = HessianOperator(
        model, classify, batches, dtype=torch.float64, weight=lambda batch: weights[id(batch[0])]
    )
    vector = torch.ones(operator.size, dtype=torch.float64)
    expected = (dense[0] + 2 * dense[1] + 5 * dense[2]) / 8 @ vector
    assert relative_error(operator.product(vector), expected) < EXACT


def test_gradients_and_the_mode_of_the_caller_stay_outside():
    model, batches = build("tied")
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3)
    before = snapshot(model)
    operator = HessianOperator(model, classify, batches, dtype=torch.float64)
    vector = torch.ones(operator.size, dtype=torch.float64)
    expected = operator.product(vector)
    with torch.no_grad():
        assert torch.equal(operator.product(vector), expected)
    with torch.inference_mode():
        assert torch.equal(operator.product(vector), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(operator.product(vector), expected)
    assert_untouched(model, before)


def test_a_model_in_training_mode_keeps_its_running_statistics():
    model, batches = build("normed in training")
    before = snapshot(model)
    operator = HessianOperator(model, classify, batches)
    operator.product(torch.ones(operator.size))
    assert_untouched(model, before)
    assert model.norm.num_batches_tracked == 0


def test_after_an_error_the_model_is_as_it_was():
    model, batches = build("normed in training")
    before = snapshot(model)

    def fails(model, batch):
        classify(model, batch)
        raise KeyError("in the loss")

    operator = HessianOperator(model, fails, batches, dtype=torch.float64)
    with pytest.raises(KeyError, match="in the loss"):
        operator.product(torch.ones(operator.size, dtype=torch.float64))
    assert_untouched(model, before)


def test_half_precision_models_are_computed_in_float32(caplog):
    model, batches = build("tied")
    half = copy.deepcopy(model).to(torch.bfloat16)
    with caplog.at_level("INFO"):
        operator = HessianOperator(half, classify, batches)
    assert operator.dtype is torch.float32
    assert "float32" in caplog.text
    vector = torch.randn(operator.size)
    expected = dense_hessian(half, classify, batches) @ vector.double()
    assert relative_error(operator.product(vector), expected) < SINGLE


def test_batches_in_any_form_are_cast_with_the_model():
    images, labels = image_batches(1)[0]
    model, _ = build("normed")
    expected = None
    for batch, loss_fn in (
        ((images, labels), classify),
        ({"x": images, "y": labels}, lambda m, b: classify(m, (b["x"], b["y"]))),
        ([images, {"y": labels, "name": "text"}], lambda m, b: classify(m, (b[0], b[1]["y"]))),
    ):
        operator = HessianOperator(model, loss_fn, [batch], dtype=torch.float64)
        found = operator.product(torch.ones(operator.size, dtype=torch.float64))
        assert expected is None or torch.equal(found, expected)
        expected = found
    assert images.dtype is torch.float32


def test_a_compiled_model_runs_without_its_wrapper():
    model, batches = build("tied")
    operator = HessianOperator(torch.compile(model, backend="eager"), classify, batches, dtype=torch.float64)
    vector = torch.ones(operator.size, dtype=torch.float64)
    assert relative_error(operator.product(vector), known_hessian("tied") @ vector) < EXACT


def test_products_agree_with_curvlinops():
    curvlinops = pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = [(torch.randn(5, 3).double(), torch.randint(2, (5,))) for _ in range(2)]
    other = curvlinops.HessianLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), data)
    operator = HessianOperator(model, classify, data)
    vector = torch.randn(operator.size, dtype=torch.float64)
    torch.testing.assert_close(operator.product(vector), other @ vector, rtol=1e-11, atol=1e-13)


def test_nothing_is_kept_between_calls():
    """As many tensors are alive after a product as before it."""
    model, batches = build("gpt2")
    operator = HessianOperator(model, classify, batches)
    vector = torch.ones(operator.size)

    def alive():
        gc.collect()
        return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())

    operator.product(vector)
    before = alive()
    operator.product(vector)
    operator.block_products({"b": torch.ones(8)}, [ParameterBlock("b", "transformer.ln_f.bias")])
    assert alive() == before
