"""The state: made at construction, saved, loaded, copied, moved, and refused where it does not fit."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import tiny_models
from lightning_adam_mini import AdamMini
from lightning_adam_mini.partition import STRATEGIES


def model(dtype=torch.float32):
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3)).to(dtype)


def steps(module, optimizer, count=1, *, start=0):
    """Steps with gradients that depend on the number of the step alone."""
    for step in range(start, start + count):
        torch.manual_seed(step)
        tiny_models.set_gradients(module)
        optimizer.step()


def trained(count=2, **options):
    module = model()
    optimizer = AdamMini(module, **options)
    steps(module, optimizer, count)
    return module, optimizer


def saved_and_read(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_state(first, second):
    assert len(first.param_groups) == len(second.param_groups)
    a, b = first.state_dict(), second.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for number, state in a["state"].items():
        assert state.keys() == b["state"][number].keys()
        for key, value in state.items():
            torch.testing.assert_close(value, b["state"][number][key], rtol=0, atol=0)


def assert_same_parameters(first, second):
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


# Made at construction

SHAPES = {
    "transformer": {"exp_avg_sq": (3, 1)},
    "default": {"exp_avg_sq": (1, 1)},
    "element": {"exp_avg_sq": (3, 4)},
    "factored": {"exp_avg_sq_row": (3, 1), "exp_avg_sq_col": (1, 4)},
}


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("partition", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_the_state_is_there_from_the_start(partition, dtype, wide, capturable):
    module = model(dtype)
    optimizer = AdamMini(module, partition=partition, capturable=capturable)
    assert len(optimizer.state) == 5
    state = optimizer.state[module[1].weight]
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "step": (),
        "exp_avg": (3, 4),
        **SHAPES[partition],
    }
    assert state["step"].dtype == torch.float32
    assert state["exp_avg"].dtype == dtype
    assert all(state[key].dtype == wide for key in SHAPES[partition])
    assert not any(value.any() for value in state.values())


@pytest.mark.parametrize("exp_avg_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("implementation", ["reference", "foreach"])
def test_the_dtype_of_the_first_moment(exp_avg_dtype, implementation):
    module = model()
    optimizer = AdamMini(module, exp_avg_dtype=exp_avg_dtype, implementation=implementation)
    steps(module, optimizer, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    steps(module, optimizer, 2)
    for state in optimizer.state.values():
        assert state["exp_avg"].dtype == exp_avg_dtype
        assert state["exp_avg_sq"].dtype == torch.float32
    assert all(parameter.isfinite().all() for parameter in module.parameters())


# Saved and loaded


@pytest.mark.parametrize("partition", [*STRATEGIES, "auto"])
@pytest.mark.parametrize("through_file", [False, True])
def test_a_training_that_resumes_is_the_same_training(partition, through_file):
    whole = model()
    first = copy.deepcopy(whole)
    optimizer = AdamMini(whole, partition=partition, weight_decay=0.1)
    steps(whole, optimizer, 5)

    interrupted = AdamMini(first, partition=partition, weight_decay=0.1)
    steps(first, interrupted, 2)
    state = interrupted.state_dict()
    state = saved_and_read(state) if through_file else copy.deepcopy(state)
    second = copy.deepcopy(first)
    resumed = AdamMini(second, partition=partition, lr=1.0)
    resumed.load_state_dict(state)
    steps(second, resumed, 3, start=2)
    assert_same_parameters(whole, second)
    assert_same_state(optimizer, resumed)


def test_a_state_dict_holds_nothing_but_tensors_and_options():
    _, optimizer = trained()
    state_dict = saved_and_read(optimizer.state_dict())
    assert state_dict.keys() == {"state", "param_groups"}
    options = {"params", "lr", "betas", "eps", "weight_decay", "maximize", "capturable", "partition"}
    assert all(group.keys() == options for group in state_dict["param_groups"])


def test_loading_keeps_the_wide_second_moment_of_narrow_weights():
    """Torch's own `load_state_dict` casts every tensor to the dtype of the parameter."""
    module = model(torch.bfloat16)
    optimizer = AdamMini(module)
    steps(module, optimizer, 3)
    other = AdamMini(copy.deepcopy(module))
    other.load_state_dict(optimizer.state_dict())
    assert_same_state(optimizer, other)
    moments = [state["exp_avg_sq"] for state in other.state.values()]
    assert all(moment.dtype == torch.float32 for moment in moments)
    assert any(not torch.equal(moment, moment.bfloat16().float()) for moment in moments)


