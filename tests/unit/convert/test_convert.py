"""Optimizer states of others as states of AdamMini, and back."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, NAdam, RAdam

import tiny_models
from lightning_adam_mini import AdamMini, partition_module
from lightning_adam_mini.blocks import Blocks, Kind, Segment
from lightning_adam_mini.convert import from_adam_mini_package, from_adamw, repartition, to_adamw
from lightning_adam_mini.convert.second_moments import block_means, blocks_of_signature
from lightning_adam_mini.optim.state import check_partition

OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8}
PARTITIONS = ["transformer", "transformer_early", "factored", "slimadam", "default", "element"]


def model(seed=0):
    """A fused matrix, two equal layers, norms, and a table that is also the head."""
    torch.manual_seed(seed)
    return tiny_models.randomize(tiny_models.gpt2(n_layer=2))


def train(module, optimizer, steps=3, seed=0):
    for step in range(steps):
        torch.manual_seed(1000 * seed + step)
        tiny_models.set_gradients(module)
        optimizer.step()


def decays(parameter):
    return parameter.dim() >= 2


def groups(module, *, decay_first=True, named=False):
    chosen = [[item for item in module.named_parameters() if decays(item[1]) is wanted] for wanted in (True, False)]
    entries = [{"params": items, "weight_decay": rate} for items, rate in zip(chosen, (0.1, 0.0), strict=True)]
    if not named:
        entries = [{**entry, "params": [p for _, p in entry["params"]]} for entry in entries]
    return entries if decay_first else entries[::-1]


def by_names(state_dict, module, optimizer):
    """As torch.distributed.checkpoint keys a state."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    flat = [names[p] for group in optimizer.param_groups for p in group["params"]]
    return {
        "state": {flat[number]: state for number, state in state_dict["state"].items()},
        "param_groups": [{**g, "params": [flat[n] for n in g["params"]]} for g in state_dict["param_groups"]],
    }


ADAMWS = {
    "one group": lambda m: AdamW(m.parameters(), **OPTIONS),
    "foreach": lambda m: AdamW(m.parameters(), foreach=True, **OPTIONS),
    "fused": lambda m: AdamW(m.parameters(), fused=True, **OPTIONS),
    "Adam": lambda m: Adam(m.parameters(), **OPTIONS),
    "decay first": lambda m: AdamW(groups(m), **OPTIONS),
    "decay last": lambda m: AdamW(groups(m, decay_first=False), **OPTIONS),
    "a group a parameter": lambda m: AdamW([{"params": [p]} for p in m.parameters()], **OPTIONS),
    "names in another order": lambda m: AdamW(list(m.named_parameters())[::-1], **OPTIONS),
    "names in groups": lambda m: AdamW(groups(m, decay_first=False, named=True), **OPTIONS),
}


def assert_equal_states(one, other, **tolerance):
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], **{"rtol": 0, "atol": 0, **tolerance})


def mean_by_numbers(blocks, values):
    """The definition: the mean over the elements with the number of each block."""
    index = blocks.block_index().flatten()
    return torch.stack([values.flatten()[index == number].double().mean() for number in range(int(index.max()) + 1)])


@pytest.mark.parametrize(
    ("build", "partition"),
    [*((form, "transformer") for form in ADAMWS), *(("one group", name) for name in PARTITIONS[1:])],
)
def test_the_second_moment_of_adamw_becomes_its_block_means(build, partition):
    module = model()
    adamw = ADAMWS[build](module)
    train(module, adamw)
    before = copy.deepcopy(adamw.state_dict())
    optimizer = AdamMini(module, partition=partition, **OPTIONS)
    optimizer.load_state_dict(from_adamw(adamw.state_dict(), optimizer))
    for (name, cut), parameter in zip(
        optimizer.partition.items(), (p for g in optimizer.param_groups for p in g["params"]), strict=True
    ):
        old, new = adamw.state[parameter], optimizer.state[parameter]
        assert torch.equal(new["exp_avg"], old["exp_avg"]), name
        assert new["step"] == old["step"] == 3
        if cut.blocks.kind is Kind.FACTORED:
            assert new["exp_avg_sq_row"].shape == cut.blocks.state_shapes["exp_avg_sq_row"]
            rows = old["exp_avg_sq"].double().mean(1 - cut.blocks.axis, keepdim=True)
            assert torch.equal(new["exp_avg_sq_row"], rows.float()), name
        elif cut.blocks.kind is Kind.ELEMENT:
            assert torch.equal(new["exp_avg_sq"], old["exp_avg_sq"]), name
        else:
            means = mean_by_numbers(cut.blocks, old["exp_avg_sq"])
            torch.testing.assert_close(new["exp_avg_sq"].flatten(), means.float(), rtol=0, atol=0)
    assert str(before) == str(adamw.state_dict()), "the input is untouched"


