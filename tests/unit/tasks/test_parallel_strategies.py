"""Which ranks do what, which parts of a network are units, and what is refused before training."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, StrategyRegistry
from torch import nn

from lightning_adam_mini.tasks import base  # noqa: F401 - registers the strategies
from lightning_adam_mini.tasks.parallel import FSDP2, HSDP
from lightning_adam_mini.tasks.parallel.building import build_for
from lightning_adam_mini.tasks.parallel.fsdp1 import prepare_fsdp1
from lightning_adam_mini.tasks.parallel.sharding import checkpoint_activations, repeated_blocks
from lightning_adam_mini.tasks.parallel.strategies import MeshSizes, check_strategy, fit_sizes
from ranks import run_ranks


@pytest.mark.parametrize(
    ("world", "replicate", "tensor", "expected"),
    [
        (8, 1, 1, MeshSizes(shard=8)),
        (8, 2, 1, MeshSizes(replicate=2, shard=4)),
        (8, 1, 4, MeshSizes(shard=2, tensor=4)),
        (12, 3, 2, MeshSizes(replicate=3, shard=2, tensor=2)),
    ],
)
def test_sizes_fill_the_world(world, replicate, tensor, expected):
    sizes = fit_sizes(world, replicate=replicate, tensor=tensor)
    assert sizes == expected
    assert sizes.data_ranks * sizes.tensor == world


@pytest.mark.parametrize(
    ("world", "replicate", "tensor", "told"),
    [
        (6, 1, 4, "tensor_parallel_size 4 does not divide 6 ranks: set it to 1, 2, 3 or 6"),
        (6, 1, 0, "set it to 1, 2, 3 or 6"),
        (8, 3, 2, r"replicate_size 3 does not divide 4 ranks \(of 8, 2 at a time .*: set it to 1, 2 or 4"),
    ],
)
def test_sizes_that_do_not_divide_are_told_with_those_that_do(world, replicate, tensor, told):
    with pytest.raises(ValueError, match=told):
        fit_sizes(world, replicate=replicate, tensor=tensor)


def test_strategies_have_names():
    """Without options FSDP2 shards over all ranks, and HSDP over those of a node."""
    for name, kind, sizes in (("fsdp2", FSDP2, MeshSizes(shard=8)), ("hsdp", HSDP, MeshSizes(replicate=2, shard=4))):
        strategy = StrategyRegistry.get(name)
        assert type(strategy) is kind
        strategy.parallel_devices, strategy.num_nodes = [torch.device("cpu")] * 4, 2
        assert strategy.sizes == sizes
        assert strategy._timeout.total_seconds() == 300


def _positions(rank, strategy, world):
    strategy = connected(strategy, world, rank)
    strategy.setup_environment()
    mesh = strategy.data_mesh
    return strategy.distributed_sampler_kwargs, mesh.mesh.tolist(), strategy.tensor_mesh is None


def connected(strategy, world, rank=0):
    """A strategy as the trainer would leave it, on the process group of the test."""
    strategy.parallel_devices = [torch.device("cpu")] * world
    strategy.cluster_environment = SimpleNamespace(
        local_rank=lambda: rank,
        global_rank=lambda: rank,
        node_rank=lambda: 0,
        set_global_rank=lambda _: None,
        set_world_size=lambda _: None,
        world_size=lambda: world,
        main_address="localhost",
        main_port=1,
    )
    strategy.accelerator = SimpleNamespace(setup_device=lambda device: None)
    strategy._lightning_module = SimpleNamespace(_trainer=None)
    return strategy


@pytest.mark.parametrize(
    ("options", "replicas", "meshes"),
    [
        ({}, [0, 1, 2, 3], [[0, 1, 2, 3]] * 4),
        ({"tensor_parallel_size": 2}, [0, 0, 1, 1], [[0, 2], [1, 3], [0, 2], [1, 3]]),
        ({"replicate_size": 2}, [0, 1, 2, 3], [[[0, 1], [2, 3]]] * 4),
    ],
    ids=["fsdp2", "tensor", "replicate"],
)
def test_ranks_that_compute_together_read_the_same(options, replicas, meshes):
    found = run_ranks(4, _positions, FSDP2(**options), 4)
    assert [sampler["rank"] for sampler, _, _ in found] == replicas
    assert {sampler["num_replicas"] for sampler, _, _ in found} == {len(set(replicas))}
    assert [mesh for _, mesh, _ in found] == meshes
    assert {alone for _, _, alone in found} == {"tensor_parallel_size" not in options}


def test_all_ranks_predict_the_same():
    strategy = connected(FSDP2(), 2, rank=1)
    strategy._lightning_module._trainer = SimpleNamespace(state=SimpleNamespace(fn="predict"))
    assert strategy.distributed_sampler_kwargs == {"num_replicas": 1, "rank": 0}


class Shared(nn.Module):
    """Two equal blocks, one of which shares a matrix with the head."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])
        self.stages = nn.ModuleList([Stage(), Stage()])
        self.head = nn.Linear(4, 4)
        self.stages[0].layer.weight = self.head.weight


