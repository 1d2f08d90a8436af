"""Code for the authors' package, with one changed import."""

import copy
import logging
import pickle
import warnings

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


class OtherNames(nn.Module):
    """A GPT-2 whose attention has names that no word of the package fits, and one matrix that stays unknown."""

    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, DIM), nn.Embedding(5, DIM)
        self.ln_1 = nn.LayerNorm(DIM)
        self.fq, self.fk, self.fv, self.fo, self.fx = (nn.Linear(DIM, DIM) for _ in range(5))
        self.mlp = nn.Sequential(nn.Linear(DIM, 12), nn.GELU(), nn.Linear(12, DIM))
        self.gain = nn.Parameter(torch.ones(DIM))  # a vector that decays, by its name

    def forward(self, input_ids, labels):
        x = self.ln_1(self.wte(input_ids) + self.wpe.weight)
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.fq, self.fk, self.fv))
        heads = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        self.logits = (self.mlp(self.fx(self.fo(heads)) * self.gain)) @ self.wte.weight.T
        self.loss = nn.functional.cross_entropy(self.logits.flatten(0, 1), labels.flatten())
        return self


def add_names(optimizer):
    optimizer.wqk_names |= {"fq", "fk"}
    optimizer.wv_names.add("fv")
    optimizer.attn_proj_names.add("fo")


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


@pytest.mark.parametrize("add", [add_names, lambda optimizer: optimizer.embd_names.add("wpe"), lambda optimizer: None])
def test_names_are_added_as_there(add):
    ours, theirs = (OtherNames().double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    results = []
    for network, cls in ((ours, Adam_mini), (theirs, release.Adam_mini)):
        optimizer = cls(network.named_parameters(), dim=DIM, n_heads=HEADS, **OPTIONS)
        add(optimizer)
        results.append(train(network, optimizer))
    assert_equal(*results)


class Layers(nn.Module):
    """No attention: convolutions and linear layers, with biases, under names that the package knows and others."""

    def __init__(self):
        super().__init__()
        self.first, self.linear = nn.Conv2d(2, 4, 3), nn.Linear(64, 4)

    def forward(self, images):
        return self.linear(self.first(images).tanh().flatten(1)).square().mean()


def test_a_network_without_attention_is_that_of_the_package():
    ours, theirs = (Layers().double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    for network, cls in ((ours, Adam_mini), (theirs, release.Adam_mini)):
        optimizer = cls(network.named_parameters(), **OPTIONS)  # needs no heads
        for _ in range(15):
            optimizer.zero_grad()
            network(images).backward()
            optimizer.step()
    assert_equal(dict(ours.named_parameters()), dict(theirs.named_parameters()))


def lora():
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
    return peft.get_peft_model(tiny_models.llama(), peft.LoraConfig(r=2, target_modules=targets))


@pytest.mark.parametrize(
    "factory",
    [
        tiny_models.qwen3,  # heads of another size than dim / n_heads
        tiny_models.mixtral,  # stacked experts, at which the package crashes
        lora,  # and it does at the factors of a query
    ],
)
def test_the_blocks_are_those_of_the_model_where_the_package_departs_from_the_paper(factory):
    model = factory()
    own = {name: found.blocks for name, found in AdamMini(model).partition.items()}
    by_names = blocks(Adam_mini(model.named_parameters(), **SIZES))
    assert by_names == {name: own[name] for name in by_names}


def test_vectors_have_one_second_moment_where_the_package_crashes():
    found = blocks(Adam_mini(tiny_models.bert().named_parameters(), dim=DIM, n_heads=HEADS))
    assert found["embeddings.LayerNorm.weight"].num_values == 1


def test_options_of_adam_mini():
    model = tiny_models.llama()
    optimizer = Adam_mini(model.named_parameters(), **SIZES, partition="factored", exp_avg_dtype=torch.uint8)
    assert blocks(optimizer) == blocks(AdamMini(model, partition="factored"))
    optimizer.wv_names = {}
    assert blocks(optimizer) == blocks(AdamMini(model, partition="factored"))  # a matrix all the same
    assert optimizer.exp_avg_dtype is torch.uint8
    by_role = {"partition": "transformer", "partition_overrides": {"value": "whole", "re:.*norm.*": "element"}}
    assert blocks(Adam_mini(model.named_parameters(), **SIZES, **by_role)) == blocks(AdamMini(model, **by_role))


def test_weight_decay_by_names_or_by_a_policy():
    model = OtherNames()
    sizes = {"dim": DIM, "n_heads": HEADS, "weight_decay": 0.1}
    decays = lambda optimizer: {  # noqa: E731
        name
        for group in optimizer.param_groups
        for parameter in group["params"]
        if group["weight_decay"]
        for name, own in model.named_parameters()
        if own is parameter
    }
    assert "gain" in decays(Adam_mini(model.named_parameters(), **sizes))
    assert "gain" not in decays(Adam_mini(model.named_parameters(), **sizes, weight_decay_policy="matrices"))
    assert "ln_1.bias" not in decays(Adam_mini(model.named_parameters(), **sizes))


def test_an_annotated_model_decides():
    model = annotate(tiny_models.gpt2())  # a fused query, key and value, transposed
    assert blocks(Adam_mini(model.named_parameters(), dim=DIM, n_heads=HEADS)) == blocks(AdamMini(model))
    assert blocks(Adam_mini(model.named_parameters())) == blocks(AdamMini(model))


def test_heads_of_an_annotated_model_in_repeated_parts():
    configuration = {"vocab_size": VOCAB, "hidden_size": DIM, "num_hidden_layers": 1, "num_attention_heads": HEADS}
    transformers = tiny_models.transformers()
    model = annotate(transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**configuration)))
    assert blocks(Adam_mini(model.named_parameters(), dim=DIM, n_heads=HEADS)) == blocks(AdamMini(model))


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


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_goes_on(copied):
    model = tiny_models.llama().double()
    optimizer = Adam_mini(model.named_parameters(), **SIZES, **OPTIONS)
    optimizer.wv_names = {}
    train(model, optimizer, range(3))
    other, other_optimizer = copied((model, optimizer))
    assert blocks(other_optimizer) == blocks(optimizer)
    assert_equal(train(other, other_optimizer, range(3, 6)), train(model, optimizer, range(3, 6)), atol=0)
    other_optimizer.wv_names = {"v_proj"}
    with pytest.raises(ValueError, match="changed after its first step"):
        other_optimizer.step()


