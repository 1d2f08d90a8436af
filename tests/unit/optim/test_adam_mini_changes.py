"""Parameters that change under the optimizer: resized, replaced, swapped. AdamW's behaviour, or one clear error."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import tiny_models
from lightning_adam_mini import AdamMini

IMPLEMENTATIONS = [None, "reference", *(pytest.param(name, marks=pytest.mark.slow) for name in ("foreach", "fused"))]


def model():
    return nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 3), nn.LayerNorm(3))


def snapshot(optimizer, *modules):
    """All that a refused step must leave as it is."""
    tensors = [p.detach().clone() for module in modules for p in module.parameters()]
    states = [value.clone() for state in optimizer.state.values() for value in state.values()]
    return tensors + states


def step(*pairs):
    tiny_models.set_gradients(*(module for module, _ in pairs))
    for _, optimizer in pairs:
        optimizer.step()


def assert_refused(optimizer, module, message, call=None):
    before = snapshot(optimizer, module)
    with pytest.raises(ValueError, match=message):
        (call or optimizer.step)()
    for a, b in zip(before, snapshot(optimizer, module), strict=True):
        assert torch.equal(a, b)


# Shapes


def resized(size):
    def change(module):
        module[0].weight.data = torch.ones(size, 4)

    return change


def pruned(module):
    module[1].weight.data = module[1].weight.data[:, :2]


def unrolled(module):
    module[1].weight.data = module[1].weight.data.flatten()


SHAPES = {"grown": resized(9), "shrunk": resized(2), "emptied": resized(0), "pruned": pruned}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("partition", ["transformer", "default", "element", "factored"])
@pytest.mark.parametrize("change", SHAPES)
def test_a_shape_that_changes_before_the_first_step(change, partition, implementation):
    """As if the optimizer had been built over what is there now."""
    ours, expected = model(), model()
    expected.load_state_dict(ours.state_dict())
    options = {"partition": partition, "implementation": implementation, "lr": 1e-2}
    optimizer = AdamMini(ours, **options)
    for module in (ours, expected):
        SHAPES[change](module)
    other = AdamMini(expected, **options)
    for _ in range(2):
        step((ours, optimizer), (expected, other))
    assert optimizer.partition == other.partition
    for a, b in zip(ours.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
    fresh = AdamMini(copy.deepcopy(expected), **options)
    fresh.load_state_dict(optimizer.state_dict())  # its fingerprint is that of the new shapes


def test_a_tensor_of_other_dimensions_before_the_first_step():
    module = model()
    optimizer = AdamMini(module, partition="default")
    unrolled(module)
    step((module, optimizer))
    assert optimizer.state[module[1].weight]["exp_avg_sq"].shape == (1,)
    module = model()
    optimizer = AdamMini(module, partition="transformer")
    unrolled(module)
    module[1].weight.grad = torch.ones(12)
    assert_refused(
        optimizer, module, r"1.weight had the shape \(3, 4\) and has \(12,\), for which its blocks are not known"
    )


def test_parts_of_a_fused_matrix_are_not_guessed():
    module = nn.Sequential(nn.Embedding(5, 8), nn.MultiheadAttention(8, 2))
    optimizer = AdamMini(module)
    weight = module[1].in_proj_weight
    weight.data = weight.data[:12]
    weight.grad = torch.ones(12, 8)
    assert_refused(
        optimizer, module, r"in_proj_weight had the shape \(24, 8\) and has \(12, 8\), .* build AdamMini after"
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("change", SHAPES)
def test_a_shape_that_changes_after_steps_is_refused_before_anything_moves(change, implementation):
    module = model()
    optimizer = AdamMini(module, partition="transformer", implementation=implementation)
    for _ in range(2):  # the second is a repeated one
        step((module, optimizer))
    SHAPES[change](module)
    tiny_models.set_gradients(module)
    message = r"(0|1).weight had the shape \(., 4\) in 2 steps .*optimizer.state.pop\(parameter\)"
    assert_refused(optimizer, module, message)
    assert_refused(optimizer, module, message, lambda: optimizer.step(lambda: 0.0))
    changed = next(p for p in module.parameters() if p.shape != optimizer.partition[names_of(module)[p]].blocks.shape)
    assert_refused(optimizer, module, message, lambda: optimizer.step_parameter(changed))
    optimizer.state_dict()  # what is there can still be saved
    optimizer.state.pop(changed)  # the remedy
    step((module, optimizer))
    assert all(state["step"] == (1 if p is changed else 3) for p, state in optimizer.state.items())


def names_of(module):
    return {parameter: name for name, parameter in module.named_parameters()}


def test_a_resized_language_model():
    module = tiny_models.gpt2()
    optimizer = AdamMini(module, lr=1e-2)
    module.resize_token_embeddings(70)
    tokens = torch.tensor([[1, 69, 3]])
    module(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    table = module.transformer.wte.weight
    assert optimizer.state[table]["exp_avg_sq"].shape == (70, 1)
    module.resize_token_embeddings(80)
    module.zero_grad()
    module(input_ids=tokens, labels=tokens).loss.backward()
    assert_refused(optimizer, module, r"wte.weight had the shape \(70, \d+\) in 1 steps and has \(80")


# Gradients


def wrong_shape(module):
    weight = module[2].weight
    weight.grad = torch.ones(3)
    weight.grad.data = torch.ones(2)


def sparse(module):
    module[0].sparse = True
    module[0].weight.grad = None
    module[0](torch.tensor([1])).sum().backward()


BAD_GRADIENTS = {
    "shape": (wrong_shape, r"2.weight: the gradient has the shape \(2,\), the parameter \(3,\)"),
    "sparse": (sparse, "0.weight: sparse gradients are not supported"),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", BAD_GRADIENTS)
@pytest.mark.parametrize("num_steps", [0, 2])
def test_a_gradient_that_is_refused_moves_no_parameter(bad, num_steps, implementation):
    spoil, message = BAD_GRADIENTS[bad]
    module = model()
    optimizer = AdamMini(module, implementation=implementation)
    for _ in range(num_steps):
        step((module, optimizer))
    tiny_models.set_gradients(module)
    spoil(module)
    assert_refused(optimizer, module, message)
    assert_refused(optimizer, module, message, lambda: optimizer.step(lambda: 0.0))
    step((module, optimizer))


@pytest.mark.parametrize("num_steps", [0, 2])
def test_options_that_are_refused_move_no_parameter(num_steps):
    module = model()
    optimizer = AdamMini(module)
    for _ in range(num_steps):
        step((module, optimizer))
    optimizer.param_groups[1]["betas"] = (0.9,)
    tiny_models.set_gradients(module)
    assert_refused(optimizer, module, "unpack")


# Replaced in the groups


def swap(optimizer, *, keep=()):
    """New tensors of the same contents in the places of the old, as accelerate does it."""
    for group in optimizer.param_groups:
        for place, parameter in enumerate(group["params"]):
            if parameter not in keep:
                group["params"][place] = torch.empty(1)  # the old one is let go first
                group["params"][place] = nn.Parameter(parameter.detach().clone())


@pytest.mark.parametrize("in_module", [False, True])
@pytest.mark.parametrize("num_steps", [0, 2])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_parameters_that_are_replaced_go_on_in_their_places(implementation, num_steps, in_module):
    whole, swapped = model(), model()
    swapped.load_state_dict(whole.state_dict())
    options = {"lr": 1e-2, "partition": "transformer", "implementation": implementation}
    first, second = AdamMini(whole, **options), AdamMini(swapped, **options)
    for _ in range(num_steps):
        step((whole, first), (swapped, second))
    names = [[names_of(swapped)[p] for p in group["params"]] for group in second.param_groups]
    partition = second.partition
    old = weakref.ref(swapped[0].weight)
    swap(second)
    now = {
        name: p for g, m in zip(second.param_groups, names, strict=True) for name, p in zip(m, g["params"], strict=True)
    }
    if in_module:
        for name, parameter in now.items():
            owner, _, own = name.rpartition(".")
            setattr(swapped.get_submodule(owner), own, parameter)
    else:
        swapped = nn.ParameterList(now[name] for name in names_of(whole).values())
    for _ in range(2):
        step((whole, first), (swapped, second))
    assert second.partition == partition
    assert set(second.state) == set(swapped.parameters())
    for a, b in zip(whole.parameters(), swapped.parameters(), strict=True):
        assert torch.equal(a, b)
        assert first.state[a]["step"] == second.state[b]["step"]
    if in_module:
        gc.collect()
        assert old() is None, "what was replaced is let go"


def test_a_state_is_saved_and_loaded_right_after_a_replacement():
    module = model()
    optimizer = AdamMini(module)
    step((module, optimizer))
    swap(optimizer)
    saved = optimizer.state_dict()
    assert all(state["step"] == 1 for state in saved["state"].values())
    other = AdamMini(model())
    swap(other)
    other.load_state_dict(saved)
    assert all(state["step"] == 1 for state in other.state.values())


def test_a_step_without_gradients_right_after_a_replacement():
    optimizer = AdamMini(model())
    swap(optimizer)
    optimizer.step()
    assert len(optimizer.state) == len(optimizer.partition)


def test_another_tensor_in_the_place_of_one_is_refused():
    module = model()
    optimizer = AdamMini(module)
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(7, 4))
    optimizer.param_groups[0]["params"][0].grad = torch.ones(7, 4)
    assert_refused(optimizer, module, r"a parameter of shape \(7, 4\) that does not belong to the model")
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(6, 4)))
    assert_refused(optimizer, module, "that does not belong to the model .* add_param_group")


def test_parameters_that_are_replaced_in_another_order_are_refused():
    """The model tells that the new tensors stand in each other's places, whose shapes are the same."""
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    optimizer = AdamMini(module, partition="default")
    for layer in module:
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    optimizer.param_groups[0]["params"] = [module[1].weight, module[0].weight]
    tiny_models.set_gradients(module)
    assert_refused(optimizer, module, "1.weight of the model is in the place of 0.weight in param_groups")


