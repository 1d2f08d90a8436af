"""Blocks by patterns, and overrides of a partition next to those that a recipe has."""

import pytest
import torch
from torch import nn

import tiny_models

pytest.importorskip("jsonargparse")

from lightning_adam_mini.cli.hessian.problem import (
    choose_blocks,
    own_structures,
    structures_or_keep,
    with_own_overrides,
)
from lightning_adam_mini.factory import AdamMini
from lightning_adam_mini.hessian.advice import KEEP
from lightning_adam_mini.partition import partition_module


class Tied(nn.Module):
    """An embedding that is the head too, two linear layers of which one is frozen, and a norm."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight
        self.second.requires_grad_(False)


def names(*patterns, **options):
    return [
        block.name for block in choose_blocks(Tied(), patterns or None, AdamMini(partition="default"), **options)[0]
    ]


def test_without_patterns_all_trainable_matrices():
    assert names() == ["table.weight", "first.weight"]
    assert names(least=17) == ["table.weight"]
    assert choose_blocks(Tied(), None, AdamMini(), least=17)[1] == ["first.weight"]


def test_each_block_once_in_the_order_of_the_patterns():
    assert names("first.*", "*.weight", "re:fir.*weight") == [
        "first.weight",
        "first.bias",
        "table.weight",
        "norm.weight",
    ]
    assert names("first.weight[0]", "first.weight[*]") == ["first.weight[0]"]


def test_a_block_of_the_partition_has_its_elements():
    model, factory = Tied(), AdamMini(partition="transformer", partition_overrides={"first.weight": "row"})
    ((block,), _) = choose_blocks(model, ["first.weight[2]"], factory)
    assert block.index.tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("second.weight", "second.weight is frozen, and the Hessian is that of trainable parameters"),
        ("second*[0]", "second.weight is frozen"),
        ("head.weight", "head.weight is the same tensor as table.weight, which goes by that name"),
        ("first.weight ", "'first.weight ': no trainable parameter of that name; did you mean first.weight"),
        ("", "'': no trainable parameter"),
        ("re:(", "this is not a regular expression"),
        ("first.weight[16]", "there is no block 16"),
    ],
)
def test_what_names_no_block(pattern, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")) as raised:
        names(pattern)
    assert "\n" not in str(raised.value)


def test_a_model_without_a_matrix():
    with pytest.raises(ValueError, match="no trainable parameter of two dimensions: name others by --blocks"):
        choose_blocks(nn.LayerNorm(3), None, AdamMini())
    with pytest.raises(ValueError, match="no matrix has 25 elements: lower --steps"):
        names(least=25)


def test_a_factored_second_moment_has_no_blocks_to_name():
    with pytest.raises(ValueError, match="block"):
        choose_blocks(Tied(), ["first.weight[0]"], AdamMini(partition="factored"))


OWN = {"re:first\\..*": "row", "norm.bias": "element", "table.weight": "row"}


@pytest.mark.parametrize(
    ("advised", "kept"),
    [
        ({}, list(OWN)),
        ({"re:^first\\.weight$": "element"}, list(OWN)),  # the pattern still matches the bias
        ({"re:^table\\.weight$": "whole"}, list(OWN)[:2]),
    ],
)
def test_advice_stands_beside_the_overrides_of_the_recipe(advised, kept):
    model, factory = Tied(), AdamMini(partition="default", partition_overrides=OWN)
    found = with_own_overrides(model, factory, advised)
    assert list(found) == [*advised, *kept]
    before = own_structures(model, factory)
    after = partition_module(model, "default", found)
    changed = {name for name in before if before[name] != after[name].blocks}
    assert changed == {key.removeprefix("re:^").removesuffix("$").replace("\\", "") for key in advised}


def test_structures_that_can_be_asked_for():
    found = structures_or_keep(Tied(), AdamMini(partition="default", partition_overrides={"first.weight": "row"}))
    assert list(found["first.weight"]) == ["keep", "row", "column", "whole", "element"]
    assert found["first.weight"]["keep"] == found["first.weight"]["row"]
    assert found["table.weight"]["keep"] == found["table.weight"]["whole"]
    assert torch.equal(found["first.weight"]["element"].block_index().flatten(), torch.arange(16))


def test_what_can_be_asked_for_is_what_the_override_does():
    model = tiny_models.llama()
    found = structures_or_keep(model, AdamMini())
    assert set(found["model.layers.0.self_attn.q_proj.weight"]) == {KEEP, "head", "row", "column", "whole", "element"}
    assert set(found["lm_head.weight"]) == {KEEP, "row", "column", "whole", "element"}
    for name, structures in found.items():
        for structure in structures.keys() - {KEEP}:
            partition = partition_module(model, overrides={f"re:^{name}$": structure})
            assert partition[name].blocks == structures[structure]
