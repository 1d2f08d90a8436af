"""`verify_partition` on attention in many styles: what it says, and that what it advises is right."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_adam_mini import AdamMini, partition_module, verify_partition
from lightning_adam_mini.partition import ModuleLayout, Role, Rows, Span

HEADS, HEAD_DIM = 4, 8
WIDTH = HEADS * HEAD_DIM


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`(batch, heads, tokens, head_dim)` to `(batch, tokens, width)`."""
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def split(x: Tensor, order: str) -> tuple[Tensor, ...]:
    """Fused rows of an order as in einops, to query, key and value `(batch, heads, tokens, head_dim)`."""
    sizes = {"3": 3, "h": HEADS, "d": HEAD_DIM}
    x = x.unflatten(-1, [sizes[letter] for letter in order.split()])
    places = [2 + order.split().index(letter) for letter in "3hd"]
    return tuple(x.permute(places[0], 0, places[1], 1, places[2]))


class Fused(nn.Module):
    """A fused matrix under a name of its own, in any order."""

    def __init__(self, order: str):
        super().__init__()
        self.order, self.num_heads = order, HEADS
        self.everything = nn.Linear(WIDTH, 3 * WIDTH)
        self.back = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.back(attend(*split(self.everything(x), self.order)))


class Separate(nn.Module):
    """Three projections under names of their own."""

    def __init__(self, names=("alpha", "beta", "gamma"), make=lambda: nn.Linear(WIDTH, WIDTH), order="h d"):
        super().__init__()
        self.names, self.order = names, order
        for name in names:
            setattr(self, name, make())
        self.back = nn.Linear(WIDTH, WIDTH)

    def heads(self, x):
        sizes = {"h": HEADS, "d": HEAD_DIM}
        x = x.unflatten(-1, [sizes[letter] for letter in self.order.split()])
        return x.movedim(2 + self.order.split().index("h"), 1)

    def forward(self, x):
        return self.back(attend(*(self.heads(getattr(self, name)(x)) for name in self.names)))


class Dense(nn.Module):
    """A weight of (inputs, outputs), multiplied from the right."""

    def __init__(self, inputs=WIDTH, outputs=WIDTH):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)

    def forward(self, x):
        return x @ self.weight


class Wrapper(nn.Module):
    """A projection in a child, with a low-rank factor beside it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


class Grouped(nn.Module):
    """Two query heads for each key, one group after the other."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x):
        x = self.mix(x).unflatten(-1, (2, 4, HEAD_DIM)).permute(0, 2, 3, 1, 4)
        q, k, v = x.split([2, 1, 1], 2)
        q, k, v = q.flatten(1, 2), k.repeat_interleave(2, 1).flatten(1, 2), v.repeat_interleave(2, 1).flatten(1, 2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Convolved(nn.Module):
    """Attention over the places of an image, from 1x1 convolutions."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv1d(WIDTH, 3 * WIDTH, 1)

    def forward(self, x):
        q, k, v = self.mix(x.mT).unflatten(1, (3, HEADS, HEAD_DIM)).unbind(1)
        return (v @ (q.mT @ k).softmax(-1).mT).flatten(1, 2).mT


class Bare(nn.Module):
    """Weights of (inputs, heads, head_dim) without a layer, as einsum takes them."""

    def __init__(self):
        super().__init__()
        self.alpha, self.beta, self.gamma = (nn.Parameter(torch.randn(WIDTH, HEADS, HEAD_DIM) / 6) for _ in range(3))
        self.back = nn.Parameter(torch.randn(HEADS, HEAD_DIM, WIDTH) / 6)

    def forward(self, x):
        q, k, v = (torch.einsum("btc,chd->bthd", x, weight) for weight in (self.alpha, self.beta, self.gamma))
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return torch.einsum("bqhd,hdc->bqc", torch.einsum("bhqk,bkhd->bqhd", weights, v), self.back)


class Normed(Separate):
    """Norms over all heads, and positions by rotation."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def heads(self, x):
        x = super().heads(self.norm(x) * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1))
        angles = torch.arange(x.shape[2])[:, None] * torch.ones(HEAD_DIM // 2)
        a, b = x.chunk(2, -1)
        return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


class LinearAttention(Separate):
    """Keys and values first."""

    def forward(self, x):
        q, k, v = (self.heads(getattr(self, name)(x)) for name in self.names)
        return self.back((q.softmax(-1) @ (k.softmax(-2).mT @ v)).transpose(1, 2).flatten(2))


class Experts(nn.Module):
    """Experts of (experts, inputs, outputs) in bare parameters."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, WIDTH, 16))
        self.down = nn.Parameter(torch.randn(3, 16, WIDTH))

    def forward(self, x):
        return torch.einsum("ebto,eoc->btc", torch.einsum("btc,eco->ebto", x, self.up).relu(), self.down)


def transformer(*blocks: nn.Module) -> nn.Sequential:
    """A model of tokens around some blocks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, WIDTH), *blocks, nn.Linear(WIDTH, 11))


