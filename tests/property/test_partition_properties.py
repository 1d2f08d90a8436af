"""What holds for the partition of every module tree, whatever its layers, shapes, names, ties and wrappers.

A tree is drawn as nested `Tree`s and built from them, so that the same tree can be built again with other names or with
wrappers around some of its modules.
"""

import ast
import functools
import math
import re
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

from lightning_adam_mini import AdamMini, partition_module
from lightning_adam_mini.blocks import Kind
from lightning_adam_mini.partition import STRATEGIES, Role, Structure, layouts
from lightning_adam_mini.partition.layer_roles import POSITION_WORDS
from lightning_adam_mini.partition.layouts.parameter_names import is_output_name, projected_parts
from lightning_adam_mini.partition.tree import plain_names

pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns about tensors without elements, and old wrappers
many = settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

BY_ROLE = ("transformer", "transformer_early", "factored", "slimadam")

FUSED_NAMES = ("Wqkv", "att_proj", "c_attn", "kqv", "proj_qkv", "qkv", "query_key_value", "to_qvk", "w_pack")

# Every word of the table, in patterns and in lists of attributes; a name that holds none of them must tell nothing.
TABLE_WORDS = {
    word
    for layout in [*layouts.LAYOUTS, *layouts.LAYERS]
    for pattern in [*layout.parameters, *layout.children]
    for word in re.split(r"[^A-Za-z0-9_]+", pattern)
} | {*FUSED_NAMES, "kv", "to_kv", "qk", *layouts.BARE_PARAMETERS, "weight", "bias"}


def tells_something(name):
    """Whether a word of a name speaks of projections or positions, as `q_1` or `pe2` do."""
    return (
        bool(projected_parts(name)) or is_output_name(name) or not POSITION_WORDS.isdisjoint(re.split(r"[^a-z]+", name))
    )


# Names that hold parts of others: "wo" in network, "v_proj" in conv_proj, "embed" and "output" in paths of norms.
MISLEADING = (
    "network",
    "conv_proj",
    "final_layer_norm",
    "embedding_output",
    "layernorm_embedding",
    "word_embeddings_layernorm",
    "post_mlp_layernorm",
    "linear_attn",
    "queryless",
    "monkey",
    "valued",
    "unbiased",
    "module",
    "base_model",
    "base_layer",
    "original_module",
    "_orig_mod",
    "_forward_module",
    "parametrized",
)
names_of_no_rule = st.one_of(
    st.sampled_from(MISLEADING),
    st.from_regex(r"[a-z]{2,3}_?[0-9]{1,2}", fullmatch=True),
).filter(lambda name: name not in TABLE_WORDS and not hasattr(nn.Module, name) and not tells_something(name))
names_of_rules = st.sampled_from(
    sorted(word for word in TABLE_WORDS if word.isidentifier() and not hasattr(nn.Module(), word))
)
sizes = st.integers(1, 4)
heads = st.integers(1, 3)
SEPARATE = [
    (("q_proj", "k_proj", "v_proj"), "o_proj"),
    (("query", "key", "value"), "dense"),
    (("wq", "wk", "wv"), "wo"),
    (("q", "k", "v"), "o"),
    (("to_q", "to_k", "to_v"), "proj"),
]


class Block(nn.Module):
    """Children and parameters under any names."""


class Attention(nn.Module):
    """Tells its sizes under some of the names that the library reads, or none of them, or wrong ones."""


@dataclass(frozen=True)
class Tree:
    """A module: a kind of leaf with its arguments, or a block of children.

    Args:
        kind: A key of `LEAVES`, or "block".
        arguments: For the leaf's builder; a dictionary as sorted pairs, so that trees can be compared.
        children: By name.
        frozen: Whether its own parameters require no gradient.
        wrapper: Number of the wrapper around it, where wrappers are asked for.
    """

    kind: str
    arguments: tuple = ()
    children: tuple = ()
    frozen: bool = False
    wrapper: int = 0


WRAPPERS = (
    None,
    None,
    nn.DataParallel,
    torch.compile,
    AveragedModel,
    checkpoint_wrapper,
    lambda module: checkpoint_wrapper(nn.DataParallel(module)),
)


def separate_attention(names, output, dim, n_heads, kv_heads, head_dim, told):
    module = Attention()
    for name, value in told:
        setattr(module, name, value)
    for name, count in zip(names, (n_heads, kv_heads, kv_heads), strict=True):
        setattr(module, name, nn.Linear(dim, count * head_dim))
    setattr(module, output, nn.Linear(n_heads * head_dim, dim))
    return module