def test_columns_of_each_segment_have_means_of_their_own():
    """Two repeats of a segment of two rows and one of a single row."""
    blocks = Blocks.factored((6, 4), segment_lengths=(2, 1), repeats=2)
    values = torch.rand(6, 4)
    means = block_means(blocks, values, dtype=torch.float32)
    expected = torch.stack([values[[0, 1, 3, 4]].double().mean(0), values[[2, 5]].double().mean(0)])
    assert torch.equal(means["exp_avg_sq_col"], expected.float())
    assert torch.equal(means["exp_avg_sq_row"], values.double().mean(1, keepdim=True).float())


@pytest.mark.parametrize("partition", ["transformer", "factored"])
def test_training_goes_on_as_from_a_state_set_by_hand(partition):
    module = model()
    adamw = AdamW(groups(module, decay_first=False), **OPTIONS)
    train(module, adamw, 10)
    twin = copy.deepcopy(module)
    first = AdamMini(module, partition=partition, weight_decay=0.1, **OPTIONS)
    first.load_state_dict(from_adamw(adamw.state_dict(), first))
    second = AdamMini(twin, partition=partition, weight_decay=0.1, **OPTIONS)
    cuts = partition_module(twin, partition)
    for (name, ours), theirs in zip(twin.named_parameters(), module.parameters(), strict=True):
        state, source = second.state[ours], adamw.state[theirs]
        state["step"].fill_(10)
        state["exp_avg"].copy_(source["exp_avg"])
        for key, means in block_means(cuts[name].blocks, source["exp_avg_sq"], dtype=torch.float32).items():
            state[key].copy_(means)
    train(module, first, 10, seed=1)
    train(twin, second, 10, seed=1)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, twin.get_parameter(name)), name


@pytest.mark.parametrize("partition", PARTITIONS)
def test_to_adamw_and_back(partition):
    module = model()
    optimizer = AdamMini(module, partition=partition, **OPTIONS)
    train(module, optimizer)
    saved = optimizer.state_dict()
    adamw = AdamW(list(module.named_parameters()), **OPTIONS)
    for expanded, target in (
        (to_adamw(saved, optimizer), AdamW(groups(module), **OPTIONS)),
        (to_adamw(saved, adamw), adamw),
    ):
        target.load_state_dict(copy.deepcopy(expanded))
        back = from_adamw(target.state_dict(), optimizer)
        for number, state in saved["state"].items():
            assert_equal_states(back["state"][number], state, rtol=2e-7)
        train(module, target, 1)