TOKENS = torch.arange(10).view(2, 5)
IN_ORDER = ("3 h d", "h 3 d", "d 3 h")
STYLES = {
    **{f"fused {order}": lambda order=order: Fused(order) for order in (*IN_ORDER, "3 d h", "h d 3", "d h 3")},
    "separate": Separate,
    "interleaved": lambda: Separate(order="d h"),
    "copied names": lambda: Separate(("W_q", "W_k", "W_v")),
    "inputs first": lambda: Separate(make=Dense),
    "wrapped": lambda: Separate(make=Wrapper),
    "layers and norms": lambda: Separate(make=lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))),
    "grouped": Grouped,
    "bare": Bare,
    "normed": Normed,
    "linear attention": LinearAttention,
}
BY_HEAD = set(STYLES) - {"fused 3 d h", "fused h d 3"}
"""Styles whose heads the vocabulary of layouts can tell; others keep a number for each row."""


def heads_of(model, name, **arguments):
    """Numbers that are kept of a parameter's second moment."""
    return partition_module(model, "transformer", **arguments)[name].blocks.num_values


@pytest.mark.parametrize("style", STYLES)
def test_what_is_advised_is_confirmed(style):
    model = transformer(STYLES[style](), nn.Linear(WIDTH, WIDTH))
    found = verify_partition(model, TOKENS)
    assert found.is_changed, "no name tells this attention"
    arguments = {"partition_layouts": found.layouts, "partition_overrides": found.overrides}
    again = verify_partition(model, TOKENS, **arguments)
    assert not again.contradicted
    assert not again.is_changed
    assert (again.layouts, again.overrides) == (found.layouts, found.overrides)
    optimizer = AdamMini(model, lr=1e-3, **arguments)
    by_head = [
        name for name, cut in optimizer.partition.items() if Role.QUERY in cut.role.roles and "head" in cut.structure
    ]
    assert bool(by_head) == (style in BY_HEAD)
    assert all("query head" in again.parameters[name].reason for name in by_head)
    assert not found.overrides or style not in BY_HEAD


def test_convolutions_of_one_place_are_projections():
    model = transformer(Convolved())
    found = verify_partition(model, TOKENS)
    assert found.parameters["1.mix.weight"].status == "contradicted"
    again = verify_partition(model, TOKENS, partition_layouts=found.layouts, partition_overrides=found.overrides)
    assert not again.contradicted
    assert again.parameters["1.mix.weight"].status == "confirmed"


