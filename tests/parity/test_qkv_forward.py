"""Query, key and value projections, as the model's own forward pass uses them.

Blocks of a projection are disturbed, and a spy on attention tells which heads of the query, the key or the value move.
This knows nothing of the layouts, so it finds rows that a layout puts into the wrong block.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import model_zoo
from attention_spy import Call, spy_on_attention
from lightning_adam_mini import partition_module
from lightning_adam_mini.partition import ModuleLayout, Role, layouts, register_layout
from lightning_adam_mini.partition.module_layout import Rows, Span

ROLES = {Role.QUERY: "query", Role.KEY: "key", Role.VALUE: "value"}
MOVED = 1e-4
"""Of the largest element. Heads that do not depend on a block stay the same to the last bit, others move far more."""
NOTHING, SEVERAL = -1, -2

UNSEEN = {
    "timm_diff_attention": (
        "two attention calls share the rows, each with half of the queries and keys",
        r"^qkv\.weight: query block 1 moves {'query': 0, 'key': 0, 'value': 0}",
    ),
    "timm_xcit": (
        "attends over channels, so that tokens stand where heads have their width",
        r"^blocks\.0\.attn\.qkv\.weight: value block 4 moves {'query': 0, 'key': 0, 'value': 0}",
    ),
    "timm_coat": (
        "multiplies keys and values first",
        r"^serial_blocks1\.0\.factoratt_crpe\.qkv\.weight: no attention call depends on the parameter",
    ),
    "timm_volo": (
        "projects attention's weights, without queries and keys",
        r"^network\.0\.0\.attn\.v\.weight: value block 0 moves {'query': 0, 'key': 0, 'value': 0}",
    ),
    "diffusers_sana": (
        "multiplies keys and values first",
        r"^transformer_blocks\.0\.attn1\.to_q\.weight: query block 0 moves {'query': 0, 'key': 0, 'value': 16}",
    ),
    "pyg_gps_performer": (
        "multiplies random features of keys and values first",
        r"^attn\.k\.weight: key block 0 moves {'query': 0, 'key': 0, 'value': 1}",
    ),
    "pyg_hgt": (
        "relations mix the channels of a head before the message",
        r"^conv\.kqv_lin\.lins\.paper\.weight: no attention call depends on the parameter",
    ),
    "longformer": (
        "cuts tokens into chunks, which stand beside the heads",
        r"\.0\.attention\.self\.query\.weight: query block 0 moves {'query': 0, 'key': 0, 'value': 0}",
    ),
    "led": (
        "cuts tokens into chunks, which stand beside the heads",
        r"\.0\.self_attn\.longformer_self_attn\.query\.weight: query block 0 moves {'query': 0, 'key': 0, 'value': 0}",
    ),
    "informer": (
        "keys choose which queries attend",
        r"^model\.encoder\.layers\.0\.self_attn\.k_proj\.weight: key block 0 moves {'query': 1, 'key': 1, 'value': 0}",
    ),
    "timm_davit": (
        "every other block attends over channels",
        r"^stages\.0\.blocks\.0\.1\.attn\.qkv\.weight: query block 0 moves {'query': 0, 'key': 0, 'value': 64}",
    ),
    "detr": (
        "the decoder starts from zeros, of which all values are the same",
        r"^model\.decoder\.layers\.0\.self_attn\.v_proj\.weight: no attention call depends on the parameter",
    ),
}
"""Entries of the zoo whose attention the spy cannot tell apart, why, and what it then says."""

UNSEEN_ROLES = {"jetmoe": {"query"}, "timm_gcvit": {"query"}}
"""Parts of attention without a projection of their own: JetMoE's experts make queries, GCViT takes pooled images."""

UNSEEN_NAMES = (
    "rel_attn.r", ".pos_proj.weight", ".pos_q_proj.weight", ".pos_key_proj.weight", ".pos_query_proj.weight",
    ".w2e_query.weight", ".e2w_query.weight", ".e2e_query.weight", ".experts.input_linear.weight",
)  # fmt: skip
"""Relative positions, and pairs with an entity, have scores beside those that the spy follows; experts serve only some
tokens."""

MIXING_NORMS = (
    "q_norm", "k_norm", "v_norm", "norm_q", "norm_k", "norm_v", "norm_added_q", "norm_added_k", "q_rms_norm",
    "k_rms_norm", "q_rms_norm_t", "k_rms_norm_t",
)  # fmt: skip
"""Norms between projection and attention; those that mix heads, or channels of values, are taken out."""

WITHOUT_NORMS = (
    "olmo2", "olmoe", "diffusers_ltx", "diffusers_wan", "diffusers_lumina2", "diffusers_hidream", "timm_mvit_v2",
    "timm_gemma4_vit",
)  # fmt: skip
"""Entries with such norms."""

