"""Every parameter of every model in the zoo has the role, cut and blocks that its source says, and the model trains."""

import pytest
import torch

import model_zoo
from lightning_adam_mini import AdamMini, partition_module
from lightning_adam_mini.blocks import Blocks, Kind
from lightning_adam_mini.measure.memory import optimizer_state_bytes
from lightning_adam_mini.partition import resolve_strategy

ENTRIES = {**model_zoo.entries(), **model_zoo.entries(model_zoo.UNSEEN)}


@pytest.fixture(params=ENTRIES, ids=str)
def entry(request):
    return ENTRIES[request.param]


def test_the_zoo_is_large():
    assert len({entry.target for entry in ENTRIES.values()}) >= 60


def test_every_parameter_is_what_its_source_says(entry):
    model = entry.build()
    cuts = partition_module(model, "transformer")
    for cut in cuts.values():
        _check_each_element_lies_in_one_block(cut.blocks)
    found = {name: (cut.role.name, cut.structure, cut.blocks.num_values) for name, cut in cuts.items()}
    expected = {}
    for name, parameter in model.named_parameters():
        wanted = entry.expected(name)
        blocks = parameter.numel() if wanted.blocks is None else wanted.blocks
        expected[name] = (wanted.role, wanted.structure, blocks)
        assert cuts[name].blocks.shape == parameter.shape
    assert found == expected
    assert resolve_strategy("auto", model).name == entry.partition
    assert not model_zoo.unused_patterns(entry, list(cuts))


def _check_each_element_lies_in_one_block(blocks: Blocks) -> None:
    assert blocks.kind is not Kind.FACTORED
    index = blocks.block_index()
    assert index.shape == blocks.shape
    sizes = torch.bincount(index.flatten(), minlength=blocks.num_values)
    assert len(sizes) == blocks.num_values
    assert sizes.min() > 0
    assert sizes.sum() == index.numel()


SOME = [pytest.param(name, marks=() if number % 6 == 0 else pytest.mark.slow) for number, name in enumerate(ENTRIES)]


@pytest.mark.filterwarnings("error:.*partition_overrides:UserWarning")
@pytest.mark.parametrize("entry", SOME, indirect=True)
def test_the_model_takes_three_steps(entry):
    model = entry.build()
    optimizer = AdamMini(model, lr=1e-3)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = [parameter.detach().clone() for parameter in trained.values()]
    for _ in range(3):
        optimizer.zero_grad()
        entry.loss(model).backward()
        optimizer.step()
    after = [parameter.detach() for parameter in trained.values()]
    assert all(torch.isfinite(parameter).all() for parameter in after)
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    elements = sum(parameter.numel() for parameter in trained.values())
    values = sum(optimizer.partition[name].blocks.num_values for name in trained)
    assert optimizer_state_bytes(optimizer) == 4 * (elements + values + len(trained))
