"""Products of the Hessian operator against dense Hessians in float64; what it leaves alone; graphs that it keeps."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

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
    token_batches,
)
from lightning_adam_mini.blocks import Blocks, Segment
from lightning_adam_mini.hessian import (
    HessianOperator,
    ParameterBlock,
    block_of,
    blocks_of,
    model_tridiagonals,
    parameter_blocks,
    trace,
)
from lightning_adam_mini.hessian.loss import place

EXACT = 1e-10
# Rounding of a float32 double backward of a few layers.
SINGLE = 1e-4
PLENTY = 2**30


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


@pytest.mark.parametrize(("name", "reduction"), [*((name, "mean") for name in MODELS), ("tied", "sum")])
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
def test_all_blocks_tile_the_parameter(blocks):
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


class Counted:
    """A loss that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, model, batch):
        self.calls += 1
        return classify(model, batch)


def graph_bytes(model, batch):
    """The least budget that keeps the graph of one batch."""
    operator, low, high = HessianOperator(model, classify, [batch]), 0, 2**24
    while high - low > 1:
        middle = (low + high) // 2
        with operator.keep_graphs(middle):
            operator.product(torch.ones(operator.size))
            fits = bool(operator._graphs._kept.gradients)
        low, high = (low, middle) if fits else (middle, high)
    return high


@pytest.mark.parametrize(
    ("name", "budget"), [*((name, PLENTY) for name in MODELS), ("normed in training", 20_000), ("tied", 1)]
)
def test_products_with_kept_graphs_equal_the_dense_hessian(name, budget):
    model, batches = build(name)
    operator = HessianOperator(model, classify, batches, dtype=torch.float64)
    dense = known_hessian(name)
    generator = torch.Generator().manual_seed(3)
    blocks = parameter_blocks(model)
    start = 0
    with operator.keep_graphs(budget):
        for _ in range(3):
            vector = torch.randn(operator.size, dtype=torch.float64, generator=generator)
            assert relative_error(operator.product(vector), dense @ vector) < EXACT
        for block in blocks:
            size = operator.block_size(block)
            expected = dense[start : start + size, start : start + size]
            found = operator.block_products({block.name: torch.eye(size, dtype=torch.float64)}, [block])
            assert (found[block.name] - expected).norm() <= EXACT * dense.norm()
            start += size