TENSORS = {
    "timm_vit_sam": {"heads": 3},
    **{name: {"heads_dim": 1} for name in ("timm_hiera", "timm_hiera_windows", "timm_nest", "hiera")},
}
"""Entries whose tensors are `(batch * windows * heads, ...)` or `(batch, heads, windows, ...)`, for the spy to know."""


@dataclass
class Probe:
    """A model under the spy.

    Args:
        model: The model.
        run: One forward pass.
        options: How the spy reads tensors.
    """

    model: nn.Module
    run: Callable[[], object]
    options: dict[str, int]

    @torch.no_grad()
    def calls(self, stop_after: int | None = None) -> list[Call]:
        """The attention calls of one forward pass."""
        with spy_on_attention(self.model, **self.options, stop_after=stop_after) as spy:
            self.run()
        return spy.calls

    @torch.no_grad()
    def disturbed(self, parameter, mask, stop_after: int | None = None) -> list[Call]:
        """The same with noise on the elements of a parameter that `mask` chooses."""
        saved = parameter.clone()
        parameter += torch.randn_like(parameter) * mask
        try:
            return self.calls(stop_after)
        finally:
            parameter.copy_(saved)


class ProbedCall:
    """The first attention call that depends on a parameter, undisturbed.

    Args:
        probe: The model.
        calls: The attention calls, undisturbed.
        parameter: The parameter.
    """

    def __init__(self, probe: Probe, calls: list[Call], parameter: Tensor):
        pairs = zip(calls, probe.disturbed(parameter, torch.ones_like(parameter)), strict=True)
        moved = (any(_moved(*pair, role).any() for role in ROLES.values()) for pair in pairs)
        self.number = next((number for number, some in enumerate(moved) if some), NOTHING)
        assert self.number != NOTHING, "no attention call depends on the parameter"
        self._probe, self._parameter, self._call = probe, parameter, calls[self.number]
        self._heads = {role: _heads(getattr(self._call, role)) for role in ROLES.values()}

    def moved(self, mask) -> dict[str, Tensor]:
        """What moves with the chosen elements: `(heads, 1)` of the query and key, `(heads, channels)` of the value."""
        after = self._probe.disturbed(self._parameter, mask, self.number + 1)[self.number]
        found = {}
        for role, heads in self._heads.items():
            moved = _moved(self._call, after, role)
            assert torch.equal(moved, moved[heads]), f"copies of a {role} head differ"
            own = moved[[head for number, head in enumerate(heads) if head == number]]
            found[role] = own if role == "value" else own.any(1, keepdim=True)
        return found

    def block_of_places(self, order) -> dict[str, Tensor]:
        """For each place the only block that moves it, or `NOTHING`, or `SEVERAL`.

        Half of the blocks are disturbed at a time, chosen by one digit of their number, then the other half: a place
        that moves with exactly one half for every digit depends on one block, whose number the digits spell.

        Args:
            order: Number of each element's block; negative for elements to leave alone.
        """
        numbers, ones, twos = {}, {}, {}
        for digit in range(max(1, int(order.max()).bit_length())):
            chosen = (order >> digit) & 1
            low, high = self.moved((order >= 0) & (chosen == 0)), self.moved((order >= 0) & (chosen == 1))
            for role in ROLES.values():
                numbers[role] = numbers.get(role, 0) + (high[role].long() << digit)
                ones[role] = ones.get(role, False) | low[role] | high[role]
                twos[role] = twos.get(role, False) | (low[role] & high[role])
        return {r: numbers[r].where(ones[r], NOTHING).where(~twos[r], SEVERAL) for r in ROLES.values()}


def _moved(before: Call, after: Call, role) -> Tensor:
    """Which channels of which heads moved in any sample, at any token."""
    old, new = getattr(before, role), getattr(after, role)
    return ((old - new).abs() > MOVED * old.abs().max()).any(0).any(1)


def _heads(tensor) -> list[int]:
    """For each head the first that equals it: a head of keys may be there once for each query head that it serves."""
    first: list[int] = []
    for number in range(tensor.shape[1]):
        same = (head for head in first if torch.equal(tensor[:, head], tensor[:, number]))
        first.append(next(same, number))
    return first


def _along_axis(cut, values) -> Tensor:
    """One value for each row of a parameter, for each of its elements."""
    shape = cut.blocks.shape
    return torch.tensor(values).view([-1 if a == cut.role.axis else 1 for a in range(len(shape))]).expand(shape)


def _roles_of_elements(cut) -> Tensor:
    """For each element the number of its role in `ROLES`, or `NOTHING`."""
    numbers = {role: number for number, role in enumerate(ROLES)}
    parts = [numbers.get(part.role, NOTHING) for part in cut.role.parts for _ in range(part.length)]
    return _along_axis(cut, parts * cut.role.repeats)