def fused_attention(name, dim, n_heads, head_dim, transposed):
    module = Attention()
    module.num_heads, module.head_dim = n_heads, head_dim
    rows = 3 * n_heads * head_dim
    setattr(module, name, conv1d(dim, rows) if transposed else nn.Linear(dim, rows))
    return module


def conv1d(inputs, outputs):
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(outputs, inputs)


def bare(parameters):
    module = Block()
    for name, shape in parameters:
        module.register_parameter(name, nn.Parameter(torch.randn(shape)))
    return module


def tied(dim, vocab, embedding_first):
    """An embedding and an output head of one weight, in either order."""
    module, embedding, head = Block(), nn.Embedding(vocab, dim), nn.Linear(dim, vocab, bias=False)
    head.weight = embedding.weight
    for name, child in (("aa1", embedding), ("aa2", head)) if embedding_first else (("aa1", head), ("aa2", embedding)):
        setattr(module, name, child)
    return module


def parametrized(inputs, outputs):
    return parametrizations.weight_norm(nn.Linear(inputs, outputs))


LEAVES = {
    "linear": nn.Linear,
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "embedding": nn.Embedding,
    "layer_norm": nn.LayerNorm,
    "rms_norm": nn.RMSNorm,
    "group_norm": nn.GroupNorm,
    "batch_norm": nn.BatchNorm2d,
    "multihead": functools.partial(nn.MultiheadAttention),
    "transposed": conv1d,
    "lstm": nn.LSTM,
    "gru_cell": nn.GRUCell,
    "bilinear": nn.Bilinear,
    "separate": separate_attention,
    "fused": fused_attention,
    "bare": bare,
    "tied": tied,
    "parametrized": parametrized,
}


@st.composite
def arguments(draw, kind, names):
    a, b, c = draw(sizes), draw(sizes), draw(sizes)
    match kind:
        case "linear" | "transposed" | "embedding":
            return draw(st.sampled_from([0, a, b, c])), b  # none, perhaps
        case "parametrized" | "gru_cell":
            return a, b
        case "conv1d" | "conv2d" | "conv_transpose2d" | "bilinear":
            return a, b, c
        case "layer_norm":
            return ((a, b),) if draw(st.booleans()) else (a,)
        case "rms_norm" | "batch_norm":
            return (a,)
        case "group_norm":
            return a, a * b
        case "lstm":
            return a, b, 1, draw(st.booleans())
        case "multihead":
            count = draw(heads)
            other = draw(st.booleans())
            separate = {"kdim": b, "vdim": c} if other else {}
            return a * count, count, tuple(separate.items()), draw(st.booleans())
        case "separate":
            fields, output = draw(st.sampled_from(SEPARATE))
            count, size = draw(heads), draw(sizes)
            kv_heads = draw(st.sampled_from([n for n in range(1, count + 1) if count % n == 0]))
            true = {"num_heads": count, "num_key_value_heads": kv_heads, "head_dim": size}
            told = {name: value for name, value in true.items() if draw(st.integers(0, 4))}
            if not draw(st.integers(0, 5)):
                told["head_dim"] = draw(sizes)  # a lie, perhaps
            return fields, output, a, count, kv_heads, size, tuple(told.items())
        case "fused":
            return draw(st.sampled_from(FUSED_NAMES)), a, draw(heads), b, draw(st.booleans())
        case "tied":
            return a, b, draw(st.booleans())
        case "bare":
            shapes = st.lists(st.integers(0, 3), max_size=4).map(tuple)
            own = st.one_of(names, st.sampled_from(["weight", "bias", "gamma", "pos_embed", "A_log", "my_bias"]))
            return (tuple(draw(st.dictionaries(own, shapes, min_size=1, max_size=3)).items()),)
    raise AssertionError(kind)


@st.composite
def leaf_trees(draw, names):
    kind = draw(st.sampled_from(sorted(LEAVES)))
    frozen = not draw(st.integers(0, 5))
    return Tree(kind, draw(arguments(kind, names)), (), frozen, draw(st.integers(0, len(WRAPPERS) - 1)))


def trees(names):
    """A block of blocks and leaves; `names` gives the names of its children."""

    def block(children):
        fields = st.dictionaries(names, children, min_size=1, max_size=4)
        wrappers = st.integers(0, len(WRAPPERS) - 1)
        return st.builds(lambda found, w: Tree("block", (), tuple(found.items()), False, w), fields, wrappers)

    return block(st.recursive(leaf_trees(names), block, max_leaves=5))


