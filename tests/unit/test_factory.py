"""Optimizer factories: what they build, what they refuse, and that the command line can explain them."""

import inspect
import pickle
from dataclasses import FrozenInstanceError, asdict, fields
from typing import get_args

import pytest
import torch

from lightning_adam_mini import factory
from lightning_adam_mini.optim.groups import WeightDecayPolicy
from lightning_adam_mini.partition.strategies import STRATEGIES, Cut
from tiny_models import gpt2

FACTORIES = [getattr(factory, name) for name in factory.__all__ if name != "OptimizerFactory"]
every_factory = pytest.mark.parametrize("cls", FACTORIES, ids=lambda cls: cls.__name__)


def trained(optimizer, model, steps=3):
    torch.manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(0, 11, (2, 5))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_names_of_partitions_and_cuts_are_the_librarys():
    assert set(get_args(factory.PartitionName)) == {"auto", *STRATEGIES}
    assert set(get_args(factory.CutName)) == set(Cut)


@every_factory
def test_every_option_is_documented(cls):
    documented = {line.strip().partition(":")[0] for base in cls.__mro__ for line in (base.__doc__ or "").splitlines()}
    assert {field.name for field in fields(cls)} <= documented


@every_factory
def test_options_reach_the_optimizer(cls):
    optimizer = cls(lr=0.125, weight_decay=0.25).build(gpt2())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0]
    assert {group["lr"] for group in optimizer.param_groups} == {0.125}
    if hasattr(cls, "betas"):
        optimizer = cls(betas=(0.5, 0.75)).build(gpt2())
        assert {tuple(group["betas"]) for group in optimizer.param_groups} == {(0.5, 0.75)}


@every_factory
def test_matrices_decay_and_vectors_do_not(cls):
    model = gpt2()
    decayed, spared = cls(weight_decay=0.25).build(model).param_groups
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in spared["params"]} == {1}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))
    (everything,) = cls(weight_decay=0.25, weight_decay_policy="all").build(model).param_groups
    assert everything["weight_decay"] == 0.25


@every_factory
def test_training_moves_every_parameter(cls):
    model = gpt2()
    before = [p.detach().clone() for p in model.parameters()]
    after = trained(cls(lr=0.01).build(model), model).parameters()
    assert all(p.isfinite().all() and not torch.equal(p, old) for p, old in zip(after, before, strict=True))


@every_factory
def test_frozen_parameters_are_left_out(cls):
    model = gpt2()
    model.transformer.wte.requires_grad_(requires_grad=False)
    held = {id(p) for group in cls().build(model).param_groups for p in group["params"]}
    assert id(model.transformer.wte.weight) not in held
    model.requires_grad_(requires_grad=False)
    with pytest.raises(ValueError, match="frozen"):
        cls().build(model)


REFUSED = {
    "lr": [-1.0, float("nan"), float("inf")],
    "weight_decay": [-0.1, float("nan"), float("inf")],
    "betas": [(1.0, 0.9), (0.9, -0.1), (0.9, float("nan"))],
    "eps": [-1e-8, float("nan"), float("inf")],
}


@every_factory
def test_refused_before_there_is_a_model(cls):
    for option in REFUSED.keys() & {field.name for field in fields(cls)}:
        for value in REFUSED[option]:
            with pytest.raises(ValueError, match=f"{option} must be"):
                cls(**{option: value})


@every_factory
def test_a_factory_is_a_value(cls):
    own = cls(lr=0.5)
    assert own == cls(**asdict(own)) == pickle.loads(pickle.dumps(own))
    assert own != cls(lr=0.25)
    with pytest.raises(FrozenInstanceError):
        own.lr = 0.25
    with pytest.raises(TypeError):
        cls(0.5)
    with pytest.raises(TypeError, match="unknown"):
        cls(unknown=1)


def test_the_base_builds_nothing():
    assert inspect.isabstract(factory.OptimizerFactory)


def test_decoupled_and_coupled_decay():
    """With a gradient of zero, AdamW shrinks a weight by lr * decay; Adam and SGD see decay as a gradient."""
    module = torch.nn.Linear(2, 2, bias=False)
    for cls, expected in ((factory.AdamW, 1 - 0.1 * 0.5), (factory.SGD, 1 - 0.1 * 0.5), (factory.Adam, 1 - 0.1)):
        with torch.no_grad():
            module.weight.fill_(1.0)
        module.weight.grad = torch.zeros_like(module.weight)
        cls(lr=0.1, weight_decay=0.5).build(module).step()
        assert module.weight.detach().flatten().tolist() == pytest.approx([expected] * 4), cls.__name__


def test_adam_mini_with_elements_is_adamw():
    ours, torchs = gpt2(), gpt2()
    torchs.load_state_dict(ours.state_dict())
    trained(factory.AdamMini(lr=0.01, partition="element").build(ours), ours.eval())
    trained(factory.AdamW(lr=0.01).build(torchs), torchs.eval())
    for one, other in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_partition_options_reach_adam_mini():
    model = gpt2()
    optimizer = factory.AdamMini(partition="default", exp_avg_dtype="bfloat16").build(model)
    state = optimizer.state[model.transformer.wte.weight]
    assert state["exp_avg_sq"].numel() == 1
    assert state["exp_avg"].dtype == torch.bfloat16
    overrides = {"token_embedding": "element"}
    optimizer = factory.AdamMini(partition="default", partition_overrides=overrides).build(model)
    weight = model.transformer.wte.weight
    assert optimizer.state[weight]["exp_avg_sq"].numel() == weight.numel()


def test_adafactor_follows_the_external_rate_or_its_own():
    moved = {}
    for relative_step in (False, True):
        for lr in (0.01, 0.02):
            torch.manual_seed(0)
            model = gpt2().eval()
            before = model.transformer.wte.weight.detach().clone()
            trained(factory.Adafactor(lr=lr, relative_step=relative_step).build(model), model, steps=1)
            moved[relative_step, lr] = (model.transformer.wte.weight.detach() - before).norm().item()
    assert moved[False, 0.02] == pytest.approx(2 * moved[False, 0.01], rel=0.02)
    assert moved[True, 0.02] == pytest.approx(moved[True, 0.01], rel=0.02)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pytorch_optimizer", None)
    with pytest.raises(ValueError, match=r"Lion needs the package pytorch-optimizer; install it with"):
        factory.Lion().build(gpt2())


def test_policies_are_those_of_the_groups():
    assert set(get_args(WeightDecayPolicy)) == {"matrices", "all"}