def test_adamw_starts_with_the_step_of_adam_mini():
    """Right after the conversion both take the same step but for the new gradient: at beta2 = 1 - 1e-12, the same."""
    module = model()
    slow = {**OPTIONS, "betas": (0.9, 1 - 1e-12)}
    optimizer = AdamMini(module, partition="factored", weight_decay=0.1, **OPTIONS)
    train(module, optimizer)
    twin = copy.deepcopy(module)
    adamw = AdamW(groups(twin), **slow)
    adamw.load_state_dict(to_adamw(optimizer.state_dict(), adamw))
    for group in (*adamw.param_groups, *optimizer.param_groups):
        group["betas"] = slow["betas"]
    torch.manual_seed(5)
    tiny_models.set_gradients(module, twin)
    optimizer.step()
    adamw.step()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter, twin.get_parameter(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("old", PARTITIONS)
@pytest.mark.parametrize("new", PARTITIONS)
def test_repartition(old, new):
    module = model()
    source, target = (AdamMini(module, partition=name, **OPTIONS) for name in (old, new))
    train(module, source)
    state = repartition(source.state_dict(), target)
    target.load_state_dict(state)
    if old == new:
        for number, saved in source.state_dict()["state"].items():
            assert_equal_states(state["state"][number], saved)
    through = AdamW(list(module.named_parameters()), **OPTIONS)
    through.load_state_dict(to_adamw(source.state_dict(), through))
    for number, expected in from_adamw(through.state_dict(), target)["state"].items():
        assert_equal_states(state["state"][number], expected, rtol=2e-7)


def test_states_keyed_by_names_and_of_a_larger_module():
    """As torch.distributed keys them, and as a task names what it wraps, or torch.compile and DDP."""
    module = model()
    adamw = AdamW(groups(module, decay_first=False), **OPTIONS)
    train(module, adamw)
    optimizer = AdamMini(module, **OPTIONS)
    expected = from_adamw(adamw.state_dict(), optimizer)["state"]
    keyed = by_names(adamw.state_dict(), module, adamw)
    task = nn.ModuleDict({"model": module})
    wrapped = {
        "state": {f"module._orig_mod.{name}": state for name, state in keyed["state"].items()},
        "param_groups": [
            {**g, "params": [f"module._orig_mod.{name}" for name in g["params"]]} for g in keyed["param_groups"]
        ],
    }
    for state_dict, target in ((keyed, optimizer), (keyed, AdamMini(task, **OPTIONS)), (wrapped, optimizer)):
        found = from_adamw(state_dict, target)["state"]
        for number, state in expected.items():
            assert_equal_states(found[number], state)
    of_the_task = by_names(adamw.state_dict(), task, adamw)
    found = from_adamw(of_the_task, optimizer)["state"]
    for number, state in expected.items():
        assert_equal_states(found[number], state)


def test_order_that_shapes_do_not_tell():
    """Two square matrices in two groups, of which either may be the first."""
    module = tiny_models.randomize(nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)))
    last_first = [{"params": [module[1].weight], "weight_decay": 0.0}, {"params": [module[0].weight]}]
    adamw = AdamW([*last_first, {"params": [nn.Parameter(torch.ones(2))]}], **OPTIONS)
    module.extra = adamw.param_groups[2]["params"][0]
    module.register_parameter("extra", module.extra)
    train(module, adamw, 3)
    optimizer = AdamMini(module, partition="default", **OPTIONS)
    with pytest.raises(ValueError, match=r"are ambiguous; pass names="):
        from_adamw(adamw.state_dict(), optimizer)
    names = ["1.weight", "0.weight", "extra"]
    optimizer.load_state_dict(from_adamw(adamw.state_dict(), optimizer, names=names))
    for parameter in module.parameters():
        assert torch.equal(optimizer.state[parameter]["exp_avg"], adamw.state[parameter]["exp_avg"])


def test_hyperparameters_stay_unless_asked():
    module = model()
    theirs = {"lr": 0.5, "betas": (0.7, 0.8), "eps": 1e-3}
    adamw = AdamW(groups(module), **theirs)
    train(module, adamw, 1)
    optimizer = AdamMini(module, weight_decay=0.3, **OPTIONS)
    for keep, options, rates in ((False, OPTIONS, [0.3, 0.0]), (True, theirs, [0.1, 0.0])):
        found = from_adamw(adamw.state_dict(), optimizer, keep_hyperparameters=keep)["param_groups"]
        assert [group["weight_decay"] for group in found] == rates
        assert all({key: group[key] for key in options} == options for group in found)
        assert all(group["partition"] for group in found)
    everything = AdamMini(module, weight_decay_policy="all", **OPTIONS)
    with pytest.raises(ValueError, match=r"one group \(transformer.wte.weight, ...\) had weight_decay = 0.1 and 0.0"):
        from_adamw(adamw.state_dict(), everything, keep_hyperparameters=True)
    adam = Adam(module.parameters(), weight_decay=0.1)
    with pytest.raises(ValueError, match="an L2 term"):
        from_adamw(adam.state_dict(), optimizer, keep_hyperparameters=True)


