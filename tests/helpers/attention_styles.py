"""Attention as people write it: forty styles of names, orders, wrappers and orientations, in our own words.

Each style declares what its forward pass would do with each projection, as role and number of blocks: the truth. None
of them is known by its class. `WIDTH` inputs, four query heads of six rows, two key-value heads where they are grouped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn

from lightning_adam_mini.partition import ModuleLayout, Role, Rows, Span

WIDTH, HEADS, KV_HEADS, SIZE = 24, 4, 2, 6
INNER, KV_INNER = HEADS * SIZE, KV_HEADS * SIZE
Q, K, V, OUT = ("query", HEADS), ("key", HEADS), ("value", INNER), ("attention_output", WIDTH)
KG, VG = ("key", KV_HEADS), ("value", KV_INNER)
QKV = ("query+key+value", HEADS + HEADS + INNER)
QKV_GROUPED = ("query+key+value", HEADS + KV_HEADS + KV_INNER)
VKQ = ("value+key+query", INNER + HEADS + HEADS)
KV = ("key+value", HEADS + INNER)


class Attention(nn.Module):
    """A module with the children, parameters and attributes given."""

    def __init__(self, **members: object) -> None:
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A layer without a bias."""
    return nn.Linear(inputs, outputs, bias=False)


def parameter(*shape: int) -> nn.Parameter:
    """A parameter of a module's own."""
    return nn.Parameter(torch.randn(shape))


class DenseFromTheRight(nn.Module):
    """A layer that keeps its weights as (inputs, outputs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = parameter(inputs, outputs), parameter(outputs)

    def forward(self, tokens):
        return tokens @ self.weight + self.bias


class Kernel(nn.Module):
    """The same under the name that JAX gives it, by an einsum."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel = parameter(inputs, outputs)

    def forward(self, tokens):
        return torch.einsum("...i,io->...o", tokens, self.kernel)


class DenseOfOddInputs(nn.Module):
    """A layer whose forward pass cannot run alone, so that nobody can see which way it takes its weights."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = parameter(inputs, outputs)

    def forward(self, tokens, mask):
        return (tokens * mask) @ self.weight


class Wrapped(nn.Module):
    """A layer around another."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = linear(inputs, outputs)

    def forward(self, tokens):
        return self.linear(tokens)


class LoRA(nn.Module):
    """A layer with low-rank factors beside it, written by hand."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = linear(inputs, outputs)
        self.lora_A, self.lora_B = linear(inputs, rank), linear(rank, outputs)


class LoRAOfParameters(nn.Module):
    """The same with factors that are parameters, taken from the right."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2) -> None:
        super().__init__()
        self.linear, self.lora_a, self.lora_b = (
            linear(inputs, outputs),
            parameter(inputs, rank),
            parameter(rank, outputs),
        )


def separate(names: str, layer: Callable[[int, int], nn.Module] = linear, kv: int = INNER, **attributes: object):
    """Projections of queries, keys, values and outputs under four names."""
    q, k, v, out = names.split()
    layers = {q: layer(WIDTH, INNER), k: layer(WIDTH, kv), v: layer(WIDTH, kv), out: layer(INNER, WIDTH)}
    return Attention(**layers, **attributes)


def truth_of(names: str, suffix: str = "weight", key=K, value=V):
    """What four names mean."""
    q, k, v, out = names.split()
    return {f"{q}.{suffix}": Q, f"{k}.{suffix}": key, f"{v}.{suffix}": value, f"{out}.{suffix}": OUT}


@dataclass(frozen=True)
class Style:
    """One way to write attention.

    Args:
        build: Makes the module.
        truth: Role and number of blocks of each projection.
        outcome: What the library does on its own: all `right`, some kept as in AdamW and `named` by a warning, or
            `refused` with an error.
        layout: What settles a style that is not right by itself.
    """

    build: Callable[[], nn.Module]
    truth: dict[str, tuple[str, int]]
    outcome: str = "right"
    layout: str | ModuleLayout = ""


def _separate(names: str, outcome: str = "right", suffix: str = "weight", layout="", **options):
    grouped = options.get("kv") == KV_INNER
    truth = truth_of(names, suffix, *((KG, VG) if grouped else ()))
    return Style(lambda: separate(names, **options), truth, outcome, layout)


def _fused(
    name: str, layer, truth: tuple[str, int], layout, out: str = "out_proj", suffix: str = ".weight", **attributes
):
    rows = INNER + 2 * KV_INNER if truth == QKV_GROUPED else 3 * INNER

    def build():
        return Attention(**{name: layer(WIDTH, rows), out: linear(INNER, WIDTH)}, **attributes)

    return Style(build, {f"{name}{suffix}": truth, f"{out}.weight": OUT}, "refused", layout)


def conv1x1(inputs: int, outputs: int) -> nn.Conv2d:
    """A convolution that mixes channels alone."""
    return nn.Conv2d(inputs, outputs, 1, bias=False)


