"""The spread of squared gradients within blocks, against plain sums over lists."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_adam_mini import AdamMini
from lightning_adam_mini.blocks import Blocks, Segment
from lightning_adam_mini.hessian.block_structure import mean_square_gradients, spread_from, spread_sums
from lightning_adam_mini.tasks.callbacks.monitoring import GradientSpread

STRUCTURES = {
    "rows": Blocks.rows((6, 4)),
    "heads": Blocks.rows((6, 4), block_size=3),
    "columns": Blocks.rows((6, 4), axis=1),
    "whole": Blocks.whole((6, 4)),
    "segments": Blocks.segmented((6, 4), (Segment(4, 2), Segment(2, 1))),
    "experts": Blocks.rows((3, 2, 4), axis=1, batch_axes=(0,)),
}


def by_hand(blocks, squares):
    """Within and total variance from lists."""
    index, values = blocks.block_index().flatten().tolist(), squares.flatten().tolist()
    pairs = [(number, math.log(value)) for number, value in zip(index, values, strict=True) if value > 0]
    groups = [[log for number, log in pairs if number == wanted] for wanted in dict.fromkeys(n for n, _ in pairs)]
    mean = [sum(group) / len(group) for group in groups]
    within = sum((log - m) ** 2 for group, m in zip(groups, mean, strict=True) for log in group)
    logs = [log for _, log in pairs]
    total = sum((log - sum(logs) / len(logs)) ** 2 for log in logs)
    return within / (len(logs) - len(groups)), total / (len(logs) - 1)


@pytest.mark.parametrize("name", STRUCTURES)
def test_variances(name):
    blocks = STRUCTURES[name]
    squares = torch.rand(blocks.shape, generator=torch.Generator().manual_seed(0)) + 1e-3
    squares.view(-1)[[0, 5, 6]] = 0
    found = spread_from(spread_sums(blocks, squares))
    assert (found.within, found.total) == pytest.approx(by_hand(blocks, squares), rel=1e-5)
    assert found.zeros == pytest.approx(3 / squares.numel())


def test_rows_explain_what_lies_between_rows():
    sizes = torch.tensor([1.0, 100.0, 1e4]).view(3, 1)
    even = spread_from(spread_sums(Blocks.rows((3, 5)), sizes.expand(3, 5)))
    assert even.within == pytest.approx(0, abs=1e-6)
    assert even.explained == pytest.approx(1)
    assert spread_from(spread_sums(Blocks.rows((3, 5), axis=1), sizes.expand(3, 5))).explained < 0


def test_blocks_without_meaning_explain_nothing_on_average():
    generator = torch.Generator().manual_seed(0)
    squares = torch.randn(2000, 40, generator=generator).square()
    found = spread_from(spread_sums(Blocks.rows((2000, 40)), squares))
    assert found.explained == pytest.approx(0, abs=0.02)
    assert found.total == pytest.approx(math.pi**2 / 2, rel=0.05)


def test_sums_of_parameters_add_up_around_their_own_means():
    blocks = Blocks.whole((6, 4))
    generator = torch.Generator().manual_seed(0)
    squares = torch.rand(6, 4, generator=generator) + 0.1
    apart = spread_from(spread_sums(blocks, squares) + spread_sums(blocks, 1e6 * squares))
    assert apart.within == pytest.approx(spread_from(spread_sums(blocks, squares)).within, rel=1e-4)


def test_elements_have_no_spread_within_and_zeros_no_logarithm():
    found = spread_from(spread_sums(Blocks.element((2, 3)), torch.ones(2, 3)))
    assert math.isnan(found.within)
    empty = spread_from(spread_sums(Blocks.rows((2, 3)), torch.zeros(2, 3)))
    assert empty.zeros == 1
    assert math.isnan(empty.within)
    assert math.isnan(empty.explained)


def test_a_factored_second_moment_is_refused():
    with pytest.raises(ValueError, match="no blocks"):
        spread_sums(Blocks.factored((2, 3)), torch.ones(2, 3))


def test_mean_square_gradients():
    model = nn.Linear(2, 1, bias=False)
    batches = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]])]
    found = mean_square_gradients(model, lambda model, batch: model(batch).sum(), batches)
    torch.testing.assert_close(found["weight"], torch.tensor([[5.0, 2.0]], dtype=torch.float64))
    assert model.weight.grad is None
    with pytest.raises(ValueError, match="empty"):
        mean_square_gradients(model, lambda model, batch: model(batch).sum(), [])


class Logged(Logger):
    """Keeps metrics by step."""

    name, version = "kept", ""

    def __init__(self):
        super().__init__()
        self.rows = {}

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        found = {name: value for name, value in metrics.items() if name.startswith("gradient_spread")}
        if found:
            self.rows[step] = found


class Net(LightningModule):
    """A perceptron."""

    def __init__(self, optimizer):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        self.optimizer = optimizer

    def training_step(self, batch, _):
        return self.net(batch[0]).square().sum()

    def configure_optimizers(self):
        return self.optimizer(self)


def fit(module, **options):
    logger, data = Logged(), TensorDataset(torch.randn(12, 3, generator=torch.Generator().manual_seed(0)))
    trainer = Trainer(
        logger=logger,
        callbacks=[GradientSpread()],
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=2,
        **options,
    )
    trainer.fit(module, DataLoader(data, batch_size=2))
    return logger.rows


class Recorded(AdamMini):
    """Keeps the gradients of each step."""

    def step(self, closure=None):
        loss = super().step(closure)
        gradients = {name: p.grad.clone() for name, p in self.module.named_parameters()}
        self.steps = [*getattr(self, "steps", []), gradients]
        return loss


def recorded(module):
    optimizer = Recorded(module, lr=1e-2, partition="default")
    optimizer.module = module
    module.recorded = optimizer
    return optimizer


def test_the_callback_logs_the_spread_of_a_step_by_role():
    torch.manual_seed(0)
    module = Net(recorded)
    rows = fit(module)
    assert sorted(rows) == [1, 3, 5]  # Lightning's number of a step counts from 0
    optimizer = module.recorded
    for step, metrics in rows.items():
        by_role = {}
        for name, found in optimizer.partition.items():
            sums = spread_sums(found.blocks, optimizer.steps[step][name].square())
            by_role[found.role.name] = by_role.get(found.role.name, 0) + sums
        expected = {f"gradient_spread/{role}": spread_from(sums).within for role, sums in by_role.items()}
        assert {name: value for name, value in metrics.items() if "explained" not in name} == pytest.approx(expected)


def test_an_optimizer_of_a_part_of_the_module_logs_that_part():
    rows = []
    for part in (lambda module: module, lambda module: module.net):
        torch.manual_seed(0)
        rows.append(fit(Net(lambda module, part=part: AdamMini(part(module), lr=1e-2, partition="default"))))
    whole, part = rows
    assert sorted(part) == [1, 3, 5]
    assert part == whole


def test_an_optimizer_whose_names_are_not_the_modules_is_told():
    with pytest.warns(UserWarning, match="logs nothing: the parameters of the optimizer have other names"):
        assert fit(Net(lambda module: AdamMini(list(module.parameters()), lr=0.1, partition="default"))) == {}


def test_another_optimizer_gets_the_blocks_that_adam_mini_would_have():
    torch.manual_seed(0)
    rows = fit(Net(lambda module: torch.optim.SGD(module.parameters(), 0.1)))
    assert "gradient_spread/linear" in rows[1]


def test_where_no_block_has_several_elements_it_says_so():
    with pytest.warns(UserWarning, match="logs nothing: no parameter has blocks of several"):
        assert fit(Net(lambda module: AdamMini(module, lr=0.1, partition="element"))) == {}


def test_released_gradients_are_refused():
    module = Net(lambda module: AdamMini(module, lr=0.1, partition="default"))
    module.gradient_release = True
    with pytest.raises(ValueError, match=r"leave model\.gradient_release out"):
        fit(module)
