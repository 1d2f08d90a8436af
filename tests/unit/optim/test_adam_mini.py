"""The class: what it takes, the groups it makes of it, and every argument that is refused."""

import copy
import warnings

import pytest
import torch
from torch import nn

import tiny_models
from lightning_adam_mini import AdamMini
from lightning_adam_mini.partition import STRATEGIES, Strategy
from tiny_models import SeparateAttention


def model():
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))


def parameter(*shape, dtype=None):
    return nn.Parameter(torch.zeros(shape or (2, 2), dtype=dtype))


def numels(optimizer):
    return [sorted(p.numel() for p in group["params"]) for group in optimizer.param_groups]


# What may be handed over, from a model.
FORMS = {
    "module": lambda m: m,
    "parameters": lambda m: m.parameters(),
    "list of parameters": lambda m: list(m.parameters()),
    "named parameters": lambda m: m.named_parameters(),
    "one group": lambda m: [{"params": list(m.parameters())}],
    "a generator in a group": lambda m: [{"params": m.parameters()}],
    "named parameters in a group": lambda m: [{"params": m.named_parameters()}],
    "a generator of groups": lambda m: ({"params": [p]} for p in m.parameters()),
    "single tensors in groups": lambda m: [{"params": p} for p in m.parameters()],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_parameters(form):
    """The same update whichever way the parameters come; each tensor is one block."""
    first, second = model(), model()
    second.load_state_dict(first.state_dict())
    options = {"partition": "default", "weight_decay": 0.0}
    optimizers = [AdamMini(first, **options), AdamMini(FORMS[form](second), **options)]
    tiny_models.set_gradients(first, second)
    for optimizer in optimizers:
        optimizer.step()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "module"])
def test_the_model_beside_parameters_or_groups_tells_the_roles(form):
    module = model()
    optimizer = AdamMini(FORMS[form](module), module=module, partition="transformer")
    roles = {name: cut.role.name for name, cut in optimizer.partition.items()}
    assert roles["0.weight"] == "token_embedding"
    assert optimizer.state[module[0].weight]["exp_avg_sq"].shape == (5, 1)


def test_part_of_the_model():
    module = model()
    optimizer = AdamMini(module[1].parameters(), module=module, partition="transformer")
    assert list(optimizer.partition) == ["1.weight", "1.bias"]


def test_names_of_the_partition():
    module = model()
    assert list(AdamMini(module).partition) == ["0.weight", "1.weight", "1.bias", "2.weight", "2.bias"]
    assert list(AdamMini(module.named_parameters(), partition="default").partition) == list(AdamMini(module).partition)
    unnamed = AdamMini(module.parameters(), partition="default")
    assert list(unnamed.partition) == [f"parameter {number}" for number in range(5)]


@pytest.mark.parametrize("form", ["parameters", "named parameters", "one group"])
def test_bare_parameters_are_refused(form):
    with pytest.raises(ValueError, match=r"module=model.*annotate\(model\).*partition='default'"):
        AdamMini(FORMS[form](model()))


def test_one_bare_matrix_has_no_model_to_ask():
    assert AdamMini([parameter(), parameter(3)]).partition["parameter 0"].structure == "whole"


@pytest.mark.parametrize(
    "build",
    [
        AdamMini,
        lambda m: AdamMini(m.parameters(), module=m),
        lambda m: AdamMini(m.parameters(), partition="default"),
        lambda m: AdamMini(m.parameters(), partition="element"),
    ],
)
def test_what_is_meant_is_not_warned_about(build):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(model())


def test_defaults_are_those_of_adamw():
    ours, torchs = AdamMini(model()).defaults, torch.optim.AdamW(model().parameters()).defaults
    assert {name: torchs[name] for name in ours} == ours


# Weight decay


def test_two_groups():
    optimizer = AdamMini(model(), weight_decay=0.3)
    assert numels(optimizer) == [[12, 20], [3, 3, 3]]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


def test_the_policy_that_spares_nothing():
    optimizer = AdamMini(model(), weight_decay=0.3, weight_decay_policy="all")
    assert numels(optimizer) == [[3, 3, 3, 12, 20]]
    assert optimizer.param_groups[0]["weight_decay"] == 0.3