def from_the_right(inputs: int, outputs: int) -> nn.Parameter:
    """A bare matrix (inputs, outputs)."""
    return parameter(inputs, outputs)


def _with_kv(q: str, kv: str, layout: str, **attributes):
    def build():
        members = {q: linear(WIDTH, INNER), kv: linear(WIDTH, 2 * INNER), "proj": linear(INNER, WIDTH)}
        return Attention(**members, **attributes)

    return Style(build, {f"{q}.weight": Q, f"{kv}.weight": KV, "proj.weight": OUT}, "refused", layout)


def _annotated():
    return Attention(h=HEADS, d_k=SIZE, linears=nn.ModuleList([linear(WIDTH, INNER) for _ in range(4)]))


def _transformer_lens():
    weights = {f"W_{letter}": parameter(HEADS, WIDTH, SIZE) for letter in "QKV"}
    biases = {f"b_{letter}": parameter(HEADS, SIZE) for letter in "QKV"}
    return Attention(**weights, **biases, W_O=parameter(HEADS, SIZE, WIDTH), n_heads=HEADS, d_head=SIZE)


def _jax_general():
    weights = {f"{name}_kernel": parameter(WIDTH, HEADS, SIZE) for name in ("query", "key", "value")}
    return Attention(**weights, out_kernel=parameter(HEADS, SIZE, WIDTH), num_heads=HEADS, head_dim=SIZE)


def _torchtitan_linear():
    inner = Attention(wq=linear(WIDTH, INNER), wk=linear(WIDTH, KV_INNER), wv=linear(WIDTH, KV_INNER))
    return Attention(qkv_linear=inner, wo=linear(INNER, WIDTH), n_heads=HEADS, n_kv_heads=KV_HEADS)


def _matrices_of_its_own():
    """`x @ self.W_q`, which nothing but the forward pass tells from `self.W_q @ x`."""
    weights = {name: parameter(WIDTH, INNER) for name in ("W_q", "W_k", "W_v", "W_o")}
    return Attention(**weights, num_heads=HEADS)