class Stage(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x)


def names(model):
    return list(repeated_blocks(model))


def test_blocks_of_networks():
    assert names(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == [], "single layers are no blocks"
    assert names(Shared()) == ["stages.1"]
    assert names(nn.Sequential(nn.Sequential(Stage(), Stage()), nn.Sequential(Stage(), nn.ReLU()))) == ["0.0", "0.1"]


def test_blocks_of_transformers():
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=12, n_head=2))
    assert names(model) == [f"transformer.h.{layer}" for layer in range(3)]


def test_blocks_of_residual_networks():
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        assert names(models.resnet18()) == [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]
        assert names(models.vit_b_16()) == [f"encoder.layers.encoder_layer_{layer}" for layer in range(12)]


def test_blocks_of_u_nets():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        found = names(diffusers.UNet2DModel())
    assert {name.split(".")[0] for name in found} == {"down_blocks", "mid_block", "up_blocks"}


def test_blocks_of_graph_networks():
    pytest.importorskip("torch_geometric")
    from lightning_adam_mini.tasks.graph.networks import NodeNetwork

    assert names(NodeNetwork("gcn", 8, 3, num_layers=3, hidden_size=4)) == [f"body.convs.{layer}" for layer in range(3)]


def test_fsdp1_wraps_the_blocks_unless_the_user_says_what():
    model = Shared()
    strategy = FSDPStrategy()
    prepare_fsdp1(strategy, model)
    policy = strategy.kwargs["auto_wrap_policy"]
    wrapped = [module for module in model.modules() if policy(module=module, recurse=False, nonwrapped_numel=1)]
    assert wrapped == [model.stages[1]]
    own = FSDPStrategy(auto_wrap_policy={Stage})
    before = own.kwargs["auto_wrap_policy"]
    prepare_fsdp1(own, model)
    assert own.kwargs["auto_wrap_policy"] is before
    with pytest.raises(ValueError, match="use_orig_params=false hides which parameter"):
        prepare_fsdp1(FSDPStrategy(use_orig_params=False), model)


def test_activations_are_computed_again():
    model = nn.Sequential(Stage(), Stage())
    calls = []
    for stage in model:
        stage.layer.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpoint_activations(model)
    names_before = [name for name, _ in nn.Sequential(Stage(), Stage()).named_parameters()]
    assert list(model.state_dict()) == names_before
    model(torch.ones(1, 4, requires_grad=True)).sum().backward()
    assert len(calls) == 4
    with pytest.raises(ValueError, match="Linear has no repeated blocks"):
        checkpoint_activations(nn.Linear(2, 2))


class DeepSpeedStrategy:
    """Lightning's cannot be made without GPUs."""


def trainer(strategy, precision="32-true"):
    return SimpleNamespace(strategy=strategy, precision=precision)


@pytest.mark.parametrize(
    ("strategy", "precision", "told"),
    [
        (DeepSpeedStrategy(), "32-true", "use --trainer.strategy fsdp2"),
        (StrategyRegistry["ddp"]["strategy"](), "16-mixed", None),
        (FSDP2(), "16-mixed", "use bf16-mixed"),
        (FSDP2(), "bf16-mixed", None),
        (HSDP(cpu_offload=True), "32-true", "there is no GPU"),
    ],
    ids=["deepspeed", "ddp", "float16", "bfloat16", "offload"],
)
def test_what_cannot_run_is_told(strategy, precision, told):
    if isinstance(strategy, FSDP2):
        connected(strategy, 1)
    if told is None:
        check_strategy(trainer(strategy, precision))
        return
    with pytest.raises(ValueError, match=told):
        check_strategy(trainer(strategy, precision))


def test_lightnings_own_strategy_is_not_enough():
    from lightning.pytorch.strategies import ModelParallelStrategy

    with pytest.raises(ValueError, match="FSDP2 in place of Lightning's"):
        check_strategy(trainer(ModelParallelStrategy()))


def _refused(rank, strategy):
    strategy = connected(strategy, 2, rank)
    strategy.setup_environment()
    try:
        build_for(strategy, lambda: nn.Sequential(Stage(), Stage()))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tensor_parallel_size": 2}, "none for Sequential; set it to 1"),
        ({"initialisation": "sharded"}, "initialisation sharded is for language models"),
        ({}, ""),
    ],
)
def test_networks_that_a_strategy_cannot_divide(options, told):
    for message in run_ranks(2, _refused, FSDP2(**options)):
        assert told in message
        assert bool(told) == bool(message)


def _drawn(rank):
    torch.manual_seed(rank)  # nobody has set a seed
    strategy = connected(FSDP2(), 2, rank)
    strategy.setup_environment()
    return build_for(strategy, lambda: nn.Linear(4, 4)).weight.full_tensor().detach()


def test_ranks_draw_one_model_without_a_seed_too(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # of a run in this process before
    first, second = run_ranks(2, _drawn)
    torch.manual_seed(0)
    assert torch.equal(first, nn.Linear(4, 4).weight)
    assert torch.equal(first, second)
