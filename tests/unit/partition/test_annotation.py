"""A model that is annotated, whatever is done to it before an optimizer gets its parameters alone."""

import copy
import gc
import io

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lightning_adam_mini import AdamMini, annotate
from lightning_adam_mini.partition import Strategy, annotation_of
from ranks import run_ranks
from tiny_models import SeparateAttention


def model():
    return nn.Sequential(nn.Embedding(8, 4), SeparateAttention(4, head_dim=2, num_heads=2), nn.Linear(4, 6))


def structures(optimizer):
    return {name: (found.role.name, found.blocks) for name, found in optimizer.partition.items()}


EXPECTED = structures(AdamMini(model()))


def pickled(module):
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def swapped(module):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return module.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def replaced(module):
    for each in module.modules():
        for name, parameter in each.named_parameters(recurse=False):
            setattr(each, name, nn.Parameter(parameter.detach().clone()))
    return module


CHANGES = {
    "nothing": lambda m: m,
    "a deep copy": copy.deepcopy,
    "a copy of a copy": lambda m: copy.deepcopy(copy.deepcopy(m)),
    "a pickle": pickled,
    "another dtype": lambda m: m.to(torch.bfloat16),
    "parameters swapped by a conversion": swapped,
    "the meta device and back": lambda m: m.to_empty(device="meta").to_empty(device="cpu"),
    "new parameters": replaced,
    "a wrapper": nn.Sequential,
    "compiled": torch.compile,
}


@pytest.mark.parametrize("change", CHANGES)
def test_parameters_are_found_after(change):
    module = CHANGES[change](annotate(model()))
    assert structures(AdamMini(module.parameters())) == EXPECTED


FORMS = {
    "named": lambda m: m.named_parameters(),
    "groups": lambda m: [{"params": [p for p in m.parameters() if p.dim() == size]} for size in (1, 2)],
    "named in a group": lambda m: [{"params": list(m.named_parameters())}],
}


@pytest.mark.parametrize("form", FORMS)
def test_parameters_are_found_as(form):
    assert structures(AdamMini(FORMS[form](annotate(model())))) == EXPECTED


def test_a_part_of_the_model():
    module = annotate(model())
    found = structures(AdamMini(module[1].parameters()))
    assert found == {name: own for name, own in EXPECTED.items() if name.startswith("1.")}


def test_partition_overrides_and_layouts_are_those_of_the_annotation():
    module = annotate(model(), "transformer", {"query": "row"})
    expected = AdamMini(model(), partition="transformer", partition_overrides={"query": "row"})
    assert structures(AdamMini(module.parameters())) == structures(expected)
    own = AdamMini(module.parameters(), partition="factored", partition_overrides={})
    assert structures(own) == structures(AdamMini(model(), partition="factored"))


def test_a_strategy_of_ones_own():
    strategy = Strategy("rows", {})
    assert structures(AdamMini(annotate(model(), strategy).parameters())) == structures(
        AdamMini(model(), partition=strategy)
    )


def test_the_last_annotation_counts():
    module = annotate(annotate(model()), "factored")
    assert annotation_of(module.parameters()).partition == "factored"
    annotate(whole := nn.ModuleDict({"inner": module}), "element")
    assert structures(AdamMini(module.parameters())).keys() == {f"inner.{name}" for name in EXPECTED}
    assert annotation_of(whole.parameters()).partition == "element"


def test_a_model_of_others_is_no_annotation():
    annotate(model())
    with pytest.raises(ValueError, match=r"annotate\(model\)"):
        AdamMini(model().parameters())
    assert annotation_of(model().parameters()) is None


def test_no_parameters_belong_to_no_model():
    """As those of a rank on which DeepSpeed leaves none, beside an annotated model of someone else."""
    module = annotate(model())
    assert annotation_of([]) is None
    assert AdamMini([{"params": []}]).partition == {}
    assert annotation_of(module.parameters()).model is module


def test_an_annotated_model_that_is_gone_is_not_kept():
    module = annotate(model())
    parameters = list(module.parameters())
    del module
    gc.collect()
    assert annotation_of(parameters) is None


def test_parameters_of_two_models_are_refused():
    first = annotate(model())
    others = [*first.parameters(), nn.Parameter(torch.zeros(3, 5))]
    with pytest.raises(ValueError, match=r"7 of 8 parameters belong to the annotated Sequential.*shape \(3, 5\)"):
        AdamMini(others)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((model().parameters(),), "takes a model"),
        ((model(), "tranformer"), "unknown partition"),
        ((model(), "auto", {"quary": "row"}), "quary"),
        ((model(), "auto", {"2.bias": "column"}), "column"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        annotate(*arguments)


def test_the_state_of_the_model_is_as_before():
    module = model()
    before = list(module.state_dict())
    assert list(annotate(module).state_dict()) == before
    assert [name for name, _ in module.named_modules()] == [name for name, _ in model().named_modules()]
    assert DataLoader(range(2))  # an annotated model is no argument of other constructors


def _sharded(rank, how):
    torch.manual_seed(0)
    module = model()
    if how != "after":
        annotate(module)
    mesh = init_device_mesh("cpu", (2,))
    if how == "fsdp2" or how == "after":
        fully_shard(module[1], mesh=mesh)
        fully_shard(module, mesh=mesh)
        if how == "after":
            annotate(module)
    elif how == "tensor parallel":
        parallelize_module(module, mesh, {"2": ColwiseParallel()})
    elif how == "ddp":
        module = DistributedDataParallel(module)
    else:
        module = FullyShardedDataParallel(module, use_orig_params=True, device_id=torch.device("cpu"))
    return structures(AdamMini(module.parameters()))


@pytest.mark.parametrize("how", ["fsdp2", "after", "tensor parallel", "ddp", "fsdp1"])
def test_parameters_are_found_after_sharding(how):
    for found in run_ranks(2, _sharded, how):
        assert found == EXPECTED


def _trained(rank, is_annotated):
    """Weights after three steps of a model that FSDP2 shards, by its parameters alone or by the model."""
    torch.manual_seed(0)
    module = model()
    if is_annotated:
        annotate(module)
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    optimizer = AdamMini(module.parameters(), module=None if is_annotated else module, lr=1e-2)
    for step in range(3):
        torch.manual_seed(step)
        for parameter in module.parameters():
            parameter.grad = parameter.detach() * 0.1 + step
        optimizer.step()
    return [parameter.full_tensor().detach() for parameter in module.parameters()]


def test_a_sharded_run_of_parameters_alone_is_that_of_the_model():
    for alone, beside in zip(*(run_ranks(2, _trained, how)[0] for how in (True, False)), strict=True):
        assert torch.equal(alone, beside)