def _sequential(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(linear(inputs, outputs), nn.LayerNorm(outputs))


def _modern_speedrun():
    return Attention(qkv_w=parameter(3, INNER, WIDTH), c_proj=linear(INNER, WIDTH), num_heads=HEADS, head_dim=SIZE)


def _old_spectral_norm(inputs: int, outputs: int) -> nn.Module:
    return nn.utils.spectral_norm(linear(inputs, outputs))


_HEADS = {"num_heads": HEADS}
_GROUPED = {"kv": KV_INNER}
_ROWS = Rows(Span(Role.VALUE, "heads"), Span(Role.KEY, "heads"), Span(Role.QUERY, "heads"))
_ANNOTATED = ModuleLayout(
    "annotated",
    {
        "linears.0.weight": Role.QUERY,
        "linears.1.weight": Role.KEY,
        "linears.2.weight": Role.VALUE,
        "linears.3.weight": Role.ATTENTION_OUTPUT,
    },
)

STYLES: dict[str, Style] = {
    # separate projections
    "llama2.c": _separate("wq wk wv wo", n_local_heads=HEADS, n_local_kv_heads=KV_HEADS, **_GROUPED),
    "nanochat": _separate("c_q c_k c_v c_proj", n_head=HEADS, n_kv_head=KV_HEADS, **_GROUPED),
    "fairseq": _separate("q_proj k_proj v_proj out_proj", **_HEADS),
    "ESM": _separate("q_proj k_proj v_proj out_proj", attention_heads=HEADS, num_heads=HEADS, head_dim=SIZE),
    "x-transformers": _separate("to_q to_k to_v to_out", heads=HEADS),
    "OpenNMT": _separate("linear_query linear_keys linear_values final_linear", head_count=HEADS, dim_per_head=SIZE),
    "Keras port": _separate("query_dense key_dense value_dense output_dense", **_HEADS),
    "textbook capitals": _separate("W_q W_k W_v W_o", **_HEADS),
    "textbook shouting": _separate("WQ WK WV WO", n_heads=HEADS),
    "camel case": _separate("toQ toK toV unifyHeads", heads=HEADS),
    "one letter": _separate("Q K V O", nhead=HEADS),
    "plural": _separate("queries keys values fc_out", heads=HEADS),
    "fc first": _separate("fc_q fc_k fc_v fc_o", n_heads=HEADS),
    "layers": _separate("q_layer k_layer v_layer out_layer", **_HEADS),
    "long names": _separate("query_projection key_projection value_projection out_projection", n_heads=HEADS),
    "names last": _separate("proj_q proj_k proj_v proj", n_heads=HEADS),
    "heads of a configuration": _separate(
        "query_layer key_layer value_layer out", config=SimpleNamespace(n_head=HEADS)
    ),
    "a group of a name of its own": _separate("w_q w_k w_v w_o", kv=KV_INNER, num_heads=HEADS, my_groups=KV_HEADS),
    "no head count": _separate("query key value out", "refused"),
    # in wrappers
    "Kyutai": _separate("q_proj k_proj v_proj o_proj", suffix="linear.weight", layer=Wrapped, **_HEADS),
    "LoRA by hand": _separate("W_q W_k W_v W_o", suffix="base_layer.weight", layer=LoRA, **_HEADS),
    "LoRA of parameters": _separate("to_q to_k to_v to_out", suffix="linear.weight", layer=LoRAOfParameters, **_HEADS),
    "norms behind": _separate("to_q to_k to_v to_out", suffix="0.weight", layer=_sequential, heads=HEADS),
    "old spectral norm": _separate("q k v o", suffix="weight_orig", layer=_old_spectral_norm, **_HEADS),
    "newer torchtitan": Style(
        _torchtitan_linear,
        {"qkv_linear.wq.weight": Q, "qkv_linear.wk.weight": KG, "qkv_linear.wv.weight": VG, "wo.weight": OUT},
    ),
    # other orientations
    "weights from the right": _separate("q_proj k_proj v_proj o_proj", layer=DenseFromTheRight, **_HEADS),
    "JAX kernels": _separate("query key value out", suffix="kernel", layer=Kernel, **_HEADS),
    "TransformerLens": Style(
        _transformer_lens, {"W_Q": Q, "W_K": K, "W_V": V, "W_O": OUT, **{f"b_{x}": ("bias", INNER) for x in "QKV"}}
    ),
    "DenseGeneral": Style(_jax_general, {"query_kernel": Q, "key_kernel": K, "value_kernel": V, "out_kernel": OUT}),
    "layers that do not run": _separate("q_proj k_proj v_proj o_proj", "named", layer=DenseOfOddInputs, **_HEADS),
    "matrices of its own": Style(_matrices_of_its_own, {"W_q": Q, "W_k": K, "W_v": V, "W_o": OUT}, "named"),
    # names that say nothing
    "Annotated Transformer": Style(
        _annotated,
        {"linears.0.weight": Q, "linears.1.weight": K, "linears.2.weight": V, "linears.3.weight": OUT},
        "named",
        _ANNOTATED,
    ),
    "numbered": _separate("lin1 lin2 lin3 lin4", "named", **_HEADS),
    "unnamed fused": Style(
        lambda: Attention(mix=linear(WIDTH, 3 * INNER), back=linear(INNER, WIDTH), num_heads=HEADS),
        {"mix.weight": QKV, "back.weight": OUT},
        "named",
        "fused_contiguous",
    ),
    # fused
    "nanoGPT": _fused("c_attn", linear, QKV, "fused_contiguous", "c_proj", n_head=HEADS),
    "flash-attention": _fused("Wqkv", linear, QKV_GROUPED, "fused_contiguous", num_heads=HEADS, num_heads_kv=KV_HEADS),
    "flash-attention across": _with_kv("Wq", "Wkv", "fused_contiguous", **_HEADS),
    "open_clip": _fused("in_proj_weight", lambda i, o: parameter(o, i), QKV, "fused_contiguous", suffix="", **_HEADS),
    "modded-nanogpt": Style(_modern_speedrun, {"qkv_w": ("query+key+value", 0), "c_proj.weight": OUT}, "refused"),
    "Megatron": _fused(
        "query_key_value", linear, QKV_GROUPED, "fused_per_group", n_heads=HEADS, num_query_groups=KV_HEADS
    ),
    "by head": _fused("attn_qkv", linear, QKV, "fused_per_head", **_HEADS),
    "capitals fused": _fused("QKV", linear, QKV, "fused_contiguous", heads=HEADS),
    "kqv": _fused("kqv", linear, QKV, "fused_contiguous", heads=HEADS),
    "values first": _fused(
        "to_vkq",
        linear,
        VKQ,
        ModuleLayout("vkq", {"to_vkq.weight": _ROWS, "out_proj.weight": Role.ATTENTION_OUTPUT}),
        heads=HEADS,
    ),
    "in_proj": _fused("in_proj", linear, QKV, "fused_contiguous", **_HEADS),
    "one bare matrix": _fused("w_qkv", from_the_right, QKV, "fused_contiguous", suffix="", **_HEADS),
    "1x1 convolution": _fused("to_qkv", conv1x1, QKV, "fused_contiguous", heads=HEADS),
    "one key-value head": Style(
        lambda: Attention(
            qkv=linear(WIDTH, INNER + 2 * SIZE), out=linear(INNER, WIDTH), n_head=HEADS, multi_query=True
        ),
        {"qkv.weight": ("query+key+value", HEADS + 1 + SIZE), "out.weight": OUT},
        "refused",
        "fused_contiguous",
    ),
}
