"""The callback that observes AdamW's second moment, on a small network under Lightning's trainer."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_adam_mini import AdamMini
from lightning_adam_mini.factory import Adam, AdamW
from lightning_adam_mini.measure import log_deviation, signal_to_noise, slimadam_rule
from lightning_adam_mini.partition import expressible_structures
from lightning_adam_mini.tasks.callbacks import SecondMomentStatistics


class Net(LightningModule):
    """A perceptron whose last layer gets no gradient."""

    def __init__(self, build):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        self.idle = nn.Linear(2, 2)
        self._build = build
        self.seen = []

    def training_step(self, batch, _):
        return self.net(batch[0]).square().sum()

    def configure_optimizers(self):
        return self._build(self)

    def on_train_batch_end(self, *_):
        (optimizer,) = self.trainer.optimizers
        state = optimizer.state[next(self.parameters())]
        self.seen += [state["exp_avg_sq"].clone()] if "exp_avg_sq" in state else []


def fit(build, statistics, **options):
    module = Net(build)
    data = TensorDataset(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)))
    trainer = Trainer(
        callbacks=[statistics],
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(module, DataLoader(data, batch_size=2))
    return module


@pytest.mark.parametrize(
    "build",
    [
        AdamW(lr=1e-2).build,
        Adam(lr=1e-2).build,
        lambda module: AdamMini(module, lr=1e-2, partition="element"),
        lambda module: torch.optim.AdamW(module.parameters(), lr=1e-2),
    ],
    ids=["AdamW", "Adam", "AdamMini", "torch"],
)
def test_means_over_the_steps_whose_turn_it_is(build):
    statistics = SecondMomentStatistics(from_step=4, every=3)
    module = fit(build, statistics)
    record = statistics.record
    assert record.num_observations == 3
    first, second = record.matrices()  # the idle layer was never updated
    assert (first.name, second.name) == ("net.0.weight", "net.2.weight")
    structures = expressible_structures(module, factored=True)["net.0.weight"]
    observed = [module.seen[step - 1] for step in (4, 7, 10)]
    rows = [signal_to_noise(v, structures["row"]) for v in observed]
    factored = [log_deviation(v, structures["factored"]) for v in observed]
    assert first.structures["row"].signal_to_noise == pytest.approx(sum(rows) / 3)
    assert first.structures["factored"].log_deviation == pytest.approx(sum(factored) / 3)
    assert set(record.overrides(slimadam_rule)) <= {"net.0.weight", "net.2.weight", r"re:net\.\d+\.weight"}


def test_accumulated_batches_are_one_step():
    statistics = SecondMomentStatistics(from_step=1, every=1)
    fit(AdamW(lr=1e-2).build, statistics, accumulate_grad_batches=5)
    assert statistics.record.num_observations == 2


@pytest.mark.parametrize(
    "build",
    [
        lambda module: AdamMini(module, lr=1e-2, partition="default"),
        lambda module: torch.optim.SGD(module.parameters(), lr=1e-2),
        lambda module: torch.optim.SGD(module.parameters(), lr=1e-2, momentum=0.9),
    ],
)
def test_an_optimizer_without_elements_is_told(build):
    with pytest.raises(ValueError, match=r"net\.0\.weight: \w+ keeps no second moment for each element") as raised:
        fit(build, SecondMomentStatistics(from_step=2, every=1))
    assert "\n" not in str(raised.value)


def test_advice_of_a_run_without_an_observed_step():
    statistics = SecondMomentStatistics(from_step=100)
    with pytest.raises(ValueError, match="the run took 0 steps, and the first that is observed is 100"):
        _ = statistics.record
    fit(AdamW(lr=1e-2).build, statistics)
    with pytest.raises(ValueError, match="the run took 10 steps"):
        _ = statistics.record


def test_a_wrapped_network_has_the_names_of_a_plain_one():
    def compiled(module):
        module.net = torch.compile(module.net, backend="eager")
        return AdamW(lr=1e-2).build(module)

    plain, wrapped = SecondMomentStatistics(4, 3), SecondMomentStatistics(4, 3)
    fit(AdamW(lr=1e-2).build, plain)
    fit(compiled, wrapped)
    assert wrapped.record.matrices() == plain.record.matrices()


def test_parts_of_second_moments_are_refused(monkeypatch):
    monkeypatch.setattr(Net, "is_sharded", True, raising=False)
    with pytest.raises(ValueError, match="ranks hold parts of them here: train on one device or with strategy 'ddp'"):
        fit(AdamW(lr=1e-2).build, SecondMomentStatistics(1, 1))


@pytest.mark.parametrize("options", [{"from_step": 0}, {"every": 0}])
def test_numbers_of_steps_are_positive(options):
    with pytest.raises(ValueError, match="at least 1, not 0"):
        SecondMomentStatistics(**options)
