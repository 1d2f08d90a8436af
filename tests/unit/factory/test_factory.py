"""Optimizer factories: what they build, what they refuse, and that training, resuming and scaling work with each."""

import copy
import inspect
import io
import pickle
import warnings
from dataclasses import FrozenInstanceError, asdict, fields
from typing import get_args

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import tiny_models
from lightning_adam_mini import factory
from lightning_adam_mini.factory import adam, muon
from lightning_adam_mini.measure import optimizer_state_bytes
from lightning_adam_mini.optim.params import WeightDecayPolicy
from lightning_adam_mini.partition.strategies import STRATEGIES, Structure
from tiny_models import gpt2

FACTORIES = [getattr(factory, name) for name in factory.__all__ if name != "OptimizerFactory"]
every_factory = pytest.mark.parametrize("cls", FACTORIES, ids=lambda cls: cls.__name__)


def trained(optimizer, model, steps=3, seed=0, scheduler=None):
    torch.manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(0, 11, (2, 5))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
    return model


def small_conv_net():
    """Kernels, a depthwise kernel, vectors and a number alone; channels last, as recipes have it."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3, bias=False)
            self.norm = nn.BatchNorm2d(4)
            self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
            self.fc = nn.Linear(4, 2)
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, images):
            features = self.depthwise(self.norm(self.stem(images)).relu())
            return self.fc(features.mean((2, 3))) * self.gain

    return Net().to(memory_format=torch.channels_last)


def trained_on_images(optimizer, model, steps=3):
    for _ in range(steps):
        model(torch.randn(2, 3, 8, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same_bits(one, other):
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_names_of_partitions_and_cuts_are_the_librarys():
    assert set(get_args(adam.PartitionName)) == {"auto", *STRATEGIES}
    assert set(get_args(adam.StructureName)) == set(Structure)


def test_every_factory_is_listed():
    def below(cls):
        return {cls, *(sub for child in cls.__subclasses__() for sub in below(child))}

    own = {cls for cls in below(factory.OptimizerFactory) if cls.__module__.startswith("lightning_adam_mini.")}
    assert own == {getattr(factory, name) for name in factory.__all__}
    assert all(type(cls.decoupled_weight_decay) is bool for cls in FACTORIES)


@every_factory
def test_every_option_is_documented(cls):
    documented = {line.strip().partition(":")[0] for base in cls.__mro__ for line in (base.__doc__ or "").splitlines()}
    assert {field.name for field in fields(cls)} <= documented


@every_factory
def test_options_reach_the_optimizer(cls):
    optimizer = cls(lr=0.125, weight_decay=0.25).build(gpt2())
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    assert decays == ([0.25, 0.25, 0.0] if cls is factory.Muon else [0.25, 0.0])
    assert {group["lr"] for group in optimizer.param_groups} == {0.125}
    if hasattr(cls, "betas"):
        betas = (0.5, 0.75, 0.875)[: cls.num_betas]
        optimizer = cls(betas=betas).build(gpt2())
        assert {tuple(group["betas"]) for group in optimizer.param_groups if "betas" in group} == {betas}


@every_factory
def test_matrices_decay_and_vectors_do_not(cls):
    model = gpt2()
    *decayed, spared = cls(weight_decay=0.25).build(model).param_groups
    assert {p.ndim for group in decayed for p in group["params"]} == {2}
    assert {p.ndim for p in spared["params"]} == {1}
    assert sum(len(group["params"]) for group in [*decayed, spared]) == len(list(model.parameters()))
    groups = cls(weight_decay=0.25, weight_decay_policy="all").build(model).param_groups
    assert {group["weight_decay"] for group in groups} == {0.25}


@every_factory
def test_training_moves_every_parameter(cls):
    model = gpt2()
    before = [p.detach().clone() for p in model.parameters()]
    after = trained(cls(lr=0.01).build(model), model).parameters()
    assert all(p.isfinite().all() and not torch.equal(p, old) for p, old in zip(after, before, strict=True))


@every_factory
def test_a_conv_net_trains_and_its_state_is_predicted(cls):
    model = small_conv_net()
    before = [p.detach().clone() for p in model.parameters()]
    own = cls(lr=0.01)
    optimizer = own.build(model)
    trained_on_images(optimizer, model)
    assert all(
        p.isfinite().all() and not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)
    )
    with torch.device("meta"):
        assert own.predict_state_bytes(small_conv_net()) == optimizer_state_bytes(optimizer)


VARIANTS = [
    *(cls() for cls in FACTORIES),
    factory.AdamMini(partition="default"),
    factory.AdamMini(partition="element"),
    factory.AdamMini(partition="factored", exp_avg_dtype="bfloat16"),
    factory.AdamMini(partition_overrides={"value": "whole"}),
    factory.SGD(momentum=0.0),
    factory.SM3(momentum=0.0),
    factory.Adafactor(beta1=None),
    factory.Adafactor(weight_decay_policy="all"),
    factory.Muon(adamw_for=("mlp",)),
]


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", VARIANTS, ids=str)
def test_predicted_bytes_are_the_optimizers(own, dtype, frozen):
    with torch.device("meta"):
        predicted = own.predict_state_bytes(gpt2().to(dtype).requires_grad_())
    model = gpt2().to(dtype)
    if frozen:
        model.transformer.wte.requires_grad_(requires_grad=False)
        smaller = own.predict_state_bytes(model)
        assert smaller < predicted or smaller == predicted == 0
        predicted = smaller
    optimizer = own.build(model)
    trained(optimizer, model)
    assert optimizer_state_bytes(optimizer) == predicted


@every_factory
def test_frozen_parameters_train_once_they_are_unfrozen(cls):
    model = gpt2()
    table = model.transformer.wte.weight.requires_grad_(requires_grad=False)
    optimizer = cls(lr=0.1).build(model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    before = table.detach().clone()
    trained(optimizer, model)
    assert torch.equal(table, before)
    assert not optimizer.state.get(table)
    table.requires_grad_()
    trained(optimizer, model)
    assert not torch.equal(table, before)
    model.requires_grad_(requires_grad=False)
    with pytest.raises(ValueError, match="frozen"):
        cls().build(model)


@every_factory
def test_parameters_without_a_gradient_and_without_elements_are_skipped(cls):
    model = small_conv_net()
    model.empty = nn.Parameter(torch.zeros(0, 3))
    before = copy.deepcopy(model)
    optimizer = cls(lr=0.01).build(model)
    for _ in range(2):
        model.fc(torch.randn(2, 4)).square().sum().backward()
        model.empty.grad = torch.zeros_like(model.empty)
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert moved == {"fc.weight", "fc.bias"}
    optimizer.step()  # no gradient at all


@every_factory
def test_a_step_leaves_the_gradients_alone(cls):
    model = gpt2()
    optimizer = cls(weight_decay=0.1).build(model)
    for _ in range(2):
        tiny_models.set_gradients(model)
        before = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), before, strict=True))


@every_factory
def test_a_closure_is_called_with_gradients_enabled(cls):
    model = small_conv_net()

    def closure():
        assert torch.is_grad_enabled()
        loss = model(torch.ones(2, 3, 8, 8)).square().sum()
        loss.backward()
        return loss

    assert cls(lr=0.01).build(model).step(closure).item() > 0


def decreasing(optimizer):
    return lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


@every_factory
def test_a_resumed_run_has_the_same_bits(cls):
    """Saved to a file and loaded without code, as Lightning does, into a new model, optimizer and scheduler."""
    model = gpt2()
    optimizer = cls(lr=0.01).build(model)
    scheduler = decreasing(optimizer)
    trained(optimizer, model, scheduler=scheduler)
    saved = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()], saved)
    saved.seek(0)
    weights, optimizer_state, scheduler_state = torch.load(saved, weights_only=True)

    other = gpt2()
    other.load_state_dict(weights)
    other_optimizer = cls(lr=0.01).build(other)
    other_scheduler = decreasing(other_optimizer)
    other_optimizer.load_state_dict(optimizer_state)
    other_scheduler.load_state_dict(scheduler_state)
    trained(optimizer, model, seed=1, scheduler=scheduler)
    trained(other_optimizer, other, seed=1, scheduler=other_scheduler)
    assert_same_bits(model, other)
    # The state decides: without it the continuation differs.
    fresh = gpt2()
    fresh.load_state_dict(weights)
    trained(cls(lr=0.01).build(fresh), fresh, seed=1)
    with pytest.raises(AssertionError):
        assert_same_bits(model, fresh)


@every_factory
def test_copies_go_on_alone(cls):
    model = gpt2().eval()
    optimizer = cls(lr=0.01).build(model)
    if type(optimizer).__module__.startswith("pytorch_optimizer"):
        pytest.xfail("pytorch-optimizer keeps options outside of what torch's optimizers copy")
    trained(optimizer, model)
    copied, copied_optimizer = copy.deepcopy((model, optimizer))
    pickled, pickled_optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    before = [p.detach().clone() for p in model.parameters()]
    trained(copied_optimizer, copied, seed=1)
    trained(pickled_optimizer, pickled, seed=1)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    trained(optimizer, model, seed=1)
    assert_same_bits(model, copied)
    assert_same_bits(model, pickled)


@every_factory
def test_a_schedule_reaches_every_group(cls):
    model = gpt2()
    optimizer = cls(lr=0.5).build(model)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: float(step > 0))
    before = [p.detach().clone() for p in model.parameters()]
    trained(optimizer, model, steps=1)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    scheduler.step()
    trained(optimizer, model, steps=1)
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@every_factory
def test_a_gradient_scaler_scales_back_and_skips_overflows(cls):
    model, plain = gpt2(), gpt2()
    plain.load_state_dict(model.state_dict())
    optimizer, plain_optimizer = cls(lr=0.01).build(model), cls(lr=0.01).build(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for overflow in (False, True, False):
        tiny_models.set_gradients(plain, model)
        scaler.scale(torch.zeros(()))  # makes the scale
        for p in model.parameters():
            p.grad *= scaler.get_scale()
        if overflow:
            next(model.parameters()).grad[0, 0] = torch.inf
        else:
            plain_optimizer.step()
        scaler.step(optimizer)
        scaler.update()
        assert_same_bits(model, plain)
    assert scaler.get_scale() == 2.0


REFUSED = {
    "lr": [-1.0, float("nan"), float("inf")],
    "weight_decay": [-0.1, float("nan"), float("inf")],
    "betas": [(1.0, 0.9), (0.9, -0.1), (0.9, float("nan")), (0.9,), (0.9, 0.9, 0.9, 0.9)],
    "eps": [-1e-8, float("nan"), float("inf")],
    "eps1": [-1e-8, float("nan"), float("inf")],
    "eps2": [-1e-8, float("nan"), float("inf")],
    "momentum": [-0.1, 1.0, float("nan")],
    "beta1": [-0.1, 1.0, float("nan")],
    "beta2_cap": [-0.1, 1.0, float("nan")],
    "decay_rate": [0.0, 0.8, float("nan"), float("-inf")],
    "clip_threshold": [0.0, -1.0, float("nan"), float("inf")],
    "ns_steps": [0, 100],
}


@every_factory
def test_refused_before_there_is_a_model(cls):
    for option in REFUSED.keys() & {field.name for field in fields(cls)}:
        for value in REFUSED[option]:
            with pytest.raises(ValueError, match=f"{option} must be"):
                cls(**{option: value})


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (factory.SGD, {"nesterov": True, "momentum": 0.0}, "nesterov needs a momentum"),
        (factory.Adafactor, {"warmup_init": True}, "warmup_init needs relative_step"),
        (factory.Muon, {"adamw_for": ("re:(",)}, "adamw_for: 're:\\(' is not a valid regular expression"),
        (factory.CAME, {"betas": (0.9, 0.99)}, "betas must be 3 numbers"),
    ],
)
def test_options_that_contradict_each_other(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(**options)


@every_factory
def test_what_it_cannot_train_is_refused_by_build(cls):
    model = gpt2()
    model.transformer.wte = nn.Embedding(11, 8, sparse=True)
    with pytest.raises(ValueError, match=rf"transformer.wte: {cls.__name__} does not take sparse gradients"):
        cls().build(model)
    model = small_conv_net()
    model.waves = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    if cls.elementwise:
        optimizer = cls().build(model)
        model.waves.grad = torch.ones_like(model.waves)
        optimizer.step()
        assert not torch.equal(model.waves, torch.ones_like(model.waves))
    else:
        with pytest.raises(ValueError, match=r"^waves: .*complex parameters.*torch.view_as_real"):
            cls().build(model)


@every_factory
def test_sharded_tensors_are_refused_where_an_update_needs_whole_ones(cls):
    """As FSDP with the original parameters leaves them: flat parts without a sign of the whole tensor's norm."""
    model = small_conv_net()
    model.fc.weight._fsdp_flattened = True
    if cls.elementwise:
        cls().build(model)
    elif cls is not factory.AdamMini:  # which has its own tests
        with pytest.raises(ValueError, match=r"^fc.weight: .*sharded.*strategy 'ddp'"):
            cls().build(model)


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


