"""LightningModules of others, trained through our LightningCLI and under each strategy."""

import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict  # before ranks are forked, so that none imports it again
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import SaveConfigCallback, instantiate_class
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_adam_mini import AdamMini, annotate, factory
from lightning_adam_mini.integrations.lightning import ConfiguresOptimizer, LightningCLI
from lightning_adam_mini.schedule import Schedule
from lightning_adam_mini.tasks.parallel import FSDP2
from ranks import run_ranks
from sharded_fits import BATCH, FSDP1, Network, bare_trainer

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS, LR, WITHIN = 8, 1e-2, 2e-6


class Foreign(LightningModule):
    """Knows nothing of this package; the batch of a step follows from its number."""

    def __init__(self, width: int = 12):
        super().__init__()
        torch.manual_seed(0)
        self.net = Network(width)

    def training_step(self, batch, batch_idx):
        draw = torch.Generator().manual_seed(self.trainer.global_step)
        tokens, labels = torch.randint(17, (BATCH, 6), generator=draw), torch.randint(5, (BATCH,), generator=draw)
        part = partial(torch.chunk, chunks=self.trainer.world_size)
        rank = self.trainer.global_rank
        return nn.functional.cross_entropy(self.net(part(tokens)[rank]), part(labels)[rank])


class Own(Foreign):
    """Builds its optimizer itself."""

    def configure_optimizers(self):
        return AdamMini(self, lr=LR, partition="transformer")


class Grouped(Foreign):
    """Hands over groups, as for any optimizer."""

    def configure_optimizers(self):
        annotate(self, "transformer")
        is_vector = {
            name: "norm" in name or "bias" in name for name, _ in self.named_parameters()
        }  # FSDP1 hides shapes
        vectors = [p for name, p in self.named_parameters() if is_vector[name]]
        matrices = [p for name, p in self.named_parameters() if not is_vector[name]]
        return AdamMini([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=LR)


class Late(Foreign):
    """Has no parameters before `configure_model`, which shards them if it can."""

    def __init__(self, width: int = 12):
        super().__init__(width)
        self.width, self.net = width, None

    def configure_model(self):
        if self.net is None:
            torch.manual_seed(0)
            self.net = Network(self.width)
            if self.device_mesh is not None:
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class ForeignCLI(LightningCLI):
    """Without files of its own."""

    def __init__(self, model, arguments, **options):
        super().__init__(model, args=arguments, run=False, save_config_callback=None, **options)


def structures(optimizer):
    return {name.removeprefix("net."): (p.role.name, p.blocks) for name, p in optimizer.partition.items()}


def expected(partition="auto"):
    return structures(AdamMini(Network(), partition=partition))


def optimizer_of(configured):
    return configured[0][0] if isinstance(configured, tuple) else configured


# The command line: `--optimizer` builds from the module


@pytest.mark.parametrize("model", [Foreign, Late])
@pytest.mark.parametrize("partition", ["auto", "factored"])
def test_the_obvious_option_gives_the_partition_of_the_model(model, partition):
    cli = ForeignCLI(model, ["--optimizer", "AdamMini", "--optimizer.lr=0.02", f"--optimizer.partition={partition}"])
    cli.model.configure_model()
    optimizer = cli.model.configure_optimizers()
    assert structures(optimizer) == expected(partition)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.02]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]


def test_all_options_of_the_optimizer_are_options(tmp_path):
    config = {
        "class_path": "lightning_adam_mini.AdamMini",
        "init_args": {"partition_overrides": {"query": "row"}, "exp_avg_dtype": "torch.uint8", "betas": [0.8, 0.9]},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"optimizer": config}), "utf-8")
    optimizer = ForeignCLI(Foreign, [f"--config={tmp_path}/own.yaml"]).model.configure_optimizers()
    assert optimizer.exp_avg_dtype is torch.uint8
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert structures(optimizer) == structures(AdamMini(Network(), partition_overrides={"query": "row"}))


