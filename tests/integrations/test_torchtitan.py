"""AdamMini in runs of torchtitan: its debug model with two layers, on the CPU, as the page sets it up."""

import os
import re
import sys
import types
import zlib
from functools import partial

import pytest
import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from checkout import ROOT
from ranks import run_ranks

pytest.importorskip("torchtitan")

from lightning_adam_mini import AdamMini

STEPS, SAVED, ROWS = 6, 3, 4
"""`ROWS` are the sequences of a batch, whatever the number of ranks."""


def page_program():
    """The program of the page as a module; importing it lets torchtitan run on the CPU."""
    page = (ROOT / "docs/use/torchtitan.md").read_text("utf-8")
    (text,) = re.findall(r"^```python\n(# on_a_cpu.py\n.*?)^```", page, re.MULTILINE | re.DOTALL)
    module = types.ModuleType("on_a_cpu")
    sys.modules["on_a_cpu"] = module
    exec(compile(text, "on_a_cpu.py", "exec"), module.__dict__)
    return module


PAGE = page_program()

from torchtitan.components.checkpointer.utils import canonical_fqn  # noqa: E402 - after the page's program
from torchtitan.components.optimizer import ParamGroupConfig, default_adamw  # noqa: E402 - after the page's program

from lightning_adam_mini.integrations.torchtitan import AdamMiniContainer, adam_mini  # noqa: E402 - after the page's program


def named(part):
    return [(canonical_fqn(name), parameter) for name, parameter in part.named_parameters()]


def draw_(part):
    """The same weights, however they are sharded."""
    with torch.no_grad():
        for name, parameter in named(part):
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            full = 0.02 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1)
            if isinstance(parameter, DTensor):
                full = distribute_tensor(full, parameter.device_mesh, parameter.placements)
            parameter.copy_(full)


def train(rank, folder, optimizer, change):
    """A run on this rank: its losses, and the whole weights and structures of its model parts."""
    world = torch.distributed.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.chdir(folder)
    config = PAGE.debugmodel(optimizer(), steps=STEPS)
    config.model_spec.model.layers = config.model_spec.model.layers[:2]
    config.training.local_batch_size = ROWS // world
    config.checkpoint.interval, config.checkpoint.last_save_model_only = SAVED, False
    change(config)
    trainer = config.build()
    for part in trainer.model_parts:
        draw_(part)
    losses = []
    trainer.metrics_processor.log = lambda step, loss, *_, **__: losses.append(loss)
    trainer.train()
    structures = {
        canonical_fqn(name): partition.structure
        for optimizer in trainer.optimizers
        if isinstance(optimizer, AdamMini)
        for name, partition in optimizer.partition.items()
    }
    weights = {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()
        for part in trainer.model_parts
        for name, parameter in named(part)
    }
    trainer.close()
    return losses, weights, structures


def run(world, folder, optimizer, change=lambda config: None):
    """What `train` returns on the last rank, with the weights and structures of all ranks."""
    results = run_ranks(world, train, folder, optimizer, change)
    losses = results[-1][0]
    weights = {name: value for result in results for name, value in result[1].items()}
    return losses, weights, {name: value for result in results for name, value in result[2].items()}


def adamw():
    config = default_adamw(lr=8e-4)
    config.implementation = "for-loop"
    return config


factored, auto, element = (partial(adam_mini, 8e-4, partition=name) for name in ("factored", "auto", "element"))


def save(config):
    config.checkpoint.enable = True


def resume(config):
    save(config)
    config.checkpoint.load_step, config.checkpoint.load_only = SAVED, True


def tensor_parallel(config):
    config.parallelism.tensor_parallel_degree, config.training.local_batch_size = 2, ROWS


def replicated(config):
    config.parallelism.data_parallel_replicate_degree, config.parallelism.data_parallel_shard_degree = 2, 1


def pipeline(config):
    config.parallelism.pipeline_parallel_degree, config.training.local_batch_size = 2, ROWS
    config.parallelism.pipeline_parallel_schedule = "1F1B"


def furthest(weights, others):
    assert weights.keys() == others.keys()
    return max((weights[name] - others[name]).abs().max().item() for name in weights)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("titan")


@pytest.fixture(scope="module")
def of_one_process(folder):
    return run(1, folder, factored)


@pytest.fixture(scope="module")
def saved(folder):
    """A run of two ranks that was saved at half."""
    return run(2, folder, factored, save)


@pytest.mark.slow
def test_elements_train_as_torchtitans_adamw(folder):
    losses, weights, _ = run(2, folder, adamw)
    found, others, structures = run(2, folder, element)
    assert set(structures.values()) == {"element"}
    assert found == pytest.approx(losses, rel=1e-6)
    assert furthest(weights, others) < 1e-6


@pytest.mark.slow
def test_two_ranks_train_as_one(saved, of_one_process):
    assert saved[0] == pytest.approx(of_one_process[0], rel=1e-6)
    assert furthest(saved[1], of_one_process[1]) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("change", [tensor_parallel, replicated, pipeline], ids=lambda change: change.__name__)
def test_every_layout_trains_as_one_process(folder, of_one_process, change):
    losses, weights, structures = run(2, folder, factored, change)
    assert losses == pytest.approx(of_one_process[0], rel=1e-6)
    assert furthest(weights, of_one_process[1]) < 1e-6
    assert structures == of_one_process[2]


