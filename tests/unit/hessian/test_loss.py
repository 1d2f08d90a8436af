"""Bad input to the Hessian: one clear line each."""

from collections import UserDict
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tiny_models
from hessian_models import build, classify
from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.hessian import HessianOperator, ParameterBlock, block_of
from lightning_adam_mini.hessian.loss import place, tensors_of

DATA = TensorDataset(torch.arange(12.0).view(6, 2))


def square(model, batch):
    return model(batch[0]).square().mean()


def product(model, loss_fn, batches, **options):
    operator = HessianOperator(model, loss_fn, batches, **options)
    return operator.product(torch.ones(operator.size, dtype=operator.dtype))


class Shuffled:
    """Draws anew on each pass, without a sampler that says so."""

    def __iter__(self):
        yield (torch.randn(2, 2),)


class Noisy(nn.Module):
    """Random without a dropout layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        return self.layer(F.dropout(x, 0.5))


def dropping():
    return nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: product(dropping(), square, list(DATA)), r"^1 drops at random \(rate 0.1\).*model.eval\(\)"),
        (lambda: product(nn.MultiheadAttention(2, 1, dropout=0.2), square, list(DATA)), "MultiheadAttention drops"),
        (lambda: product(nn.Linear(2, 1), square, DataLoader(DATA, shuffle=True)), "RandomSampler.*shuffle=False"),
        (lambda: product(nn.Linear(2, 1), square, iter(DATA)), "iterator.*list of batches"),
        (lambda: product(nn.Linear(2, 1), square, Shuffled()), "two passes over the data give different batches"),
        (lambda: product(nn.Linear(2, 1), square, []), "batches is empty"),
        (lambda: product(nn.Linear(2, 1).requires_grad_(False), square, list(DATA)), "no trainable parameter"),
        (lambda: product(nn.Linear(2, 1), lambda m, b: m(b[0]), list(DATA) * 2), None),
        (lambda: product(nn.Linear(2, 2), lambda m, b: m(b[0]), list(DATA)), r"not a tensor of shape \(2,\)"),
        (lambda: product(nn.Linear(2, 2), lambda m, b: 1.0, list(DATA)), "scalar tensor, not float"),
        (lambda: product(nn.Linear(2, 2), lambda m, b: square(m, b).detach(), list(DATA)), "does not depend on"),
        (lambda: product(nn.Linear(2, 2), lambda m, b: square(m, b) / 0, list(DATA)), "loss of batch 0 is inf"),
        (lambda: product(nn.Linear(2, 2), lambda m, b: m(b[0] * 0 + 1e-30).square().sum().sqrt() * 0, []), "empty"),
        (lambda: product(nn.Linear(2, 1), square, list(DATA), reduction="none"), "'mean' or 'sum'"),
        (lambda: product(nn.Linear(2, 1), square, list(DATA), dtype=torch.bfloat16), "float32 or torch.float64"),
    ],
)
def test_one_line_says_what_to_do(call, message):
    if message is None:  # one output: a scalar
        call()
        return
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_random_model_is_found_by_its_loss():
    operator = HessianOperator(Noisy(), square, [(torch.ones(8, 2),)])
    vector = torch.ones(operator.size)
    with pytest.raises(ValueError, match=r"loss of batch 0 changed from .* turn off dropout"):
        [operator.product(vector) for _ in range(5)]


def test_a_pass_with_fewer_batches_is_found():
    batches = [(torch.ones(1, 2),), (torch.zeros(1, 2),)]
    operator = HessianOperator(nn.Linear(2, 1), square, batches)
    operator.product(torch.ones(3))
    batches.pop()
    with pytest.raises(ValueError, match="a pass gave 1 batches, the first one 2"):
        operator.product(torch.ones(3))


def test_a_product_that_is_not_finite():
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    with pytest.raises(ValueError, match="not finite although the loss is"):
        product(model, lambda m, b: m.weight.abs().pow(1.5).sum(), [None])


def test_an_unknown_parameter_names_the_close_ones():
    model, batches = build("tied")
    operator = HessianOperator(model, classify, batches)
    with pytest.raises(ValueError, match=r"no trainable parameter 'hidden.wieght'.*did you mean hidden.weight"):
        operator.block_size(ParameterBlock("a", "hidden.wieght"))
    with pytest.raises(ValueError, match=r"no trainable parameter 'head\.weight'"):
        operator.block_size(ParameterBlock("a", "head.weight"))
    with pytest.raises(ValueError, match="positions 0 to 28 of 28 elements"):
        operator.block_size(ParameterBlock("a", "embed.weight", torch.tensor([0, 28])))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: op.product(torch.ones(3)), r"takes a vector \(\d+,\) in torch.float32"),
        (lambda op: op.product(torch.ones(op.size).double()), "not .* in torch.float64"),
        (
            lambda op: op.block_products({"b": torch.ones(3)}, [ParameterBlock("b", "hidden.bias")]),
            r"vector \(4,\) or rows \(k, 4\)",
        ),
        (lambda op: op.block_products({"c": torch.ones(3)}, [ParameterBlock("b", "hidden.bias")]), "'c'"),
    ],
)
def test_wrong_vectors(call, message):
    with pytest.raises(ValueError, match=message):
        call(HessianOperator(*_arguments("tied")))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([1.0]), "int64"),
        (torch.tensor([], dtype=torch.int64), "non-empty"),
        (torch.tensor([[1]]), "int64 tensor"),
        (torch.tensor([1, 1]), "twice"),
    ],
)
def test_wrong_positions(index, message):
    with pytest.raises(ValueError, match=message):
        ParameterBlock("b", "weight", index)


def test_a_block_that_does_not_exist():
    with pytest.raises(ValueError, match="blocks 0 to 3: there is no block 4"):
        block_of("w", Blocks.rows((4, 2)), 4)
    with pytest.raises(ValueError, match="no blocks to number"):
        block_of("w", Blocks.factored((4, 2)), 0)


def test_fused_attention_of_transformers_is_refused():
    model = tiny_models.gpt2().eval()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"uses flash_attention_2.*attn_implementation='sdpa' or 'eager'"):
        HessianOperator(model, classify, [])


def test_attention_of_torch_is_switched_and_it_says_so_once(caplog):
    model, batches = build("gpt2")
    operator = HessianOperator(model, classify, batches)
    with caplog.at_level("INFO", logger="lightning_adam_mini"):
        for _ in range(2):
            operator.product(torch.ones(operator.size))
    assert caplog.text.count("math kernel") == 1
    caplog.clear()
    with caplog.at_level("INFO", logger="lightning_adam_mini"):
        HessianOperator(*_arguments("tied")).product(torch.ones(54))
    assert "math kernel" not in caplog.text


class Square(torch.autograd.Function):
    """x^2, whose backward pass autograd can differentiate."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return grad * 2 * ctx.saved_tensors[0]