def test_decay_follows_roles_and_not_names():
    """In "lnear" an `ln`, and in "norm_proj" a `norm`, that are none."""
    module = nn.ModuleDict({"lnear": nn.Linear(2, 3, bias=False), "norm_proj": nn.Linear(4, 5, bias=False)})
    assert numels(AdamMini(module, weight_decay=0.3)) == [[6, 20]]


def test_vectors_do_not_decay_whatever_they_do():
    """The biases of an LSTM have no `bias` for a name, and a scale of one's own has no role."""
    module = nn.LSTM(2, 3)
    module.scale = nn.Parameter(torch.ones(5))
    assert numels(AdamMini(module)) == [[24, 36], [5, 12, 12]]


def test_a_model_of_matrices_alone_has_one_group():
    assert numels(AdamMini(SeparateAttention())) == [[32, 32, 64, 64]]
    assert numels(AdamMini(nn.LayerNorm(3))) == [[3, 3]]


def test_groups_keep_their_own_options():
    module = model()
    optimizer = AdamMini(
        [
            {"params": module[0].parameters(), "lr": 0.5},
            {"params": module[1].parameters(), "weight_decay": 0.25, "betas": (0.5, 0.6), "maximize": True},
            {"params": module[2].parameters()},
        ],
        module=module,
        lr=0.1,
        weight_decay=0.01,
    )
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1, 0.1]
    # Groups are the user's: no policy changes them.
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.25, 0.01]
    assert [group["maximize"] for group in optimizer.param_groups] == [False, True, False]
    assert optimizer.param_groups[1]["betas"] == (0.5, 0.6)


def test_group_options_act():
    module = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    still = copy.deepcopy(module[1])
    optimizer = AdamMini(
        [{"params": module[0].parameters()}, {"params": module[1].parameters(), "lr": 0.0}], partition="default"
    )
    tiny_models.set_gradients(module)
    optimizer.step()
    assert torch.equal(module[1].weight, still.weight)
    assert not torch.equal(module[0].weight, still.weight)


# Frozen parameters


@pytest.mark.parametrize("form", ["module", "parameters", "named parameters", "one group"])
@pytest.mark.parametrize("implementation", [None, "reference", "foreach", "fused"])
def test_frozen_parameters_train_once_they_are_unfrozen(form, implementation):
    """As with AdamW, also where all are frozen at first, and no byte is kept for them until then."""
    ours, theirs = model(), model()
    theirs.load_state_dict(ours.state_dict())
    for module in (ours, theirs):
        module.requires_grad_(False)
    options = {"lr": 1e-2, "weight_decay": 0.0}
    optimizer = AdamMini(FORMS[form](ours), partition="element", implementation=implementation, **options)
    adamw = torch.optim.AdamW(theirs.parameters(), **options)
    assert not optimizer.state
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 5
    for part in (1, 0, 2):
        for module, which in ((ours, optimizer), (theirs, adamw)):
            module[part].requires_grad_(True)
            torch.manual_seed(part)
            tiny_models.set_gradients(module)
            for parameter in module.parameters():
                parameter.grad = parameter.grad if parameter.requires_grad else None
            which.step()
        assert len(optimizer.state) == sum(p.requires_grad for p in ours.parameters())
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_frozen_parameters_decay_by_their_role():
    module = model()
    module[1].requires_grad_(False)
    assert numels(AdamMini(module)) == [[12, 20], [3, 3, 3]]


def test_a_frozen_matrix_that_cannot_be_cut_is_trained_as_by_adamw():
    """A fused one of a class that no layout knows, as LoRA freezes it: a word where it comes to be trained."""
    module = nn.Module()
    module.embedding = nn.Embedding(5, 4)
    module.attention = nn.Module()
    module.attention.num_heads = 2
    module.attention.qkv = nn.Linear(4, 12, bias=False)
    module.attention.qkv.requires_grad_(False)
    optimizer = AdamMini(module)
    weight = module.attention.qkv.weight
    assert weight not in optimizer.state
    module.attention.qkv.requires_grad_(True)
    tiny_models.set_gradients(module)
    with pytest.warns(UserWarning, match="attention.qkv.weight was frozen .* as by AdamW now.*partition_overrides"):
        optimizer.step()
    assert optimizer.state[weight]["exp_avg_sq"].shape == weight.shape
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    with pytest.raises(ValueError, match="no layout knows how"):
        AdamMini(module)