def check_parameter(call: ProbedCall, cut) -> dict[str, Tensor]:
    """Compare the blocks of a parameter with what they move.

    Returns:
        Which places of each role the parameter moves.

    Raises:
        AssertionError: A block moves anything but one head of its role, or one channel of it for values.
    """
    roles, index = _roles_of_elements(cut), cut.blocks.block_index()
    blocks, order = index.where(roles >= 0, NOTHING).unique(return_inverse=True)
    order = order - int((blocks == NOTHING).any())
    found = call.block_of_places(order)
    for number in range(int(order.max()) + 1):
        (own,) = {list(ROLES.values())[role] for role in roles[order == number].unique().tolist()}
        counts = {role: int((places == number).sum()) for role, places in found.items()}
        told = f"{own} block {number} moves {counts}"
        assert all((count > 0) == (role == own) for role, count in counts.items()), told
        assert own != "value" or counts[own] == 1, told
    assert not any((places == SEVERAL).any() for places in found.values()), "several blocks move one head"
    _check_rows(call, cut, order, found)
    if (roles == NOTHING).any():
        # Gates move nothing; what queries, keys and values are projected from moves several of them.
        others = call.moved(roles == NOTHING)
        assert sum(bool(places.any()) for places in others.values()) != 1, "other rows move a head"
    return {role: places >= 0 for role, places in found.items()}


def _check_rows(call, cut, order, found):
    """Each row of a block must move all that the block does: one head, or all heads that share a key.

    The first rows of all blocks are disturbed at a time, then the second rows, and so on.
    """
    row, rank = _along_axis(cut, range(cut.blocks.shape[cut.role.axis])), torch.full_like(order, NOTHING)
    for number in range(int(order.max()) + 1):
        mask = order == number
        rank[mask] = torch.searchsorted(row[mask].unique(), row[mask])
    if rank.max() == 0:
        return
    for number in range(int(rank.max()) + 1):
        moved = call.moved(rank == number)
        disturbed = order[rank == number].unique()
        for role, places in found.items():
            assert torch.equal(moved[role], torch.isin(places, disturbed)), f"row {number} of a block moves other heads"


def _without_repeats(model, parameters) -> list[str]:
    """Names of parameters; of layers of one class with the same names and shapes only the first's."""
    layers: dict[str, list[str]] = {}
    for name in parameters:
        layers.setdefault(re.match(r"(.*\.\d+\.|\d+\.|)", name).group(), []).append(name)
    kinds = {}
    for prefix, names in layers.items():
        shapes = tuple((name.removeprefix(prefix), parameters[name].shape) for name in names)
        kind = (re.sub(r"\d+", "*", prefix), type(model.get_submodule(prefix.rstrip("."))), shapes)
        kinds.setdefault(kind, names)
    return [name for names in kinds.values() for name in names]


def check(probe: Probe, unseen_roles=frozenset()) -> None:
    """Compare the partition of a model with what its forward pass does.

    Raises:
        AssertionError: They differ, or a query, key or value is made by no parameter of that role.
    """
    calls, parameters = probe.calls(), dict(probe.model.named_parameters())
    partition = partition_module(probe.model, "transformer")
    projections = {
        name: parameters[name]
        for name, cut in partition.items()
        if not ROLES.keys().isdisjoint(cut.role.roles) and not name.endswith(UNSEEN_NAMES)
    }
    seen: dict[tuple[int, str], Tensor] = {}
    for name in _without_repeats(probe.model, projections):
        try:
            call = ProbedCall(probe, calls, parameters[name])
            places = check_parameter(call, partition[name])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        for role, moved in places.items():
            seen[call.number, role] = seen.get((call.number, role), False) | moved
    assert seen, "no parameter is a query, key or value"
    whole = {(number, role) for (number, role), places in seen.items() if places.all()}
    for number, role in seen.keys() - whole:
        tensor = getattr(calls[number], role)
        # Several calls of one module may share their queries: the parameter was followed to the first.
        shared = any(torch.equal(getattr(calls[n], r), tensor) for n, r in whole if r == role)
        assert shared or role in unseen_roles, f"part of the {role} of call {number} comes from no {role} parameter"


def build(entry: model_zoo.Entry) -> Probe:
    """A model of the zoo without weights that are equal or zero, such as gates and biases at their start."""
    model = entry.build().eval()
    if entry.name in WITHOUT_NORMS:
        for module in list(model.modules()):
            for name in MIXING_NORMS:
                if getattr(module, name, None) is not None:
                    setattr(module, name, nn.Identity())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    options = TENSORS.get(entry.name) or {"batch": _batch(entry)}
    return Probe(model, lambda: entry.loss(model), options)