@pytest.mark.parametrize("name", ["AdamMini", "Lion", "CAME", "Muon"])
def test_any_factory_is_an_optimizer(name):
    cli = ForeignCLI(Foreign, ["--optimizer", f"lightning_adam_mini.factory.{name}", "--optimizer.lr=0.02"])
    optimizer = cli.model.configure_optimizers()
    assert type(optimizer) is type(getattr(factory, name)().build(Foreign()))
    assert optimizer.param_groups[0]["lr"] == 0.02


def test_a_short_name_is_ours_or_torchs_whatever_else_is_imported():
    import pytorch_optimizer  # noqa: F401 - has an AdamMini and an AdamW too

    for name, expected_class in (("AdamMini", AdamMini), ("AdamW", torch.optim.AdamW)):
        optimizer = ForeignCLI(Foreign, ["--optimizer", name, "--optimizer.lr=0.02"]).model.configure_optimizers()
        assert type(optimizer) is expected_class


def test_torchs_optimizers_are_as_in_lightning():
    cli = ForeignCLI(Foreign, ["--optimizer", "AdamW", "--lr_scheduler", "StepLR", "--lr_scheduler.step_size=3"])
    (optimizer,), (scheduler,) = cli.model.configure_optimizers()
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["params"] == list(cli.model.parameters())
    assert scheduler.step_size == 3
    assert scheduler.optimizer is optimizer


def test_without_an_option_the_module_decides():
    optimizer = ForeignCLI(Own, []).model.configure_optimizers()
    assert structures(optimizer) == expected("transformer")


def test_the_option_is_used_instead_of_the_modules_own():
    with pytest.warns(UserWarning, match=r"--optimizer is used instead of Own\.configure_optimizers"):
        cli = ForeignCLI(Own, ["--optimizer=AdamMini", "--optimizer.partition=element"])
    assert structures(cli.model.configure_optimizers()) == expected("element")


class Two(Foreign):
    """Two optimizers, as LightningCLI's documentation has them."""

    def __init__(self, first: dict | None = None, second: dict | None = None):
        super().__init__()
        self.options = first, second
        self.automatic_optimization = False

    def configure_optimizers(self):
        first, second = self.options
        parts = self.net.blocks.parameters(), [*self.net.tokens.parameters(), *self.net.head.parameters()]
        return [instantiate_class(part, init) for part, init in zip(parts, (first, second), strict=True)]


class TwoCLI(ForeignCLI):
    def add_arguments_to_parser(self, parser):
        parser.add_optimizer_args(nested_key="first", link_to="model.first")
        parser.add_optimizer_args(AdamMini, nested_key="second", link_to="model.second")


def test_several_optimizers_share_the_partition_of_the_model():
    cli = TwoCLI(Two, ["--first=AdamMini", "--first.lr=0.1", "--second.lr=0.2"])
    first, second = cli.model.configure_optimizers()
    assert structures(first) | structures(second) == expected()
    assert (first.param_groups[0]["lr"], second.param_groups[0]["lr"]) == (0.1, 0.2)


