"""Training with DeepSpeed: ZeRO-0, 1 and 2 on one and two ranks, against one process without DeepSpeed."""

import logging
import os

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from lightning_adam_mini import AdamMini
from ranks import run_ranks
from sharded_fits import BATCH, Network

os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
pytest.importorskip("deepspeed")

import deepspeed
from deepspeed.utils import safe_get_full_fp32_param

from lightning_adam_mini.integrations.deepspeed import ZeroAdamMini

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

STEPS, LR, WITHIN = 15, 1e-2, 1e-6
BFLOAT16 = {"bf16": {"enabled": True}}


def network():
    torch.manual_seed(0)
    return Network()


def groups_of(model):
    """A user's own groups: the blocks apart from the others, vectors without decay."""
    blocks = dict(model.blocks.named_parameters())
    others = [p for name, p in model.named_parameters() if not name.startswith("blocks")]
    return [
        {"params": [p for p in blocks.values() if p.dim() > 1], "weight_decay": 0.3},
        {"params": [p for p in blocks.values() if p.dim() == 1], "weight_decay": 0.0, "lr": 3 * LR},
        {"params": others},
    ]


def build(cls, model, *, groups=False, **options):
    if groups:
        return cls(groups_of(model), lr=LR, module=model, **options)
    return cls(model, lr=LR, **options)


def batch(step, part=0, parts=1):
    draw = torch.Generator().manual_seed(step)
    tokens, labels = torch.randint(17, (BATCH, 6), generator=draw), torch.randint(5, (BATCH,), generator=draw)
    return tokens.chunk(parts)[part], labels.chunk(parts)[part]


