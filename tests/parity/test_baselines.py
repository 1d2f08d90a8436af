"""Every optimizer of the factory beside its paper's rule in float64, and how far other libraries are from it."""

from functools import reduce
from importlib import import_module

import pytest
import torch
from torch import nn
from torch.optim import _muon as torch_muon
from torch.optim import lr_scheduler

from lightning_adam_mini import factory
from lightning_adam_mini.factory.muon import MuonWithAdamW
from reference import baselines
from tiny_models import random_gradient, randomize

STEPS = 12
LR, DECAY = 0.01, 0.3


class Mixed(nn.Module):
    """Tensors of every number of dimensions; the weights decay and the others do not."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.wide = nn.Linear(6, 3)
        self.tall = nn.Linear(2, 5, bias=False)
        self.line = nn.Conv1d(3, 4, 2)
        self.conv = nn.Conv2d(3, 4, (3, 2))
        self.norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.ones(()))
        self.token = nn.Parameter(torch.ones(1, 1, 3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)


def decays(name):
    return name in {"embedding.weight", "wide.weight", "tall.weight", "line.weight", "conv.weight"}


def gradients_of(module, *, zeros=True):
    """Gradients of all steps by name; rows and whole tensors of zeros among them."""
    gradients = {n: [random_gradient(p) for _ in range(STEPS)] for n, p in module.named_parameters() if p.requires_grad}
    if zeros:
        for step in (0, 5):
            gradients["embedding.weight"][step][2] = 0
        gradients["wide.bias"][1].zero_()
    return gradients


def trained(module, optimizer, gradients, scheduler=None):
    scheduler = scheduler(optimizer) if scheduler else None
    for step in range(STEPS):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.grad = gradients[name][step].clone()
        optimizer.step()
        if scheduler:
            scheduler.step()
    return {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}


def module_in_float64():
    module = randomize(Mixed().double())
    with torch.no_grad():
        module.norm.bias.zero_()  # as biases start
    return module


def differences(build, reference, options, *, decay=DECAY, policy="matrices", schedule=False, of_movement=False):
    """The largest difference of each tensor to the reference, relative to its largest number or largest movement."""
    module = module_in_float64()
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    gradients = gradients_of(module)
    rate = (lambda step: (step + 1) / (1 + step**2 / 9)) if schedule else (lambda step: 1.0)
    rates = [LR * rate(step) for step in range(STEPS)]
    scheduler = (lambda optimizer: lr_scheduler.LambdaLR(optimizer, rate)) if schedule else None
    after = trained(module, build(module), gradients, scheduler)
    found = {}
    for name, parameter in after.items():
        own_decay = decay if policy == "all" or decays(name) else 0.0
        expected = reference(start[name], gradients[name], rates, own_decay, **options)
        scale = expected - start[name] if of_movement else expected
        found[name] = ((parameter - expected).abs().max() / scale.abs().max()).item()
    return found


TWO = {"betas": (0.8, 0.9), "eps": 1e-4}
CASES = {
    "SGD": ("SGD", baselines.sgd, {"momentum": 0.8}),
    "SGD without momentum": ("SGD", baselines.sgd, {"momentum": 0.0}),
    "SGD, Nesterov": ("SGD", baselines.sgd, {"momentum": 0.8, "nesterov": True}),
    "Adam": ("Adam", baselines.adam, TWO),
    "AdamW": ("AdamW", baselines.adamw, TWO),
    "Lion": ("Lion", baselines.lion, {"betas": (0.8, 0.9)}),
    "LAMB": ("LAMB", baselines.lamb, TWO),
    "LAMB without correction": ("LAMB", baselines.lamb, {**TWO, "bias_correction": False}),
    "NovoGrad": ("NovoGrad", baselines.novograd, TWO),
    "NovoGrad, averaged": ("NovoGrad", baselines.novograd, {**TWO, "grad_averaging": True}),
    "Adafactor": ("Adafactor", baselines.adafactor, {"beta1": 0.8}),
    "Adafactor without momentum": ("Adafactor", baselines.adafactor, {"beta1": None, "clip_threshold": 0.5}),
    "Adafactor as released": (
        "Adafactor",
        baselines.adafactor,
        {"beta1": 0.8, "relative_step": True, "scale_parameter": True, "warmup_init": True},
    ),
    "Adafactor, Zhai": ("Adafactor", baselines.adafactor, {"beta1": 0.8, "beta2_cap": 0.6, "eps1": 1e-3}),
    "Adafactor, scaled": ("Adafactor", baselines.adafactor, {"beta1": 0.8, "scale_parameter": True, "eps2": 1.0}),
    "CAME": ("CAME", baselines.came, {"betas": (0.8, 0.9, 0.95)}),
    "CAME, other eps": ("CAME", baselines.came, {"betas": (0.8, 0.9, 0.95), "eps1": 1e-2, "eps2": 1e-2}),
    "SM3": ("SM3", baselines.sm3, {"momentum": 0.8}),
    "SM3 without momentum": ("SM3", baselines.sm3, {"momentum": 0.0}),
}
every_case = pytest.mark.parametrize("case", CASES)


@pytest.mark.filterwarnings("ignore:Adafactor with relative_step")
@pytest.mark.parametrize("schedule", [False, True], ids=["constant", "scheduled"])
@pytest.mark.parametrize(("decay", "policy"), [(0.0, "matrices"), (DECAY, "matrices"), (DECAY, "all")])
@every_case
def test_the_papers_rule(case, decay, policy, schedule):
    name, reference, options = CASES[case]
    own = getattr(factory, name)(lr=LR, weight_decay=decay, weight_decay_policy=policy, **options)
    found = differences(own.build, reference, options, decay=decay, policy=policy, schedule=schedule)
    assert all(value < 1e-12 for value in found.values()), found


# What a mistaken reader of the paper would have, as options of the reference.
MISTAKES = {
    "SGD": {"momentum": 0.79},
    "Adam": {**TWO, "eps": 1.1e-4},
    "AdamW": {**TWO, "betas": (0.8, 0.91)},
    "Lion": {"betas": (0.9, 0.8)},
    "LAMB": {**TWO, "bias_correction": False},
    "NovoGrad": {**TWO, "grad_averaging": True},
    "Adafactor": {"beta1": 0.8, "decay_rate": -0.81},
    "Adafactor, Zhai": {"beta1": 0.8, "eps1": 1e-3},
    "CAME": {"betas": (0.8, 0.9, 0.96)},
    "SM3": {"momentum": 0.81},
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_shows(case):
    name, reference, options = CASES[case]
    own = getattr(factory, name)(lr=LR, weight_decay=DECAY, **options)
    assert max(differences(own.build, reference, MISTAKES[case]).values()) > 1e-7


@pytest.mark.filterwarnings("ignore:Adafactor with relative_step")
@every_case
def test_decay_shows(case):
    name, reference, options = CASES[case]
    own = getattr(factory, name)(lr=LR, weight_decay=DECAY, **options)
    assert max(differences(own.build, reference, options, decay=0.0).values()) > 1e-8


# Our own rules, as a mistaken hand would have written them: each takes the place of `update_`.


def lamb(mistake):
    def update_(self, param, grad, state, group):
        (beta1, beta2), step, eps, decay = group["betas"], state["step"].item(), group["eps"], group["weight_decay"]
        m = beta1 * state.get("m", 0) + (1 - beta1) * grad
        v = beta2 * state.get("v", 0) + (1 - beta2) * grad**2
        state["m"], state["v"] = m, v
        m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
        direction = m_hat / ((v_hat + eps).sqrt() if mistake == "eps inside the root" else v_hat.sqrt() + eps)
        if mistake != "decay after the ratio":
            direction = direction + decay * param
        norm = (m if mistake == "ratio of the wrong vector" else direction).norm()
        ratio = param.norm() / norm
        if (param.norm() == 0 or norm == 0) and mistake != "no case of a zero norm":
            ratio = 1.0
        param.sub_(group["lr"] * ratio * direction)
        if mistake == "decay after the ratio":
            param.sub_(group["lr"] * decay * param)

    return update_


def novograd(mistake):
    def update_(self, param, grad, state, group):
        beta1, beta2 = group["betas"]
        squares = (grad**2).mean() if mistake == "mean in place of the sum" else (grad**2).sum()
        start = 0 * squares if mistake == "starts at zero" else squares
        state["v"] = beta2 * state.get("v", start) + (1 - beta2) * squares
        direction = grad / (state["v"].sqrt() + group["eps"])
        decay = group["weight_decay"] * param
        inside = mistake != "decay outside of the momentum"
        state["m"] = beta1 * state.get("m", 0) + direction + (decay if inside else 0)
        param.sub_(group["lr"] * (state["m"] + (0 if inside else decay)))

    return update_


def sm3(mistake):
    choose = torch.maximum if mistake == "greatest in place of the least" else torch.minimum

    def update_(self, param, grad, state, group):
        axes = range(max(param.ndim, 1))
        if "mu" not in state:
            state["mu"] = [grad.new_zeros([n if axis == a else 1 for a, n in enumerate(param.shape)]) for axis in axes]
        sums = reduce(choose, state["mu"]) + grad**2
        for axis, mu in enumerate(state["mu"]):
            others = [a for a in range(param.ndim) if a != axis]
            new = sums.amax(others, keepdim=True) if others else sums
            mu.copy_(mu + new if mistake == "SM3-I" else new)
        update = grad / sums.sqrt()
        if mistake != "zero over zero":
            update = update.nan_to_num(nan=0.0)
        momentum = group["momentum"]
        gain = 1.0 if mistake == "sum in place of the average" else 1 - momentum
        state["m"] = momentum * state.get("m", 0) + gain * update
        rate = 1.0 if mistake == "decay without the rate" else group["lr"]
        param.mul_(1 - rate * group["weight_decay"]).sub_(group["lr"] * state["m"])

    return update_


MUTANTS = {
    "LAMB": (
        lamb,
        ["ratio of the wrong vector", "decay after the ratio", "eps inside the root", "no case of a zero norm"],
    ),
    "NovoGrad": (novograd, ["mean in place of the sum", "starts at zero", "decay outside of the momentum"]),
    "SM3": (
        sm3,
        [
            "SM3-I",
            "greatest in place of the least",
            "zero over zero",
            "sum in place of the average",
            "decay without the rate",
        ],
    ),
}


@pytest.mark.parametrize(
    ("name", "mistake"), [(name, mistake) for name, (_, mistakes) in MUTANTS.items() for mistake in [None, *mistakes]]
)
def test_a_mistake_in_our_own_rules_shows(name, mistake, monkeypatch):
    module = import_module(getattr(factory, name).__module__)
    monkeypatch.setattr(getattr(module, f"{name}Optimizer"), "update_", MUTANTS[name][0](mistake))
    _, reference, options = CASES[name]
    own = getattr(factory, name)(lr=LR, weight_decay=DECAY, **options)
    found = differences(own.build, reference, options)
    assert all(value < 1e-8 for value in found.values()) is (mistake is None), found  # no number shows too


def muon_or_adamw(hidden):
    def reference(p, gradients, rates, decay, *, name, nesterov):
        if name not in hidden:
            return baselines.adamw(p, gradients, rates, decay, **TWO)
        flat = [g.flatten(1) for g in gradients]
        options = {"momentum": 0.7, "nesterov": nesterov, "orthogonalize": baselines.newton_schulz}
        return baselines.muon(p.flatten(1), flat, rates, decay, **options).view(p.shape)

    return reference


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    ("adamw_for", "hidden"),
    [
        ((), {"wide.weight", "tall.weight", "line.weight", "conv.weight"}),
        (("conv", "wide.weight"), {"tall.weight"}),
        (("re:.*(wide|line).*",), {"tall.weight", "conv.weight"}),
    ],
)
def test_muon_and_adamw(adamw_for, hidden, nesterov, monkeypatch):
    """With the iteration in float64: torch's is in bfloat16, and `test_newton_schulz` looks at it alone."""
    monkeypatch.setattr(torch_muon, "_zeropower_via_newtonschulz", lambda g, *_: baselines.newton_schulz(g))
    module = module_in_float64()
    module.conv.to(memory_format=torch.channels_last)
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    gradients = gradients_of(module)
    own = factory.Muon(lr=LR, weight_decay=DECAY, momentum=0.7, nesterov=nesterov, adamw_for=adamw_for, **TWO)
    after = trained(module, own.build(module), gradients)
    assert module.conv.weight.is_contiguous(memory_format=torch.channels_last)
    reference = muon_or_adamw(hidden)
    for name, parameter in after.items():
        decay = DECAY if decays(name) else 0.0
        expected = reference(start[name], gradients[name], [LR] * STEPS, decay, name=name, nesterov=nesterov)
        torch.testing.assert_close(parameter, expected, rtol=1e-12, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")


def test_experts_are_matrices_of_their_own():
    experts = nn.Parameter(torch.randn(3, 4, 5, dtype=torch.float64))
    single = [nn.Parameter(matrix.clone()) for matrix in experts.detach()]
    options = {"lr": LR, "rule": "muon", "weight_decay": DECAY, "momentum": 0.7, "nesterov": True, "ns_steps": 5}
    together = MuonWithAdamW([{"params": [experts], "stacked": True, **options}], lr=LR)
    apart = MuonWithAdamW([{"params": single, "stacked": False, **options}], lr=LR)
    for _ in range(3):
        experts.grad = torch.randn_like(experts)
        for parameter, grad in zip(single, experts.grad, strict=True):
            parameter.grad = grad.clone()
        together.step()
        apart.step()
    assert torch.equal(experts, torch.stack([p.detach() for p in single]))


def test_newton_schulz():
    """Near the exact iteration, as far as bfloat16 goes, and near an orthogonal matrix, as far as five steps go."""
    for shape in ((8, 8), (5, 16), (16, 5)):
        gradient = torch.randn(shape, dtype=torch.float64)
        coefficients = (torch_muon.DEFAULT_A, torch_muon.DEFAULT_B, torch_muon.DEFAULT_C)
        found = torch_muon._zeropower_via_newtonschulz(gradient, coefficients, 5, torch_muon.EPS).double()
        expected = baselines.newton_schulz(gradient)
        assert (found - expected).norm() < 0.05 * expected.norm()
        assert 0.3 < torch.linalg.svdvals(found).min() <= torch.linalg.svdvals(found).max() < 1.3


def grouped(module):
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return [
        {"params": [p for n, p in named.items() if decays(n)], "weight_decay": DECAY},
        {"params": [p for n, p in named.items() if not decays(n)], "weight_decay": 0.0},
    ]


ADAFACTOR = {"beta1": 0.8}
BIG_VISION = {"momentum": 0.8, "momentum_dtype": torch.float64, "clipping_threshold": 1.0, "min_dim_size_to_factor": 1}
COUPLED = {**TWO, "weight_decouple": False}
# What docs/optimizers.md says of classes in libraries: the class, its options, the rule, its options, and about how
# large the largest difference of a weight is, in parts of its largest movement; 0 for those that are right.
LIBRARIES = [
    ("pytorch_optimizer.Lion", {"betas": (0.8, 0.9)}, "Lion", {"betas": (0.8, 0.9)}, 0),
    (
        "pytorch_optimizer.CAME",
        {"betas": (0.8, 0.9, 0.95)},
        "CAME",
        {"betas": (0.8, 0.9, 0.95)},
        0,
    ),
    ("pytorch_optimizer.NovoGrad", TWO, "NovoGrad", TWO, 0),
    (
        "pytorch_optimizer.AdaFactor",
        {"betas": (0.8, 0.999), "relative_step": False, "scale_parameter": False},
        "Adafactor",
        ADAFACTOR,
        0.003,
    ),
    ("torch.optim.Adafactor", {}, "Adafactor", {"beta1": None, "scale_parameter": True}, 0.14),
    ("timm.optim.AdafactorBigVision", BIG_VISION, "Adafactor", ADAFACTOR, 0.65),
    ("pytorch_optimizer.Lamb", TWO, "LAMB", TWO, 1.2),
    ("pytorch_optimizer.Lamb", COUPLED, "LAMB", TWO, 0.75),
    ("pytorch_optimizer.Lamb", {**COUPLED, "adam_debias": True}, "LAMB", TWO, 0.02),
    ("timm.optim.Lamb", TWO, "LAMB", TWO, 0.2),
    ("timm.optim.Lamb", {**TWO, "max_grad_norm": None, "always_adapt": True}, "LAMB", TWO, 0),
    ("pytorch_optimizer.SM3", {"momentum": 0.8}, "SM3", {"momentum": 0.8}, 1.2),
]


@pytest.mark.parametrize(("path", "given", "rule", "options", "claimed"), LIBRARIES)
def test_what_is_said_of_libraries(path, given, rule, options, claimed):
    module, _, name = path.rpartition(".")
    pytest.importorskip(module.partition(".")[0])
    cls, reference = getattr(import_module(module), name), getattr(baselines, rule.lower())
    found = differences(lambda m: cls(grouped(m), lr=LR, **given), reference, options, of_movement=True)
    worst = max(value for name, value in found.items() if decays(name))
    if claimed:
        assert 0.5 * claimed < worst < 2 * claimed
    else:
        assert all(value < 1e-12 for value in found.values()), found


@pytest.mark.parametrize(
    ("name", "changed"), [("NovoGrad", True), ("Muon", True), ("CAME", False), ("AdaFactor", False)]
)
def test_what_is_said_of_gradients_in_pytorch_optimizer(name, changed):
    weight = nn.Parameter(torch.randn(3, 4))
    weight.grad = before = torch.randn(3, 4)
    before = before.clone()
    group = {"params": [weight], **({"use_muon": True} if name == "Muon" else {})}
    getattr(pytest.importorskip("pytorch_optimizer"), name)([group], lr=LR).step()
    assert torch.equal(weight.grad, before) is not changed
