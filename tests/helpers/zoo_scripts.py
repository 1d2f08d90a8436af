"""Models in the manner of well-known training scripts and small libraries, as the zoo's files build them.

The classes have the names, children, parameters and attributes that those scripts give theirs, and compute what they
compute; the text is our own. The scripts themselves are no packages.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _split(tensor: Tensor, heads: int) -> Tensor:
    """`(batch, tokens, heads * size)` as `(batch, heads, tokens, size)`."""
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).flatten(2)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention with key-value heads that several query heads share."""
    shared = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(shared, 1) for tensor in (key, value))
    return F.scaled_dot_product_attention(query, key, value)


class Tokens(nn.Module):
    """Embeds tokens, runs a layer over them, and predicts the next."""

    def __init__(self, layer: nn.Module, width: int, tokens: int = 19):
        super().__init__()
        self.wte = nn.Embedding(tokens, width)
        self.layer = layer
        self.lm_head = nn.Linear(width, tokens, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.wte(tokens)
        return self.lm_head(hidden + self.layer(hidden))


def _of_tokens(build):
    """A builder of a whole model around the layer that `build` makes; it takes the layer's width and arguments."""

    def builder(width: int, *arguments: int, **named: int) -> nn.Module:
        return Tokens(build(width, *arguments, **named), width)

    return builder


class NanoGPT:
    class CausalSelfAttention(nn.Module):
        def __init__(self, config: SimpleNamespace):
            super().__init__()
            self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
            self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
            self.n_head, self.n_embd, self.dropout = config.n_head, config.n_embd, config.dropout

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (_split(part, self.n_head) for part in self.c_attn(x).split(self.n_embd, dim=2))
            return self.c_proj(_merge(_attend(q, k, v)))


nanogpt = _of_tokens(
    lambda width, n_head: NanoGPT.CausalSelfAttention(
        SimpleNamespace(n_embd=width, n_head=n_head, bias=True, dropout=0.0)
    )
)


class MinGPT:
    class CausalSelfAttention(nn.Module):
        def __init__(self, n_embd: int, n_head: int):
            super().__init__()
            self.key, self.query, self.value, self.proj = (nn.Linear(n_embd, n_embd) for _ in range(4))
            self.n_head = n_head

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (_split(layer(x), self.n_head) for layer in (self.query, self.key, self.value))
            return self.proj(_merge(_attend(q, k, v)))


mingpt = _of_tokens(MinGPT.CausalSelfAttention)


class Llama2c:
    class Attention(nn.Module):
        def __init__(self, dim: int, n_heads: int, n_kv_heads: int):
            super().__init__()
            self.n_kv_heads = n_kv_heads
            self.n_local_heads, self.n_local_kv_heads = n_heads, n_kv_heads
            self.n_rep, self.head_dim = n_heads // n_kv_heads, dim // n_heads
            self.wq = nn.Linear(dim, n_heads * self.head_dim, bias=False)
            self.wk = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
            self.wv = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
            self.wo = nn.Linear(n_heads * self.head_dim, dim, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = _split(self.wq(x), self.n_local_heads), *self._shared(x)
            return self.wo(_merge(_attend(q, k, v)))

        def _shared(self, x: Tensor) -> list[Tensor]:
            return [_split(layer(x), self.n_local_kv_heads) for layer in (self.wk, self.wv)]

    class FeedForward(nn.Module):
        def __init__(self, dim: int, hidden: int):
            super().__init__()
            self.w1, self.w3 = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
            self.w2 = nn.Linear(hidden, dim, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.w2(F.silu(self.w1(x)) * self.w3(x))


llama2c = _of_tokens(
    lambda width, hidden, **heads: nn.Sequential(Llama2c.Attention(width, **heads), Llama2c.FeedForward(width, hidden))
)


class MiniMind:
    class Attention(nn.Module):
        def __init__(self, width: int, n_heads: int, n_kv_heads: int):
            super().__init__()
            self.num_key_value_heads = self.n_local_kv_heads = n_kv_heads
            self.n_local_heads, self.n_rep, self.head_dim = n_heads, n_heads // n_kv_heads, width // n_heads
            self.q_proj = nn.Linear(width, n_heads * self.head_dim, bias=False)
            self.k_proj, self.v_proj = (nn.Linear(width, n_kv_heads * self.head_dim, bias=False) for _ in range(2))
            self.o_proj = nn.Linear(n_heads * self.head_dim, width, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            q = _split(self.q_proj(x), self.n_local_heads)
            k, v = (_split(layer(x), self.n_local_kv_heads) for layer in (self.k_proj, self.v_proj))
            return self.o_proj(_merge(_attend(q, k, v)))

    class FeedForward(nn.Module):
        def __init__(self, width: int, hidden: int):
            super().__init__()
            self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
            self.down_proj = nn.Linear(hidden, width, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    class MoEGate(nn.Module):
        def __init__(self, width: int, num_experts: int):
            super().__init__()
            self.n_routed_experts = num_experts
            self.weight = nn.Parameter(torch.randn(num_experts, width) / width)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight).softmax(-1)

    class MOEFeedForward(nn.Module):
        """Experts that all tokens choose, each with its own weight, and one more beside them."""

        def __init__(self, width: int, hidden: int, num_experts: int):
            super().__init__()
            self.experts = nn.ModuleList(MiniMind.FeedForward(width, hidden) for _ in range(num_experts))
            self.gate = MiniMind.MoEGate(width, num_experts)
            self.shared_experts = nn.ModuleList([MiniMind.FeedForward(width, hidden)])

        def forward(self, x: Tensor) -> Tensor:
            chosen = zip(self.gate(x).split(1, -1), self.experts, strict=True)
            return sum(weight * expert(x) for weight, expert in chosen) + self.shared_experts[0](x)


minimind = _of_tokens(
    lambda width, hidden, num_experts, **heads: nn.Sequential(
        MiniMind.Attention(width, **heads), MiniMind.MOEFeedForward(width, hidden, num_experts)
    )
)


class Nanochat:
    class CausalSelfAttention(nn.Module):
        def __init__(self, n_embd: int, n_head: int, n_kv_head: int):
            super().__init__()
            self.n_head, self.n_kv_head, self.n_embd, self.head_dim = n_head, n_kv_head, n_embd, n_embd // n_head
            self.c_q = nn.Linear(n_embd, n_head * self.head_dim, bias=False)
            self.c_k, self.c_v = (nn.Linear(n_embd, n_kv_head * self.head_dim, bias=False) for _ in range(2))
            self.c_proj = nn.Linear(n_embd, n_embd, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            q = _split(self.c_q(x), self.n_head)
            k, v = (_split(layer(x), self.n_kv_head) for layer in (self.c_k, self.c_v))
            q, k = (F.rms_norm(tensor, tensor.shape[-1:]) for tensor in (q, k))
            return self.c_proj(_merge(_attend(q, k, v)))


nanochat = _of_tokens(Nanochat.CausalSelfAttention)


class ModdedNanoGPT:
    class CausalSelfAttention(nn.Module):
        """Query, key, value and output projection in one tensor."""

        def __init__(self, dim: int, num_heads: int, head_dim: int):
            super().__init__()
            self.num_heads, self.head_dim, self.dim, self.hdim = num_heads, head_dim, dim, num_heads * head_dim
            self.qkvo_w = nn.Parameter(torch.randn(4 * dim, self.hdim) / dim**0.5)
            self.attn_gate = nn.Linear(4, num_heads, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            qkv = _split(F.linear(x, self.qkvo_w[: 3 * self.dim]), 3 * self.num_heads)
            y = _attend(*qkv.chunk(3, dim=1)) * self.attn_gate(x[..., :4]).sigmoid().transpose(1, 2)[..., None]
            return F.linear(_merge(y), self.qkvo_w[3 * self.dim :])


class StackedNanoGPT:
    class CausalSelfAttention(nn.Module):
        """Query, key and value as three matrices of one tensor."""

        def __init__(self, dim: int, num_heads: int, head_dim: int):
            super().__init__()
            self.num_heads, self.head_dim = num_heads, head_dim
            self.qkv_w = nn.Parameter(torch.randn(3, num_heads * head_dim, dim) / dim**0.5)
            self.c_proj = nn.Linear(num_heads * head_dim, dim, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            qkv = _split(F.linear(x, self.qkv_w.flatten(end_dim=1)), 3 * self.num_heads)
            return self.c_proj(_merge(_attend(*qkv.chunk(3, dim=1))))


modded_nanogpt = _of_tokens(ModdedNanoGPT.CausalSelfAttention)
stacked_nanogpt = _of_tokens(StackedNanoGPT.CausalSelfAttention)


class LitGPT:
    class CausalSelfAttention(nn.Module):
        def __init__(self, config: SimpleNamespace):
            super().__init__()
            rows = (config.n_head + 2 * config.n_query_groups) * config.head_size
            self.qkv = nn.Linear(config.n_embd, rows)
            self.proj = nn.Linear(config.n_head * config.head_size, config.n_embd)
            self.config = config

        def forward(self, x: Tensor) -> Tensor:
            groups = self.config.n_query_groups
            counts = (self.config.n_head, groups, groups)
            parts = self.qkv(x).split([count * self.config.head_size for count in counts], dim=-1)
            q, k, v = (_split(part, count) for part, count in zip(parts, counts, strict=True))
            return self.proj(_merge(_attend(q, k, v)))

    class LLaMAMLP(nn.Module):
        def __init__(self, width: int, hidden: int):
            super().__init__()
            self.fc_1, self.fc_2 = (nn.Linear(width, hidden) for _ in range(2))
            self.proj = nn.Linear(hidden, width)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(F.silu(self.fc_1(x)) * self.fc_2(x))


class OldLitGPT:
    class CausalSelfAttention(nn.Module):
        """The queries, key and value of each group follow each other."""

        def __init__(self, config: SimpleNamespace):
            super().__init__()
            rows = (config.n_head + 2 * config.n_query_groups) * config.head_size
            self.attn = nn.Linear(config.n_embd, rows)
            self.proj = nn.Linear(config.n_head * config.head_size, config.n_embd)
            self.config = config

        def forward(self, x: Tensor) -> Tensor:
            config = self.config
            queries = config.n_head // config.n_query_groups
            grouped = self.attn(x).unflatten(-1, (config.n_query_groups, queries + 2, config.head_size))
            parts = grouped.split((queries, 1, 1), dim=-2)
            q, k, v = (part.flatten(2, 3).transpose(1, 2) for part in parts)
            return self.proj(_merge(_attend(q, k, v)))


def _lit_config(width: int, **sizes: int) -> SimpleNamespace:
    return SimpleNamespace(n_embd=width, **sizes)


litgpt = _of_tokens(
    lambda width, hidden, **sizes: nn.Sequential(
        LitGPT.CausalSelfAttention(_lit_config(width, **sizes)), LitGPT.LLaMAMLP(width, hidden)
    )
)
old_litgpt = _of_tokens(lambda width, **sizes: OldLitGPT.CausalSelfAttention(_lit_config(width, **sizes)))


class Torchtitan:
    class QKVLinear(nn.Module):
        def __init__(self, dim: int, n_heads: int, n_kv_heads: int, head_dim: int):
            super().__init__()
            self.head_dim = head_dim
            self.wq = nn.Linear(dim, n_heads * head_dim, bias=False)
            self.wk, self.wv = (nn.Linear(dim, n_kv_heads * head_dim, bias=False) for _ in range(2))

        def forward(self, x: Tensor) -> list[Tensor]:
            return [layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.wq, self.wk, self.wv)]

    class FusedQKVLinear(nn.Module):
        """Knows its heads by the rows alone, since tensor parallelism may have split them."""

        def __init__(self, dim: int, n_heads: int, n_kv_heads: int, head_dim: int):
            super().__init__()
            self.head_dim, self.heads_per_kv, self.r_dim = head_dim, n_heads // n_kv_heads, n_heads // n_kv_heads + 2
            self.wqkv = nn.Linear(dim, n_kv_heads * self.r_dim * head_dim, bias=False)

        def forward(self, x: Tensor) -> list[Tensor]:
            rows = self.wqkv(x).unflatten(-1, (-1, self.r_dim, self.head_dim))
            return [part.flatten(2, 3) for part in rows.split((self.heads_per_kv, 1, 1), dim=-2)]

    class GQAttention(nn.Module):
        def __init__(self, dim: int, n_heads: int, n_kv_heads: int, head_dim: int, fused: bool):
            super().__init__()
            self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
            projections = Torchtitan.FusedQKVLinear if fused else Torchtitan.QKVLinear
            self.qkv_linear = projections(dim, n_heads, n_kv_heads, head_dim)
            self.wo = nn.Linear(n_heads * head_dim, dim, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (tensor.transpose(1, 2) for tensor in self.qkv_linear(x))
            return self.wo(_merge(_attend(q, k, v)))


torchtitan = _of_tokens(Torchtitan.GQAttention)


class OpenClip:
    class Attention(nn.Module):
        def __init__(self, dim: int, num_heads: int):
            super().__init__()
            self.num_heads, self.head_dim = num_heads, dim // num_heads
            self.in_proj_weight = nn.Parameter(torch.randn(3 * dim, dim) * self.head_dim**-0.5)
            self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
            self.head_scale = nn.Parameter(torch.ones(num_heads, 1, 1))
            self.out_proj = nn.Linear(dim, dim)

        def forward(self, x: Tensor) -> Tensor:
            parts = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
            q, k, v = (_split(part, self.num_heads) for part in parts)
            return self.out_proj(_merge(_attend(q, k, v) * self.head_scale))


open_clip = _of_tokens(OpenClip.Attention)


class FlashAttention:
    class Inner(nn.Module):
        def forward(self, q: Tensor, kv: Tensor) -> Tensor:
            """Take `(batch, tokens, heads, size)` and `(batch, tokens, 2, heads, size)`."""
            k, v = kv.unbind(dim=2)
            return _merge(_attend(*(tensor.transpose(1, 2) for tensor in (q, k, v))))

    class MHA(nn.Module):
        def __init__(self, embed_dim: int, num_heads: int, num_heads_kv: int, cross_attn: bool = False):
            super().__init__()
            self.num_heads, self.num_heads_kv, self.head_dim = num_heads, num_heads_kv, embed_dim // num_heads
            self.cross_attn = cross_attn
            queries, others = num_heads * self.head_dim, 2 * num_heads_kv * self.head_dim
            if cross_attn:
                self.Wq, self.Wkv = nn.Linear(embed_dim, queries), nn.Linear(embed_dim, others)
            else:
                self.Wqkv = nn.Linear(embed_dim, queries + others)
            self.inner_attn = FlashAttention.Inner()
            self.inner_cross_attn = FlashAttention.Inner()
            self.out_proj = nn.Linear(embed_dim, embed_dim)

        def forward(self, x: Tensor) -> Tensor:
            queries = self.num_heads * self.head_dim
            q, kv = (self.Wq(x), self.Wkv(x)) if self.cross_attn else self.Wqkv(x).tensor_split([queries], dim=-1)
            q, kv = q.unflatten(-1, (-1, self.head_dim)), kv.unflatten(-1, (2, -1, self.head_dim))
            return self.out_proj(self.inner_cross_attn(q, kv))


flash_attention = _of_tokens(FlashAttention.MHA)


class TransformerLens:
    class Attention(nn.Module):
        def __init__(self, cfg: SimpleNamespace):
            super().__init__()
            self.cfg = cfg
            heads, shared = cfg.n_heads, cfg.n_key_value_heads
            prefix = "" if shared is None else "_"
            self.W_Q = nn.Parameter(torch.randn(heads, cfg.d_model, cfg.d_head))
            self.W_O = nn.Parameter(torch.randn(heads, cfg.d_head, cfg.d_model))
            self.b_Q, self.b_O = nn.Parameter(torch.zeros(heads, cfg.d_head)), nn.Parameter(torch.zeros(cfg.d_model))
            for name in "KV":
                setattr(self, f"{prefix}W_{name}", nn.Parameter(torch.randn(shared or heads, cfg.d_model, cfg.d_head)))
                setattr(self, f"{prefix}b_{name}", nn.Parameter(torch.zeros(shared or heads, cfg.d_head)))

        def forward(self, x: Tensor) -> Tensor:
            prefix = "" if self.cfg.n_key_value_heads is None else "_"
            names = ("_Q", *(f"{prefix}_{name}" for name in "KV"))
            q, k, v = (self._project(x, name, "" if name == "_Q" else prefix) for name in names)
            return torch.einsum("bhie,hed->bid", _attend(q, k, v), self.W_O) + self.b_O

        def _project(self, x: Tensor, name: str, prefix: str) -> Tensor:
            letter = name[-1]
            weight, bias = getattr(self, f"{prefix}W_{letter}"), getattr(self, f"{prefix}b_{letter}")
            return torch.einsum("bid,hde->bhie", x, weight) + bias[:, None]

    class MLP(nn.Module):
        def __init__(self, cfg: SimpleNamespace):
            super().__init__()
            self.cfg = cfg
            self.W_in = nn.Parameter(torch.randn(cfg.d_model, cfg.d_mlp))
            self.b_in = nn.Parameter(torch.zeros(cfg.d_mlp))
            self.W_out = nn.Parameter(torch.randn(cfg.d_mlp, cfg.d_model))
            self.b_out = nn.Parameter(torch.zeros(cfg.d_model))

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(x @ self.W_in + self.b_in) @ self.W_out + self.b_out

    class LayerNorm(nn.Module):
        def __init__(self, cfg: SimpleNamespace):
            super().__init__()
            self.cfg = cfg
            self.w, self.b = nn.Parameter(torch.ones(cfg.d_model)), nn.Parameter(torch.zeros(cfg.d_model))

        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], self.w, self.b)

    class Embed(nn.Module):
        def __init__(self, cfg: SimpleNamespace):
            super().__init__()
            self.cfg = cfg
            self.W_E = nn.Parameter(torch.randn(cfg.d_vocab, cfg.d_model))

        def forward(self, tokens: Tensor) -> Tensor:
            return self.W_E[tokens]

    class PosEmbed(nn.Module):
        def __init__(self, cfg: SimpleNamespace):
            super().__init__()
            self.cfg = cfg
            self.W_pos = nn.Parameter(torch.randn(cfg.n_ctx, cfg.d_model))

        def forward(self, tokens: Tensor) -> Tensor:
            return self.W_pos[: tokens.shape[1]]

    class Unembed(nn.Module):
        def __init__(self, cfg: SimpleNamespace):
            super().__init__()
            self.cfg = cfg
            self.W_U = nn.Parameter(torch.randn(cfg.d_model, cfg.d_vocab))
            self.b_U = nn.Parameter(torch.zeros(cfg.d_vocab))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.W_U + self.b_U

    class HookedTransformer(nn.Module):
        def __init__(self, cfg: SimpleNamespace):
            super().__init__()
            self.embed, self.pos_embed = TransformerLens.Embed(cfg), TransformerLens.PosEmbed(cfg)
            self.ln1, self.attn = TransformerLens.LayerNorm(cfg), TransformerLens.Attention(cfg)
            self.mlp, self.unembed = TransformerLens.MLP(cfg), TransformerLens.Unembed(cfg)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens) + self.pos_embed(tokens)
            x = x + self.attn(self.ln1(x))
            return self.unembed(x + self.mlp(x))


def transformer_lens(**sizes: int | None) -> nn.Module:
    """Bare parameters, one head for each first index."""
    return TransformerLens.HookedTransformer(SimpleNamespace(**sizes))


class XTransformers:
    class Attention(nn.Module):
        def __init__(self, dim: int, heads: int, kv_heads: int, dim_head: int):
            super().__init__()
            self.heads, self.kv_heads, self.scale = heads, kv_heads, dim_head**-0.5
            self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
            self.to_k, self.to_v = (nn.Linear(dim, kv_heads * dim_head, bias=False) for _ in range(2))
            self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            q = _split(self.to_q(x), self.heads)
            k, v = (_split(layer(x), self.kv_heads) for layer in (self.to_k, self.to_v))
            return self.to_out(_merge(_attend(q, k, v)))


x_transformers = _of_tokens(XTransformers.Attention)


class VitPytorch:
    class Attention(nn.Module):
        def __init__(self, dim: int, heads: int, dim_head: int):
            super().__init__()
            self.heads, self.scale = heads, dim_head**-0.5
            self.norm = nn.LayerNorm(dim)
            self.attend = nn.Softmax(dim=-1)
            self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
            self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Dropout(0.0))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (_split(part, self.heads) for part in self.to_qkv(self.norm(x)).chunk(3, dim=-1))
            return self.to_out(_merge(self.attend(q @ k.mT * self.scale) @ v))


def vit_pytorch(dim: int, heads: int, dim_head: int) -> nn.Module:
    """Attention over patches, without a table of tokens."""
    return nn.Sequential(nn.Linear(5, dim), VitPytorch.Attention(dim, heads, dim_head), nn.Linear(dim, 3))


class DenoisingDiffusion:
    class Attention(nn.Module):
        """Over pixels, with learned keys and values beside those of the image."""

        def __init__(self, dim: int, heads: int, dim_head: int):
            super().__init__()
            self.heads = heads
            self.mem_kv = nn.Parameter(torch.randn(2, heads, 4, dim_head))
            self.to_qkv = nn.Conv2d(dim, 3 * heads * dim_head, 1, bias=False)
            self.to_out = nn.Conv2d(heads * dim_head, dim, 1)

        def forward(self, x: Tensor) -> Tensor:
            parts = self.to_qkv(x).flatten(2).mT.chunk(3, dim=-1)
            q, k, v = (_split(part, self.heads) for part in parts)
            learned = self.mem_kv.expand(len(x), *self.mem_kv.shape).unbind(1)
            k, v = (torch.cat(pair, dim=2) for pair in zip(learned, (k, v), strict=True))
            return self.to_out(_merge(_attend(q, k, v)).mT.unflatten(-1, x.shape[2:]))


def denoising_diffusion(dim: int, heads: int, dim_head: int) -> nn.Module:
    """A convolutional network with attention."""
    return nn.Sequential(nn.Conv2d(3, dim, 3), DenoisingDiffusion.Attention(dim, heads, dim_head), nn.Conv2d(dim, 3, 3))


class LatentDiffusion:
    class AttnBlock(nn.Module):
        """Over pixels, with a single head that nothing counts."""

        def __init__(self, in_channels: int):
            super().__init__()
            self.norm = nn.GroupNorm(2, in_channels)
            self.q, self.k, self.v, self.proj_out = (nn.Conv2d(in_channels, in_channels, 1) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(self.norm(x)).flatten(2) for layer in (self.q, self.k, self.v))
            weights = torch.bmm(q.mT, k).softmax(dim=2)
            return x + self.proj_out(torch.bmm(v, weights.mT).unflatten(-1, x.shape[2:]))


def latent_diffusion(width: int) -> nn.Module:
    """A convolutional network with attention."""
    return nn.Sequential(nn.Conv2d(3, width, 3), LatentDiffusion.AttnBlock(width))


class Fairseq:
    class MultiheadAttention(nn.Module):
        """Tokens come first; a learned key and value beside those of the tokens."""

        def __init__(self, embed_dim: int, num_heads: int):
            super().__init__()
            self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
            self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(embed_dim, embed_dim) for _ in range(4))
            self.bias_k, self.bias_v = (nn.Parameter(torch.zeros(1, 1, embed_dim)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x) for layer in (self.q_proj, self.k_proj, self.v_proj))
            k, v = (
                torch.cat([own, extra.expand(len(x), 1, -1)], 1) for own, extra in ((k, self.bias_k), (v, self.bias_v))
            )
            q, k, v = (_split(tensor, self.num_heads).flatten(0, 1) for tensor in (q, k, v))
            y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
            return self.out_proj(_merge(y.unflatten(0, (-1, self.num_heads))))


fairseq = _of_tokens(Fairseq.MultiheadAttention)


class AnnotatedTransformer:
    class MultiHeadedAttention(nn.Module):
        def __init__(self, h: int, d_model: int):
            super().__init__()
            self.d_k, self.h = d_model // h, h
            self.linears = nn.ModuleList(nn.Linear(d_model, d_model) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (_split(layer(x), self.h) for layer in self.linears[:3])
            return self.linears[-1](_merge(_attend(q, k, v)))


annotated_transformer = _of_tokens(lambda width, h: AnnotatedTransformer.MultiHeadedAttention(h, width))