def trained_by_hand(steps=STEPS, **options):
    """One process without DeepSpeed."""
    model = network()
    optimizer = build(AdamMini, model, **options)
    for step in range(steps):
        tokens, labels = batch(step)
        nn.functional.cross_entropy(model(tokens), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def start(optimizer, model, stage, *, world, zero=None, **config):
    settings = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // world,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, **(zero or {})},
        "zero_allow_untested_optimizer": True,
        **config,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


def take_steps(engine, rank, world, steps):
    for step in steps:
        tokens, labels = batch(step, rank, world)
        engine.backward(nn.functional.cross_entropy(engine(tokens).float(), labels))
        engine.step()


def weights(engine):
    """The parameters in float32, also where the model has them in bfloat16."""
    return {
        name: safe_get_full_fp32_param(p)
        if hasattr(p, "_hp_mapping") and p.dtype != torch.float32
        else p.detach().clone()
        for name, p in engine.module.named_parameters()
    }


def train(rank, world, stage, options=None, config=None, cls=ZeroAdamMini):
    os.environ["LOCAL_RANK"] = str(rank)
    model = network()
    optimizer = build(cls, model, **(options or {}))
    engine = start(optimizer, model, stage, world=world, **(config or {}))
    take_steps(engine, rank, world, range(STEPS))
    return weights(engine)


def far(first, second):
    return max((first[name].float() - second[name].float()).abs().max().item() for name in second)


def structures(optimizer):
    return {name: (partition.role.name, partition.blocks) for name, partition in optimizer.partition.items()}


@pytest.mark.parametrize("partition", ["transformer", "factored"])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_zero_trains_as_one_process(world, stage, partition):
    options = {"partition": partition}
    for trained in run_ranks(world, train, world, stage, options):
        assert far(trained, trained_by_hand(**options)) < WITHIN


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_groups_of_the_user_keep_their_options(stage):
    for trained in run_ranks(2, train, 2, stage, {"groups": True}):
        assert far(trained, trained_by_hand(groups=True)) < WITHIN


@pytest.mark.parametrize(
    "config",
    [
        {"zero": {"round_robin_gradients": True}},
        {"zero": {"parameter_alignment": True}},
        {"zero": {"reduce_bucket_size": 500, "overlap_comm": True}},
        {"zero": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False},
    ],
    ids=["round robin", "aligned", "overlapped", "offloaded"],
)
def test_options_of_zero_change_nothing(config):
    for trained in run_ranks(2, train, 2, 2, {"partition": "transformer"}, config):
        assert far(trained, trained_by_hand(partition="transformer")) < WITHIN


# In bfloat16


def train_in_bfloat16(rank, world, stage, partition):
    """All ranks get the whole batch, so that the mean of their gradients is exact."""
    os.environ["LOCAL_RANK"] = str(rank)
    model = network()
    engine = start(ZeroAdamMini(model, lr=LR, partition=partition), model, stage, world=world, **BFLOAT16)
    take_steps(engine, 0, 1, range(STEPS))
    return weights(engine)


def masters_by_hand(partition):
    model, masters = network().bfloat16(), network()
    with torch.no_grad():
        for master, parameter in zip(masters.parameters(), model.parameters(), strict=True):
            master.copy_(parameter)
    optimizer = AdamMini(masters, lr=LR, partition=partition)
    for step in range(STEPS):
        tokens, labels = batch(step)
        nn.functional.cross_entropy(model(tokens).float(), labels).backward()
        with torch.no_grad():
            for master, parameter in zip(masters.parameters(), model.parameters(), strict=True):
                master.grad, parameter.grad = parameter.grad.float(), None
            optimizer.step()
            for master, parameter in zip(masters.parameters(), model.parameters(), strict=True):
                parameter.copy_(master)
    return {name: master.detach() for name, master in masters.named_parameters()}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_float32_masters_of_a_model_in_bfloat16(world, stage):
    for trained in run_ranks(world, train_in_bfloat16, world, stage, "factored"):
        assert far(trained, masters_by_hand("factored")) < WITHIN


# Against DeepSpeed's own run


@pytest.mark.parametrize("config", [{}, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_element_blocks_are_deepspeeds_own_adamw(stage, config):
    element = {"partition": "element", "weight_decay_policy": "all", "implementation": "reference"}
    own = run_ranks(2, train, 2, stage, {}, config, adamw)
    for mini, other in zip(run_ranks(2, train, 2, stage, element, config), own, strict=True):
        assert far(mini, other) < WITHIN


def adamw(model, lr):
    return AdamW(model.parameters(), lr=lr)


# Partition and states


def looked_at(rank, partition):
    os.environ["LOCAL_RANK"] = str(rank)
    model = network()
    optimizer = ZeroAdamMini(model, lr=LR, partition=partition)
    before = structures(optimizer)
    engine = start(optimizer, model, 2, world=2)
    after = structures(optimizer)
    take_steps(engine, rank, 2, range(1))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state[p] for p in parameters]
    firsts = sum(state["exp_avg"].numel() for state in states)
    seconds = sum(v.numel() for state in states for key, v in state.items() if key.startswith("exp_avg_sq"))
    return before, after, structures(optimizer), firsts, seconds


@pytest.mark.parametrize("partition", ["auto", "factored"])
def test_the_partition_is_that_of_the_model(partition):
    expected = structures(AdamMini(network(), partition=partition))
    size = sum(parameter.numel() for parameter in network().parameters())
    ranks = run_ranks(2, looked_at, partition)
    for before, after, stepped, _, seconds in ranks:
        assert before == after == stepped == expected
        assert seconds < size / 5
    assert sum(firsts for _, _, _, firsts, _ in ranks) == size


# Saved and resumed


def resumed(rank, world, stage, folder, config):
    os.environ["LOCAL_RANK"] = str(rank)

    def fresh():
        model = network()
        return start(ZeroAdamMini(model, lr=LR, partition="factored"), model, stage, world=world, **config)

    whole, first, second = fresh(), fresh(), fresh()
    take_steps(whole, rank, world, range(10))
    take_steps(first, rank, world, range(5))
    first.save_checkpoint(folder)
    second.load_checkpoint(folder)
    loaded = weights(second)
    take_steps(second, rank, world, range(5, 10))
    return far(loaded, weights(first)), far(weights(second), weights(whole)), far(loaded, weights(whole))


@pytest.mark.parametrize("config", [{}, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_resumed_run_is_the_uninterrupted_one(stage, config, tmp_path):
    schedule = {"type": "WarmupLR", "params": {"warmup_max_lr": LR, "warmup_num_steps": 8}}
    for loaded, ended, moved in run_ranks(2, resumed, 2, stage, tmp_path, {**config, "scheduler": schedule}):
        assert loaded == ended == 0
        assert moved > 0.01


def saved(rank, world, folder):
    os.environ["LOCAL_RANK"] = str(rank)
    model = network()
    engine = start(ZeroAdamMini(model, lr=LR), model, 2, world=world)
    take_steps(engine, rank, world, range(2))
    engine.save_checkpoint(folder)


def load_elsewhere(rank, world, folder):
    os.environ["LOCAL_RANK"] = str(rank)
    model = network()
    engine = start(ZeroAdamMini(model, lr=LR), model, 2, world=world)
    with pytest.raises(Exception, match="used a DP world size of 2 but the current world size is 1") as error:
        engine.load_checkpoint(folder)
    return type(error.value).__name__


def test_another_number_of_ranks_is_refused_by_deepspeed(tmp_path):
    run_ranks(2, saved, 2, tmp_path)
    assert run_ranks(1, load_elsewhere, 1, tmp_path) == ["ZeRORuntimeException"]


# Refused


def refused(rank, cls, stage, options, config):
    os.environ["LOCAL_RANK"] = str(rank)
    model = network()
    try:
        engine = start(cls(model, lr=LR, **options), model, stage, world=1, **config)
        take_steps(engine, rank, 1, range(1))
    except (AssertionError, ValueError) as error:
        kept = all(torch.equal(p, q) for p, q in zip(model.parameters(), network().parameters(), strict=True))
        return str(error), kept or stage == 3
    return None, False


@pytest.mark.parametrize(
    ("cls", "stage", "options", "config", "message"),
    [
        (AdamMini, 1, {}, {}, "use ZeroAdamMini of lightning_adam_mini.integrations.deepspeed"),
        (AdamMini, 2, {}, {}, "use ZeroAdamMini of lightning_adam_mini.integrations.deepspeed"),
        (ZeroAdamMini, 3, {}, {}, 'set "stage": 2 in "zero_optimization", or shard the model with fully_shard'),
        (ZeroAdamMini, 2, {"exp_avg_dtype": torch.uint8}, {}, "take exp_avg_dtype=torch.bfloat16"),
        (ZeroAdamMini, 2, {"stochastic_rounding": True}, BFLOAT16, "exp_avg_dtype=torch.bfloat16, or leave"),
        (ZeroAdamMini, 2, {}, {"zero_allow_untested_optimizer": False}, '"zero_allow_untested_optimizer": true'),
    ],
)
def test_what_cannot_be_is_refused_before_anything_has_changed(cls, stage, options, config, message):
    ((error, is_kept),) = run_ranks(1, refused, cls, stage, options, config)
    assert message in error
    assert "\n" not in error
    assert is_kept or config is BFLOAT16