def test_frozen_parameters_may_be_what_cannot_be_trained():
    """Codes of a quantised base model, and numbers of a dtype that stochastic rounding does not take."""
    module = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    module.codes = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    module.narrow = nn.Parameter(torch.zeros(4, dtype=torch.float16), requires_grad=False)
    module.complex = nn.Parameter(torch.zeros(4, dtype=torch.complex64), requires_grad=False)
    optimizer = AdamMini(module, stochastic_rounding=True)
    module.weight.grad = torch.ones_like(module.weight)
    optimizer.step()
    assert list(optimizer.state) == [module.weight]
    module.complex.requires_grad_(True).grad = torch.zeros_like(module.complex)
    before = module.weight.clone()
    with pytest.raises(ValueError, match="complex"):
        optimizer.step()
    assert torch.equal(module.weight, before)


def test_a_frozen_parameter_of_a_group_gets_its_state_when_it_trains():
    module = model()
    module[0].weight.requires_grad_(False)
    optimizer = AdamMini([{"params": module.parameters()}], module=module)
    assert not optimizer.state[module[0].weight]
    module[0].weight.requires_grad_(True)
    tiny_models.set_gradients(module)
    optimizer.step()
    assert optimizer.state[module[0].weight]["step"] == 1


def test_a_parameter_that_thaws_keeps_its_role():
    module = model()
    module[0].weight.requires_grad_(False)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = AdamMini(trained, module=module, partition="transformer")
    module[0].weight.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.add_param_group({"params": module[0].parameters(), "lr": 0.5})
    assert optimizer.partition["0.weight"].role.name == "token_embedding"
    assert optimizer.state[module[0].weight]["exp_avg_sq"].shape == (5, 1)
    tiny_models.set_gradients(module)
    optimizer.step()


@pytest.mark.parametrize(
    ("strategy", "num_values"), [("transformer", 6), ("element", 6), ("default", 1), (STRATEGIES["default"], 1)]
)
@pytest.mark.parametrize("group", [lambda p: {"params": [p]}, lambda p: {"params": p}, lambda p: {"params": iter([p])}])
def test_a_parameter_that_nobody_knows_is_cut_as_unknown_ones_are(strategy, num_values, group):
    optimizer = AdamMini(model(), partition=strategy)
    added = parameter(2, 3)
    with pytest.warns(UserWarning, match="does not know what parameter 5 do: their block structure is"):
        optimizer.add_param_group(group(added))
    assert optimizer.state[added]["exp_avg_sq"].numel() == num_values
    assert optimizer.partition["parameter 5"].role.name == "other"


def test_an_added_parameter_keeps_the_name_it_comes_with():
    optimizer = AdamMini(model())
    with pytest.warns(UserWarning, match="does not know what mine do"):
        optimizer.add_param_group({"params": [("mine", parameter())]})
    assert "mine" in optimizer.partition


def test_an_added_parameter_may_not_have_the_name_of_another():
    optimizer = AdamMini(model())
    with pytest.raises(ValueError, match=r"two parameters have the name '1\.bias'; give each a name of its own"):
        optimizer.add_param_group({"params": [("1.bias", parameter())]})
    assert len(optimizer.param_groups) == 2


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number of at least 0, not -1.0"),
        ({"lr": float("nan")}, "lr must be a finite number"),
        ({"lr": float("inf")}, "lr must be a finite number"),
        ({"lr": torch.tensor([1.0, 2.0])}, r"lr must be a number or a tensor of one element, not .* \(2,\)"),
        ({"eps": -1e-8}, "eps must be a finite number of at least 0, not -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number of at least 0, not -0.1"),
        ({"betas": (1.0, 0.9)}, r"betas must be two numbers in \[0, 1\), not \(1.0, 0.9\)"),
        ({"betas": (0.9, -0.1)}, r"betas must be two numbers in \[0, 1\)"),
        ({"betas": (0.9,)}, r"betas must be two numbers in \[0, 1\), not \(0.9,\)"),
        ({"betas": (0.9, 0.9, 0.9)}, r"betas must be two numbers in \[0, 1\)"),
        ({"weight_decay_policy": "none"}, "weight_decay_policy must be 'matrices' or 'all', not 'none'"),
        ({"implementation": "fast"}, "implementation must be 'reference', 'foreach', 'fused' or None, not 'fast'"),
        (
            {"implementation": "fused", "capturable": True},
            r"'fused' cannot run here: capturable is .* 'reference' runs",
        ),
        ({"implementation": "foreach", "capturable": True}, "capturable needs implementation='reference'"),
        ({"exp_avg_dtype": torch.int8}, "exp_avg_dtype must be a floating dtype, .* or None, not torch.int8"),
        ({"partition": "rows"}, "unknown partition 'rows'; choose from auto, transformer"),
        ({"partition_overrides": {"value": "row"}}, "'value' matches no parameter"),
        ({"module": nn.Linear(1, 1)}, "give the model once"),
    ],
)
def test_arguments_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdamMini(model(), **options)