def test_hooks_of_a_step_run_once():
    model, calls = tiny_models.llama(), []
    AdamMini(model)  # torch patches the step of each class
    optimizer = Adam_mini(model.named_parameters(), **SIZES, **OPTIONS)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, range(1))
    assert calls == ["before", "after"]


def test_the_partition_follows_the_names_at_once():
    model = tiny_models.llama()
    optimizer = Adam_mini(model.named_parameters(), **SIZES)
    optimizer.wv_names = {}
    assert blocks(optimizer)["model.layers.0.self_attn.v_proj.weight"].num_values == 1


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
    model = tiny_models.llama()
    train(model, Adam_mini(model.named_parameters(), **SIZES), range(2))
    assert caplog.text.count("1 query, 1 key, 1 value") == 1


def test_matrices_without_a_word_are_named_once():
    model = OtherNames()
    optimizer = Adam_mini(model.named_parameters(), dim=DIM, n_heads=HEADS)
    add_names(optimizer)
    with pytest.warns(UserWarning, match=r"no word of Adam_mini fits wpe.weight, fx.weight: .*mlp_names.add"):
        train(model, optimizer, range(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(1, 2))


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

    with pytest.raises(ValueError, match="takes a state of the package adam-mini, but this is one of AdamMini"):
        convertible(ours.state_dict(), ours)

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


def test_a_run_of_the_package_goes_on():
    """Its last state loads as it is, with its learning rate, and the next steps are its own."""
    model = tiny_models.llama(attention_bias=True).double()
    begun = copy.deepcopy(model)
    whole = train(model, release.Adam_mini(list(model.named_parameters()), **SIZES, **OPTIONS))
    theirs = release.Adam_mini(list(begun.named_parameters()), **SIZES, **OPTIONS)
    train(begun, theirs, range(7))
    ours = Adam_mini(begun.named_parameters(), **SIZES, **{**OPTIONS, "lr": 1.0, "weight_decay": 0.0})
    ours.load_state_dict(theirs.state_dict())
    assert_equal(train(begun, ours, range(7, 15)), whole)


# Bad input


def change_late(model):
    optimizer = Adam_mini(model.named_parameters(), **SIZES)
    train(model, optimizer, range(1))
    optimizer.wv_names = {}
    optimizer.step()


def change_annotated(model):
    optimizer = Adam_mini(annotate(model).named_parameters(), **SIZES)
    optimizer.wv_names = {}
    train(model, optimizer, range(1))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda model: Adam_mini(model.named_parameters()),
            "32 heads of a model with dim=2048; give Adam_mini the dim",
        ),
        (lambda model: Adam_mini(model.named_parameters(), dim=DIM, n_heads=5), "does not have 5 heads"),
        (lambda model: Adam_mini(model.named_parameters(), dim=DIM, n_heads=0), "n_heads must be a positive integer"),
        (lambda model: Adam_mini(model.named_parameters(), **{**SIZES, "dim": 2048}), "of a model with dim=2048"),
        (lambda model: Adam_mini(model.named_parameters(), **{**SIZES, "n_kv_heads": 5}), "k_proj.*5 heads"),
        (lambda model: Adam_mini(model.parameters(), **SIZES), r"takes model.named_parameters\(\)"),
        (
            lambda model: Adam_mini(tiny_models.gpt2().named_parameters(), **SIZES),
            r"c_attn.*one matrix.*annotate\(model\)",
        ),
        (
            lambda model: Adam_mini(annotate(model).named_parameters(), dim=DIM, n_heads=2 * HEADS),
            f"the annotated model has {HEADS} heads of query, and Adam_mini got {2 * HEADS}",
        ),
        (change_annotated, "the model decides: give annotate.*overrides"),
        (change_late, "changed after its first step"),
        (lambda model: Adam_mini(model.named_parameters(), **SIZES, partition="rows"), "unknown partition 'rows'"),
    ],
)
def test_bad_input_is_one_line(build, message):
    with pytest.raises(ValueError, match=message) as refused:
        build(tiny_models.llama())
    assert "\n" not in str(refused.value)