class SquareOnce(Square):
    backward = staticmethod(torch.autograd.function.once_differentiable(Square.backward))


def test_a_function_without_a_second_derivative_is_refused():
    """Without the check the product would be zero, and no error."""
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"SquareOnce has no second derivative.*plain PyTorch form"):
        product(model, lambda m, b: SquareOnce.apply(m(b[0])).sum(), list(DATA))
    with pytest.warns(UserWarning, match="Square is a custom function"):
        found = product(model, lambda m, b: Square.apply(m(b[0])).sum(), list(DATA))
    torch.testing.assert_close(found, product(model, lambda m, b: m(b[0]).square().sum(), list(DATA)))


def test_an_operation_without_a_second_derivative_is_refused():
    """Fused attention where a model insists on it."""
    model = nn.Linear(4, 4)

    def loss(m, batch):
        x = m(batch).view(1, 1, -1, 4)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x)[0].square().sum()

    with pytest.raises(ValueError, match="an operation of the model has no second derivative"):
        product(model, loss, [torch.randn(3, 4)])


@dataclass
class Sample:
    x: torch.Tensor
    name: str


class Graph:
    def __init__(self, x):
        self.x = x

    def apply(self, function):
        self.x = function(self.x)
        return self


def test_batches_are_found_in_many_forms():
    x, cpu = torch.ones(2), torch.device("cpu")
    forms = [x, {"a": [x, 3]}, UserDict(a=x), (x, "text"), [x], Sample(x, "n"), Graph(x), UserDict(a=[Sample(x, "n")])]
    for form in forms:
        placed = place(form, cpu, torch.float64)
        assert type(placed) is type(form)
        (found,) = tensors_of(placed)
        assert found.dtype is torch.float64
        (kept,) = tensors_of(form)
        assert kept is x, "left as it was"
    assert place("text", cpu, None) == "text"
    assert place(torch.arange(2), cpu, torch.float64).dtype is torch.int64


def _arguments(name):
    model, batches = build(name)
    return model, classify, batches