@pytest.mark.parametrize("option", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": -1.0}, {"weight_decay": -1.0}])
def test_options_of_groups_are_checked_too(option):
    (name,) = option
    with pytest.raises(ValueError, match=name):
        AdamMini([{"params": [parameter()], **option}], partition="default")
    optimizer = AdamMini([parameter()], partition="default")
    with pytest.raises(ValueError, match=name), pytest.warns(UserWarning, match="does not know what"):
        optimizer.add_param_group({"params": [parameter()], **option})
    assert len(optimizer.param_groups) == 1


shared = parameter()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([], "empty parameter list"),
        (iter(()), "empty parameter list"),
        ([1.0], "takes a model, parameters, pairs .* not an entry of type float"),
        ("weights", "not an entry of type str"),
        ([{"lr": 1.0}], "not an entry of type dict"),
        ([(shared, "name")], "not an entry of type tuple"),
        ([shared, {"params": [parameter()]}], "parameters and groups; put the parameters in a group too"),
        ([{"params": [shared]}, {"params": [shared]}], "more than one parameter group"),
        ([("a", shared), ("a", parameter(3))], "two parameters have the name 'a'"),
        ([{"params": [("a", shared)]}, {"params": [("a", parameter(3))]}], "two parameters have the name 'a'"),
        ([shared * 2], "can't optimize a non-leaf Tensor"),
        ([parameter(dtype=torch.complex64)], "parameter 0: complex parameters are not supported; train torch.view_as"),
    ],
)
def test_parameters_that_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        AdamMini(params, partition="default")


def test_strategies_by_role_need_the_model():
    with pytest.raises(ValueError, match=r"needs the role of each parameter.*AdamMini\(groups, ..., module=model\)"):
        AdamMini(model().parameters(), partition="transformer")


@pytest.mark.parametrize(
    ("attribute", "message"),
    [("_fsdp_flattened", "its wrapper is gone"), ("_is_flat_param", "use_orig_params=True")],
)
def test_flattened_parameters_need_their_wrapper(attribute, message):
    module = model()
    setattr(module[0].weight, attribute, True)
    with pytest.raises(ValueError, match=message):
        AdamMini(module)
    with pytest.raises(ValueError, match=r"flattened this parameter.*pass the wrapped model"):
        AdamMini(module.named_parameters(), partition="default")
    optimizer = AdamMini(model())
    with pytest.raises(ValueError, match=r"flattened this parameter.*pass the wrapped model"):
        optimizer.add_param_group({"params": list(module.parameters())})


def test_flat_tensors_of_another_wrapper_are_told_at_the_step():
    """DeepSpeed hands the optimizer one flat tensor a group in the place of its parameters."""
    optimizer = AdamMini(model())
    flat = nn.Parameter(torch.zeros(10))
    flat.grad = torch.ones(10)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ValueError, match="DeepSpeed has flattened them, use ZeroAdamMini"):
        optimizer.step()


def test_a_strategy_of_ones_own():
    optimizer = AdamMini(model(), partition=Strategy("mine", {}, otherwise=STRATEGIES["element"].otherwise))
    assert {cut.blocks.num_values for cut in optimizer.partition.values()} == {20, 12, 3}