def test_parameters_that_are_replaced_after_their_order_has_changed():
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    optimizer = AdamMini(module, partition="default")
    step((module, optimizer))
    optimizer.param_groups[0]["params"].reverse()
    step((module, optimizer))
    for layer in module:
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    optimizer.param_groups[0]["params"] = [module[1].weight, module[0].weight]
    step((module, optimizer))
    assert [int(state["step"]) for state in optimizer.state.values()] == [3, 3]


def test_parameters_that_are_replaced_in_the_model_alone_are_told():
    """AdamW says nothing, and trains nothing, as where fully_shard comes after the optimizer."""
    module = model()
    optimizer = AdamMini(module)
    for layer in module:
        for name, parameter in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(parameter.detach().clone()))
    tiny_models.set_gradients(module)
    assert_refused(optimizer, module, "0.weight: the model has another parameter than when the optimizer was built")


# Swapped, converted, copied


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_steps", [0, 2])
def test_tensors_that_are_swapped_or_assigned(num_steps, implementation):
    plain, changed = model(), model()
    changed.load_state_dict(plain.state_dict())
    options = {"lr": 1e-2, "partition": "transformer", "implementation": implementation}
    first, second = AdamMini(plain, **options), AdamMini(changed, **options)
    for _ in range(num_steps):
        step((plain, first), (changed, second))
    for parameter in changed.parameters():
        parameter.grad = None
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach().clone()))
    step((plain, first), (changed, second))
    for parameter in changed.parameters():
        parameter.data = parameter.data.clone()
    step((plain, first), (changed, second))
    for a, b in zip(plain.parameters(), changed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_that_are_assigned_in_a_load_are_other_parameters():
    """With AdamW the old ones stay in the groups, and no gradient comes to them; here it is told."""
    module = model()
    optimizer = AdamMini(module)
    module.load_state_dict({name: p.clone() for name, p in module.state_dict().items()}, assign=True)
    tiny_models.set_gradients(module)
    assert_refused(optimizer, module, "the model has another parameter")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_follows_its_own_parameters(copied):
    module = model()
    optimizer = AdamMini(module, partition="transformer")
    other, twin = copied((module, optimizer))
    resized(8)(other)
    step((other, twin))
    assert twin.state[other[0].weight]["exp_avg_sq"].shape == (8, 1)
    step((module, optimizer))
    resized(8)(module)
    tiny_models.set_gradients(module)
    assert_refused(optimizer, module, "in 1 steps")
    swap(twin)
    twin.state_dict()
