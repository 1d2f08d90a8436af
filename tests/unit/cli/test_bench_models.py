"""Models that `adam-mini bench` gives memory, and optimizers that it takes."""

from argparse import Namespace
from typing import get_args

import pytest
import torch
from torch import nn

import tiny_models
from lightning_adam_mini.cli.bench import contenders, steps
from lightning_adam_mini.cli.bench.contenders import BASELINE, choose
from lightning_adam_mini.cli.models import Source
from lightning_adam_mini.cli.runnable_models import choose_device, give_memory, trained_bytes
from lightning_adam_mini.optim.dispatch import Implementation


def on_meta(build):
    with torch.device("meta"):
        return build()


def test_memory_keeps_ties_shapes_and_what_is_frozen():
    model = on_meta(tiny_models.gpt2)
    shapes = {name: (p.shape, p.stride()) for name, p in model.named_parameters()}
    model.transformer.wpe.weight.requires_grad_(False)
    expected = trained_bytes(model)
    give_memory(model, torch.device("cpu"))
    assert {name: (p.shape, p.stride()) for name, p in model.named_parameters()} == shapes
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not model.transformer.wpe.weight.requires_grad
    assert trained_bytes(model) == expected
    assert all(p.std() > 0 for p in model.parameters())


def test_dtype_and_buffers():
    model = on_meta(lambda: nn.BatchNorm1d(8))
    give_memory(model, torch.device("cpu"), torch.bfloat16)
    assert model.weight.dtype is torch.bfloat16
    assert model.running_mean.dtype is torch.float32
    assert model.num_batches_tracked.item() == 0


def test_every_implementation_is_offered():
    names = [entry.name for entry in choose(None, Source(nn.Linear(2, 2)), [])]
    assert names[0] == BASELINE
    assert {f"adam-mini-{name}" for name in get_args(Implementation)} < set(names)


def test_unknown_names_get_the_list():
    with pytest.raises(ValueError, match=r"adamw-8bit, authors.*did you mean adamw-foreach"):
        choose(["adamw-foreech"], Source(nn.Linear(2, 2)), [])
    with pytest.raises(ValueError, match="no implementation of it"):
        choose(["authors"], Source(nn.Linear(2, 2)), ["default"])


def test_partitions_give_rows_of_their_own():
    source = Source(nn.Linear(2, 2), partition="default")
    labels = [entry.label for entry in choose(["adam-mini-foreach", BASELINE], source, ["default", "element"])]
    assert labels == [BASELINE, "adam-mini-foreach default", "adam-mini-foreach element"]
    (_, ours) = choose(["adam-mini-foreach"], source, [])
    assert (ours.label, ours.partition) == ("adam-mini-foreach", "default")


@pytest.mark.parametrize("name", ["authors", "adamw-8bit"])
def test_a_missing_package_is_told(name, monkeypatch):
    monkeypatch.setattr(contenders, "import_module", lambda _: (_ for _ in ()).throw(ImportError("none")))
    _, entry = choose([name], Source(nn.Linear(2, 2)), [])
    with pytest.raises(ValueError, match="not installed; pip install"):
        entry.build(Source(nn.Linear(2, 2)))


def test_turns_keep_within_memory():
    entries = choose(None, Source(nn.Linear(2, 2)), [])
    size, probes = 10**9, 4 * steps.COPY_BYTES
    everything = 4 * size + 2 * size * len(entries) + probes
    assert list(steps._turns(entries, size, everything)) == [entries]
    assert list(steps._turns(entries, size, None)) == [entries]
    pairs = list(steps._turns(entries, size, 4 * size + 2 * size * 2 + probes))
    assert pairs == [[entries[0], other] for other in entries[1:]]
    with pytest.raises(ValueError, match=r"needs 9\.1 GB here .* --dtype bfloat16"):
        list(steps._turns(entries, size, 9 * size))
    assert list(steps._turns(entries[:1], size, everything)) == [entries[:1]]


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(None).type == "cpu"
    with pytest.raises(ValueError, match="no GPU here"):
        choose_device("cuda")


def test_one_that_fails_is_a_row_and_the_baseline_an_error(monkeypatch):
    def measure(source):
        options = Namespace(ranks=1, dtype=None, seed=0, rounds=3)
        entries = choose(["adam-mini-foreach", "authors"], source, [])
        return steps.measure(source, entries, options, torch.device("cpu"))

    def fail(*_, **__):
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr(steps, "COPY_BYTES", 1 << 12)
    monkeypatch.setattr(contenders, "AdamMini", fail)
    rows = measure(Source(on_meta(lambda: nn.Linear(4, 4))))["rows"]
    assert [row.get("reason") for row in rows][:2] == [None, "RuntimeError: out of luck"]
    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    with pytest.raises(ValueError, match="adamw-fused, which ratios are to, failed: RuntimeError: out of luck"):
        measure(Source(on_meta(lambda: nn.Linear(4, 4))))