plain_trees = trees(names_of_no_rule)
any_trees = trees(st.one_of(names_of_no_rule, names_of_rules))
strategies = st.sampled_from(sorted(STRATEGIES))


@dataclass
class Builder:
    """Builds a tree: with names from `renamed` in place of its own, and with its wrappers."""

    wraps: bool = False
    renamed: list[str] = field(default_factory=list)

    def build(self, tree, *, is_root=True):
        torch.manual_seed(0)
        module = Block() if tree.kind == "block" else self._leaf(tree)
        for parameter in module.parameters():
            parameter.requires_grad_(not tree.frozen)
        for name, child in tree.children:
            new_name = self.renamed.pop() if self.renamed else name
            setattr(module, new_name, self.build(child, is_root=False))
        # Around the root, a checkpoint wrapper hides its name from `named_parameters()`: a case of its own.
        wrap = WRAPPERS[tree.wrapper % 5 if is_root else tree.wrapper] if self.wraps else None
        return wrap(module) if wrap else module

    def _leaf(self, tree):
        if tree.kind == "bare" and self.renamed:
            return bare(
                [(name if is_of_a_rule(name) else self.renamed.pop(), shape) for name, shape in tree.arguments[0]]
            )
        if tree.kind != "multihead":
            return LEAVES[tree.kind](*tree.arguments)
        dim, count, options, with_bias = tree.arguments
        return nn.MultiheadAttention(dim, count, add_bias_kv=with_bias, **dict(options))


def build(tree, **options):
    return Builder(**options).build(tree)


def number_of_names(tree):
    own = len(tree.arguments[0]) if tree.kind == "bare" else 0
    return own + sum(1 + number_of_names(child) for _, child in tree.children)


def is_of_a_rule(name):
    """Whether a parameter's own name tells what it does."""
    return name in TABLE_WORDS or name.endswith("_bias")


def names_parameter(message, model):
    """Whether an error begins with the name of a parameter."""
    return message.partition(":")[0] in dict(model.named_parameters())


def settled_overrides(model, strategy):
    """The overrides that an error asks for.

    An error must be a ValueError about a parameter, and what it proposes must settle all at once.
    """
    try:
        partition_module(model, strategy)
    except ValueError as error:
        message = str(error)
        assert names_parameter(message, model), message
        overrides = ast.literal_eval(re.search(r"partition_overrides=(\{.*?'\})", message).group(1))
        partition_module(model, strategy, overrides)
        return overrides
    return {}


def partition_of(model, strategy):
    return partition_module(model, strategy, settled_overrides(model, strategy))


def described(model, strategy, overrides=None):
    """Name, role, cut and blocks of each parameter in order."""
    partition = partition_module(model, strategy, overrides)
    assert_complete(partition, model)
    plain = plain_names(model)
    return {plain[name]: (cut.role.name, cut.role.known, cut.structure, cut.blocks) for name, cut in partition.items()}


def assert_complete(partition, model):
    """Each parameter has an entry, in the model's order; only a frozen one that cannot be cut has none."""
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert list(partition) == [name for name in required if name in partition]
    assert not any(required[name] for name in required.keys() - partition.keys())


def own_names(model):
    """Plain names of the parameters, a tied one once."""
    plain = plain_names(model)
    return [plain[name] for name, _ in model.named_parameters()]


PARTS = {"q": ("q", "Q", "query", "queries"), "k": ("k", "K", "key", "keys"), "v": ("v", "V", "value", "values")}
PREFIXES, SUFFIXES = ("", "to_", "W_", "fc_", "attn_", "c_"), ("", "_proj", "_layer", "_dense", "Linear")


def projection(kind, inputs, outputs):
    """A matrix in a layer of some kind, or in none."""
    match kind:
        case "linear":
            return nn.Linear(inputs, outputs)
        case "wrapped":
            return nn.Sequential(nn.Linear(inputs, outputs), nn.LayerNorm(outputs))
        case "conv":
            return nn.Conv1d(inputs, outputs, 1)
    return nn.Parameter(torch.randn(inputs, outputs))