def test_known_names_of_weights_from_the_right():
    attention = Separate(("q_proj", "k_proj", "v_proj"), make=Dense)
    attention.num_heads = HEADS
    model = transformer(attention)
    assert not verify_partition(model, TOKENS).contradicted
    of_a_linear_layer = {
        f"{name}_proj.weight": Rows(role, axis=0)
        for name, role in {"q": Role.QUERY, "k": Role.KEY, "v": Role.VALUE}.items()
    }
    found = verify_partition(model, TOKENS, partition_layouts={"Separate": ModuleLayout("wrong", of_a_linear_layer)})
    assert {verdict.name for verdict in found.contradicted} == {f"1.{name}_proj.weight" for name in "qkv"}
    assert found.parameters["1.q_proj.weight"].reason.startswith("products sum over dimension 0, its rows")
    blocks = partition_module(model, layouts=found.layouts)["1.q_proj.weight"].blocks
    assert (blocks.axis, blocks.num_values) == (1, HEADS)


def test_experts_and_dense_layers_outside_of_attention():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = Dense(WIDTH, 48), Dense(48, WIDTH)
            self.experts = Experts()

        def forward(self, x):
            return self.down(self.up(x).relu()) + self.experts(x)

    model = transformer(Fused("3 h d"), Mlp())
    found = verify_partition(
        model,
        TOKENS,
        partition_layouts={
            "Mlp": ModuleLayout(
                "wrong",
                {
                    "up.weight": Role.MLP,
                    "down.weight": Role.MLP,
                    "experts.up": Rows(Role.EXPERT, axis=1, batch_axes=(0,)),
                    "experts.down": Rows(Role.EXPERT, axis=1, batch_axes=(0,)),
                },
            )
        },
    )
    assert [verdict.name for verdict in found.contradicted] == [
        "2.up.weight",
        "2.down.weight",
        "2.experts.up",
        "2.experts.down",
    ]
    cuts = partition_module(model, layouts=found.layouts)
    assert {name: (cuts[name].blocks.axis, cuts[name].blocks.batch_axes) for name in cuts if name.startswith("2.")} == {
        "2.up.weight": (1, ()),
        "2.down.weight": (1, ()),
        "2.experts.up": (2, (0,)),
        "2.experts.down": (2, (0,)),
    }
    again = verify_partition(model, TOKENS, partition_layouts=found.layouts)
    assert not again.contradicted, "a sum over experts contradicts nothing"


class Named(Fused):
    """A fused matrix under a usual name, with attributes that mislead."""

    def __init__(self, order="3 h d", **attributes):
        super().__init__(order)
        self.qkv = self._modules.pop("everything")
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.back(attend(*split(self.qkv(x), self.order)))


@pytest.mark.parametrize(
    ("order", "given", "right"),
    [("3 h d", "fused_per_head", "fused_contiguous"), ("h 3 d", "fused_contiguous", "fused_per_head")],
)
def test_the_right_order_has_a_name(order, given, right):
    found = verify_partition(transformer(Named(order)), TOKENS, partition_layouts={"Named": given})
    assert [verdict.name for verdict in found.contradicted] == ["1.qkv.weight"]
    assert found.layouts == {"Named": right}


def test_a_refused_matrix_is_judged_too():
    found = verify_partition(transformer(Named()), TOKENS)
    assert "the partition refuses it" in found.parameters["1.qkv.weight"].reason
    assert found.layouts == {"Named": "fused_contiguous"}


def test_head_counts_of_other_meaning_are_contradicted():
    layouts = {
        "Named": ModuleLayout(
            "of_attributes",
            {"qkv.weight": Rows(Span(Role.QUERY, "heads"), Role.KEY, Role.VALUE)},
            sizes={"heads": "groups", "kv_heads": "groups", "head_dim": 16},
        )
    }
    found = verify_partition(transformer(Named(groups=2)), TOKENS, partition_layouts=layouts)
    assert "blocks hold rows of several query heads: 2 blocks, 4 heads" in found.parameters["1.qkv.weight"].reason
    again = verify_partition(transformer(Named(groups=2)), TOKENS, partition_layouts=found.layouts)
    assert not again.contradicted


