"""Advice: blind to names and types, it finds heads and rows where the Hessian has them, and what AdamMini takes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tiny_models
from lightning_adam_mini import AdamMini
from lightning_adam_mini.blocks import Blocks, Segment
from lightning_adam_mini.hessian import HessianOperator
from lightning_adam_mini.hessian.advice import (
    KEEP,
    advise,
    advise_from_parts,
    advise_from_scores,
    find_parts,
    rate_parts,
    score_parts,
)
from lightning_adam_mini.hessian.block_structure import Score, candidate_structures, exact_scores, mean_square_gradients

DIM, HEADS, VOCAB = 32, 4, 8


class Attention(nn.Module):
    """Attention, a perceptron and an output head, under names that say nothing."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCAB, DIM)
        self.first, self.second, self.third, self.fourth = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))
        self.fifth, self.sixth = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)
        self.last = nn.Linear(DIM, VOCAB, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens):
        x = self.table(tokens)
        normal = F.rms_norm(x, (DIM,))
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.inputs(normal))
        x = x + self.fourth(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.last(F.rms_norm(x + self.sixth(F.silu(self.fifth(F.rms_norm(x, (DIM,))))), (DIM,)))

    def inputs(self, x):
        return self.first(x), self.second(x), self.third(x)


class FusedAttention(Attention):
    """The same with one matrix for the three."""

    def __init__(self):
        super().__init__()
        self.fused = nn.Linear(DIM, 3 * DIM, bias=False)
        nn.init.normal_(self.fused.weight, std=0.02)

    def inputs(self, x):
        return self.fused(x).chunk(3, -1)


def loss_of(model, tokens):
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def chains(seed=0, count=8, length=13):
    """Random walks over the tokens: each step depends on the two before."""
    generator = torch.Generator().manual_seed(seed)
    table = (2 * torch.randn(VOCAB, VOCAB, VOCAB, generator=generator)).softmax(-1)
    tokens = torch.randint(VOCAB, (count, 2), generator=generator)
    while tokens.shape[1] < length:
        following = torch.multinomial(table[tokens[:, -2], tokens[:, -1]], 1, generator=generator)
        tokens = torch.cat([tokens, following], 1)
    return tokens


@pytest.fixture(scope="module")
def blind():
    """Advice at initialisation, with nothing that could be asked for."""
    torch.manual_seed(0)
    operator = HessianOperator(Attention().double(), loss_of, [chains()])
    names = [f"{name}.weight" for name in ("first", "second", "fifth", "sixth")]
    return {row.parameter: row for row in advise(operator, {}, parameters=names, method="sketch").rows}


@pytest.mark.parametrize("name", ["first", "second"])
def test_queries_and_keys_ask_for_heads(blind, name):
    assert blind[f"{name}.weight"].best == f"rows x {DIM // HEADS}"


@pytest.mark.parametrize("name", ["fifth", "sixth"])
def test_the_perceptron_asks_for_output_neurons(blind, name):
    assert blind[f"{name}.weight"].best == "rows x 1"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sketch", pytest.param("exact", marks=pytest.mark.slow)])
def test_a_fused_matrix_is_looked_at_in_parts(method):
    """Of the whole, values hide the heads of queries and keys."""
    torch.manual_seed(0)
    operator = HessianOperator(FusedAttention().double(), loss_of, [chains()])
    shape, head = (3 * DIM, DIM), DIM // HEADS
    own = {KEEP: Blocks.segmented(shape, (Segment(2 * DIM, head), Segment(DIM, 1))), "row": Blocks.rows(shape)}
    own |= {"head": Blocks.rows(shape, block_size=head), "whole": Blocks.whole(shape)}
    (row,) = advise(operator, {"fused.weight": own}, parameters=["fused.weight"], method=method).rows
    assert [part.best for part in row.parts] == [f"rows x {head}", f"rows x {head}", "rows x 1"]
    assert (row.best, row.structure, row.blocks) == (f"rows x {DIM}", KEEP, own[KEEP])
    assert "different norms" in row.reason
    assert row.is_clear
    assert row.information == pytest.approx(sum(part.scores[part.best].information for part in row.parts) / 3)
    assert "its current structure has the most" in row.reason
    (unknown,) = advise(operator, {}, parameters=["fused.weight"], method=method).rows
    assert unknown.structure is None
    assert "cannot express a structure" in unknown.reason


def test_heads_are_no_parts(blind):
    assert not blind["first.weight"].parts
    assert not blind["second.weight"].parts


def test_only_a_few_long_runs_of_different_norms_are_parts():
    structures = candidate_structures((8, 8))

    def scores(by_norms):
        return {name: Score(0.8, 0.125, 8, 64, by_norms) for name in structures}

    assert find_parts(structures, scores(by_norms=0.125)) is None
    found = find_parts(
        {name: blocks for name, blocks in structures.items() if "4" in name}, {"rows x 4": scores(0.8)["rows x 4"]}
    )
    assert found == "rows x 4"
    some = ("whole", "element", "rows x 1", "columns x 1")
    assert find_parts(structures, {name: scores(0.8)[name] for name in some}) is None
    many = Blocks.rows((18, 2), block_size=2)
    assert find_parts({"many": many}, {"many": scores(0.8)["whole"]}) is None


def test_a_structure_of_the_whole_is_found_within_its_parts():
    """A part's elements in their order, and what structures of the whole are within it."""
    shape, size = (3, 12), 12
    halves = Blocks.rows(shape, axis=1, block_size=4)
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(3 * size, 3 * size, generator=generator, dtype=torch.float64)

    def score(block, structures, num_parts=1):
        assert num_parts == 3
        return exact_scores((matrix + matrix.T)[block.index][:, block.index], structures)

    parts = score_parts("weight", halves, score)
    assert [part.structures["whole"].shape for part in parts] == [(3, 4)] * 3
    assert parts[1].block.index.tolist() == [4, 5, 6, 7, 16, 17, 18, 19, 28, 29, 30, 31]
    for whole, name in (
        (Blocks.rows(shape, axis=1, block_size=2), "columns x 2"),
        (Blocks.rows(shape), "rows x 1"),
        (Blocks.whole(shape), "whole"),
        (halves, "whole"),
        (Blocks.element(shape), "element"),
        (Blocks.segmented(shape, (Segment(4, 2), Segment(8, 2)), axis=1), "columns x 2"),
    ):
        expected = sum(part.scores[name].information for part in parts) / 3
        assert rate_parts(parts, whole).information == pytest.approx(expected)
    assert rate_parts(parts, Blocks.rows(shape, axis=1, block_size=3)) is None, "no structure of a part"


def test_the_sketch_sees_the_head_that_the_dense_hessian_sees(blind):
    torch.manual_seed(0)
    operator = HessianOperator(Attention().double(), loss_of, [chains()])
    (row,) = advise(operator, {}, parameters=["first.weight"], method="exact").rows
    sketched = blind["first.weight"]
    assert row.best == sketched.best
    assert row.is_clear
    for name, score in row.scores.items():
        found = sketched.scores[name]
        assert abs(found.share - score.share) < 5 * found.standard_error + 0.02


def test_overrides_are_what_adam_mini_takes():
    from lightning_adam_mini.partition import partition_module

    model = tiny_models.randomize(tiny_models.llama()).double().eval()
    tokens = torch.randint(tiny_models.VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))

    def loss(model, tokens):
        logits = model(input_ids=tokens, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    structures = {name: found.blocks for name, found in partition_module(model).items()}
    names = [name for name, p in model.named_parameters() if p.dim() > 1]
    expressible = {
        name: {
            KEEP: structures[name],
            "row": Blocks.rows(structures[name].shape),
            "whole": Blocks.whole(structures[name].shape),
        }
        for name in names
    }
    squares = mean_square_gradients(model, loss, [tokens])
    operator, chosen = HessianOperator(model, loss, [tokens]), [names[1], names[2], names[-1]]
    found = advise(operator, expressible, parameters=chosen, squares=squares, method="sketch", columns=2)
    assert [row.parameter for row in found.rows] == chosen
    optimizer = AdamMini(model, partition_overrides=found.overrides)
    for row in found.rows:
        assert optimizer.partition[row.parameter].blocks == row.blocks
        assert row.state_bytes == 4 * optimizer.partition[row.parameter].blocks.num_values
        assert set(row.spreads) == set(row.scores)
    assert found.state_bytes < found.full_bytes


def score(information_at, size=64, error=0.0):
    return Score(information_at, 0.125, 8, size, 0.125, standard_error=error)


def of_scores(shares, expressible, error=0.0):
    structures = {name: candidate_structures((8, 8))[name] for name in shares}
    return advise_from_scores("weight", structures, {n: score(s, error=error) for n, s in shares.items()}, expressible)


ROWS, COLUMNS = Blocks.rows((8, 8)), Blocks.rows((8, 8), axis=1)


def test_what_cannot_be_asked_for_is_in_the_reason():
    found = of_scores({"rows x 1": 0.3, "columns x 1": 0.9}, {"row": ROWS})
    assert (found.best, found.structure) == ("columns x 1", "row")
    assert "no override expresses it" in found.reason
    assert of_scores({"rows x 1": 0.3, "columns x 1": 0.9}, {}).structure is None


def test_a_structure_that_is_not_clearly_worse_is_kept():
    own = {KEEP: ROWS, "column": COLUMNS}
    shares = {"rows x 1": 0.5, "columns x 1": 0.52}
    assert of_scores(shares, own).structure == "column"
    unsure = of_scores(shares, own, error=0.1)
    assert unsure.structure == KEEP
    assert not unsure.is_clear


def test_noise_asks_for_one_block():
    generator = torch.Generator().manual_seed(1)
    draws = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    structures = candidate_structures((8, 8))
    scores = exact_scores(torch.ones(64, 64, dtype=torch.float64) + 0.01 * (draws + draws.T), structures)
    found = advise_from_scores("weight", structures, scores, {KEEP: ROWS, "whole": Blocks.whole((8, 8))})
    assert (found.best, found.structure) == ("whole", "whole")
    assert "one block" in found.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "guess"}, "'auto', 'exact' or 'sketch'"),
        ({"method": "exact", "budget_bytes": 1000}, "raise the budget"),
        ({"parameters": ["fist.weight"]}, "did you mean first.weight"),
        ({"parameters": []}, "no trainable matrix"),
    ],
)
def test_bad_input(options, message):
    operator = HessianOperator(Attention(), loss_of, [chains()])
    with pytest.raises(ValueError, match=message):
        advise(operator, {}, **options)


