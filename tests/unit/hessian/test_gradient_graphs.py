"""Graphs of gradients that are kept for several products: the same products, fewer passes, within their budget."""

import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hessian_models import MODELS, build, classify, known_hessian, relative_error, token_batches
from lightning_adam_mini.hessian import HessianOperator, ParameterBlock, model_tridiagonals, parameter_blocks, trace

EXACT = 1e-10
PLENTY = 2**30


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


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("budget", [PLENTY, 20_000, 1])
def test_products_equal_the_dense_hessian(name, budget):
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


def test_nothing_stays_after_it():
    model, batches = build("gpt2")
    operator = HessianOperator(model, classify, batches)
    operator.product(torch.ones(operator.size))

    def alive():
        gc.collect()
        return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())

    before = alive()
    with operator.keep_graphs(PLENTY):
        operator.product(torch.ones(operator.size))
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