@pytest.mark.slow
def test_the_papers_blocks_train_as_in_one_process(folder):
    _, weights, structures = run(1, folder, auto)
    found = run(2, folder, auto)
    assert found[2] == structures
    assert structures["layers.0.attention.qkv_linear.wqkv.weight"] == "head+head+row"
    assert furthest(weights, found[1]) < 1e-6


@pytest.mark.slow
def test_a_resumed_run_is_the_run(folder, saved):
    losses, weights, _ = run(2, folder, factored, resume)
    assert losses == saved[0][SAVED:]
    assert furthest(weights, saved[1]) == 0


@pytest.mark.slow
def test_a_saved_run_goes_on_in_one_process(folder, saved):
    losses, weights, _ = run(1, folder, factored, resume)
    assert losses == pytest.approx(saved[0][SAVED:], rel=1e-6)
    assert furthest(weights, saved[1]) < 1e-6


@pytest.mark.slow
def test_a_saved_run_goes_on_in_a_pipeline(folder, saved):
    losses, weights, _ = run(2, folder, factored, lambda config: (pipeline(config), resume(config)))
    assert losses == pytest.approx(saved[0][SAVED:], rel=1e-6)
    assert furthest(weights, saved[1]) < 1e-6


@pytest.mark.slow
def test_a_state_of_another_partition_is_refused(folder, saved):
    with pytest.raises(AssertionError, match="exp_avg_sq"):  # the checkpoint lacks what this run would load
        run(2, folder, element, resume)


# The container alone, in this process


def model():
    config = PAGE.debugmodel(adamw()).model_spec.model
    config.layers = config.layers[:2]
    part = config.build()
    part.init_weights(buffer_device=None)
    return part


def stages():
    """The model in two parts, as a pipeline has it."""
    first, last = model(), model()
    first.norm = first.lm_head = last.tok_embeddings = None
    del first.layers["1"], last.layers["0"]
    return [first, last]


@pytest.fixture(autouse=True)
def files_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("partition", ["auto", "factored"])
def test_the_partition_is_that_of_the_model(partition):
    part = model()
    (optimizer,) = adam_mini(partition=partition).build(model_parts=[part]).optimizers
    expected = AdamMini(part, partition=partition)
    assert {name: p.blocks for name, p in optimizer.partition.items()} == {
        name: p.blocks for name, p in expected.partition.items()
    }


def test_options_reach_the_optimizer():
    config = adam_mini(lr=0.5, weight_decay=0.25, partition="factored")
    config.partition_overrides = {"lm_head.weight": "row"}
    config.optimizer_factory_kwargs_by_name = {"AdamMini": {"exp_avg_dtype": torch.bfloat16}}
    (optimizer,) = config.build(model_parts=[model()]).optimizers
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.9, 0.95), 0.25)
    assert not {"fused", "foreach"} & group.keys()
    assert optimizer.partition["lm_head.weight"].structure == "row"
    assert optimizer.exp_avg_dtype == torch.bfloat16


def test_other_optimizers_stay_beside_it():
    part = model()
    part.tok_embeddings.weight.requires_grad_(False)
    config = adam_mini(partition="factored")
    config.param_groups.insert(
        0, ParamGroupConfig(pattern="norm", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-3})
    )
    container = config.build(model_parts=[part])
    assert sorted(type(optimizer).__name__ for optimizer in container.optimizers) == ["AdamMini", "AdamW"]
    names = {name for optimizer in container for group in optimizer.param_groups for name in group["param_names"]}
    assert "lm_head.weight" in names
    assert "tok_embeddings.weight" not in names
    container.load_state_dict(container.state_dict())


def take_steps(container, parts, number):
    for step in range(number):
        for part in parts:
            for name, parameter in part.named_parameters():
                seed = zlib.crc32(f"{name} {step}".encode())
                parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        container.step()


def test_a_state_of_one_part_loads_into_two_stages():
    whole, parts = [model()], stages()
    config = adam_mini(partition="auto")
    one, two = config.build(model_parts=whole), config.build(model_parts=parts)
    take_steps(one, whole, 2)
    two.load_state_dict(one.state_dict())
    saved, loaded = one.state_dict(), two.state_dict()
    assert saved.keys() == loaded.keys()
    for key, value in saved.items():
        assert torch.equal(value, loaded[key]) if isinstance(value, torch.Tensor) else value == loaded[key], key


def group(**options):
    return ParamGroupConfig(pattern=".*", optimizer_name="AdamMini", optimizer_kwargs=options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AdamMiniContainer.Config(param_groups=default_adamw().param_groups), "adam_mini\\(lr=...\\)"),
        (
            AdamMiniContainer.Config(param_groups=[group(lr=1e-3, partition="factored")]),
            "has partition, but a group of AdamMini",
        ),
        (
            AdamMiniContainer.Config(param_groups=[group(lr=1e-3)], implementation="fused_opt_states_bf16"),
            "exp_avg_dtype",
        ),
        (AdamMiniContainer.Config(param_groups=[group(lr=-1.0)]), "lr must be"),
        (adam_mini(partition="blocks"), "blocks"),
        (AdamMiniContainer.Config(param_groups=[group()], partition_layouts={"Other": "contiguous"}), "Other"),
    ],
)
def test_wrong_input_is_told(config, message):
    with pytest.raises(ValueError, match=message):
        config.build(model_parts=[model()])


def test_a_state_of_adamw_is_refused():
    part = model()
    state = default_adamw().build(model_parts=[part]).state_dict()
    with pytest.raises(ValueError, match="another optimizer or model"):
        adam_mini().build(model_parts=[part]).load_state_dict(state)