def test_a_class_of_ones_own_choice():
    class OneClassCLI(ForeignCLI):
        def add_arguments_to_parser(self, parser):
            parser.add_optimizer_args(AdamMini)
            parser.set_defaults({"optimizer.partition": "factored"})

    optimizer = OneClassCLI(Foreign, ["--optimizer.lr=0.02"]).model.configure_optimizers()
    assert structures(optimizer) == expected("factored")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--optimizer=AdamMini", "--optimizer.partition=tranformer"],
            "unknown partition .tranformer.",
        ),
        (["--optimizer=AdamMini", '--optimizer.partition_overrides={"quary": "row"}'], "quary"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(arguments, message, tmp_path):
    cli = ForeignCLI(Foreign, arguments)
    with pytest.raises(ValueError, match=message):
        trainer(1, "auto", tmp_path).fit(cli.model, [0] * 100)
    assert cli.trainer.global_step == 0


def test_an_unknown_option_is_refused_at_once(capsys):
    with pytest.raises(SystemExit):
        ForeignCLI(Foreign, ["--optimizer=AdamMini", "--optimizer.partitions=factored"])
    assert "partitions" in capsys.readouterr().err


def test_the_config_of_a_run_starts_it_again(tmp_path):
    trainer_options = {"default_root_dir": str(tmp_path), "max_steps": 1, "accelerator": "cpu", "logger": False}
    trainer_options |= {"enable_progress_bar": False, "enable_checkpointing": False}
    arguments = {"optimizer": {"class_path": "AdamMini", "init_args": {"partition": "factored"}}}
    cli = LightningCLI(Foreign, args=arguments | {"trainer": trainer_options}, run=False)
    SaveConfigCallback(cli.parser, cli.config, overwrite=True).setup(cli.trainer, cli.model, "fit")
    again = ForeignCLI(Foreign, ["--config", str(tmp_path / "config.yaml")])
    assert structures(again.model.configure_optimizers()) == expected("factored")


# In Python


def test_the_base_class_has_optimizer_and_schedule(tmp_path):
    class Configured(ConfiguresOptimizer, Foreign):
        optimizer_factory = factory.AdamMini(lr=LR, partition="factored")
        schedule = Schedule(shape="linear", warmup=2)

    run = trainer(1, "auto", tmp_path)
    run.fit(module := Configured(), [0] * 100)
    assert structures(run.optimizers[0]) == expected("factored")
    assert module.lr_schedulers().last_epoch == STEPS


# One process, several ranks, resumed: the same parameters


def trainer(world, strategy, folder, steps=STEPS):
    return bare_trainer(world, strategy, folder, max_steps=steps, enable_checkpointing=False, limit_val_batches=0)


def fit(rank, folder, module, strategy, steps=STEPS, load=None, save=None):
    """Parameters after the steps, whole, and the block structures."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world > 1 or strategy is not None:
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    if rank and strategy not in (None, FSDP1):  # ranks begin with other weights, as without a seed
        module = partial(_with_other_weights, module)
    run = trainer(world, strategy() if strategy else "auto", folder, steps)
    run.fit(module := module(), [0] * 100, ckpt_path=load)
    if save:
        run.save_checkpoint(save)
    weights = run.strategy.lightning_module_state_dict()
    return weights, structures(run.optimizers[0])


def _with_other_weights(module):
    made = module()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1.0)
    return made


def through_cli(model, *options):
    arguments = ["--optimizer=AdamMini", f"--optimizer.lr={LR}", "--optimizer.partition=transformer", *options]
    return ForeignCLI(model, arguments).model


def by_hand():
    """The same steps in a loop of plain torch."""
    torch.manual_seed(0)
    network = Network()
    optimizer = AdamMini(network, lr=LR, partition="transformer")
    for step in range(STEPS):
        draw = torch.Generator().manual_seed(step)
        tokens, labels = torch.randint(17, (BATCH, 6), generator=draw), torch.randint(5, (BATCH,), generator=draw)
        nn.functional.cross_entropy(network(tokens), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return network.state_dict()


def assert_equal(weights, others, within=WITHIN):
    weights = {name.removeprefix("net."): tensor for name, tensor in weights.items()}
    others = {name.removeprefix("net."): tensor for name, tensor in others.items()}
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, others[name], rtol=0, atol=within, msg=lambda m, n=name: f"{n}: {m}")


MODULES = {
    "own": Own,
    "groups": Grouped,
    "command line": partial(through_cli, Foreign),
    "command line, late": partial(through_cli, Late),
}
FSDP2_OF_LIGHTNING = partial(ModelParallelStrategy, 2, 1, save_distributed_checkpoint=False)
LAYOUTS = {
    "ddp": DDPStrategy,
    "fsdp1": FSDP1,
    "fsdp2": FSDP2,
    "fsdp2 of lightning": FSDP2_OF_LIGHTNING,
}


@pytest.mark.parametrize("module", MODULES)
def test_a_fit_is_the_loop_of_plain_torch(module, tmp_path):
    weights, found = fit(0, tmp_path, MODULES[module], None)
    assert_equal(weights, by_hand(), within=0)
    assert found == expected("transformer")


def _cases():
    for layout in LAYOUTS:
        for module in MODULES:
            if layout == "fsdp2 of lightning" and module != "command line, late":
                continue  # it asks for a `configure_model` that shards
            quick = (layout, module) == ("fsdp2", "command line")
            yield pytest.param(layout, module, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("layout", "module"), list(_cases()))
def test_ranks_train_as_one_process(layout, module, tmp_path):
    results = run_ranks(2, fit, tmp_path, MODULES[module], LAYOUTS[layout])
    assert_equal(results[0][0], by_hand())
    assert all(found == expected("transformer") for _, found in results)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_a_resumed_fit_is_the_uninterrupted_one(layout, tmp_path):
    module, strategy = MODULES["command line, late"], LAYOUTS.get(layout)
    work = partial(run_ranks, 2, fit) if layout else lambda *arguments: [fit(0, *arguments)]
    work(tmp_path, module, strategy, 5, None, tmp_path / "half.ckpt")
    weights = work(tmp_path, module, strategy, STEPS, tmp_path / "half.ckpt")[0][0]
    assert_equal(weights, by_hand())


@pytest.mark.parametrize("options", [[], ["--lr_scheduler=StepLR", "--lr_scheduler.step_size=3"]])
def test_element_blocks_are_lightnings_own_adamw(options, tmp_path):
    def weights(*optimizer):
        arguments = [*optimizer, f"--optimizer.lr={LR}", *options]
        return fit(0, tmp_path, lambda: ForeignCLI(Foreign, arguments).model, None)[0]

    ours = weights("--optimizer=AdamMini", "--optimizer.partition=element", "--optimizer.weight_decay_policy=all")
    run = trainer(1, "auto", tmp_path)
    run.fit(ForeignCLI(Foreign, ["--optimizer=AdamW", f"--optimizer.lr={LR}", *options]).model, [0] * 100)
    assert_equal(ours, run.strategy.lightning_module_state_dict(), within=1e-6)


# FSDP2 shards what it can, and refuses the rest


class Itself(Own):
    """Uses a parameter without a submodule."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


class Sharing(Own):
    """Two networks with one parameter."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(12, 17)
        self.other.weight = self.net.tokens.weight


class PartlySharded(Own):
    """Shards one of two networks."""

    def configure_model(self):
        fully_shard(self.net.head, mesh=self.device_mesh["data_parallel"])


class OnMeta(Own):
    """Has no values."""

    def __init__(self):
        super().__init__()
        self.net = self.net.to("meta")


def _refused(rank, folder, module):
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the caller looks at it
        trainer(2, FSDP2(), folder).fit(module(), [0] * 100)
    return str(refused.value)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Itself, "scale: fsdp2 gathers parameters for the forward pass of a module, and Itself uses this one itself"),
        (Sharing, "net.tokens.weight: 2 networks of Sharing share this parameter"),
        (PartlySharded, "net.tokens.weight: configure_model has sharded other parameters and not this one"),
        (OnMeta, "net.tokens.weight: a parameter on the meta device has no values to shard"),
    ],
)
def test_fsdp2_refuses_what_ranks_would_train_apart(module, message, tmp_path):
    for told in run_ranks(2, _refused, tmp_path, module):
        assert told.startswith(message)
        assert "\n" not in told


class Normed(Foreign):
    """Networks in a list, with batch norms, whose statistics differ between ranks."""

    def __init__(self):
        super().__init__()
        self.net = nn.ModuleList([nn.Linear(4, 6), nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2))])

    def training_step(self, batch, batch_idx):
        hidden = torch.randn(8, 4, generator=torch.Generator().manual_seed(self.trainer.global_rank))
        for part in self.net:
            hidden = part(hidden)
        return hidden.square().mean()

    def configure_optimizers(self):
        return AdamMini(self, lr=LR, partition="default")


def _statistics(rank, folder):
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    run = trainer(2, FSDP2(), folder, steps=2)
    run.fit(module := Normed(), [0] * 100)
    return module.net[1][0].running_mean, [type(p).__name__ for p in module.parameters()]


def test_fsdp2_shards_networks_of_a_list_and_shares_their_statistics(tmp_path):
    (mean, kinds), (other, _) = run_ranks(2, _statistics, tmp_path)
    torch.testing.assert_close(mean, other, rtol=0, atol=0)
    assert set(kinds) == {"DTensor"}