@st.composite
def attentions(draw):
    """Attention of any usual names: separate, fused or in pairs; of layers, wrappers or bare matrices; told or not."""
    count, size, dim = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([2, 3])), draw(st.sampled_from([4, 6]))
    kv_heads = draw(st.sampled_from([n for n in (1, 2, 4) if count % n == 0]))
    told = {
        "num_heads": count,
        draw(st.sampled_from(["n_kv_head", "kv_heads", "my_groups"])): kv_heads,
        "head_dim": size,
    }
    rows = {"q": count * size, "k": kv_heads * size, "v": kv_heads * size}
    pattern = draw(st.sampled_from([("q", "k", "v"), ("q", "kv"), ("qk", "v"), ("qkv",), ("vqk",), ("kqv",)]))
    prefix, suffix = draw(st.sampled_from(PREFIXES)), draw(st.sampled_from(SUFFIXES))
    module = Attention()
    for name, value in told.items():
        if draw(st.integers(0, 2)):
            setattr(module, name, value)
    for letters in pattern:
        names = letters if len(letters) > 1 else draw(st.sampled_from(PARTS[letters]))
        outputs = sum(rows[letter] for letter in letters)
        kind = draw(st.sampled_from(["linear", "linear", "wrapped", "conv", "bare"]))
        layer = projection(kind, dim, outputs)
        setattr(module, f"{prefix}{names}{suffix}", layer)
    setattr(module, draw(st.sampled_from(["out", "proj", "W_o", "last"])), nn.Linear(count * size, dim))
    return module


@settings(many, max_examples=15, phases=[Phase.explicit, Phase.generate])
@given(st.lists(attentions(), min_size=1, max_size=2))
def test_what_a_refusal_advises_is_accepted(modules):
    """The overrides settle all, the layouts all but what the message leaves open."""
    model = nn.Sequential(nn.Embedding(5, 4), *modules)
    try:
        partition_module(model)
    except ValueError as error:
        message = str(error)
    else:
        return
    assert settled_overrides(model, "transformer")
    if advice := re.search(r"partition_layouts=(\{.*?\})", message):
        left_open = re.findall(r"[\w.]+", (re.search(r"which leaves (.*?) open", message) or ("", ""))[1])
        found = partition_module(model, "factored", layouts=ast.literal_eval(advice.group(1)))
        before = partition_module(model, "factored")
        unsettled = {
            name
            for name, p in found.items()
            if p.role.problem and (Role.FUSED_QKV in p.role.roles or not before[name].role.problem)
        }
        assert unsettled == set(left_open), message


@many
@given(any_trees, strategies)
def test_every_element_lies_in_one_block(tree, strategy):
    model = build(tree)
    partition = partition_of(model, strategy)
    assert_complete(partition, model)
    parameters = dict(model.named_parameters())
    for name, cut in partition.items():
        parameter, blocks = parameters[name], cut.blocks
        assert blocks.shape == parameter.shape
        if blocks.kind is Kind.FACTORED:
            continue  # every element has a row and a column, but no block
        index = blocks.block_index()
        assert index.shape == parameter.shape
        if parameter.numel():
            sizes = torch.bincount(index.flatten(), minlength=blocks.num_values)
            assert len(sizes) == blocks.num_values
            assert sizes.min() > 0
            assert sizes.sum() == parameter.numel()


@pytest.mark.slow
@settings(many, max_examples=15)  # each partitions a model once for every parameter
@given(any_trees, strategies)
def test_frozen_parameters_have_a_problem_only_where_training_them_would_raise(tree, strategy):
    model = build(tree)
    model.requires_grad_(False)
    found = {name: cut.problem for name, cut in partition_module(model, strategy).items() if cut.problem}
    problems = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(True)
        try:
            partition_module(model, strategy)
        except ValueError as error:
            problems[name] = str(error)
        parameter.requires_grad_(False)
    assert problems == found
    assert all(message.startswith(f"{name}: ") for name, message in problems.items())


@many
@given(any_trees)
def test_a_transformer_gives_no_matrix_one_block(tree):
    """Only convolutions and norms may, and what has one row or is one head."""
    for name, cut in partition_of(build(tree), "transformer").items():
        blocks = cut.blocks
        if sum(size != 1 for size in blocks.shape) < 2 or 0 in blocks.shape or cut.role.name in ("conv", "norm"):
            continue
        one_row = blocks.axis is not None and blocks.shape[blocks.axis] == 1
        one_head = (
            cut.structure == Structure.HEAD
            and len(cut.role.parts) == 1
            and cut.role.parts[0].head_dim == cut.role.parts[0].length
        )
        assert blocks.num_values > 1 or one_row or one_head, name


