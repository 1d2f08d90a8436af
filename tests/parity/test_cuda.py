"""The update on a CUDA device."""

import copy

import pytest
import torch

import tiny_models
from lightning_adam_mini import AdamMini

pytestmark = pytest.mark.gpu
PARTITIONS = ["transformer", "factored", "default", "element"]


def steps(model, optimizer, gradients):
    for step_gradients in gradients:
        for parameter, gradient in zip(model.parameters(), step_gradients, strict=True):
            parameter.grad = gradient.to(parameter.device, parameter.dtype, copy=True)
        optimizer.step()


def model_and_gradients(num_steps=5):
    model = tiny_models.randomize(tiny_models.encoder_layer())
    gradients = [[tiny_models.random_gradient(p) for p in model.parameters()] for _ in range(num_steps)]
    return model, gradients


def assert_same(first, second, tolerances):
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), **tolerances[a.dtype])


@pytest.mark.parametrize("implementation", ["reference", "foreach"])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_the_device_equals_the_cpu(partition, implementation, tolerances):
    model, gradients = model_and_gradients()
    on_device = copy.deepcopy(model).cuda()
    steps(model, AdamMini(model, partition=partition, implementation="reference"), gradients)
    steps(on_device, AdamMini(on_device, partition=partition, implementation=implementation), gradients)
    assert_same(model, on_device, tolerances)


def test_a_model_that_moves_after_construction(tolerances):
    model, gradients = model_and_gradients()
    moved = copy.deepcopy(model)
    steps(model, AdamMini(model), gradients)
    optimizer = AdamMini(moved)
    steps(moved, optimizer, gradients[:2])
    moved.cuda()
    steps(moved, optimizer, gradients[2:])
    assert_same(model, moved, tolerances)
    state = optimizer.state[moved.linear1.weight]
    assert state["exp_avg"].is_cuda
    assert not state["step"].is_cuda


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_a_captured_step_equals_the_reference(partition, tensor_lr, tolerances):
    model, gradients = model_and_gradients(num_steps=1)
    captured = copy.deepcopy(model).cuda()
    lr = torch.tensor(1e-2, device="cuda") if tensor_lr else 1e-2
    optimizer = AdamMini(captured, lr=lr, partition=partition, capturable=True)
    for parameter, gradient in zip(captured.parameters(), gradients[0], strict=True):
        parameter.grad = gradient.cuda()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(4):
        graph.replay()

    steps(model, AdamMini(model, lr=1e-2, partition=partition, implementation="reference"), gradients * 5)
    assert_same(model, captured, tolerances)


def test_capturing_a_step_that_is_not_capturable_raises():
    model, gradients = model_and_gradients(num_steps=1)
    model.cuda()
    optimizer = AdamMini(model)
    steps(model, optimizer, gradients)
    with pytest.raises(RuntimeError, match="capturable is False"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


def test_the_gradient_scaler_skips_a_step_with_infinite_gradients():
    model, gradients = model_and_gradients(num_steps=1)
    model.cuda()
    optimizer = AdamMini(model)
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cuda")
    scaler.scale(torch.ones((), device="cuda"))
    for parameter, gradient in zip(model.parameters(), gradients[0], strict=True):
        parameter.grad = gradient.cuda()
    model.linear1.weight.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
