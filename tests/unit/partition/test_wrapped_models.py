"""How a model was prepared for training changes neither roles nor cuts: wrappers, adapters, parametrizations, ties."""

import contextlib
import copy

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

import tiny_models
from lightning_adam_mini import AdamMini, partition_module
from lightning_adam_mini.partition.tree import plain_names
from tiny_models import DIM, HEADS, HIDDEN, POSITIONS, VOCAB, FusedAttention, SeparateAttention, transformers

pytestmark = pytest.mark.filterwarnings("ignore")  # torch and peft advise against one process, tied adapters, ...


@pytest.fixture(scope="module", autouse=True)
def _one_process():
    """A process group of this process alone, without a network."""
    with contextlib.suppress(ImportError):
        import lightning.fabric  # noqa: F401  it watches calls of `torch.compile`, from its import on
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def t5():
    config = {"vocab_size": VOCAB, "d_model": DIM, "d_kv": 3, "d_ff": HIDDEN, "num_layers": 1, "num_heads": HEADS}
    return transformers().T5ForConditionalGeneration(transformers().T5Config(decoder_start_token_id=0, **config))


def masked_bert(**options):
    config = {"vocab_size": VOCAB, "hidden_size": DIM, "intermediate_size": HIDDEN, "num_hidden_layers": 1}
    config |= {"num_attention_heads": HEADS, "max_position_embeddings": POSITIONS}
    return transformers().BertForMaskedLM(transformers().BertConfig(**config, **options))


def fused():
    """A class that no layout knows, so that the one the user names must reach it."""
    return nn.ModuleDict({"tokens": nn.Embedding(VOCAB, DIM), "attention": FusedAttention()})