def test_loaded_tensors_are_copies():
    module, optimizer = trained()
    state_dict = optimizer.state_dict()
    other = AdamMini(copy.deepcopy(module))
    other.load_state_dict(state_dict)
    before = copy.deepcopy(state_dict)
    steps(module, other)
    for number, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(value, state_dict["state"][number][key])


def test_loading_twice():
    _, optimizer = trained()
    state_dict = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state_dict)
    optimizer.load_state_dict(copy.deepcopy(state_dict))
    optimizer.load_state_dict(optimizer.state_dict())


def test_loading_beside_a_scheduler():
    """A scheduler adds a key to the groups that a state saved without one has not."""
    _, optimizer = trained()
    other = AdamMini(model())
    torch.optim.lr_scheduler.ConstantLR(other)
    other.load_state_dict(optimizer.state_dict())


def test_hooks_of_a_load_are_seen():
    _, optimizer = trained()
    saved = {"wrapped": optimizer.state_dict()}
    other = AdamMini(model())
    other.register_load_state_dict_pre_hook(lambda _, state_dict: state_dict["wrapped"])
    other.load_state_dict(saved)
    assert_same_state(optimizer, other)


def test_adamw_loads_into_element_blocks():
    """They are the same optimizer, and keep the same state."""
    first, second = model(), model()
    second.load_state_dict(first.state_dict())
    torchs = torch.optim.AdamW(first.parameters(), lr=1e-2)
    ours = AdamMini(second, partition="element", weight_decay_policy="all")
    steps(first, torchs, 2)
    second.load_state_dict(first.state_dict())
    ours.load_state_dict(torchs.state_dict())
    steps(first, torchs, 2)
    steps(second, ours, 2)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


# States that do not fit


def released(module):
    release = pytest.importorskip("adam_mini")
    return release.Adam_mini(list(module.named_parameters()), verbose=False)


def in_groups_of(module, optimizer_class, **options):
    """An optimizer with the two groups that AdamMini makes."""
    matrices = [p for p in module.parameters() if p.dim() >= 2]
    vectors = [p for p in module.parameters() if p.dim() < 2]
    return optimizer_class([{"params": matrices}, {"params": vectors}], **options)


def with_other_shapes():
    return nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 3), nn.LayerNorm(3))


ADAMW = torch.optim.AdamW
FOREIGN = {
    "AdamW": (
        lambda: (m := model(), in_groups_of(m, ADAMW)),
        r"exp_avg_sq of '0.weight' has shape \(5, 4\), but here it has \(1, 1\): it comes from AdamW, or",
    ),
    "AdamW, one group": (lambda: (m := model(), ADAMW(m.parameters())), r"groups of \[5\] parameters, .* has \[2, 3\]"),
    "SGD": (
        lambda: (m := model(), in_groups_of(m, torch.optim.SGD, lr=0.1)),
        "groups without betas, eps, capturable: it comes from another optimizer",
    ),
    "SGD with momentum": (
        lambda: (m := model(), in_groups_of(m, torch.optim.SGD, lr=0.1, momentum=0.9)),
        "groups without betas, eps, capturable: it comes from another optimizer",
    ),
    "Adagrad": (
        lambda: (m := model(), in_groups_of(m, torch.optim.Adagrad)),
        "groups without betas, capturable: it comes from another optimizer",
    ),
    "Adamax": (
        lambda: (m := model(), in_groups_of(m, torch.optim.Adamax)),
        "the saved state of '0.weight' has the keys step, exp_avg, exp_inf, but AdamMini .* keeps step, exp_avg, exp",
    ),
    "another partition": (
        lambda: (m := model(), AdamMini(m, partition="transformer")),
        "'0.weight' has the blocks 'mean a0 5/1' in the state and 'mean' here; .* or convert the state",
    ),
    "a factored partition": (
        lambda: (m := model(), AdamMini(m, partition="factored")),
        "another partition: '0.weight' has the blocks 'factored a0 5/5' in the state and 'mean' here",
    ),
    "another model": (
        lambda: (m := with_other_shapes(), AdamMini(m)),
        r"exp_avg of '0.weight' has shape \(6, 4\), but here it has \(5, 4\): it comes from another model",
    ),
    "a larger model": (
        lambda: (m := nn.Sequential(model(), nn.Linear(2, 2)), AdamMini(m)),
        r"groups of \[3, 4\] parameters, this optimizer has \[2, 3\]: it belongs to another model",
    ),
    "the authors' release": (lambda: (m := model(), released(m)), r"groups of \[1, 1, 1, 1, 1\] parameters"),
}