def test_sizes_that_differ_become_attributes():
    class Sized(nn.Module):
        def __init__(self, count):
            super().__init__()
            self.count, self.size = count, WIDTH // count
            self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x):
            heads = (layer(x).unflatten(-1, (self.count, -1)).transpose(1, 2) for layer in (self.a, self.b, self.c))
            return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

    model = transformer(Sized(2), Sized(4))
    found = verify_partition(model, TOKENS)
    cuts = partition_module(model, layouts=found.layouts)
    assert [cuts[f"{n}.a.weight"].blocks.num_values for n in (1, 2)] == [2, 4]
    assert found.layouts["Sized"].sizes == {"count": "count", "size": "size"}


def test_the_advice_can_be_pasted():
    for style in ("fused d 3 h", "bare", "fused 3 d h", "grouped"):
        model = transformer(STYLES[style]())
        found = verify_partition(model, TOKENS)
        names = {"ModuleLayout": ModuleLayout, "Role": Role, "Rows": Rows, "Span": Span}
        arguments = eval(f"dict({found.as_python()})", names)
        assert arguments.get("partition_layouts", {}) == found.layouts
        assert arguments.get("partition_overrides", {}) == found.overrides


def test_what_the_user_overrides_is_his_word():
    model = transformer(Fused("3 h d"))
    found = verify_partition(model, TOKENS, partition_overrides={"1.everything.weight": "row"})
    assert not found.contradicted
    assert not found.is_changed


def test_a_model_without_token_embedding_attends():
    class Network(nn.Sequential):
        def forward(self, image):
            return super().forward(image.flatten(2).mT)

    model = Network(nn.Linear(3, WIDTH), Separate())
    found = verify_partition(model, torch.randn(2, 3, 4, 4))
    assert any("auto selects default" in note for note in found.notes)
    assert {verdict.name for verdict in found.contradicted} == {"1.alpha.weight", "1.beta.weight"}
    assert not verify_partition(model, torch.randn(2, 3, 4, 4), partition_layouts=found.layouts).contradicted


# The model afterwards


