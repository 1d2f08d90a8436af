"""The optimizer repeats a step from the plan that it kept of the last one, and sees whatever has changed since."""

import copy

import pytest
import torch
from torch import nn

import tiny_models
from lightning_adam_mini import AdamMini
from lightning_adam_mini.optim.dispatch import StepPlan
from lightning_adam_mini.optim.kernels import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


def nothing(module, optimizer):
    pass


def other_memory(module, optimizer):
    module[0].weight.data = module[0].weight.data.clone()


def other_state(module, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def other_moment(module, optimizer):
    state = optimizer.state[module[0].weight]
    state["exp_avg"] = 2 * state["exp_avg"]


def other_layout(module, optimizer):
    module[0].weight.data = module[0].weight.data.t().contiguous().t()


def no_gradient(module, optimizer):
    module[0].weight.grad = None


def another_without_gradient(module, optimizer):
    """One matrix has none in a step, the other in the next."""
    steps = optimizer.state[module[1].weight]["step"]
    module[0 if steps == 3 else 1].weight.grad = None


def gradient_in_another_order(module, optimizer):
    module[0].weight.grad = module[0].weight.grad.t().contiguous().t()


def other_options(module, optimizer):
    for group in optimizer.param_groups:
        group |= {"lr": torch.tensor(5e-3), "betas": (0.8, 0.9), "eps": 1e-3, "maximize": True}


def one_more_parameter(module, optimizer):
    if len(optimizer.param_groups) == 2:
        with pytest.warns(UserWarning, match="does not know what"):
            optimizer.add_param_group({"params": [("late", module.late)]})


EVENTS = (nothing, other_memory, other_state, other_moment, other_layout, no_gradient, gradient_in_another_order)
EVENTS += (another_without_gradient, other_options, one_more_parameter)


@pytest.mark.parametrize("implementation", ["fused", "foreach", "reference"])
@pytest.mark.parametrize("event", EVENTS)
def test_a_repeated_step_sees_what_has_changed(event, implementation, tolerances, monkeypatch):
    """As its twin does, which makes a plan for each step."""
    repeated = []
    holds = StepPlan.holds
    monkeypatch.setattr(StepPlan, "holds", lambda *a: repeated.append(holds(*a)) or repeated[-1])
    module = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    module.late = nn.Parameter(torch.zeros(3))
    trained = list(module.named_parameters())[1:]
    optimizer = AdamMini(
        trained, lr=1e-2, module=nn.Sequential(*module), partition="default", implementation=implementation
    )
    other = copy.deepcopy(module)
    twin = AdamMini(
        list(other.named_parameters())[1:], lr=1e-2, module=nn.Sequential(*other), partition="default",
        implementation="reference",
    )  # fmt: skip
    for number in range(6):
        tiny_models.set_gradients(module, other)
        if number in (3, 4):
            event(module, optimizer)
            event(other, twin)
        optimizer.step()
        twin._plan = None
        twin.step()
        for a, b in zip(module.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, **tolerances[torch.float32])
    assert any(repeated), "a plan was used"
