"""Query, key and value projections, as the model's own forward pass uses them.

`verify_partition` follows each parameter through a forward pass to the heads of attention. It knows nothing of the
layouts, so it finds rows that a layout puts into the wrong block.
"""

import re

import pytest
import torch
from torch import nn

import model_zoo
from lightning_adam_mini import verify_partition
from lightning_adam_mini.partition import ModuleLayout, Role, Rows, Span, layouts, register_layout
from lightning_adam_mini.verify.running import traced

UNSEEN = {
    "timm_volo": (
        "projects attention's weights, without queries and keys",
        r"network\.0\.0\.attn\.v\.weight: not seen: no attention call takes a value from it",
    ),
    "pyg_hgt": (
        "relations mix the channels of a head before the message",
        r"conv\.kqv_lin\.lins\.paper\.weight: not seen: no attention call takes a key from it",
    ),
    "timm_davit": (
        "every other block attends over channels, and weighs what it calls the query",
        r"stages\.0\.blocks\.0\.1\.attn\.qkv\.weight: contradicted: rows with the role query feed the value",
    ),
}
"""Entries of the zoo that the forward pass does not confirm, why, and what it then says."""

MADE_ELSEWHERE = {
    "timm_gcvit": r"query from (stem|stages\.\d)\.",  # pooled images
    **dict.fromkeys(("bamba", "granitemoehybrid", "zamba2"), r"mamba\.in_proj"),
}
"""Operands of attention without a projection of their own; state spaces have the products of linear attention."""


def verified(entry: model_zoo.Entry, **arguments):
    """The verdict on a model of the zoo."""
    model = entry.build()
    positional, named = entry.forward_inputs()
    return verify_partition(model, *positional, partition="transformer", **arguments, **named)


def has_projections(entry: model_zoo.Entry) -> bool:
    """Whether the zoo says that some parameter is a query, key or value."""
    return any(is_projection(expected) for expected in entry.parameters.values())


def is_projection(expected: model_zoo.Expected) -> bool:
    """Whether a parameter holds queries, keys or values."""
    return not {"query", "key", "value"}.isdisjoint(expected.role.split("+"))


ENTRIES = [name for name, entry in model_zoo.entries().items() if has_projections(entry) and name not in UNSEEN]

FUSED = (
    "gpt2", "gpt_bigcode_multi_query", "gpt_bigcode_multi_head", "phi3", "gpt_neox", "bloom", "falcon_multi_query",
    "falcon_new_decoder", "falcon_rw", "mpt", "codegen", "persimmon", "modernbert", "multihead_attention",
    "torchvision_vit", "torchvision_swin", "timm_vit", "timm_swin", "timm_eva_fused", "qwen2_vl", "deberta",
    "qwen3_next", "deepseek_v3", "blip",
)  # fmt: skip
"""Entries whose parameters order queries, keys and values in ways of their own."""


# In the fast tests, every order of fused matrices, and an eighth of the others.
SOME = [
    pytest.param(name, marks=() if name in FUSED or number % 8 == 0 else pytest.mark.slow)
    for number, name in enumerate(ENTRIES)
]


@pytest.mark.parametrize("name", SOME)
def test_a_block_is_what_the_forward_pass_takes_for_a_head(name):
    entry = model_zoo.entries()[name]
    found = verified(entry)
    projections = [verdict for verdict in found.parameters.values() if is_projection(entry.expected(verdict.name))]
    assert projections
    assert [verdict for verdict in projections if verdict.status != "confirmed"] == []
    assert found.contradicted == ()
    assert all(re.search(MADE_ELSEWHERE[name], note) for note in found.notes)


def test_fused_layouts_are_checked():
    assert not set(FUSED).difference(ENTRIES)


@pytest.mark.parametrize("name", UNSEEN)
def test_an_exception_is_one(name):
    _, told = UNSEEN[name]
    assert re.search(told, str(verified(model_zoo.entries()[name])))


def test_exceptions_are_in_the_zoo():
    assert model_zoo.entries().keys() >= {*UNSEEN, *MADE_ELSEWHERE}


