"""`torch.compile` around a step, around a training function, or around all of it: the eager result."""

import copy

import pytest
import torch
from torch import nn

import tiny_models
from lightning_adam_mini import AdamMini

INPUTS = torch.linspace(-1, 1, 12).view(3, 4)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 6, bias=False), nn.Linear(6, 1))


def loss_of(module):
    return module(INPUTS).square().mean()


def a_step(module, optimizer):
    optimizer.step()


def a_training_function(module, optimizer):
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(module).backward()
        optimizer.step()


def a_step_with_a_closure(module, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(module)
        loss.backward()
        return loss

    return optimizer.step(closure)


def a_step_of_each_parameter(module, optimizer):
    for parameter in module.parameters():
        optimizer.step_parameter(parameter)


def saved_and_loaded(module, optimizer):
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()


FUNCTIONS = (a_step, a_training_function, a_step_with_a_closure, a_step_of_each_parameter, saved_and_loaded)


def check(function, backend, implementation):
    eager, compiled = model(), model()
    first, second = (
        AdamMini(module, lr=1e-2, partition="default", implementation=implementation) for module in (eager, compiled)
    )
    run = torch.compile(function, backend=backend)
    for _ in range(3):
        tiny_models.set_gradients(eager, compiled)
        function(eager, first)
        run(compiled, second)
    exact = function not in (a_training_function, a_step_with_a_closure) or backend == "eager"
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)
        assert first.state[a]["step"] == second.state[b]["step"] >= 3


@pytest.fixture(autouse=True)
def nothing_compiled():
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("function", [a_training_function, a_step_of_each_parameter])
def test_a_compiled_function_trains_as_the_eager_one(function):
    check(function, "eager", None)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", [None, "fused", "foreach", "reference"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_backend_and_implementation(function, backend, implementation):
    check(function, backend, implementation)


def test_more_optimizers_than_the_compiler_compiles_for():
    """Past its limit the compiler runs a function as it is, and may compile what that calls."""
    step = torch.compile(lambda optimizer: optimizer.step(), backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(3):
            eager, compiled = model(), model()
            tiny_models.set_gradients(eager, compiled)
            first, second = (AdamMini(module, partition="default") for module in (eager, compiled))
            for _ in range(2):
                first.step()
                step(second)
            for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
                assert torch.equal(a, b)


def test_a_compiled_step_beside_hooks_and_a_schedule():
    eager, compiled = model(), model()
    optimizers = [AdamMini(module, lr=1e-2, partition="default") for module in (eager, compiled)]
    calls = []
    for optimizer in optimizers:
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in optimizers]
    optimizers[1].step = torch.compile(optimizers[1].step, backend="eager")
    for _ in range(3):
        tiny_models.set_gradients(eager, compiled)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    assert calls == ["before", "after"] * 6
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_optimizer_is_built_within_a_compiled_function():
    def build_and_train(module):
        optimizer = AdamMini(module, lr=1e-2, partition="default")
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return optimizer

    eager = model()
    compiled = copy.deepcopy(eager)
    build_and_train(eager)
    optimizer = torch.compile(build_and_train, backend="eager")(compiled)
    assert all(state["step"] == 1 for state in optimizer.state.values())
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        assert torch.equal(a, b)