def test_only_batches_that_do_not_fit_are_computed_again():
    model, _ = build("tied")
    batches = [(inputs.clone(), labels.clone()) for inputs, labels in token_batches(7, count=4)]
    one = graph_bytes(model, batches[0])
    vector = torch.ones(HessianOperator(model, classify, batches).size)
    for budget, computed in ((PLENTY, 0), (2 * one + one // 2, 2), (one - 1, 4), (0, 4)):
        loss = Counted()
        operator = HessianOperator(model, loss, batches)
        expected = operator.product(vector)
        with operator.keep_graphs(budget):
            operator.product(vector)
            loss.calls = 0
            torch.testing.assert_close(operator.product(vector), expected)
        assert loss.calls == computed
        loss.calls = 0
        operator.product(vector)
        assert loss.calls == 4, "kept within the context alone"


def test_copies_in_another_dtype_count():
    model, batches = build("tied")
    alone = graph_bytes(model, batches[0])
    operator = HessianOperator(model, classify, batches[:1], dtype=torch.float64)
    with operator.keep_graphs(alone + 8 * operator.size):
        operator.product(torch.ones(operator.size, dtype=torch.float64))
        assert not operator._graphs._kept.gradients


def test_other_parameters_get_graphs_of_their_own():
    model, batches = build("tied")
    operator = HessianOperator(model, classify, batches, dtype=torch.float64)
    dense = known_hessian("tied")
    first = ParameterBlock("first", "embed.weight", torch.arange(4))
    with operator.keep_graphs(PLENTY):
        operator.block_products({"first": torch.eye(4, dtype=torch.float64)}, [first])
        vector = torch.ones(operator.size, dtype=torch.float64)
        assert relative_error(operator.product(vector), dense @ vector) < EXACT


@pytest.mark.slow
def test_tensors_stay_alive_within_keep_graphs_alone():
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
    with operator.keep_graphs(PLENTY):
        operator.product(vector)
        assert alive() > before
    assert alive() == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_parameters_that_change_within_are_refused():
    model, batches = build("tied")
    operator = HessianOperator(model, classify, batches, dtype=torch.float64)
    vector = torch.ones(operator.size, dtype=torch.float64)
    with operator.keep_graphs(PLENTY):
        operator.product(vector)
        with torch.no_grad():
            model.hidden.weight.mul_(2)
        with pytest.raises(ValueError, match="end keep_graphs first"):
            operator.product(vector)


class Overwriting(nn.Module):
    """Changes what the gradient of the multiplication needs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        hidden = self.weight.exp()
        product = hidden * hidden
        hidden.add_(x)
        return product.sum()


@pytest.mark.parametrize("budget", [0, PLENTY])
def test_an_operation_in_place_is_found(budget):
    operator = HessianOperator(Overwriting(), lambda model, x: model(x), [torch.ones(3)])
    with operator.keep_graphs(budget), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        operator.product(torch.ones(3))


def test_after_an_error_products_are_right():
    model, batches = build("tied")
    fail = [False]

    def loss_fn(model, batch):
        if fail[0]:
            raise KeyError("no")
        return classify(model, batch)

    operator = HessianOperator(model, loss_fn, batches, dtype=torch.float64)
    vector = torch.ones(operator.size, dtype=torch.float64)
    with operator.keep_graphs(PLENTY):
        fail[0] = True
        with pytest.raises(KeyError):
            operator.product(vector)
        fail[0] = False
        for _ in range(2):
            assert relative_error(operator.product(vector), known_hessian("tied") @ vector) < EXACT


def test_a_gradient_that_is_a_parameter():
    """Of <a, b> the gradient with respect to a is b itself."""

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.randn(3)) for _ in range(2))

    operator = HessianOperator(Product(), lambda model, _: model.a @ model.b, [0])
    for budget in (0, PLENTY):
        with operator.keep_graphs(budget):
            for _ in range(2):
                found = operator.product(torch.arange(6.0))
                assert found.tolist() == [3, 4, 5, 0, 1, 2]


def test_lanczos_and_traces_share_the_first_passes():
    model, batches = build("tied")
    for call in (lambda op: model_tridiagonals(op, steps=5, probes=2), lambda op: trace(op, probes=9)):
        loss = Counted()
        call(HessianOperator(model, loss, batches))
        assert loss.calls == len(batches)


def test_sparse_tensors_are_counted():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2, bias=False)

    adjacency = torch.eye(4).to_sparse()

    def loss_fn(model, x):
        return torch.sparse.mm(adjacency, model.layer(x)).square().sum()

    operator = HessianOperator(Graph(), loss_fn, [torch.randn(4, 3)])
    vector = torch.ones(6)
    expected = operator.product(vector)
    with operator.keep_graphs(PLENTY):
        for _ in range(2):
            torch.testing.assert_close(operator.product(vector), expected)


def test_activation_checkpointing_computes_the_same():
    class Network(nn.Module):
        def __init__(self, *, checkpoints):
            super().__init__()
            torch.manual_seed(0)
            self.hidden, self.head, self.checkpoints = nn.Linear(4, 8), nn.Linear(8, 3), checkpoints

        def body(self, x):
            return torch.tanh(self.hidden(x)).sin()

        def forward(self, x):
            return self.head(checkpoint(self.body, x, use_reentrant=False) if self.checkpoints else self.body(x))

    batch = torch.randn(5, 4)
    plain, checkpointed = (
        HessianOperator(Network(checkpoints=on), lambda model, x: model(x).square().mean(), [batch])
        for on in (False, True)
    )
    vector = torch.ones(plain.size)
    with checkpointed.keep_graphs(PLENTY):
        for _ in range(2):
            torch.testing.assert_close(checkpointed.product(vector), plain.product(vector))


@pytest.mark.parametrize("budget", [0, PLENTY])
def test_a_product_takes_the_memory_that_is_given(budget):
    model, batches = build("tied")
    operator = HessianOperator(model, classify, batches, dtype=torch.float64)
    vector = torch.ones(operator.size, dtype=torch.float64)
    out = torch.full_like(vector, torch.nan)
    with operator.keep_graphs(budget):
        for _ in range(2):
            assert operator.product(vector, out=out).data_ptr() == out.data_ptr()
            assert relative_error(out, known_hessian("tied") @ vector) < EXACT
        with pytest.raises(ValueError, match="out is the vector itself"):
            operator.product(vector, out=vector)
        with pytest.raises(ValueError, match="out takes a vector"):
            operator.product(vector, out=torch.ones(3, dtype=torch.float64))