def test_parameters_without_a_gradient_and_frozen_ones():
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    module[0].requires_grad_(False)
    adamw = AdamW(module.parameters(), **OPTIONS)
    module[2].weight.grad = torch.rand(2, 2)
    adamw.step()
    optimizer = AdamMini(module, partition="default", **OPTIONS)
    optimizer.load_state_dict(from_adamw(adamw.state_dict(), optimizer))
    assert torch.equal(optimizer.state[module[2].weight]["exp_avg"], adamw.state[module[2].weight]["exp_avg"])
    assert optimizer.state[module[1].weight]["step"] == 0
    assert module[0].weight not in optimizer.state


@pytest.mark.parametrize("exp_avg_dtype", [None, torch.uint8])
def test_defaults_of_torch_change_no_bit(exp_avg_dtype):
    module = nn.Sequential(nn.Linear(64, 70), nn.Linear(70, 2))
    adamw = AdamW(module.parameters(), **OPTIONS)
    module[0].weight.grad = torch.rand(70, 64)
    adamw.step()
    adamw.state[module[0].weight]["step"] = 1  # as older releases of torch have saved it
    optimizer = AdamMini(module, partition="default", exp_avg_dtype=exp_avg_dtype, **OPTIONS)
    expected = from_adamw(adamw.state_dict(), optimizer)
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        found = from_adamw(adamw.state_dict(), optimizer)
        back = to_adamw(found, optimizer)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for number, state in expected["state"].items():
        for key, tensor in state.items():
            assert found["state"][number][key].dtype is tensor.dtype
            assert torch.equal(found["state"][number][key], tensor)
    assert str(back) == str(to_adamw(expected, optimizer))


def test_bfloat16_and_meta():
    """A model without memory is enough to convert for; the second moment of half precision becomes float32."""
    module = model().to(torch.bfloat16)
    adamw = AdamW(module.parameters(), **OPTIONS)
    train(module, adamw, 2)
    with torch.device("meta"):
        outline = tiny_models.gpt2(n_layer=2).to(torch.bfloat16)
    optimizer = AdamMini(outline, **OPTIONS)
    state = from_adamw(adamw.state_dict(), optimizer)["state"]
    assert {value["exp_avg_sq"].dtype for value in state.values()} == {torch.float32}
    assert {value["exp_avg"].dtype for value in state.values()} == {torch.bfloat16}
    assert not any(value["exp_avg_sq"].is_meta for value in state.values())


def test_the_package_and_this_library_take_the_same_next_step():
    """Lockstep in float64, on a model that the package cuts as the paper says."""
    release = pytest.importorskip("adam_mini")
    theirs = tiny_models.llama(num_hidden_layers=2, attention_bias=True).double()
    options = {**OPTIONS, "weight_decay": 0.1}
    named = list(theirs.named_parameters())
    sizes = {"dim": tiny_models.DIM, "n_heads": tiny_models.HEADS, "n_kv_heads": tiny_models.KV_HEADS}
    package = release.Adam_mini(named, verbose=False, **sizes, **options)
    train(theirs, package, 5)
    file = io.BytesIO()
    torch.save(package.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    ours = copy.deepcopy(theirs)
    optimizer = AdamMini(ours, **OPTIONS)
    optimizer.load_state_dict(from_adam_mini_package(saved, optimizer, keep_hyperparameters=True))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    torch.manual_seed(7)
    tiny_models.set_gradients(theirs, ours)
    before = copy.deepcopy(ours)
    package.step()
    optimizer.step()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=0, atol=1e-12)
        assert not torch.allclose(parameter, before.get_parameter(name), atol=1e-6)