class Adapter(nn.Module):
    """A low-rank adapter whose second factor is zero, as at its start: the loss is linear in the first."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
        nn.init.zeros_(self.second.weight)


@pytest.mark.parametrize("method", ["exact", "sketch"])
def test_a_matrix_without_a_hessian_stays_as_it_is(method):
    model = Adapter()
    operator = HessianOperator(
        model, lambda model, x: model.second(model.first(x)).square().sum() + x.sum(), [torch.randn(5, 6)]
    )
    own = {"first.weight": {KEEP: Blocks.rows((2, 6)), "whole": Blocks.whole((2, 6))}}
    first, second = advise(operator, own, method=method, columns=4).rows
    assert (first.parameter, first.structure, first.blocks) == ("first.weight", KEEP, Blocks.rows((2, 6)))
    assert "Hessian is zero" in first.reason
    assert second.scores["rows x 1"].information > 0


def test_parts_without_structures_of_their_own_change_nothing():
    """Rows are the blocks of all, and those of the second half have larger entries."""
    shape = (8, 3)
    index = Blocks.rows(shape).block_index().flatten()
    inside = torch.where(index.unsqueeze(0) == index.unsqueeze(1), 1.0, 0.1).double()
    sizes = torch.where(index < 4, 1.0, 5.0)
    matrix = inside * sizes * sizes.unsqueeze(1)
    structures = candidate_structures(shape)
    scores = exact_scores(matrix, structures)
    row = advise_from_scores("weight", structures, scores, {KEEP: structures["rows x 1"], "whole": structures["whole"]})
    assert (row.best, row.structure) == ("rows x 1", KEEP)
    runs = find_parts(structures, scores)
    assert runs in ("rows x 2", "rows x 4")
    parts = score_parts(
        "weight",
        structures[runs],
        lambda block, structures, _: exact_scores(matrix[block.index][:, block.index], structures),
    )
    assert {part.best for part in parts} == {"rows x 1"}
    assert advise_from_parts(row, runs, parts, structures, {KEEP: structures["rows x 1"]}) is row
