"""A step of the class: closures, schedulers, gradients of every sort, and the tools that train around it."""

import copy
import warnings
from typing import get_args

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import tiny_models
from lightning_adam_mini import AdamMini
from lightning_adam_mini.optim.dispatch import Implementation

IMPLEMENTATIONS = get_args(Implementation)
PARTITIONS = ["transformer", "transformer_early", "factored", "slimadam", "default", "element"]


def model():
    return nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3), nn.LayerNorm(3), nn.Linear(3, 1))


def loss_of(module):
    return (module(torch.tensor([[0, 1], [2, 4]])) - 1).square().mean()


def backward(module):
    module.zero_grad()
    loss = loss_of(module)
    loss.backward()
    return loss


def twins(**options):
    """Two equal models, each with its optimizer."""
    first = model()
    second = copy.deepcopy(first)
    return (first, AdamMini(first, **options)), (second, AdamMini(second, **options))


def assert_equal(first, second):
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("partition", PARTITIONS)
def test_it_trains(partition, implementation):
    module = model()
    optimizer = AdamMini(module, lr=3e-2, partition=partition, implementation=implementation)
    start = loss_of(module).item()
    for _ in range(60):
        backward(module)
        optimizer.step()
    assert loss_of(module) < 0.05 * start


def test_a_closure():
    (first, with_closure), (second, without) = twins()

    def closure():
        assert torch.is_grad_enabled()
        return backward(first)

    for _ in range(3):
        expected = backward(second)
        without.step()
        assert torch.equal(with_closure.step(closure), expected)
    assert_equal(first, second)
    assert without.step() is None


def test_maximize_is_the_opposite_gradient():
    (first, ascending), (second, descending) = twins()
    for group in ascending.param_groups:
        group["maximize"] = True
    for _ in range(3):
        tiny_models.set_gradients(first, second)
        for parameter in first.parameters():
            parameter.grad.neg_()
        ascending.step()
        descending.step()
    assert_equal(first, second)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_are_not_changed(implementation):
    module = model()
    optimizer = AdamMini(module, maximize=True, implementation=implementation)
    tiny_models.set_gradients(module)
    before = [parameter.grad.clone() for parameter in module.parameters()]
    optimizer.step()
    for gradient, parameter in zip(before, module.parameters(), strict=True):
        assert torch.equal(gradient, parameter.grad)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("partition", PARTITIONS)
def test_gradients_that_do_not_lie_in_order(partition, implementation):
    options = {"partition": partition, "implementation": implementation}
    (first, _), (second, _) = twins(**options)
    optimizers = [AdamMini(first, **options), AdamMini(second, **options)]
    for _ in range(3):
        tiny_models.set_gradients(first, second)
        for parameter in first.parameters():
            if parameter.dim() == 2:
                parameter.grad = parameter.grad.t().contiguous().t()
        assert not first[2].weight.grad.is_contiguous()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_parameters_that_do_not_lie_in_order():
    """A channels-last model keeps its order in memory, and so does its first moment."""
    module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = AdamMini(module)
    tiny_models.set_gradients(module)
    optimizer.step()
    assert module.weight.is_contiguous(memory_format=torch.channels_last)
    assert optimizer.state[module.weight]["exp_avg"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_parameter_without_a_gradient_stands_still(implementation):
    module = model()
    optimizer = AdamMini(module, weight_decay=0.1, implementation=implementation)
    tiny_models.set_gradients(module)
    module[0].weight.grad = None
    before = module[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(module[0].weight, before)
    assert optimizer.state[module[0].weight]["step"] == 0
    assert optimizer.state[module[2].weight]["step"] == 1


def test_no_gradient_at_all():
    module = model()
    AdamMini(module).step()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("partition", PARTITIONS)
def test_tensors_without_elements_or_dimensions(partition, implementation):
    module = nn.Module()
    module.empty = nn.Parameter(torch.empty(0, 3))
    module.hollow = nn.Parameter(torch.empty(3, 0))
    module.scalar = nn.Parameter(torch.tensor(2.0))
    optimizer = AdamMini(module, lr=0.1, weight_decay=0, partition=partition, implementation=implementation)
    for _ in range(2):
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert module.scalar.item() == pytest.approx(1.8)
    assert all(p.isfinite().all() for p in module.parameters())


def test_sparse_gradients_are_refused():
    module = nn.Embedding(5, 4, sparse=True)
    optimizer = AdamMini(module)
    module(torch.tensor([1])).sum().backward()
    with pytest.raises(
        ValueError, match=r"weight: sparse gradients are not supported; use nn.Embedding\(..., sparse=F"
    ):
        optimizer.step()


def test_parameters_that_were_replaced_are_refused():
    module = model()
    optimizer = AdamMini(module)
    replacement = nn.Parameter(torch.zeros(7))
    replacement.grad = torch.zeros(7)
    optimizer.param_groups[0]["params"] = [replacement]
    with pytest.raises(ValueError, match=r"a parameter of shape \(7,\) that does not belong to the model it was built"):
        optimizer.step()


def test_tied_weights_move_once():
    module = tiny_models.gpt2()
    optimizer = AdamMini(module, lr=0.1, weight_decay=0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(module.parameters()))
    tiny_models.set_gradients(module)
    before = module.lm_head.weight.detach().clone()
    optimizer.step()
    assert module.lm_head.weight is module.transformer.wte.weight
    assert optimizer.state[module.lm_head.weight]["step"] == 1
    largest = (module.lm_head.weight - before).abs().max()
    # The first step of a row moves by lr times its gradient over its root mean square: at most sqrt(8) here.
    assert 0.1 < largest <= 0.1 * 8**0.5 * 1.001


# Learning rates


SCHEDULERS = {
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 10),
    "exponential": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10),
    "warm-up": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(optimizer, 5)],
        milestones=[3],
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_schedulers(schedule):
    """The scheduled rate is the one that acts: a step of fixed gradients moves by it."""
    module = nn.Linear(1, 1, bias=False)
    optimizer = AdamMini(module, lr=0.05, betas=(0.9, 0.99), weight_decay=0, partition="default")
    scheduler = SCHEDULERS[schedule](optimizer)
    optimizer.param_groups[0]["betas"] = (0.0, 0.99)
    rates = set()
    for _ in range(8):
        (rate,) = scheduler.get_last_lr()
        before = module.weight.item()
        module.weight.grad = torch.ones(1, 1)
        optimizer.step()
        assert before - module.weight.item() == pytest.approx(rate, abs=1e-6)
        rates.add(rate)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            scheduler.step()
        optimizer.param_groups[0]["betas"] = (0.0, 0.99)
    assert len(rates) > 4


