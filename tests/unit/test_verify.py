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
    assert found.contradicted or found.layouts, "no name tells this attention"
    arguments = {"partition_layouts": found.layouts, "partition_overrides": found.overrides}
    again = verify_partition(model, TOKENS, **arguments)
    assert not again.contradicted
    assert (again.layouts, again.overrides) == (found.layouts, found.overrides)
    optimizer = AdamMini(model, lr=1e-3, **arguments)
    by_head = [name for name, cut in optimizer.partition.items() if Role.QUERY in cut.role.roles and "head" in cut.cut]
    assert bool(by_head) == (style in BY_HEAD)
    assert all("query head" in again.parameters[name].reason for name in by_head)
    assert not found.overrides or style not in BY_HEAD