def _batch(entry) -> int:
    """The first dimension of the first input; `MultiheadAttention` has tokens there."""
    queue, dimension = [entry.inputs], 1 if entry.target == "torch.nn.MultiheadAttention" else 0
    while True:
        value = queue.pop(0)
        if isinstance(value, dict) and (shape := value.get("ints") or value.get("floats")):
            return shape[dimension]
        queue = [*(value.values() if isinstance(value, dict) else value if isinstance(value, list) else []), *queue]


def has_projections(entry: model_zoo.Entry) -> bool:
    """Whether the zoo says that some parameter is a query, key or value."""
    roles = {role for expected in entry.parameters.values() for role in expected.role.split("+")}
    return not roles.isdisjoint(ROLES.values())


ENTRIES = [name for name, entry in model_zoo.entries().items() if has_projections(entry) and name not in UNSEEN]
SLOW = (
    "bridgetower", "diffusers_hidream", "diffusers_hunyuan_video", "diffusers_z_image", "longt5_global", "mllama",
    "mobilevit", "perceiver", "prophetnet", "switch_transformers", "time_series_transformer", "umt5",
)  # fmt: skip
"""The longest runs, all of separate or contiguous projections, of which the rest has plenty."""

FUSED = (
    "gpt2", "gpt_bigcode_multi_query", "gpt_bigcode_multi_head", "phi3", "gpt_neox", "bloom", "falcon_multi_query",
    "falcon_new_decoder", "falcon_rw", "mpt", "codegen", "persimmon", "modernbert", "multihead_attention",
    "torchvision_vit", "torchvision_swin", "timm_vit", "timm_swin", "timm_eva_fused", "qwen2_vl", "deberta",
    "qwen3_next", "deepseek_v3", "blip",
)  # fmt: skip
"""Entries whose parameters order queries, keys and values in ways of their own."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in ENTRIES])
def test_a_block_is_what_the_forward_pass_takes_for_a_head(name):
    check(build(model_zoo.entries()[name]), UNSEEN_ROLES.get(name, frozenset()))


def test_fused_layouts_are_checked():
    assert not set(FUSED).difference(ENTRIES)


@pytest.mark.parametrize("name", UNSEEN)
def test_an_exception_is_one(name):
    _, told = UNSEEN[name]
    with pytest.raises(AssertionError, match=told):
        check(build(model_zoo.entries()[name]))


def test_exceptions_are_in_the_zoo():
    assert model_zoo.entries().keys() >= {*UNSEEN, *UNSEEN_ROLES, *WITHOUT_NORMS, *TENSORS, *SLOW}


Q, K, V = Role.QUERY, Role.KEY, Role.VALUE
WRONG = {
    "contiguous, not by head": ("gpt_neox", "query_key_value", Rows(Q, K, V)),
    "by head, not contiguous": ("gpt2", "c_attn", Rows(Span(Q, 1), Span(K, 1), Span(V, 1), repeats="heads")),
    "values before keys": ("bloom", "query_key_value", Rows(Span(Q, 1), Span(V, 1), Span(K, 1), repeats="heads")),
    "keys before values": ("codegen", "qkv_proj", Rows(Q, K, V, repeats=4)),
    "no gate": ("qwen3_next", "q_proj", Rows(Span(Q, "heads", 16))),
    "gate first": ("qwen3_next", "q_proj", Rows(Span(Role.LINEAR, 1), Span(Q, 1), repeats="heads")),
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
    probe = build(model_zoo.entries()[name])
    attention = next(module for module in probe.model.modules() if hasattr(module, child))
    right = layouts.find_layouts(attention)[0]
    monkeypatch.setattr(layouts, "REGISTERED", [])
    wrong = ModuleLayout(
        mistake,
        classes=(f"{type(attention).__module__}.{type(attention).__qualname__}",),
        parameters={**right.parameters, f"{child}.weight": rows},
        sizes=right.sizes,
    )
    register_layout(wrong)
    with pytest.raises(AssertionError):
        check(probe)


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
def test_the_spy_sees_the_operands(way):
    operands = [torch.randn(2, 3, tokens, 4) for tokens in (5, 6, 6)]
    if way == "no softmax":
        operands[0] = operands[0][:, :, :1]
    with spy_on_attention(nn.Module(), batch=2) as spy:
        WAYS[way](*operands)
    (call,) = spy.calls
    assert all(torch.equal(seen, own) for seen, own in zip((call.query, call.key, call.value), operands, strict=True))


def test_the_spy_sees_no_attention_in_other_products():
    tokens, experts = torch.randn(3, 5, 4), torch.randn(3, 4, 4)
    with spy_on_attention(nn.Module()) as spy:
        hidden = torch.bmm(torch.bmm(tokens, experts).relu(), experts)
        nn.functional.linear(hidden, torch.randn(2, 4)).softmax(-1) @ torch.randn(2, 4)
    assert not spy.calls