# A model, the name of one of its parameters, and the options that its partition needs.
MODELS = {
    "llama": (tiny_models.llama, "model.layers.0.self_attn.v_proj.weight", {}),
    "gpt2": (tiny_models.gpt2, "transformer.h.0.mlp.c_fc.weight", {}),
    "bert": (tiny_models.bert, "encoder.layer.0.attention.self.query.weight", {}),
    "t5": (t5, "encoder.block.0.layer.0.SelfAttention.k.weight", {}),
    "mixtral": (tiny_models.mixtral, "model.layers.0.mlp.experts.down_proj", {}),
    "encoder layer": (tiny_models.encoder_layer, "self_attn.in_proj_weight", {}),
    "fused": (fused, "attention.qkv.weight", {"layouts": {"FusedAttention": "fused_contiguous"}}),
}
# The fast tests wrap a plain, a transposed and a fused model.
QUICK = [name if name in ("llama", "gpt2", "fused") else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


def is_attention(module):
    # Not the containers of a whole attention in BERT and T5 alone: whatever calls itself attention, at each depth.
    return "Attention" in type(module).__name__


def is_mlp(module):
    return any(word in type(module).__name__ for word in ("MLP", "Dense", "Intermediate", "Experts"))


def checkpointed(which):
    def wrap(model):
        apply_activation_checkpointing(model, check_fn=which)
        return model

    return wrap


def sharded(model):
    for module in reversed([module for module in model.modules() if is_attention(module)]):  # inner ones first
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    # A ModuleDict has no forward to hook into.
    return model if isinstance(model, nn.ModuleDict) else fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def sharded_by_wrapper(model):
    return FullyShardedDataParallel(
        model,
        use_orig_params=True,
        device_id=torch.device("cpu"),
        sharding_strategy=ShardingStrategy.NO_SHARD,
        # All parents of a module are visited, so that wrappers lie in wrappers.
        auto_wrap_policy=lambda module, recurse, nonwrapped_numel: recurse or is_attention(module),
    )


def checkpointed_by_transformers(model):
    if not hasattr(model, "gradient_checkpointing_enable"):
        pytest.skip("a model of transformers has it")
    model.gradient_checkpointing_enable()
    return model


def set_up_by_fabric(model):
    fabric = pytest.importorskip("lightning.fabric")
    return fabric.Fabric(accelerator="cpu", devices=1).setup_module(model)


def compiled_in_parts(model):
    """Blocks of a layer list one by one, as for regional compilation, and the whole."""
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for name, child in list(module.named_children()):
                setattr(module, name, torch.compile(child))
    return torch.compile(model)


WRAPPERS = {
    "compile": torch.compile,
    "regional compile": compiled_in_parts,
    "DataParallel": nn.DataParallel,
    "DDP": DistributedDataParallel,
    "FSDP2": sharded,
    "FSDP1": sharded_by_wrapper,
    "averaged": AveragedModel,
    "Fabric": set_up_by_fabric,
    "checkpointed attention": checkpointed(is_attention),
    "checkpointed MLP": checkpointed(is_mlp),
    "checkpointed linear layers": checkpointed(lambda module: isinstance(module, nn.Linear)),
    "checkpointed, all of it": checkpoint_wrapper,
    "gradient_checkpointing_enable": checkpointed_by_transformers,
    "compile of DDP of checkpointed": lambda m: torch.compile(DistributedDataParallel(checkpointed(is_attention)(m))),
    "DDP of compile of averaged": lambda m: DistributedDataParallel(torch.compile(AveragedModel(m))),
    "compile of FSDP2 of checkpointed": lambda m: torch.compile(sharded(checkpointed(is_mlp)(m))),
    "Fabric of compile": lambda m: set_up_by_fabric(torch.compile(m)),
}
OPTIMIZED = [name for name in WRAPPERS if "FSDP" not in name]


def by_plain_name(module, **options):
    """Plain name, role, cut and blocks of each parameter in the order of `named_parameters()`."""
    partition = partition_module(module, **options)
    assert list(partition) == [name for name, _ in module.named_parameters()]
    plain = plain_names(module)
    return [(plain.get(name, name), cut.role.name, cut.structure, cut.blocks) for name, cut in partition.items()]


@pytest.mark.parametrize("strategy", ["transformer", pytest.param("transformer_early", marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", QUICK)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_changes_nothing(wrapper, model, strategy):
    factory, _, options = MODELS[model]
    plain = factory()
    expected = by_plain_name(plain, strategy=strategy, **options)
    wrapped = WRAPPERS[wrapper](copy.deepcopy(plain))
    assert by_plain_name(wrapped, strategy=strategy, **options) == expected
    assert by_plain_name(wrapped, **options) == by_plain_name(plain, **options), "auto"


@pytest.mark.parametrize("model", QUICK)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_an_override_by_plain_name_reaches_through_a_wrapper(wrapper, model):
    factory, name, options = MODELS[model]
    plain = factory()
    expected = by_plain_name(plain, overrides={name: "whole"}, **options)
    assert sum("whole" in row for row in expected) > sum("whole" in row for row in by_plain_name(plain, **options))
    wrapped = WRAPPERS[wrapper](plain)
    assert by_plain_name(wrapped, overrides={name: "whole"}, **options) == expected
    pattern = f"re:{name.replace('.', '[.]')}"
    assert by_plain_name(wrapped, overrides={pattern: "whole"}, **options) == expected


def test_a_checkpoint_wrapper_around_another():
    """It leaves its own prefix out of `named_parameters()`, where it is the outermost, but not that of the inner."""
    name = "model.layers.0.self_attn.v_proj.weight"
    plain = tiny_models.llama()
    expected = by_plain_name(plain, overrides={name: "whole"})
    assert by_plain_name(checkpoint_wrapper(torch.compile(plain)), overrides={name: "whole"}) == expected


@pytest.mark.parametrize("wrapper", OPTIMIZED)
def test_a_wrapped_model_takes_the_same_steps(wrapper):
    plain = tiny_models.llama()
    wrapped = WRAPPERS[wrapper](copy.deepcopy(plain))
    optimizers = [AdamMini(plain), AdamMini(wrapped)]
    for _ in range(2):
        tiny_models.set_gradients(plain, wrapped)
        for optimizer in optimizers:
            optimizer.step()
    for ours, theirs in zip(plain.parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_sharded_parameters_are_cut_by_their_whole_shape():
    model = sharded(tiny_models.llama())
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert {name: cut.blocks.shape for name, cut in partition_module(model).items()} == {
        name: tuple(parameter.shape) for name, parameter in tiny_models.llama().named_parameters()
    }


def as_if_by_fsdp1(layer):
    """What FSDP1 leaves of a layer on each of several processes: a flat piece of its weight."""
    layer.weight = nn.Parameter(layer.weight.detach().flatten()[: layer.weight.numel() // 2])
    return layer


def test_flat_pieces_of_weights_raise_nothing_but_what_names_them():
    model = nn.Sequential(nn.Embedding(VOCAB, DIM), as_if_by_fsdp1(nn.Linear(DIM, VOCAB)))
    assert partition_module(model, "element")["1.weight"].blocks.shape == (VOCAB * DIM // 2,)


# Embeddings and heads that the model declares, where the declared module is wrapped.


def leaves_checkpointed(model):
    return checkpointed(lambda module: isinstance(module, nn.Linear | nn.Embedding))(model)


def embeddings_sharded(model):
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, sharded_by_wrapper(module))
    return model


def embeddings_normalised(model):
    for module in list(model.modules()):
        if isinstance(module, nn.Embedding):
            parametrizations.spectral_norm(module)
    return model


@pytest.mark.parametrize("factory", [tiny_models.gpt2, masked_bert], ids=["gpt2", "bert"])
@pytest.mark.parametrize("wrap", [leaves_checkpointed, embeddings_sharded, embeddings_normalised])
def test_wrapped_embeddings_stay_what_the_model_declares(wrap, factory):
    """A position table is told from a token embedding by the model's own word alone."""
    plain = factory(tie_word_embeddings=False)
    wrapped = wrap(copy.deepcopy(plain))
    expected = by_plain_name(plain, strategy="transformer_early")
    assert sum("position_embedding" in row for row in expected) >= 1
    found = by_plain_name(wrapped, strategy="transformer_early")
    assert sorted(found, key=str) == sorted(expected, key=str)


# Parametrizations.


@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "o_proj"])
def test_a_parametrized_projection_keeps_its_role(parametrize, projection):
    plain = {name: row for name, *row in by_plain_name(SeparateAttention(), strategy="transformer")}
    module = SeparateAttention()
    parametrize(getattr(module, projection))
    found = {name: row for name, *row in by_plain_name(module, strategy="transformer")}
    scale = next((found.pop(name) for name in found.keys() - plain.keys()), None)
    assert found == plain
    assert (scale is not None) == (parametrize is parametrizations.weight_norm)
    if scale:
        assert scale[0] == "norm"
    key = f"{projection}.weight"
    assert (
        partition_module(module, "element", {key: "whole"})[f"{projection}.{ORIGINAL[parametrize]}"].structure
        == "whole"
    )


ORIGINAL = {
    parametrizations.weight_norm: "parametrizations.weight.original1",
    parametrizations.spectral_norm: "parametrizations.weight.original",
}


@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_parametrized_output_head_is_one(parametrize):
    """By its shape, as no name tells."""
    module = nn.ModuleDict({"tokens": nn.Embedding(VOCAB, 4), "out": parametrize(nn.Linear(4, VOCAB))})
    roles = {name: role for name, role, *_ in by_plain_name(module)}
    assert roles["out.weight"] == "output_head"


def test_a_partition_runs_no_parametrization():
    """Spectral norm takes a step of its power iteration each time its weight is read."""
    layer = parametrizations.spectral_norm(nn.Linear(DIM, DIM))
    before = copy.deepcopy(layer.state_dict())
    partition_module(layer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_names_alone_are_no_weight_norm():
    """The older weight norm splits a weight into `_g` and `_v`; a gate and a value have such names too."""
    module = nn.Module()
    module.tokens = nn.Embedding(VOCAB, DIM)
    module.w_g, module.w_v = nn.Parameter(torch.randn(DIM, DIM)), nn.Parameter(torch.randn(DIM, DIM))
    partition = partition_module(module)
    assert {partition[name].structure for name in ("w_g", "w_v")} == {"element"}


# Adapters.

ADAPTERS = {
    "LoRA": {"target_modules": "all-linear"},
    "DoRA": {"target_modules": "all-linear", "use_dora": True},
    "LoRA of two": {"target_modules": ["q_proj", "v_proj"]},
    "LoRA of an embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "k_proj"]},
}
ADAPTERS_OF_GPT2 = {
    "LoRA": {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True},
    "LoRA of an embedding": {"target_modules": ["c_attn", "wte"]},
    "modules to save": {"target_modules": ["c_attn"], "modules_to_save": ["wte"]},
}


def adapted(model, options):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=3, **options))


def assert_base_weights_keep_their_blocks(model, with_adapters):
    """Each base weight, and each trained copy of it, is what it is in the plain model; the rest are adapters."""
    expected = {name: row for name, *row in by_plain_name(model, strategy="transformer_early")}
    found = by_plain_name(with_adapters, strategy="transformer_early")
    assert {name for name, *_ in found} >= expected.keys()
    for name, *row in found:
        if name in expected:
            assert (name, row) == (name, expected[name])
        else:
            assert row[0] == ("norm" if "magnitude" in name else "lora"), name


@pytest.mark.parametrize("adapters", ADAPTERS)
def test_adapters_leave_the_roles_of_llama(adapters):
    model = tiny_models.llama()
    assert_base_weights_keep_their_blocks(model, adapted(copy.deepcopy(model), ADAPTERS[adapters]))


DECLARED = ()


@pytest.mark.parametrize(
    "adapters", [name if name == "LoRA" else pytest.param(name, marks=DECLARED) for name in ADAPTERS_OF_GPT2]
)
def test_adapters_leave_the_roles_of_gpt2(adapters):
    model = tiny_models.gpt2()
    assert_base_weights_keep_their_blocks(model, adapted(copy.deepcopy(model), ADAPTERS_OF_GPT2[adapters]))


def test_adapters_of_multihead_attention():
    """peft makes new parameters when it is asked for names, so what was read before that is no longer there."""
    model = tiny_models.encoder_layer()
    with_adapters = adapted(copy.deepcopy(model), {"target_modules": ["self_attn"]})
    roles = {
        name.removeprefix("base_model.model."): cut.role.name for name, cut in partition_module(with_adapters).items()
    }
    assert roles["self_attn.base_layer.in_proj_weight"] == "query+key+value"
    assert roles["self_attn.base_layer.out_proj.base_layer.weight"] == "attention_output"


def test_only_adapters_and_saved_modules_are_trained():
    model = adapted(tiny_models.llama(), ADAPTERS["modules to save"])
    optimizer = AdamMini(model)
    trained = [name for name, parameter in model.named_parameters() if parameter in optimizer.state]
    roles = sorted(optimizer.partition[name].role.name for name in trained)
    assert roles == ["key", "lora", "lora", "output_head", "token_embedding"]
    assert len(optimizer.state) == len(roles)


@pytest.mark.parametrize("wrapper", ["compile", "DDP", "checkpointed linear layers", "FSDP2"])
def test_an_override_reaches_through_a_wrapper_of_adapters(wrapper):
    model = WRAPPERS[wrapper](adapted(tiny_models.llama(), ADAPTERS["LoRA"]))
    name = "model.layers.0.self_attn.q_proj.weight"
    adapter = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    rows = {plain: cut for plain, _, cut, _ in by_plain_name(model, overrides={name: "whole", adapter: "element"})}
    assert (rows[name], rows[adapter]) == ("whole", "element")


# Tied weights.


def assert_one_entry_and_state(model, number_tied, roles):
    """`number_tied` names stand for the parameters with these roles."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    optimizer = AdamMini(model)
    parameters = list(model.parameters())
    assert len(names) - len(parameters) == number_tied
    assert len(optimizer.partition) == len(optimizer.state) == len(parameters)
    found = {name: cut.role.name for name, cut in partition_module(model).items()}
    assert found.items() >= roles.items()
    assert list(found) == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(
    ("factory", "number_tied", "roles"),
    [
        (tiny_models.gpt2, 1, {"transformer.wte.weight": "token_embedding"}),
        (t5, 3, {"shared.weight": "token_embedding"}),
        (
            masked_bert,
            2,
            {"bert.embeddings.word_embeddings.weight": "token_embedding", "cls.predictions.bias": "bias"},
        ),
        (lambda: tiny_models.llama(tie_word_embeddings=True), 1, {"model.embed_tokens.weight": "token_embedding"}),
    ],
    ids=["gpt2", "t5", "bert", "llama"],
)
def test_tied_weights_are_one(factory, number_tied, roles):
    assert_one_entry_and_state(factory(), number_tied, roles)


def reversed_children(model):
    """The same model with the modules of every level in reverse, so that heads come before embeddings."""
    for module in list(model.modules()):
        if not isinstance(module, nn.ModuleList):
            children = dict(module._modules)
            module._modules.clear()
            module._modules.update(reversed(children.items()))
    return model


@pytest.mark.parametrize(
    ("factory", "name"),
    [(tiny_models.gpt2, "lm_head.weight"), (t5, "lm_head.weight"), (masked_bert, "cls.predictions.decoder.weight")],
    ids=["gpt2", "t5", "bert"],
)
def test_tied_weights_are_an_embedding_where_the_head_comes_first(factory, name):
    model = reversed_children(factory())
    found = partition_module(model, "transformer_early")
    assert name in found, "else the head does not come first"
    assert (found[name].role.name, found[name].structure) == ("token_embedding", "element")
    by_role = {"norm", "bias", "query", "key", "value", "query+key+value", "attention_output", "mlp"}
    plain = partition_module(factory(), "transformer_early")
    for other, cut in found.items():
        if other in plain and plain[other].role.name in by_role:
            assert (cut.role.name, cut.blocks) == (plain[other].role.name, plain[other].blocks)


@pytest.mark.parametrize("first", ["attention", "plain"])
def test_a_tied_query_is_a_query_whichever_name_comes_first(first):
    modules = {"attention": SeparateAttention(), "plain": nn.Linear(DIM, HEADS * 2, bias=False)}
    modules["plain"].weight = modules["attention"].q_proj.weight
    model = nn.ModuleDict({first: modules.pop(first), **modules})
    name = {"attention": "attention.q_proj.weight", "plain": "plain.weight"}[first]
    cut = partition_module(model, "transformer")[name]
    assert (cut.role.name, cut.blocks.num_values) == ("query", HEADS)


def test_an_override_by_the_first_name_of_a_tied_weight():
    optimizer = AdamMini(tiny_models.gpt2(), partition_overrides={"transformer.wte.weight": "whole"})
    assert optimizer.partition["transformer.wte.weight"].structure == "whole"


# Frozen parameters.


def frozen_embedding():
    model = tiny_models.llama()
    model.model.embed_tokens.requires_grad_(False)
    return model


def test_frozen_parameters_have_no_state():
    model = frozen_embedding()
    optimizer = AdamMini(model)
    assert "model.embed_tokens.weight" in partition_module(model)
    assert "model.embed_tokens.weight" in optimizer.partition
    assert model.model.embed_tokens.weight not in optimizer.state
    assert set(optimizer.state) == {parameter for parameter in model.parameters() if parameter.requires_grad}


@pytest.mark.parametrize("key", ["token_embedding", "model.embed_tokens.weight", "re:.*embed_tokens.*"])
def test_an_override_of_frozen_parameters_alone_changes_nothing(key):
    """It is no error: the same recipe serves with and without the embedding frozen."""
    partition = AdamMini(frozen_embedding()).partition
    other = AdamMini(frozen_embedding(), partition_overrides={key: "whole"})
    table = other.partition.pop("model.embed_tokens.weight")
    assert table.structure == "whole"
    assert {**other.partition, table.name: partition[table.name]} == partition


def test_a_frozen_matrix_of_unknown_order_needs_no_layout():
    """It has no second moment that a wrong order could spoil, as under adapters."""
    model = nn.Sequential(nn.Embedding(VOCAB, DIM), FusedAttention(), nn.Linear(DIM, DIM))
    model[1].requires_grad_(False)
    optimizer = AdamMini(model)
    names = {name for name, parameter in model.named_parameters() if parameter in optimizer.state}
    assert names == {"0.weight", "2.weight", "2.bias"}
