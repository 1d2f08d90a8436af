"""Code for the authors' package, with one changed import."""

import copy
import logging

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import tiny_models
from lightning_adam_mini import AdamMini, annotate
from lightning_adam_mini.convert import from_adam_mini_package
from lightning_adam_mini.integrations.original import Adam_mini, convertible
from ranks import run_ranks
from tiny_models import DIM, HEADS, KV_HEADS, VOCAB

release = pytest.importorskip("adam_mini")

SIZES = {"dim": DIM, "n_heads": HEADS, "n_kv_heads": KV_HEADS}
OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "verbose": False}


def loss(model, seed):
    tokens = torch.randint(VOCAB, (2, 5), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=tokens, labels=tokens).loss


def train(model, optimizer, steps=range(15)):
    for step in steps:
        loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_equal(one, other, atol=1e-10):
    for name, parameter in one.items():
        torch.testing.assert_close(parameter, other[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def blocks(optimizer):
    return {name: found.blocks for name, found in optimizer.partition.items()}


MODELS = {
    "llama": tiny_models.llama,
    "tied": lambda: tiny_models.llama(tie_word_embeddings=True),
    "with biases": lambda: tiny_models.llama(attention_bias=True, mlp_bias=True),
    "two layers": lambda: tiny_models.llama(num_hidden_layers=2),
}
CHANGES = {
    "none": lambda optimizer: None,
    "values as one block": lambda optimizer: setattr(optimizer, "wv_names", {}),  # the authors' advice for short runs
    "words taken away": lambda optimizer: optimizer.mlp_names.clear(),
    "a word added": lambda optimizer: optimizer.adam_block_names.add("input_layernorm"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("model", MODELS)
def test_the_update_is_that_of_the_package(model, change):
    ours, theirs = (MODELS[model]().double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    results = []
    for network, cls in ((ours, Adam_mini), (theirs, release.Adam_mini)):
        optimizer = cls(network.named_parameters(), **SIZES, **OPTIONS)
        CHANGES[change](optimizer)
        results.append(train(network, optimizer))
    assert_equal(*results)


def test_the_blocks_are_those_of_the_model_where_the_package_departs_from_the_paper():
    model = tiny_models.qwen3()  # heads of another size than dim / n_heads
    assert blocks(Adam_mini(model.named_parameters(), **SIZES)) == blocks(AdamMini(model))


def test_options_of_adam_mini():
    model = tiny_models.llama()
    optimizer = Adam_mini(model.named_parameters(), **SIZES, partition="factored", exp_avg_dtype=torch.uint8)
    assert blocks(optimizer) == blocks(AdamMini(model, partition="factored"))
    optimizer.wv_names = {}
    train(model, optimizer, range(1))
    overrides = dict.fromkeys(("model.layers.0.self_attn.v_proj.weight",), "whole")
    assert blocks(optimizer) == blocks(AdamMini(model, partition="factored", partition_overrides=overrides))
    assert optimizer.exp_avg_dtype is torch.uint8


def test_an_annotated_model_decides():
    model = annotate(tiny_models.gpt2())  # a fused query, key and value, transposed
    assert blocks(Adam_mini(model.named_parameters(), dim=DIM, n_heads=HEADS)) == blocks(AdamMini(model))
    assert blocks(Adam_mini(model.named_parameters())) == blocks(AdamMini(model))


def test_a_network_without_attention_needs_no_heads():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))
    assert blocks(Adam_mini(model.named_parameters())) == blocks(AdamMini(model, partition="default"))


def test_frozen_parameters_are_left_out():
    model = tiny_models.llama()
    model.model.embed_tokens.requires_grad_(False)
    optimizer = Adam_mini(model.named_parameters(), **SIZES)
    assert "model.embed_tokens.weight" not in optimizer.partition


def test_a_run_resumes_exactly():
    model = tiny_models.llama().double()
    begun = copy.deepcopy(model)
    whole = train(model, Adam_mini(model.named_parameters(), **SIZES, **OPTIONS))
    optimizer = Adam_mini(begun.named_parameters(), **SIZES, **OPTIONS)
    optimizer.wv_names = {"v_proj", "wv", "value"}  # as they are
    train(begun, optimizer, range(7))
    state = copy.deepcopy(optimizer.state_dict())
    optimizer = Adam_mini(begun.named_parameters(), **SIZES, **OPTIONS)
    optimizer.load_state_dict(state)
    assert_equal(train(begun, optimizer, range(7, 15)), whole, atol=0)


def test_a_scheduler_made_before_the_names_change_goes_on():
    model = tiny_models.llama()
    optimizer = Adam_mini(model.named_parameters(), **SIZES, **OPTIONS)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    optimizer.wv_names = {}
    train(model, optimizer, range(1))
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [1.5e-3, 1.5e-3]


def test_what_was_found_is_logged(caplog):
    caplog.set_level(logging.INFO, "lightning_adam_mini")
    Adam_mini(tiny_models.llama().named_parameters(), **SIZES)
    assert "1 query, 1 key, 1 value" in caplog.text


# Sharded


def _sharded(rank, wrap):
    torch.manual_seed(0)
    model = tiny_models.llama(num_hidden_layers=2)
    if wrap == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    else:
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    train(model, Adam_mini(model.named_parameters(), model_sharding=True, **SIZES, **OPTIONS))
    if wrap == "fsdp2":
        return {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    with FullyShardedDataParallel.summon_full_params(model):
        return {name: p.detach().clone() for name, p in model.module.named_parameters()}


@pytest.mark.parametrize("wrap", ["fsdp1", "fsdp2"])
def test_ranks_train_as_one_process_with_names_alone(wrap):
    torch.manual_seed(0)
    model = tiny_models.llama(num_hidden_layers=2)
    whole = train(model, Adam_mini(model.named_parameters(), **SIZES, **OPTIONS))
    assert_equal(run_ranks(2, _sharded, wrap)[0], whole, atol=2e-6)


# States of the package


def test_the_states_that_convert():
    model = tiny_models.llama(num_hidden_layers=2)
    theirs = release.Adam_mini(list(model.named_parameters()), **SIZES, **OPTIONS)
    train(model, theirs, range(2))
    state = theirs.state_dict()
    ours = Adam_mini(model.named_parameters(), **SIZES, **OPTIONS)
    assert set(convertible(state, ours).values()) == {"equal"}
    ours.load_state_dict(from_adam_mini_package(state, ours))

    factored = AdamMini(model, partition="factored")
    found = convertible(state, factored)
    assert found["model.norm.weight"] == "averaged"  # one number there, and one an element here
    assert set(found.values()) == {"averaged"}
    factored.load_state_dict(from_adam_mini_package(state, factored))

    other = AdamMini(tiny_models.llama(intermediate_size=24))
    found = convertible(state, other)
    assert found["model.layers.1.mlp.up_proj.weight"] == "this optimizer has no parameter of that name"
    assert found["model.layers.0.mlp.up_proj.weight"].startswith("its first moment has ")
    assert found["lm_head.weight"] == "equal"


# Bad input


def change_late(model):
    optimizer = Adam_mini(model.named_parameters(), **SIZES)
    train(model, optimizer, range(1))
    optimizer.wv_names = {}
    optimizer.step()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda model: Adam_mini(model.named_parameters()), "partitioned by heads; give Adam_mini dim= and n_heads="),
        (lambda model: Adam_mini(model.named_parameters(), dim=DIM, n_heads=5), "does not have 5 heads"),
        (lambda model: Adam_mini(model.named_parameters(), **{**SIZES, "dim": 2048}), "of a model with dim=2048"),
        (lambda model: Adam_mini(model.named_parameters(), **{**SIZES, "n_kv_heads": 5}), "k_proj.*5 heads"),
        (lambda model: Adam_mini(model.parameters(), **SIZES), r"takes model.named_parameters\(\)"),
        (lambda model: Adam_mini(tiny_models.gpt2().named_parameters(), **SIZES), r"c_attn holds.*annotate\(model\)"),
        (
            lambda model: Adam_mini(annotate(model).named_parameters(), dim=DIM, n_heads=2 * HEADS),
            f"the annotated model has {HEADS} heads of query, and Adam_mini got {2 * HEADS}",
        ),
        (change_late, "changed after its first step"),
        (lambda model: Adam_mini(model.named_parameters(), **SIZES, partition="rows"), "unknown partition 'rows'"),
    ],
)
def test_bad_input_is_one_line(build, message):
    with pytest.raises(ValueError, match=message) as refused:
        build(tiny_models.llama())
    assert "\n" not in str(refused.value)
