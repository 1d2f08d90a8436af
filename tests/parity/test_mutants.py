"""Mistakes that the comparison with the naive transcription must notice; so it can fail."""

import inspect
from types import FunctionType, ModuleType

import pytest
import torch

from lightning_adam_mini import blocks
from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.optim import foreach, parameter_view, step_options, update
from reference.lockstep import MODELS, lockstep

# The module, a piece of it that occurs once, and what a mistaken hand would have written.
UPDATE_MUTANTS = {
    "no correction of the first moment": ("options.step_size(step), options", "options.lr, options"),
    "no correction of the second moment": (", options.root(step)", ", 1.0"),
    "correction one step late": ("tensor.step.add_(1)", "tensor.step.add_(2)"),
    "decay without the learning rate": ("param.mul_(options.shrink)", "param.mul_(1 - options.weight_decay)"),
    "beta1 in place of beta2": ("accumulate_(tensor, options.beta2)", "accumulate_(tensor, options.beta1)"),
    "beta2 in place of beta1": ("tensor.exp_avg.dtype), 1 - options.beta1", "tensor.exp_avg.dtype), 1 - options.beta2"),
}
FOREACH_MUTANTS = {
    "eps inside the root": (
        "torch._foreach_add_(denoms, options.eps)",
        "denoms = [(d.square() + options.eps).sqrt() for d in denoms]",
    ),
    "no correction of the first moment": ("[-float(options.step_size(step)) for", "[-options.lr for"),
    "no correction of the second moment": ("[options.root(step) for", "[1.0 for"),
    "decay without the learning rate": (
        "torch._foreach_mul_(params, options.shrink)",
        "torch._foreach_mul_(params, 1 - options.weight_decay)",
    ),
    "beta1 in place of beta2": ("_denominators(alike, options.beta2)", "_denominators(alike, options.beta1)"),
}
SCALAR_MUTANTS = {
    "betas exchanged": ("(1 - self.beta1**step)", "(1 - self.beta2**step)"),
    "correction without its root": ("(1 - self.beta2**step) ** 0.5", "(1 - self.beta2**step)"),
    "decay in the other direction": ("1 - self.lr * self.weight_decay", "1 + self.lr * self.weight_decay"),
}
DENOMINATOR_MUTANTS = {
    "eps inside the root": (
        ".div_(scale).add_(eps)\n            yield from",
        ".div_(scale).square().add_(eps).sqrt()\n            yield from",
    ),
    "eps before the bias correction": (
        ".div_(scale).add_(eps)\n            yield from",
        ".add_(eps).div_(scale)\n            yield from",
    ),
}
BLOCK_MUTANTS = {
    "sum in place of the mean": ("[max(segment.block_size * width, 1) for", "[1 for"),
    "mean over rows alone": ("[max(segment.block_size * width, 1) for", "[segment.block_size for"),
    "norm in place of its square": ("norm.square_()", "norm"),
    "sum in place of the sum of squares": ("first.to(dtype).square()", "first.to(dtype).clone()"),
}
SEEN_BY = {"norm in place of its square": ["foreach"]}  # the reference takes no norms


def mutant_of(module, old, new):
    """The module with one piece of its text replaced."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} is not in {module.__name__} once: bring the mutant up to date"
    mutant = ModuleType(module.__name__)
    exec(compile(source.replace(old, new), module.__file__, "exec"), vars(mutant))
    return mutant


def is_equal(implementation, tolerances):
    ours, naive = lockstep(*MODELS["gpt2"], implementation=implementation)
    return all(torch.allclose(ours[name], naive[name], **tolerances[torch.float64]) for name in naive)


@pytest.mark.parametrize("implementation", ["reference", "foreach"])
def test_without_a_mistake_they_are_equal(implementation, tolerances):
    assert is_equal(implementation, tolerances)


@pytest.mark.parametrize("mistake", UPDATE_MUTANTS)
def test_a_mistake_in_the_reference_shows(mistake, monkeypatch, tolerances):
    monkeypatch.setattr(update, "update_", mutant_of(update, *UPDATE_MUTANTS[mistake]).update_)
    assert not is_equal("reference", tolerances)


@pytest.mark.parametrize("mistake", DENOMINATOR_MUTANTS)
def test_a_mistake_in_the_denominators_shows(mistake, monkeypatch, tolerances):
    mutant = mutant_of(parameter_view, *DENOMINATOR_MUTANTS[mistake])
    monkeypatch.setattr(parameter_view.ParameterView, "pieces", mutant.ParameterView.pieces)
    assert not is_equal("reference", tolerances)


@pytest.mark.parametrize("implementation", ["reference", "foreach"])
@pytest.mark.parametrize("mistake", SCALAR_MUTANTS)
def test_a_mistake_in_the_scalars_shows(mistake, implementation, monkeypatch, tolerances):
    mutant = mutant_of(step_options, *SCALAR_MUTANTS[mistake]).StepOptions
    for name in ("shrink", "step_size", "root"):
        monkeypatch.setattr(step_options.StepOptions, name, vars(mutant)[name])
    assert not is_equal(implementation, tolerances)


@pytest.mark.parametrize("mistake", FOREACH_MUTANTS)
def test_a_mistake_in_the_foreach_form_shows(mistake, monkeypatch, tolerances):
    monkeypatch.setattr(foreach, "update_", mutant_of(foreach, *FOREACH_MUTANTS[mistake]).update_)
    assert not is_equal("foreach", tolerances)


@pytest.mark.parametrize(
    ("mistake", "implementation"),
    [(mistake, form) for mistake in BLOCK_MUTANTS for form in SEEN_BY.get(mistake, ["reference", "foreach"])],
)
def test_a_mistake_in_the_block_means_shows(mistake, implementation, monkeypatch, tolerances):
    mutant = mutant_of(blocks, *BLOCK_MUTANTS[mistake])
    mutant.Kind = blocks.Kind
    for name, member in vars(mutant.Blocks).items():
        if isinstance(member, FunctionType) and name in vars(Blocks) and not name.startswith("__"):
            monkeypatch.setattr(Blocks, name, member)
    assert not is_equal(implementation, tolerances)