def test_the_base_builds_and_predicts_nothing():
    assert inspect.isabstract(factory.OptimizerFactory)

    class Unknown(factory.OptimizerFactory):
        def build(self, module):
            return torch.optim.Rprop(module.parameters())

    assert Unknown().predict_state_bytes(gpt2()) is None


@every_factory
def test_decoupled_and_coupled_decay(cls):
    """With gradients of zero, decoupled decay shrinks a weight by lr * decay, whatever the optimizer."""
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(1.0)
    optimizer = cls(lr=0.1, weight_decay=0.5).build(module)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    expected = 1 - 0.1 * 0.5
    if cls is factory.Adam:
        expected = 1 - 0.1  # the sign of the decay
    elif cls is factory.LAMB:
        expected = 1 - 0.1  # the whole direction is decay, scaled to the tensor's norm
    for p in module.parameters():
        assert p.detach().flatten().tolist() == pytest.approx([expected] * 4)


def test_adam_mini_with_elements_is_adamw():
    ours, torchs = gpt2(), gpt2()
    torchs.load_state_dict(ours.state_dict())
    trained(factory.AdamMini(lr=0.01, partition="element", implementation="reference").build(ours), ours.eval())
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
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer = factory.Adafactor(lr=lr, relative_step=relative_step).build(model)
            assert any("lr and schedule are not used" in str(w.message) for w in caught) is relative_step
            trained(optimizer, model, steps=1)
            moved[relative_step, lr] = (model.transformer.wte.weight.detach() - before).norm().item()
    assert moved[False, 0.02] == pytest.approx(2 * moved[False, 0.01], rel=0.02)
    assert moved[True, 0.02] == pytest.approx(moved[True, 0.01], rel=0.02)


