"""The forward pass as judge of the attention styles: what it says agrees with what each style declares."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attention_styles import (
    HEADS,
    SIZE,
    STYLES,
    WIDTH,
    DenseOfOddInputs,
    LoRA,
    LoRAOfParameters,
    Style,
)
from lightning_adam_mini import partition_module, verify_partition

TOKENS = torch.arange(10).view(2, 5)
FUSED = {"fused_contiguous": "q k v", "fused_per_head": "qkv", "fused_per_group": "q..kv", "vkq": "v k q"}


def project(module, path, x):
    """Apply the projection that holds a parameter to `(batch, tokens, inputs)`."""
    name, _, rest = path.partition(".")
    member = getattr(module, name)
    while rest.partition(".")[0].isdigit() or name == "qkv_linear":  # items of lists; a part that holds projections
        if isinstance(member, nn.Sequential):
            break
        name, _, rest = rest.partition(".")
        member = getattr(member, name)
    if isinstance(member, nn.Parameter):
        if member.dim() == 3 and name == "qkv_w":
            return torch.einsum("bti,poi->btpo", x, member).flatten(-2)
        if member.dim() == 3:
            equation = "bti,his->bths" if name.startswith("W_") else "bti,ihs->bths"
            return torch.einsum(equation, x, member).flatten(-2)
        return F.linear(x, member) if name == "in_proj_weight" else x @ member
    if isinstance(member, nn.Conv2d):
        return member(x.mT[..., None])[..., 0].mT
    if isinstance(member, LoRA):
        return member.base_layer(x) + member.lora_B(member.lora_A(x))
    if isinstance(member, LoRAOfParameters):
        return member.linear(x) + x @ member.lora_a @ member.lora_b
    if isinstance(member, DenseOfOddInputs):
        return member(x, torch.ones(()))
    return member(x)


def split(rows, order, kv_heads):
    """Rows of a fused matrix as `(batch, tokens, heads, size)`, for each of its q, k and v."""
    if order == "qkv":
        return dict(zip("qkv", rows.unflatten(-1, (HEADS, 3, SIZE)).unbind(-2), strict=True))
    if order == "q..kv":
        group = HEADS // kv_heads
        q, k, v = rows.unflatten(-1, (kv_heads, group + 2, SIZE)).split([group, 1, 1], -2)
        return {"q": q.flatten(-3, -2), "k": k.flatten(-3, -2), "v": v.flatten(-3, -2)}
    counts = {"q": HEADS, "k": kv_heads, "v": kv_heads}
    letters = order.split()
    parts = rows.split([counts[letter] * SIZE for letter in letters], -1)
    return {letter: part.unflatten(-1, (-1, SIZE)) for letter, part in zip(letters, parts, strict=True)}


class Runnable(nn.Module):
    """The module of a style, with the forward pass that its truth declares."""

    def __init__(self, style: Style):
        super().__init__()
        self.attention, self.truth = style.build(), style.truth
        self.order = FUSED.get(getattr(style.layout, "name", style.layout), "q k v")

    def forward(self, x):
        (out,) = (path for path, (role, _) in self.truth.items() if role == "attention_output")
        heads = {}
        for path, (role, _) in self.truth.items():
            letters = {name[0] for name in role.split("+")}
            if letters <= {"q", "k", "v"}:
                rows = project(self.attention, path, x)
                if len(letters) == 1:
                    heads[letters.pop()] = rows.unflatten(-1, (-1, SIZE))
                    continue
                kv_heads = (rows.shape[-1] // SIZE - HEADS * ("q" in letters)) // 2
                heads |= split(rows, self.order if "q" in letters else "k v", kv_heads)
        q, k, v = (heads[letter].transpose(1, 2) for letter in "qkv")
        k, v = (kv.repeat_interleave(HEADS // kv.shape[1], 1) for kv in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        matrix = getattr(self.attention, out.partition(".")[0])
        if isinstance(matrix, nn.Parameter) and matrix.dim() == 3:
            return torch.einsum("bths,hso->bto", mixed, matrix)
        return project(self.attention, out, mixed.flatten(2))


@pytest.mark.parametrize("name", STYLES)
def test_the_forward_pass_agrees_with_what_a_style_declares(name):
    style = STYLES[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, WIDTH), Runnable(style), nn.Linear(WIDTH, 11))
    found = verify_partition(model, TOKENS)
    projections = {f"1.attention.{path}": truth for path, truth in style.truth.items() if truth[0] != "bias"}
    assert style.outcome != "right" or not found.is_changed
    arguments = {"partition_layouts": found.layouts, "partition_overrides": found.overrides}
    again = verify_partition(model, TOKENS, **arguments)
    assert not again.contradicted
    assert {again.parameters[path].status for path in projections} == {"confirmed"}
    cuts = partition_module(model, layouts=found.layouts, overrides=found.overrides)
    for path, (role, blocks) in projections.items():
        if role == "attention_output":
            assert cuts[path].role.name in (role, "linear")  # the forward pass tells no such matrices apart
            assert cuts[path].blocks.num_values == blocks
        elif blocks:
            assert (cuts[path].role.name, cuts[path].blocks.num_values) == (role, blocks)
        else:  # rows that lie on two dimensions, of which no layout speaks
            assert found.overrides == {path: "row"}
