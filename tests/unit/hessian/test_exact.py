"""Dense Hessians: against gradients differentiated row by row, symmetric, and refused before they are too large."""

import pytest
import torch

import hessian_models
from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.hessian import HessianOperator, ParameterBlock, block_of
from lightning_adam_mini.hessian.exact import check_dense, dense_block, dense_bytes, dense_hessian


@pytest.fixture(scope="module", params=["tied", "normed"])
def problem(request):
    model, batches = hessian_models.build(request.param)
    operator = HessianOperator(model, hessian_models.classify, batches, dtype=torch.float64)
    return model, operator, hessian_models.dense_hessian(model, hessian_models.classify, batches)


def test_the_whole_hessian(problem):
    _, operator, expected = problem
    found = dense_hessian(operator)
    torch.testing.assert_close(found.matrix, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(found.matrix, found.matrix.T)
    assert 0 < found.asymmetry < 1e-12


def test_blocks_are_those_of_the_whole(problem):
    model, operator, expected = problem
    for name, start in hessian_models.offsets(model).items():
        parameter = model.get_parameter(name)
        rows = slice(start, start + parameter.numel())
        found = dense_block(operator, ParameterBlock(name, name))
        torch.testing.assert_close(found.matrix, expected[rows, rows], rtol=1e-10, atol=1e-12)
        if parameter.dim() > 1:
            row = block_of(name, Blocks.rows(parameter.shape), 1)
            inside = expected[rows, rows][row.index][:, row.index]
            torch.testing.assert_close(dense_block(operator, row).matrix, inside, rtol=1e-10, atol=1e-12)


def test_float32_tells_its_asymmetry():
    model, batches = hessian_models.build("normed")
    operator = HessianOperator(model, hessian_models.classify, batches)
    found = dense_block(operator, ParameterBlock("conv.weight", "conv.weight"))
    assert found.matrix.dtype is torch.float64
    assert 1e-12 < found.asymmetry < 1e-4


def test_progress_ends_at_all_rows():
    model, batches = hessian_models.build("tied")
    operator = HessianOperator(model, hessian_models.classify, batches)
    seen = []
    dense_block(operator, ParameterBlock("embed.weight", "embed.weight"), on_step=lambda *step: seen.append(step))
    assert seen[-1] == (28, 28)


def test_what_does_not_fit_is_refused_before_the_work():
    model, batches = hessian_models.build("tied")

    def loss(model, batch):
        raise AssertionError("the work has started")

    operator = HessianOperator(model, loss, batches)
    block = ParameterBlock("embed.weight", "embed.weight")
    with pytest.raises(ValueError, match=r"embed\.weight, which has 28 parameters, takes .* or raise the budget"):
        dense_block(operator, block, budget_bytes=dense_bytes(28) - 1)
    with pytest.raises(ValueError, match=r"take blocks one by one"):
        dense_hessian(operator, budget_bytes=1000)
    with pytest.raises(ValueError, match="of large"):
        check_dense({"small": 2, "large": 100}, dense_bytes(50))
    with pytest.raises(ValueError, match="did you mean"):
        dense_block(operator, ParameterBlock("embed.wight", "embed.wight"))
