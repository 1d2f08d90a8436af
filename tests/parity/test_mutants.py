"""Mistakes that the comparison with the naive transcription must notice; so it can fail."""

import pytest
import torch

from lightning_adam_mini import blocks
from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.optim import update
from lightning_adam_mini.optim.update import ParameterView, StepOptions
from reference.lockstep import MODELS, lockstep

IMPLEMENTATIONS = ["reference", "foreach"]

# What a mistaken hand would have written in the place of a method, which it may call.
SCALAR_MUTANTS = {
    "no correction of the first moment": ("step_size", lambda self, step: self.lr),
    "no correction of the second moment": ("root", lambda self, step: 1.0),
    "betas exchanged": ("step_size", lambda self, step: self.lr / (1 - self.beta2**step)),
    "correction without its root": ("root", lambda self, step: 1 - self.beta2**step),
    "correction one step late": ("step_size", lambda self, step: self.lr / (1 - self.beta1 ** (step + 1))),
    "decay in the other direction": ("shrink", property(lambda self: 1 + self.lr * self.weight_decay)),
    "decay without the learning rate": ("shrink", property(lambda self: 1 - self.weight_decay)),
}


def beta1_in_place_of_beta2(function):
    """The second moments move by the rate of the first, whose numbers are (0.8, 0.9) here."""
    return lambda *args: function(*args[:-1], 0.8)


def beta2_in_place_of_beta1(function):
    def mutant(*args):
        *others, options, step_size = args
        return function(*others, StepOptions(options.lr, 0.9, 0.9, options.eps, options.weight_decay), step_size)

    return mutant


UPDATE_MUTANTS = {
    "beta1 in place of beta2": ("reference", "accumulate_", beta1_in_place_of_beta2),
    "beta1 in place of beta2, in lists": ("foreach", "_foreach_denominators_", beta1_in_place_of_beta2),
    "beta2 in place of beta1": ("reference", "_move_", beta2_in_place_of_beta1),
}
DENOMINATOR_MUTANTS = {
    "eps inside the root": lambda root_of_v, root, eps: (root_of_v / root).square().add(eps).sqrt(),
    "eps before the bias correction": lambda root_of_v, root, eps: (root_of_v + eps) / root,
}
BLOCK_MUTANTS = {
    "sum in place of the mean": lambda self, *sums: sums,
    "mean over rows alone": lambda self, *sums: tuple(
        total * (self.shape[-1] if len(self.shape) > 1 else 1) for total in Blocks_means(self, *sums)
    ),
}
Blocks_means = Blocks.means


def is_equal(implementation, tolerances):
    ours, naive = lockstep(*MODELS["gpt2"], implementation=implementation)
    return all(torch.allclose(ours[name], naive[name], **tolerances[torch.float64]) for name in naive)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_a_mistake_they_are_equal(implementation, tolerances):
    assert is_equal(implementation, tolerances)


@pytest.mark.parametrize("mistake", UPDATE_MUTANTS)
def test_a_mistake_in_the_update_shows(mistake, monkeypatch, tolerances):
    implementation, name, mutate = UPDATE_MUTANTS[mistake]
    monkeypatch.setattr(update, name, mutate(getattr(update, name)))
    assert not is_equal(implementation, tolerances)


@pytest.mark.parametrize("mistake", DENOMINATOR_MUTANTS)
def test_a_mistake_in_the_denominators_shows(mistake, monkeypatch, tolerances):
    def pieces(self, root, eps):
        return self.split(DENOMINATOR_MUTANTS[mistake](self.blocks.root_second_moment(*self.moments), root, eps))

    monkeypatch.setattr(ParameterView, "pieces", pieces)
    assert not is_equal("reference", tolerances)


def test_eps_inside_the_root_shows_in_lists(monkeypatch, tolerances):
    add = torch._foreach_add_

    def mutant(tensors, other, **options):
        if other == 1e-3:  # eps: what is added is under the root
            for tensor in tensors:
                tensor.square_().add_(other).sqrt_()
        else:
            add(tensors, other, **options)

    monkeypatch.setattr(torch, "_foreach_add_", mutant)
    assert not is_equal("foreach", tolerances)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mistake", SCALAR_MUTANTS)
def test_a_mistake_in_the_scalars_shows(mistake, implementation, monkeypatch, tolerances):
    name, mutant = SCALAR_MUTANTS[mistake]
    monkeypatch.setattr(StepOptions, name, mutant)
    assert not is_equal(implementation, tolerances)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mistake", BLOCK_MUTANTS)
def test_a_mistake_in_the_block_means_shows(mistake, implementation, monkeypatch, tolerances):
    monkeypatch.setattr(Blocks, "means", BLOCK_MUTANTS[mistake])
    assert not is_equal(implementation, tolerances)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_root_in_place_of_the_sum_of_squares_shows(implementation, monkeypatch, tolerances):
    sum_square = blocks.sum_square
    monkeypatch.setattr(blocks, "sum_square", lambda *args, **options: sum_square(*args, **options).sqrt())
    assert not is_equal(implementation, tolerances)
