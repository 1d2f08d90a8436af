"""Every layout with every feature of a training: the same weights as in one process.

Forked ranks, and Lightning's trainer with the strategies of the command.
"""

import os
from functools import cache, partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint.state_dict  # before ranks are forked, so that none imports it again
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_adam_mini.factory import AdamMini
from lightning_adam_mini.schedule import Schedule
from lightning_adam_mini.tasks.atomic_files import remove
from lightning_adam_mini.tasks.base import Task
from lightning_adam_mini.tasks.callbacks import WeightEMA
from lightning_adam_mini.tasks.parallel import FSDP2, HSDP
from lightning_adam_mini.tasks.parallel.sharding import checkpoint_activations
from lightning_adam_mini.tasks.parallel.strategies import check_strategy
from ranks import run_ranks
from sharded_fits import FSDP1, bare_trainer
from sharded_models import BATCH, Convolutions
from tiny_models import POSITIONS, VOCAB, llama

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 10
WITHIN = 2e-6


LAYOUTS = {
    "ddp": (2, DDPStrategy),
    "fsdp2": (2, FSDP2),
    "hsdp": (4, partial(HSDP, replicate_size=2)),
    "tp": (2, partial(FSDP2, tensor_parallel_size=2)),
    "fsdp2 x tp": (4, partial(FSDP2, tensor_parallel_size=2)),
    "fsdp1": (2, FSDP1),
}
QUICK = ("fsdp2",)


def each(*layouts):
    """Cases of a test, most of them slow."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in layouts]


ALL, OURS = each(*LAYOUTS), each("fsdp2", "hsdp", "tp", "fsdp2 x tp")


class Training(Task):
    """Steps whose batch follows from their number alone."""

    def __init__(self, network="llama", *, average=None, recompute=False):
        super().__init__(AdamMini(lr=3e-3, betas=(0.9, 0.95)), Schedule(shape="cosine", warmup=2, horizon=STEPS))
        self.network, self.average, self.recompute = network, average, recompute
        self.save_hyperparameters({"optimizer": self.optimizer_factory, "schedule": self.schedule})  # as all tasks do
        self.losses, self.weights = [], {}

    def configure_model(self):
        if self.model is not None:
            return
        make = partial(llama, num_hidden_layers=2, hidden_size=16) if self.network == "llama" else Convolutions
        initialise = lambda model: model.initialize_weights()  # noqa: E731
        options = {"on_meta": make, "initialise": initialise} if self.network == "llama" else {}
        torch.manual_seed(0)
        self.build(partial(self.whole, make), **options)

    def whole(self, make):
        model = make()
        if self.recompute:
            checkpoint_activations(model)
        return model

    def configure_callbacks(self):
        return [WeightEMA(self.average)] if self.average else []

    def loss(self, seed):
        where = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        draw = torch.Generator().manual_seed(seed)
        tokens = torch.randint(VOCAB, (BATCH, POSITIONS), generator=draw).chunk(where["num_replicas"])[where["rank"]]
        output = self.model(tokens)
        if self.network != "llama":
            return F.cross_entropy(output, tokens[:, 0])
        return F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())

    def training_step(self, batch, batch_idx):
        return self.loss(100 * self.trainer.global_step + batch_idx % self.trainer.accumulate_grad_batches)

    def validation_step(self, batch, batch_idx):
        self.losses.append(float(self.loss(7)))

    def batch_units(self, batch):
        return BATCH

    def on_train_end(self):
        model = self.trainer.strategy.model
        if isinstance(model, FullyShardedDataParallel):
            with FullyShardedDataParallel.summon_full_params(model, writeback=False):
                self.weights = weights_of(model)
        else:
            self.weights = weights_of(self)


def weights_of(module):
    names = {name: name.replace("_fsdp_wrapped_module.", "") for name, _ in module.named_parameters()}
    whole = {
        names[name].replace("_forward_module.", "").replace("_checkpoint_wrapped_module.", ""): p
        for name, p in module.named_parameters()
    }
    return {name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for name, p in whole.items()}


def fit(rank, world, strategy, task, folder=None, load=None, steps=STEPS, **options):
    """Weights, and what this rank measured in each validation."""
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}
    own = {"max_steps": steps, "val_check_interval": STEPS, "enable_checkpointing": False}
    trainer = bare_trainer(world, strategy, folder, **own, **options)
    trainer.fit(task, [0] * 100, [0], ckpt_path=load)
    if folder:
        trainer.save_checkpoint(folder / "saved.ckpt")
    return task.weights, task.losses


def train(layout, features=(), of_strategy=(), **options):
    """What the ranks of a layout end with, by one weights dictionary and the mean loss of the last validation."""
    world, strategy = LAYOUTS[layout]
    return together(run_ranks(world, _train, world, strategy, dict(features), dict(of_strategy), options))


@cache
def alone(features=(), of_strategy=(), **options):
    strategy = FSDP2 if of_strategy else lambda: "auto"
    return together(run_ranks(1, _train, 1, strategy, dict(features), dict(of_strategy), options))


def _train(rank, world, strategy, features, of_strategy, options):
    return fit(rank, world, strategy(**of_strategy), Training(**features), **options)


def together(results):
    (weights, _), *others = results
    for other, _ in others:
        assert all(torch.equal(other[name], weight) for name, weight in weights.items()), "ranks disagree"
    return weights, sum(losses[-1] for _, losses in results if losses) / len(results)


def distance(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("layout", ALL)
def test_a_layout_trains_as_one_process(layout):
    weights, loss = train(layout)
    expected, expected_loss = alone()
    assert distance(weights, expected) < WITHIN
    assert loss == pytest.approx(expected_loss, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ALL)
def test_gradients_are_clipped_by_their_norm(layout):
    weights, _ = train(layout, gradient_clip_val=0.3)
    assert distance(weights, alone(gradient_clip_val=0.3)[0]) < WITHIN
    assert distance(weights, alone()[0]) > 100 * WITHIN, "nothing was clipped"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ALL)
def test_gradients_are_accumulated(layout):
    weights, _ = train(layout, accumulate_grad_batches=2)
    assert distance(weights, alone(accumulate_grad_batches=2)[0]) < WITHIN


@pytest.mark.slow
@pytest.mark.parametrize("layout", ALL)
def test_bfloat16(layout):
    """To the accuracy of the precision."""
    _, loss = train(layout, precision="bf16-mixed")
    assert loss == pytest.approx(alone(precision="bf16-mixed")[1], rel=0.01)
    assert loss != alone()[1]


@pytest.mark.slow
@pytest.mark.parametrize("layout", each("ddp", "fsdp2", "hsdp", "tp", "fsdp2 x tp"))
def test_weights_are_averaged(layout):
    features = (("average", 0.8),)
    weights, loss = train(layout, features)
    expected, expected_loss = alone(features)
    assert distance(weights, expected) < WITHIN
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert distance(weights, alone()[0]) > 100 * WITHIN


def test_fsdp1_averages_no_weights():
    with pytest.raises(AssertionError, match=r"--trainer\.strategy fsdp2 or ddp, or set model\.ema_decay to null"):
        train("fsdp1", (("average", 0.8),))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ALL)
def test_activations_are_computed_again(layout):
    """By the model's option, which every layout has; strategies of this package have one of their own."""
    calls = (("recompute", True),)
    weights, _ = train(layout, calls)
    assert distance(weights, alone()[0]) < WITHIN
    if layout not in ("ddp", "fsdp1"):
        assert distance(train(layout, of_strategy=(("activation_checkpointing", True),))[0], alone()[0]) < WITHIN