Q, K, V = Role.QUERY, Role.KEY, Role.VALUE
WRONG = {
    "contiguous, not by head": ("gpt_neox", "query_key_value", Rows(Q, K, V)),
    "by head, not contiguous": ("gpt2", "c_attn", Rows(Span(Q, 1), Span(K, 1), Span(V, 1), repeats="heads")),
    "values before keys": ("bloom", "query_key_value", Rows(Span(Q, 1), Span(V, 1), Span(K, 1), repeats="heads")),
    "keys before values": ("codegen", "qkv_proj", Rows(Q, K, V, repeats=4)),
    "no gate": ("qwen3_next", "q_proj", Rows(Span(Q, "heads", 16))),
    "gate first": ("qwen3_next", "q_proj", Rows(Span(Role.LINEAR, 1), Span(Q, 1), repeats="heads")),
    "by head, of a delta rule": (
        "lara_mini",
        "in_proj_qkv",
        Rows(Span(Q, 1, 5), Span(K, 1, 5), Span(V, 2, 3), repeats=2),
    ),
    "two heads in one": ("llama", "q_proj", Rows(Span(Q, 2, 12))),
    "half heads": ("llama", "k_proj", Rows(Span(K, 4, 3))),
    "all heads in one": ("mpt", "Wqkv", Rows(Span(Q, 1, 24), Span(K, 1, 24), V)),
    "a value for a key": ("bert", "value", Rows(K)),
    "no key": ("bert", "key", Rows(Role.LINEAR)),
    "inputs for outputs": ("bert", "query", Rows(Q, axis=1)),
}
"""Layouts that are wrong: the entry of the zoo, the child of its attention and the rows."""


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_layout_is_found(mistake, monkeypatch):
    name, child, rows = WRONG[mistake]
    entry = model_zoo.entries()[name]
    attention = next(module for module in entry.build().modules() if hasattr(module, child))
    right = layouts.find_layouts(attention)[0]
    monkeypatch.setattr(layouts, "REGISTERED", [])
    wrong = ModuleLayout(
        mistake,
        classes=(f"{type(attention).__module__}.{type(attention).__qualname__}",),
        parameters={**right.parameters, f"{child}.weight": rows},
        sizes=right.sizes,
    )
    register_layout(wrong)
    found = verified(entry)
    assert found.contradicted
    again = verified(entry, partition_layouts=found.layouts, partition_overrides=found.overrides)
    assert again.contradicted == ()


def test_state_spaces_and_gates_are_not_contradicted():
    """Mamba-2 has the products of linear attention, and gates of graphs have the names of queries and keys."""
    found = verified(model_zoo.entries()["mamba2"])
    assert found.contradicted == ()
    assert not found.is_changed
    assert found.parameters["backbone.layers.0.mixer.in_proj.weight"].status == "not seen"
    assert any("takes a query from backbone.layers.0.mixer.in_proj.weight" in note for note in found.notes)
    gates = pytest.importorskip("torch_geometric.nn").ResGatedGraphConv(6, 5)
    edges = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    found = verify_partition(gates, torch.randn(4, 6), edges, partition="transformer")
    assert (found.num_attention_calls, found.contradicted) == (0, ())
    assert found.parameters["lin_query.weight"].status == "confirmed"


class Attention(nn.Module):
    """Attention whose projections change nothing."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, *operands):
        return self.way(*(nn.functional.linear(operand, self.weight) for operand in operands))


def _eager(q, k, v):
    return (q @ k.transpose(-1, -2) / 2 + 1).softmax(-1) @ v


def _folded(q, k, v):
    q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
    scores = torch.baddbmm(torch.ones(()), q, k.mT, beta=0.5)
    return torch.bmm(nn.functional.dropout(nn.functional.softmax(scores, dim=-1), training=False), v)


def _einsum(q, k, v):
    scores = torch.einsum("bhid,bhjd->bhij", q, k)
    return torch.einsum("...ij,...jd->...id", scores.softmax(-1), v)


WAYS = {
    "fused": nn.functional.scaled_dot_product_attention,
    "eager": _eager,
    "folded": _folded,
    "einsum": _einsum,
    "weights on the right": lambda q, k, v: v.mT @ (q @ k.mT).softmax(-1).mT,
    "no softmax": lambda q, k, v: torch.matmul(torch.matmul(q, k.mT).tril(), v),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_operands_of_attention_are_seen(way):
    operands = [torch.randn(2, 3, tokens, 4) for tokens in (5, 6, 6)]
    if way == "no softmax":
        operands[0] = operands[0][:, :, :1]
    seen = []
    traced(Attention(WAYS[way]), operands, {}, on_call=lambda call: seen.append(call.factors))
    (factors,) = seen
    for factor, own in zip(factors.values(), operands, strict=True):
        flat = factor.tensor.unflatten(0, (2, 3)) if factor.tensor.dim() == 3 else factor.tensor
        assert any(torch.equal(form, own) for form in (flat, flat.mT))


def test_other_products_are_no_attention():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(torch.randn(3, 4, 4))
            self.back = nn.Linear(4, 2)

        def forward(self, tokens):
            hidden = torch.bmm(torch.bmm(tokens, self.experts).relu(), self.experts)
            return self.back(hidden).softmax(-1) @ self.back.weight

    assert not traced(Network(), [torch.randn(3, 5, 4)], {}).calls