def test_one_cycle_cycles_beta1():
    module = model()
    optimizer = AdamMini(module)
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10, base_momentum=0.5, max_momentum=0.8)
    seen = set()
    for _ in range(9):
        backward(module)
        optimizer.step()
        scheduler.step()
        seen.add(optimizer.param_groups[0]["betas"][0])
    assert min(seen) == pytest.approx(0.5)
    assert max(seen) <= 0.8
    assert len(seen) > 5


@pytest.mark.parametrize("options", [{}, {"implementation": "reference"}, {"capturable": True}])
def test_a_tensor_as_learning_rate(options, tolerances):
    (first, with_float), (second, _) = twins(lr=1e-2)
    lr = torch.tensor(1e-2)
    with_tensor = AdamMini(second, lr=lr, **options)
    for factor in (1.0, 0.5, 0.1):
        for group in with_float.param_groups:
            group["lr"] = 1e-2 * factor
        lr.fill_(1e-2 * factor)
        tiny_models.set_gradients(first, second)
        with_float.step()
        with_tensor.step()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerances[torch.float32])


@pytest.mark.parametrize("partition", PARTITIONS)
def test_a_capturable_step_equals_the_reference(partition, tolerances):
    (first, reference), (second, _) = twins(partition=partition, implementation="reference")
    capturable = AdamMini(second, partition=partition, capturable=True)
    assert capturable.implementation == "reference"
    for _ in range(5):
        tiny_models.set_gradients(first, second)
        reference.step()
        capturable.step()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerances[torch.float32])


# Around the optimizer


@pytest.mark.parametrize("bad", [None, float("inf"), float("nan")])
def test_the_gradient_scaler(bad):
    (first, scaled), (second, plain) = twins()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(loss_of(first)).backward()
    if bad is not None:
        first[2].weight.grad[0, 0] = bad
    scaler.step(scaled)
    scaler.update()
    if bad is None:
        backward(second)
        plain.step()
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    else:
        assert_equal(first, second)
        assert scaled.state[first[2].weight]["step"] == 0
        assert scaler.get_scale() == 2.0**9


def test_clipped_gradients():
    module = model()
    optimizer = AdamMini(module, betas=(0.0, 0.0), partition="default")
    tiny_models.set_gradients(module)
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 1e-3)
    assert norm > 1e-3
    optimizer.step()
    total = sum(state["exp_avg"].square().sum() for state in optimizer.state.values())
    assert total.sqrt().item() == pytest.approx(1e-3, rel=1e-3)


def test_hooks_of_the_step():
    module = model()
    optimizer = AdamMini(module)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    backward(module)
    optimizer.step()
    assert calls == ["before", "after"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_second_moment_of_bfloat16_weights_decays(implementation):
    """With beta2 = 0.999 a bfloat16 moment would stay where it is: 0.999 rounds to 1."""
    module = nn.Linear(4, 4).to(torch.bfloat16)
    optimizer = AdamMini(module, betas=(0.9, 0.999), partition="transformer", implementation=implementation)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(100):
        optimizer.step()
    for parameter in module.parameters():
        moment = optimizer.state[parameter]["exp_avg_sq"]
        assert moment.dtype == torch.float32
        torch.testing.assert_close(moment, torch.full_like(moment, 1e-3 * 0.999**100), rtol=1e-4, atol=0)


def test_no_warning_of_torch():
    module = model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = AdamMini(module)
        backward(module)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())


def test_no_process_group_is_needed():
    assert not torch.distributed.is_available() or not torch.distributed.is_initialized()
    module = tiny_models.encoder_layer()
    tiny_models.set_gradients(module)
    AdamMini(module).step()