@pytest.mark.slow
@pytest.mark.parametrize("layout", OURS)
def test_weights_are_drawn_in_shards(layout):
    """Ranks never hold the model whole, and still begin with the weights of one process."""
    drawn = (("initialisation", "sharded"),)
    weights, _ = train(layout, of_strategy=drawn)
    assert distance(weights, alone(of_strategy=drawn)[0]) < WITHIN
    assert distance(weights, alone()[0]) > 100 * WITHIN, "they were not drawn in shards"


@pytest.mark.slow
@pytest.mark.parametrize("layout", each("ddp", "fsdp2", "hsdp", "fsdp1"))
def test_a_network_of_convolutions(layout):
    features = (("network", "convolutions"),)
    weights, _ = train(layout, features)
    assert distance(weights, alone(features)[0]) < WITHIN


@pytest.mark.slow
@pytest.mark.parametrize("layout", each("ddp", "fsdp2", "hsdp", "tp", "fsdp2 x tp"))
def test_a_checkpoint_goes_on_in_one_process(layout, tmp_path):
    train(layout, folder=tmp_path, steps=STEPS // 2)
    found, _ = together(
        run_ranks(1, _train, 1, lambda: "auto", {}, {}, {"folder": tmp_path, "load": tmp_path / "saved.ckpt"})
    )
    assert distance(found, alone()[0]) < WITHIN


@pytest.mark.slow
def test_a_run_of_the_first_fsdp_goes_on(tmp_path):
    """There alone: its second moments have the shapes of parameters, until `adam-mini convert` makes means of them."""
    train("fsdp1", folder=tmp_path, steps=STEPS // 2)
    saved = tmp_path / "saved.ckpt"
    assert distance(train("fsdp1", load=saved)[0], alone()[0]) < WITHIN
    with pytest.raises(AssertionError, match=r"the saved exp_avg_sq of .* has shape .*adam-mini convert"):
        run_ranks(1, _train, 1, lambda: "auto", {}, {}, {"load": saved})


@pytest.mark.slow
def test_the_first_fsdp_goes_on_from_its_folder_and_from_no_other_layout(tmp_path):
    saved = tmp_path / "saved.ckpt"
    train("fsdp1", of_strategy=(("state_dict_type", "sharded"),), folder=tmp_path, steps=STEPS // 2)
    assert saved.is_dir()
    assert distance(train("fsdp1", load=saved)[0], alone()[0]) < WITHIN
    remove(saved)
    train("ddp", folder=tmp_path, steps=STEPS // 2)
    with pytest.raises(AssertionError, match=r"has shape \(11, 1\), and FSDP1 keeps one value an element"):
        train("fsdp1", load=saved)
    with pytest.raises(AssertionError, match="belongs to another model"):
        train("fsdp1", (("network", "convolutions"),), load=saved)


def test_offloading_goes_without_tensor_parallelism():
    strategy = FSDP2(cpu_offload=True, tensor_parallel_size=2)
    trainer = SimpleNamespace(strategy=strategy, precision="32-true")
    on_gpu = mock.patch.object(FSDP2, "root_device", torch.device("cuda"))
    with on_gpu, pytest.raises(ValueError, match="does not go with tensor_parallel_size above 1"):
        check_strategy(trainer)