@many
@given(any_trees, st.sampled_from([*BY_ROLE, "element"]))
def test_what_no_rule_knows_keeps_every_element(tree, strategy):
    for name, cut in partition_of(build(tree), strategy).items():
        if not cut.role.known:
            assert cut.role.roles == (Role.OTHER,)
            assert cut.blocks.kind is Kind.ELEMENT, name
        if strategy == "element":
            assert cut.blocks.num_values == math.prod(cut.blocks.shape)


@many
@given(any_trees)
def test_the_default_is_one_block_a_tensor(tree):
    partition = partition_module(build(tree), "default")
    for name, cut in partition.items():
        stacked = () if cut.role.name in ("conv", "other") else cut.role.batch_axes
        expected = math.prod(cut.blocks.shape[axis] for axis in stacked)
        assert cut.blocks.num_values == expected, name


@many
@given(plain_trees, strategies, st.data())
def test_names_that_no_table_knows_decide_nothing(tree, strategy, data):
    number = number_of_names(tree)
    renamed = data.draw(st.lists(names_of_no_rule, min_size=number, max_size=number, unique=True))
    first, second = build(tree), build(tree, renamed=renamed)
    if settled_overrides(first, strategy):
        strategy = "default"  # what must be settled is settled by name
    assert list(described(first, strategy).values()) == list(described(second, strategy).values())


@many
@given(any_trees)
def test_without_wrappers_names_are_plain(tree):
    """Be they those that a wrapper gives to what it wraps; parametrizations alone rename a weight."""
    model = build(tree)
    expected = {
        name: re.sub(r"parametrizations\.(\w+)\.original1$", r"\1", name) for name, _ in model.named_parameters()
    }
    plain = plain_names(model)
    for name, own in expected.items():
        if not name.endswith(".original0"):  # weight norm's scale, for which there is no plain name
            assert plain[name] == own


@many
@given(any_trees, strategies, st.data())
def test_wrappers_decide_nothing(tree, strategy, data):
    plain, wrapped = build(tree), build(tree, wraps=True)
    overrides = settled_overrides(plain, strategy)
    name = data.draw(st.sampled_from(own_names(plain)))
    overrides = {name: data.draw(st.sampled_from(["row", "whole", "element"])), **overrides}
    try:
        expected = described(plain, strategy, overrides)
    except ValueError:  # a fused matrix cannot mix some cuts; or one override leaves nothing to the next
        overrides.pop(name)
        expected = described(plain, strategy, overrides)
    assert described(wrapped, strategy, overrides) == expected
    assert own_names(wrapped) == own_names(plain)


@many
@given(any_trees, strategies, st.sampled_from(list(Structure)), st.data())
def test_an_override_holds_or_says_why_not(tree, strategy, cut, data):
    model = build(tree)
    names = [name for name, _ in model.named_parameters()]
    name = data.draw(st.sampled_from(names))
    overrides = {name: cut, **settled_overrides(model, strategy)}
    partition, problem = None, ""
    try:
        partition = partition_module(model, strategy, overrides)
    except ValueError as error:
        problem = str(error)
    if partition is None:
        assert names_parameter(problem, model) or problem.startswith("partition_overrides: ")
    elif partition[name].problem:
        assert not dict(model.named_parameters())[name].requires_grad
    else:
        assert (
            partition[name].structure == cut or partition[name].blocks.kind is Kind.ELEMENT
        )  # of what has no dimensions
        assert repr(name) in partition[name].why


@many
@given(any_trees, strategies, st.sampled_from(["reference", "foreach"]))
def test_the_optimizer_takes_two_finite_steps(tree, strategy, implementation):
    model = build(tree)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    overrides = settled_overrides(model, strategy)
    options = {"partition": strategy, "partition_overrides": overrides, "implementation": implementation}
    optimizer = AdamMini(model, **options)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    for _ in range(2):
        for parameter in trained.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    assert set(optimizer.partition) == {name for name, _ in model.named_parameters()}
    assert set(optimizer.state) == set(trained.values())
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
        elif parameter.numel():
            assert not torch.equal(parameter, before[name]), name
    for parameter, state in optimizer.state.items():
        assert all(torch.isfinite(value).all() for value in state.values()), parameter.shape


@many
@given(any_trees)
def test_a_partition_changes_nothing_and_is_the_same_again(tree):
    model = build(tree)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = described(model, "default")
    assert described(model, "default") == first
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