# Nothing tells these from a fresh state of ours before their first step.
LIKE_OURS_AT_FIRST = {"AdamW", "Adamax"}


@pytest.mark.parametrize(
    ("source", "num_steps"), [(s, n) for s in FOREIGN for n in (0, 1) if n or s not in LIKE_OURS_AT_FIRST]
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(source, num_steps):
    build, message = FOREIGN[source]
    module, foreign = build()
    steps(module, foreign, num_steps)
    ours, optimizer = trained(partition="default")
    before, parameters = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(ours)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(foreign.state_dict())
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for number, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(value, after["state"][number][key])
    assert_same_parameters(ours, parameters)
    steps(ours, optimizer)  # and it still trains


@pytest.mark.parametrize("num_steps", [0, 1])
def test_the_authors_state_for_as_many_parameters(num_steps):
    module = nn.Linear(4, 3)
    theirs = released(module)
    steps(module, theirs, num_steps)
    with pytest.raises(ValueError, match="groups without betas, maximize, capturable: it comes from another optimizer"):
        AdamMini(nn.Linear(4, 3)).load_state_dict(theirs.state_dict())


def test_a_refused_load_leaves_no_hook_behind():
    _, optimizer = trained(partition="default")
    with pytest.raises(ValueError, match="another partition"):
        optimizer.load_state_dict(trained(partition="transformer")[1].state_dict())
    assert not optimizer._optimizer_load_state_dict_pre_hooks


# States that are damaged


def with_state(key, change):
    """Change the key of the second parameter's state."""

    def damage(saved):
        saved["state"][1][key] = change(saved["state"][1][key])
        return saved

    return damage


def with_option(option, value):
    def damage(saved):
        saved["param_groups"][1][option] = value
        return saved

    return damage


def without(*path):
    def damage(saved):
        *way, last = path
        for key in way:
            saved = saved[key]
        del saved[last]

    return damage


def first_as(value):
    return lambda tensor: tensor.clone().index_fill_(0, torch.tensor(0), value) if tensor.dim() else tensor + value


def full(value):
    return lambda tensor: torch.full_like(tensor, value)


NAN, INFINITE, AGAIN = float("nan"), float("inf"), ".* Load another checkpoint, or start the optimizer afresh"
DAMAGES = {
    "no state": (without("state"), "an optimizer state has 'state', a dict, and 'param_groups', a list, not 'param_gr"),
    "no groups": (without("param_groups"), "and 'param_groups', a list, not 'state'"),
    "no state of one": (without("state", 1), "the optimizer state has none of '1.weight': it is not complete" + AGAIN),
    "no step": (without("state", 1, "step"), "saved state of '1.weight' has the keys exp_avg, exp_avg_sq, but"),
    "no first moment": (without("state", 1, "exp_avg"), "saved state of '1.weight' has the keys step, exp_avg_sq, but"),
    "no second moment": (
        without("state", 1, "exp_avg_sq"),
        "saved state of '1.weight' has the keys step, exp_avg, but",
    ),
    "no parameters": (without("param_groups", 0, "params"), "each of the groups .* has a list of 'params'"),
    "no options": (without("param_groups", 0, "lr"), "groups without lr"),
    "negative v": (with_state("exp_avg_sq", full(-1.0)), "saved exp_avg_sq of '1.weight' has negative numbers" + AGAIN),
    "v is NaN": (
        with_state("exp_avg_sq", first_as(NAN)),
        "saved exp_avg_sq of '1.weight' has numbers that are not fin",
    ),
    "v is inf": (
        with_state("exp_avg_sq", first_as(INFINITE)),
        "exp_avg_sq of '1.weight' has numbers that are not fini",
    ),
    "m is NaN": (with_state("exp_avg", first_as(NAN)), "saved exp_avg of '1.weight' has numbers that are not finite"),
    "m is -inf": (with_state("exp_avg", first_as(-INFINITE)), "exp_avg of '1.weight' has numbers that are not finite"),
    "m is integer": (
        with_state("exp_avg", lambda m: m.int()),
        "saved exp_avg of '1.weight' is torch.int32, not a float",
    ),
    "v is integer": (
        with_state("exp_avg_sq", lambda v: v.long()),
        "exp_avg_sq of '1.weight' is torch.int64, not a flo",
    ),
    "m is complex": (with_state("exp_avg", lambda m: m + 0j), "exp_avg of '1.weight' is torch.complex64, not a float"),
    "m is a list": (with_state("exp_avg", lambda m: m.tolist()), "saved exp_avg of '1.weight' is a list, not a dense"),
    "v is None": (
        with_state("exp_avg_sq", lambda v: None),
        "saved exp_avg_sq of '1.weight' is a NoneType, not a dense",
    ),
    "v of a shape": (with_state("exp_avg_sq", lambda v: v[:1]), r"saved exp_avg_sq of '1.weight' has shape \(1, 1\)"),
    "negative step": (with_state("step", full(-3.0)), "saved step of '1.weight' has negative numbers"),
    "half a step": (with_state("step", full(1.5)), "saved step of '1.weight' has 1.5, which is no number of steps"),
    "step is NaN": (with_state("step", full(NAN)), "saved step of '1.weight' has numbers that are not finite"),
    "step is a text": (with_state("step", lambda step: "2"), "saved step of '1.weight' is a str, not a dense"),
    "step is a pair": (with_state("step", lambda step: step.expand(2)), r"saved step of '1.weight' has shape \(2,\)"),
    "a state is a list": (
        lambda s: s["state"].update({1: [1.0]}),
        "the saved state of '1.weight' is a list, not a dict",
    ),
    "a state too many": (
        lambda s: s["state"].update({9: s["state"][1]}),
        "a state of 9, which is in none of its groups",
    ),
    "negative lr": (
        with_option("lr", -1.0),
        "group 1 of the optimizer state: lr must be a finite number of at least 0",
    ),
    "lr is None": (with_option("lr", None), "group 1 of the optimizer state: lr must be a finite number .*, not None"),
    "lr is a text": (with_option("lr", "1e-3"), "group 1 .*: lr must be a finite number of at least 0, not 1e-3"),
    "betas": (
        with_option("betas", (0.9, 1.5)),
        r"group 1 of the optimizer state: betas must be two numbers in \[0, 1\)",
    ),
    "betas is one": (with_option("betas", 0.9), r"group 1 .*: betas must be two numbers in \[0, 1\), not 0.9"),
    "eps": (
        with_option("eps", NAN),
        "group 1 of the optimizer state: eps must be a finite number of at least 0, not nan",
    ),
    "weight decay": (
        with_option("weight_decay", -0.1),
        "group 1 .*: weight_decay must be a finite number of at least 0",
    ),
    "maximize": (with_option("maximize", "no"), "group 1 .*: maximize must be True or False, not 'no'"),
    "uncounted": (
        with_option("steps_uncounted", "2"),
        "group 1 .*: steps_uncounted must be a number of steps, not '2'",
    ),
    "m is sparse": (with_state("exp_avg", lambda m: m.to_sparse()), "exp_avg of '1.weight' is torch.sparse_coo, not a"),
    "cuts": (
        with_option("partition", 3),
        "group 1 of the optimizer state has the blocks of 0 parameters, here it has 3",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused_and_changes_nothing(damage):
    module, optimizer = trained(partition="transformer")
    spoil, message = DAMAGES[damage]
    saved = copy.deepcopy(optimizer.state_dict())
    spoil(saved)
    steps(module, optimizer, start=1)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for number, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(value, after["state"][number][key])
    steps(module, optimizer)


@pytest.mark.parametrize("state", [[], None, "state", 3])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ValueError, match=r"an optimizer state is a dict, not a .*; give what the state_dict"):
        trained()[1].load_state_dict(state)
    with pytest.raises(ValueError, match="'param_groups', a list, not nothing"):
        trained()[1].load_state_dict({})


def test_what_other_savers_make_of_a_state_is_loaded():
    """Steps as integers, betas as lists, rates as tensors: all that torch's own optimizers take."""
    module, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = int(state["step"])
        state["exp_avg_sq"] = state["exp_avg_sq"].double()
    for group in saved["param_groups"]:
        group["betas"], group["lr"] = list(group["betas"]), torch.tensor(group["lr"])
    other = AdamMini(copy.deepcopy(module))
    other.load_state_dict(saved)
    steps(module, optimizer, start=2)
    (copied := other.param_groups[0]["params"][0]).grad = module[0].weight.grad
    other.step()
    torch.testing.assert_close(copied, module[0].weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("partition", ["transformer", "default"])
def test_a_state_with_frozen_parameters(partition):
    """Frozen when it was saved, and trained now; and the other way round."""
    module = model()
    module[1].requires_grad_(False)
    optimizer = AdamMini(module, partition=partition)
    for part in (module[0], module[2]):
        tiny_models.set_gradients(part)
    optimizer.step()
    saved = saved_and_read(optimizer.state_dict())
    assert len(saved["state"]) == 3

    thawed = copy.deepcopy(module).requires_grad_(True)
    resumed = AdamMini(thawed, partition=partition)
    resumed.load_state_dict(saved)
    assert sorted(int(state["step"]) for state in resumed.state.values()) == [0, 0, 1, 1, 1]
    other = copy.deepcopy(module)
    frozen = AdamMini(other, partition=partition)
    frozen.load_state_dict(saved)
    other[1].requires_grad_(True)
    for copied, its in ((other, frozen), (thawed, resumed)):
        torch.manual_seed(1)
        tiny_models.set_gradients(copied)
        its.step()
    for a, b in zip(other.parameters(), thawed.parameters(), strict=True):
        assert torch.equal(a, b)

    other[0].requires_grad_(False)
    saved = saved_and_read(frozen.state_dict())  # what was trained before it was frozen keeps its state
    assert len(saved["state"]) == 5
    module.requires_grad_(False)
    last = AdamMini(module, partition=partition)
    last.load_state_dict(saved)
    assert all(state["step"] > 0 for state in last.state.values())


def test_a_frozen_parameter_may_be_cut_otherwise_when_it_comes_to_train():
    module = model()
    module[1].requires_grad_(False)
    saved = AdamMini(module, partition="transformer").state_dict()
    overrides = {"1.weight": "element"}
    optimizer = AdamMini(module, partition="transformer", partition_overrides=overrides)
    optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"another partition: '0\.weight'"):
        AdamMini(module, partition="transformer", partition_overrides={"0.weight": "element"}).load_state_dict(saved)


# Copied and moved


def test_a_deep_copy_trains_on_its_own():
    module, optimizer = trained()
    other, copied = copy.deepcopy((module, optimizer))
    assert_same_state(optimizer, copied)
    assert copied.partition == optimizer.partition
    steps(other, copied, start=1)
    assert not torch.equal(other[0].weight, module[0].weight)
    assert optimizer.state[module[0].weight]["step"] == 2
    steps(module, optimizer, start=1)
    assert_same_parameters(module, other)


@pytest.mark.parametrize("partition", ["auto", "transformer", STRATEGIES["element"]])
def test_a_pickled_optimizer_trains_on(partition):
    module, optimizer = trained(partition=partition, implementation="reference", exp_avg_dtype=torch.float64)
    other, read = pickle.loads(pickle.dumps((module, optimizer)))
    assert_same_state(optimizer, read)
    assert (read.implementation, read.exp_avg_dtype) == ("reference", torch.float64)
    steps(module, optimizer, start=1)
    steps(other, read, start=1)
    assert_same_parameters(module, other)
    with pytest.warns(UserWarning, match="does not know what"):
        read.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


@pytest.mark.parametrize("num_steps", [0, 2])
@pytest.mark.parametrize("implementation", ["reference", "foreach"])
@pytest.mark.parametrize(
    ("before", "after"), [("float", "double"), ("double", "float"), ("float", "bfloat16"), ("bfloat16", "float")]
)
def test_a_model_that_changes_its_dtype(before, after, implementation, num_steps):
    module = getattr(model(), before)()
    optimizer = AdamMini(module, implementation=implementation)
    steps(module, optimizer, num_steps)
    getattr(module, after)()
    steps(module, optimizer)
    dtype = module[0].weight.dtype
    for state in optimizer.state.values():
        assert state["exp_avg"].dtype == dtype
        assert state["exp_avg_sq"].dtype == torch.promote_types(dtype, torch.float32)
        assert state["step"] == num_steps + 1
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("implementation", ["reference", "foreach"])
def test_the_chosen_dtype_of_the_first_moment_outlasts_a_change(implementation):
    module = model()
    optimizer = AdamMini(module, exp_avg_dtype=torch.float32, implementation=implementation)
    steps(module, optimizer)
    module.double()
    steps(module, optimizer)
    for state in optimizer.state.values():
        assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (torch.float32, torch.float64)


def test_a_model_that_changes_its_dtype_before_the_first_step():
    """As with AdamW, whose state is made at the first step."""
    first, second = model(), model()
    second.load_state_dict(first.state_dict())
    optimizer = AdamMini(first)
    first.double()
    second.double()
    steps(first, optimizer, 3)
    steps(second, AdamMini(second), 3)
    assert_same_parameters(first, second)


@pytest.fixture
def swapped_parameters():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swapped_parameters")
def test_a_model_that_is_materialised_after_construction():
    with torch.device("meta"):
        module = model()
    optimizer = AdamMini(module)
    assert all(state["exp_avg"].is_meta for state in optimizer.state.values())
    module.to_empty(device="cpu")
    other = model()
    module.load_state_dict(other.state_dict())
    steps(module, optimizer, 2)
    steps(other, AdamMini(other), 2)
    assert_same_parameters(module, other)


def test_a_model_without_memory_has_a_state_without_memory():
    with torch.device("meta"):
        module = tiny_models.encoder_layer()
    optimizer = AdamMini(module)
    assert all(state["exp_avg"].is_meta and state["exp_avg_sq"].is_meta for state in optimizer.state.values())


def test_a_state_without_the_cuts_of_its_parameters_is_loaded():
    """As states were saved before they named them."""
    _, optimizer = trained()
    saved = optimizer.state_dict()
    cuts = [group.pop("partition") for group in saved["param_groups"]]
    _, other = trained()
    other.load_state_dict(saved)
    assert [group["partition"] for group in other.param_groups] == cuts


def test_a_state_of_as_many_numbers_in_another_order_is_refused():
    _, optimizer = trained()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["partition"] = "mean a1 4/1; " + saved["param_groups"][0]["partition"].partition("; ")[2]
    with pytest.raises(
        ValueError, match=r"another partition: '0\.weight' has the blocks 'mean a1 4/1' in the state and"
    ):
        optimizer.load_state_dict(saved)


@pytest.fixture
def _other_defaults():
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.usefixtures("_other_defaults")
@pytest.mark.parametrize("step", [-1, 2.5, float("nan")])
def test_a_number_of_steps_is_looked_at_whatever_the_default_device(step):
    with torch.device("cpu"):
        _, optimizer = trained()
    saved = optimizer.state_dict()
    saved["state"][0] = {**saved["state"][0], "step": step}
    with pytest.raises(ValueError, match="the saved step"):
        optimizer.load_state_dict(saved)
    saved["state"][0]["step"] = 7
    optimizer.load_state_dict(saved)
    assert next(iter(optimizer.state.values()))["step"].item() == 7