def test_blocks_of_the_package_that_are_not_ours_are_averaged():
    """It takes the inputs of a Conv1D for its rows, and `c_attn` for one block."""
    release = pytest.importorskip("adam_mini")
    module = model()
    package = release.Adam_mini(list(module.named_parameters()), verbose=False, dim=tiny_models.DIM, n_heads=4)
    train(module, package, 3)
    optimizer = AdamMini(module, **OPTIONS)
    optimizer.load_state_dict(from_adam_mini_package(package.state_dict(), optimizer))
    layer = module.transformer.h[0]
    found = optimizer.state[layer.mlp.c_fc.weight]["exp_avg_sq"]
    expected = package.state[layer.mlp.c_fc.weight]["vmean"].double().mean().float()
    torch.testing.assert_close(found, expected.expand(found.shape), rtol=0, atol=0)
    found = optimizer.state[layer.attn.c_attn.weight]["exp_avg_sq"]
    assert torch.equal(found, package.state[layer.attn.c_attn.weight]["vmean"].expand(found.shape))


def expanded(optimizer):
    """As FSDP1 saves an AdamMini: second moments in the shapes of parameters."""
    state = copy.deepcopy(optimizer.state_dict())
    for number, (_, cut) in enumerate(optimizer.partition.items()):
        values = state["state"][number]
        moments = [values.pop(key) for key in cut.blocks.state_shapes]
        values["exp_avg_sq"] = cut.blocks.second_moment(*moments).expand(cut.blocks.shape).clone()
    return state


def test_an_expanded_second_moment_and_a_state_without_signatures():
    module = model()
    optimizer = AdamMini(module, partition="factored", **OPTIONS)
    train(module, optimizer)
    saved = optimizer.state_dict()
    for number, state in repartition(expanded(optimizer), optimizer)["state"].items():
        assert_equal_states(state, saved["state"][number], rtol=1e-6)
    older = {**saved, "param_groups": [{k: v for k, v in g.items() if k != "partition"} for g in saved["param_groups"]]}
    with pytest.raises(ValueError, match=r"wte.weight' does not name its blocks"):
        repartition(older, optimizer)
    by_row = AdamMini(nn.Linear(3, 2), partition="default", partition_overrides={"linear": "row"}, **OPTIONS)
    older = by_row.state_dict()
    for group in older["param_groups"]:
        del group["partition"]
    for number, state in repartition(older, by_row)["state"].items():
        assert_equal_states(state, by_row.state_dict()["state"][number])


def test_what_belongs_to_another_model():
    module = model()
    optimizer = AdamMini(module, **OPTIONS)
    wider = tiny_models.randomize(tiny_models.gpt2(n_layer=2, n_inner=16))
    deeper = tiny_models.randomize(tiny_models.gpt2(n_layer=3))
    for other, build, message in (
        (wider, ADAMWS["one group"], r"of shape \(8, 16\), where this model has '.*c_fc.weight' of shape \(8, 12\)"),
        (
            wider,
            ADAMWS["names in groups"],
            r"c_fc.bias' of shape \(16,\), where this model has .*c_fc.bias' of shape \(12,\)",
        ),
        (wider, ADAMWS["decay last"], r"of shape \(16,\), where this model has '.*c_fc.bias' of shape \(12,\)"),
        (deeper, ADAMWS["one group"], r"has 40 parameters without names, this model trains 28"),
        (deeper, ADAMWS["names in groups"], r"transformer.h.2.*of shape.*which this model lacks"),
    ):
        adamw = build(other)
        train(other, adamw, 1)
        with pytest.raises(ValueError, match=message):
            from_adamw(adamw.state_dict(), optimizer)
    adamw = ADAMWS["names in groups"](module)
    train(module, adamw, 1)
    with pytest.raises(ValueError, match=r"has no parameter 'transformer.h.2.*of shape"):
        from_adamw(adamw.state_dict(), AdamMini(deeper, **OPTIONS))