class Busy(nn.Module):
    """A model with all that a forward pass may change or depend on."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, WIDTH, max_norm=0.5)
        self.normed = nn.BatchNorm1d(WIDTH)
        self.attention = Normed()
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(()))
        self.calls, self.last = 0, None
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, tokens):
        self.calls += 1
        self.seen += 1
        self.last = self.attention(self.dropout(self.normed(self.table(tokens).mT).mT)) * self.gate
        return {"hidden": self.last, "noise": (torch.rand(2), None)}


def test_the_model_is_as_it_was():
    model = Busy()
    model.table.weight.requires_grad_(False)
    model.attention.alpha.eval()
    model.gate.register_hook(lambda _: pytest.fail("a hook of the real parameter ran"))
    model.attention.back.weight.grad = torch.ones(WIDTH, WIDTH)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    objects = dict(model.named_parameters())
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    found = verify_partition(model, TOKENS)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))
    assert found.num_attention_calls == 1
    assert found.parameters["table.weight"].status == "confirmed"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter is objects[name] for name, parameter in model.named_parameters())
    assert [module.training for module in model.modules()] == modes
    assert (model.calls, model.last) == (0, None)
    assert model.attention.back.weight.grad.sum() == WIDTH**2
    assert not model.table.weight.requires_grad


def test_an_error_leaves_the_model_as_it_was():
    model = Busy()
    with pytest.raises(ValueError, match=r"forward pass of Busy does not take this input:\nIndexError"):
        verify_partition(model, TOKENS + 100)
    assert model.training
    assert model.calls == 0
    assert all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = transformer(Fused("d 3 h")).to(dtype)
    found = verify_partition(model, TOKENS)
    assert heads_of(model, "1.everything.weight", layouts=found.layouts) == 2 * HEADS + WIDTH


def test_wrapped_runs():
    """Activation checkpointing, compiled modules."""
    from torch.utils.checkpoint import checkpoint

    class Wrapped(Separate):
        def forward(self, x):
            for use_reentrant in (True, False):
                x = x + checkpoint(super().forward, x, use_reentrant=use_reentrant)
            return x

    model = transformer(Wrapped())
    model[1].compile(backend="eager")
    found = verify_partition(torch.compile(model, backend="eager"), TOKENS)
    assert found.num_attention_calls == 2
    assert heads_of(model, "1.alpha.weight", layouts=found.layouts) == HEADS


@pytest.mark.slow
def test_flexible_attention():
    """The operation is compiled."""
    from torch.nn.attention import flex_attention

    class Flexible(Separate):
        def forward(self, x):
            heads = [self.heads(getattr(self, name)(x)) for name in self.names]
            return self.back(flex_attention.flex_attention(*heads).transpose(1, 2).flatten(2))

    model = transformer(Flexible())
    found = verify_partition(model, TOKENS)
    assert heads_of(model, "1.beta.weight", layouts=found.layouts) == HEADS


def test_one_layer_that_runs_twice():
    block = Fused("h 3 d")
    found = verify_partition(transformer(block, block), TOKENS)
    assert found.num_attention_calls == 2
    assert heads_of(transformer(Fused("h 3 d")), "1.everything.weight", layouts=found.layouts) == 2 * HEADS + WIDTH


def test_no_attention():
    model = nn.Sequential(nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 11))
    found = verify_partition(model, TOKENS)
    assert "no attention was seen" in found.notes[0]
    assert {
        name: verdict.status for name, verdict in found.parameters.items() if name.endswith("weight")
    } == dict.fromkeys(("0.weight", "1.weight", "3.weight"), "confirmed")


def test_what_cannot_run():
    with pytest.raises(ValueError, match=r"0\.weight: is on the meta device.* build the model on the CPU"):
        verify_partition(transformer(Normed()).to("meta"), TOKENS)
    with pytest.raises(ValueError, match="run one batch through the model first"):
        verify_partition(nn.LazyLinear(3), TOKENS)
    with pytest.raises(ValueError, match="not a list"):
        verify_partition([], TOKENS)
    with pytest.raises(ValueError, match="no layout 'fused_contigous'"):
        verify_partition(transformer(Normed()), TOKENS, partition_layouts={"Normed": "fused_contigous"})


def test_a_softmax_by_hand_and_a_norm_of_vectors():
    class ByHand(Separate):
        def heads(self, x):
            return super().heads(x / torch.linalg.vector_norm(x, dim=-1)[..., None])

        def forward(self, x):
            q, k, v = (self.heads(getattr(self, name)(x)) for name in self.names)
            scores = (torch.einsum("bhqd,bhkd->bhqk", q, k)).exp()
            weights = scores / scores.sum(-1, keepdim=True)
            return self.back(torch.einsum("bhqk,bhkd->bqhd", weights, v).flatten(2))

    model = transformer(ByHand())
    found = verify_partition(model, TOKENS)
    assert heads_of(model, "1.alpha.weight", layouts=found.layouts) == HEADS


# Models that do odd things


class Projected(Separate):
    """Attention under known names, with a method to take the heads of."""

    def __init__(self, num_heads=HEADS):
        super().__init__(("q_proj", "k_proj", "v_proj"))
        self.num_heads = num_heads

    def operands(self, x):
        return [getattr(self, name)(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for name in self.names]

    def forward(self, x):
        return self.back(F.scaled_dot_product_attention(*self.operands(x)).transpose(1, 2).flatten(2))


class InPlace(Projected):
    """Writes to inputs, to operands, and to a list of its own."""

    def __init__(self):
        super().__init__()
        self.past = []
        self.register_buffer("cache", torch.zeros(2, HEADS, 9, HEAD_DIM))

    def forward(self, x):
        x.mul_(2)
        self.past.append(x)
        q, k, v = self.operands(x)
        q *= 2
        k[..., 0] = k[..., 0] * 2
        self.cache[:, :, :5] = k
        scores = q @ self.cache[:, :, :5].mT
        scores.masked_fill_(torch.ones(5, 5).triu(1).bool(), -1e9)
        return self.back((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Linear(Projected):
    """Keys and values first."""

    def forward(self, x):
        q, k, v = self.operands(x)
        return self.back((q @ (k.mT @ v)).transpose(1, 2).flatten(2))


class Folded(Projected):
    """One key for all queries, whose heads lie among the tokens."""

    def __init__(self):
        super().__init__()
        self.num_kv_heads = 1
        self.k_proj, self.v_proj = nn.Linear(WIDTH, HEAD_DIM), nn.Linear(WIDTH, HEAD_DIM)

    def forward(self, x):
        q = self.q_proj(x).reshape(len(x), -1, HEAD_DIM)
        return self.back(((q @ self.k_proj(x).mT).softmax(-1) @ self.v_proj(x)).view_as(x))


class Called(nn.Module):
    """Runs another module on other weights."""

    def __init__(self):
        super().__init__()
        self.inner = Projected()

    def forward(self, x):
        weights = {name: 2 * value for name, value in self.inner.named_parameters()}
        return torch.func.functional_call(self.inner, weights, (x,))


class Forces(nn.Module):
    """The derivative of an energy, in its forward pass."""

    def __init__(self):
        super().__init__()
        self.energy = Projected()

    def forward(self, x):
        x = x.detach().requires_grad_()
        return x + torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


def hooked():
    model = transformer(Projected())
    model[1].q_proj.register_forward_hook(lambda _module, _inputs, output: 2 * output + 1)
    model[1].register_forward_pre_hook(lambda _module, inputs: (inputs[0] + 1,))
    return model


def tied():
    model = transformer(Projected(), Projected())
    model[3].weight = model[0].weight
    model[2].q_proj.weight = model[1].q_proj.weight
    return model


def scripted():
    return transformer(Projected(), torch.jit.trace(nn.Linear(WIDTH, WIDTH), torch.randn(2, 5, WIDTH)))


ODD = {
    "in place": (lambda: transformer(InPlace()), HEADS),
    "functional call": (lambda: transformer(Called()), HEADS),
    "forces": (lambda: transformer(Forces()), HEADS),
    "hooks that return": (hooked, HEADS),
    "tied weights": (tied, HEADS),
    "data parallel": (lambda: nn.DataParallel(transformer(Projected())), HEADS),
    "one head": (lambda: transformer(Projected(1)), 1),
    "heads of one channel": (lambda: transformer(Projected(WIDTH)), WIDTH),
    "linear attention": (lambda: transformer(Linear()), HEADS),
    "heads among tokens": (lambda: transformer(Folded()), HEADS),
    "a scripted part": (scripted, HEADS),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(("odd", "tokens"), [(odd, n) for odd in ODD for n in (5, 1) if (odd, n) != ("in place", 1)])
def test_odd_models_are_judged_and_left_as_they_were(odd, tokens):
    make, heads = ODD[odd]
    model, inputs = make(), torch.arange(2 * tokens).view(2, tokens)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = [vars(module).copy() for module in model.modules()]
    modes = [module.training for module in model.modules()]
    found = verify_partition(model, inputs)
    assert not found.contradicted
    (query,) = {verdict.reason for name, verdict in found.parameters.items() if name.endswith("q_proj.weight")}
    assert query == f"{heads} query head{'s' if heads > 1 else ''}"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [vars(module).keys() for module in model.modules()] == [own.keys() for own in attributes]
    assert not any(getattr(module, "past", ()) for module in model.modules())


def test_inputs_are_as_they_were():
    inputs = torch.randn(2, 5, WIDTH)
    before = inputs.clone()
    assert verify_partition(nn.Sequential(InPlace()), inputs, partition="transformer").num_attention_calls == 1
    assert torch.equal(inputs, before)