def names_of_muon(model, **options):
    optimizer = factory.Muon(**options).build(model)
    own = {id(p) for group in optimizer.param_groups if group["rule"] == "muon" for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in own}


def test_muon_takes_hidden_matrices_alone():
    hidden = {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
    assert names_of_muon(gpt2()) == {f"transformer.h.0.{name}" for name in hidden}
    assert names_of_muon(small_conv_net()) == {"stem.weight", "depthwise.weight", "fc.weight"}
    assert names_of_muon(small_conv_net(), adamw_for=("fc.weight",)) == {"stem.weight", "depthwise.weight"}
    assert names_of_muon(small_conv_net(), adamw_for=("conv",)) == {"fc.weight"}
    assert names_of_muon(small_conv_net(), adamw_for=("re:(stem|fc).*",)) == {"depthwise.weight"}
    experts = {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"}
    mixtral = tiny_models.mixtral()
    assert experts < names_of_muon(mixtral)
    assert not {"model.embed_tokens.weight", "lm_head.weight"} & names_of_muon(mixtral)
    trained(factory.Muon(lr=0.01).build(mixtral), mixtral)


def test_muon_refuses_models_without_hidden_matrices():
    for model in (nn.Embedding(7, 4), nn.LayerNorm(4)):
        with pytest.raises(ValueError, match="Muon needs hidden matrices, and this model has none"):
            factory.Muon().build(model)
    with pytest.raises(ValueError, match="Muon needs hidden matrices"):
        factory.Muon(adamw_for=("re:.*",)).build(small_conv_net())
    with pytest.raises(ValueError, match="'head' matches no trainable parameter; this model has the roles bias"):
        factory.Muon(adamw_for=("head",)).build(small_conv_net())


def test_muons_groups_say_whose_they_are():
    with pytest.raises(ValueError, match="rule must be 'muon' or 'adamw'"):
        muon.MuonWithAdamW([{"params": [nn.Parameter(torch.ones(2, 2))]}], lr=0.1)
    with pytest.raises(ValueError, match="Muon trains matrices"):
        muon.MuonWithAdamW([{"params": [nn.Parameter(torch.ones(2))], "rule": "muon", "stacked": False}], lr=0.1)


@pytest.mark.parametrize("cls", [factory.Lion, factory.CAME, factory.Adafactor])
def test_a_missing_package_is_named(cls, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pytorch_optimizer", None)
    with pytest.raises(ValueError, match=rf"(?i){cls.__name__} needs the package pytorch-optimizer; install it with"):
        cls().build(gpt2())


def test_policies_are_those_of_the_groups():
    assert set(get_args(WeightDecayPolicy)) == {"matrices", "all"}