def test_what_is_no_state_that_can_be_converted():
    module = model()
    optimizer = AdamMini(module, **OPTIONS)
    for other in (RAdam(module.parameters()), NAdam(module.parameters()), SGD(module.parameters(), momentum=0.9)):
        train(module, other, 1)
        with pytest.raises(ValueError, match="can be converted; start a new optimizer"):
            from_adamw(other.state_dict(), optimizer)
    amsgrad = AdamW(module.parameters(), amsgrad=True)
    train(module, amsgrad, 1)
    with pytest.raises(ValueError, match="AMSGrad"):
        from_adamw(amsgrad.state_dict(), optimizer)
    with pytest.raises(ValueError, match="no optimizer state"):
        from_adamw({"weight": torch.ones(2)}, optimizer)
    with pytest.raises(
        ValueError, match="from_adamw takes a state of AdamW, but this is one of AdamMini; use repartition"
    ):
        from_adamw(optimizer.state_dict(), optimizer)
    with pytest.raises(ValueError, match="this is one of AdamW; use from_adamw"):
        repartition(AdamW(module.parameters()).state_dict(), optimizer)
    with pytest.raises(ValueError, match="names has 1 names, but the optimizer state 28 parameters"):
        from_adamw(ADAMWS["one group"](module).state_dict(), optimizer, names=["a"])


@pytest.mark.parametrize(
    "blocks",
    [
        Blocks.element((3, 4)),
        Blocks.whole((3, 4)),
        Blocks.whole((2, 3, 4), batch_axes=(0,)),
        Blocks.rows((6, 4), block_size=2),
        Blocks.rows((4, 6), axis=1, block_size=3),
        Blocks.segmented((24, 2), (Segment(4, 2), Segment(2, 2), Segment(2, 1)), repeats=3),
        Blocks.segmented((2, 24, 2), (Segment(4, 12), Segment(4, 1)), axis=1, repeats=3, batch_axes=(0,)),
        Blocks.factored((24, 5), segment_lengths=(4, 2, 2), repeats=3),
    ],
    ids=lambda blocks: blocks.signature,
)
def test_signatures_are_read_again(blocks):
    assert blocks_of_signature(blocks.signature, blocks.shape) == blocks


# The fingerprint


def fingerprint(**options):
    module = model()
    optimizer = AdamMini(module, **options)
    return optimizer.state_dict()["param_groups"], optimizer.param_groups, list(optimizer.partition)


def test_the_same_partition_and_older_states_are_accepted():
    saved, own, names = fingerprint()
    check_partition(saved, own, names)
    for group in saved:
        del group["partition"]
    check_partition(saved, own, names)


def test_another_partition_is_told():
    saved, _, names = fingerprint(partition="transformer")
    _, own, _ = fingerprint(partition="factored")
    cuts = [partition_module(model(), name) for name in ("transformer", "factored")]
    num_changes = sum(cuts[0][name].blocks != cuts[1][name].blocks for name in names)
    with pytest.raises(ValueError, match="adam-mini convert") as told:
        check_partition(saved, own, names)
    assert "'transformer.wte.weight' has the blocks 'mean a0 11/1' in the state and 'factored a0 11/11' here" in str(
        told.value
    )
    assert f", and {num_changes - 3} more. Continue" in str(told.value)
    _, own, _ = fingerprint(partition_overrides={"transformer.wpe.weight": "whole"})
    with pytest.raises(
        ValueError,
        match=r"partition: 'transformer.wpe.weight' has the blocks 'mean a0 5/1' in the state and 'mean' here\.",
    ):
        check_partition(saved, own, names)


def test_another_number_of_parameters_is_told():
    saved, own, names = fingerprint()
    saved[0]["partition"] += "; element"
    with pytest.raises(
        ValueError, match="group 0 of the optimizer state has the blocks of 11 parameters, here it has 10"
    ):
        check_partition(saved, own, names)
