"""A task of one's own: a small Transformer that forecasts a monthly series; docs/your_own_task.md explains it."""

import csv
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_adam_mini.factory import OptimizerFactory
from lightning_adam_mini.schedule import Schedule
from lightning_adam_mini.tasks.base import PrimaryMetric, Task
from lightning_adam_mini.tasks.data.module import SampledDataModule
from lightning_adam_mini.tasks.data.sampling import PaddedItems, ShuffledSamples, collate_padded
from lightning_adam_mini.tasks.metrics import MeanLoss

CONTEXT, HORIZON = 24, 12  # months that the network sees, and that it forecasts


class Network(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.values, self.positions = nn.Linear(1, width), nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(width, HORIZON)

    def forward(self, past: Tensor) -> Tensor:  # (B, CONTEXT) to (B, HORIZON)
        last = past[:, -1:]
        hidden = self.values((past - last)[..., None]) + self.positions.weight
        return last + self.head(self.layers(hidden)[:, -1])


class Forecaster(Task):
    unit, batch_kind, logged_metrics = "windows", "windows of a series", ("train_loss", "val_loss")
    primary_metric = PrimaryMetric(metric="val_loss", label="mean squared error of the logarithm")

    def __init__(self, optimizer: OptimizerFactory | None = None, schedule: Schedule | None = None, width: int = 32):
        super().__init__(optimizer, schedule)
        self.width, self.val_loss = width, MeanLoss()

    def configure_model(self):
        if self.model is None:
            self.build(lambda: Network(self.width))

    def training_step(self, windows: Tensor, batch_idx: int) -> Tensor:
        loss = self.squared_errors(windows).mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int):
        errors = self.squared_errors(batch[1])
        self.val_loss.update(errors.sum(), errors.numel())
        self.log("val_loss", self.val_loss)

    def squared_errors(self, windows: Tensor) -> Tensor:
        return (self.model(windows[:, :CONTEXT]) - windows[:, CONTEXT:]).square()


class MonthlySeries(SampledDataModule):
    batch_kind = "windows of a series"

    def __init__(self, path: str | None = None, batch_size: int = 16, seed: int = 0):
        super().__init__(batch_size=batch_size, seed=seed)
        self.path = Path(path or Path(__file__).with_name("passengers.csv"))

    def setup(self, stage: str | None = None):
        super().setup(stage)
        with self.path.open(encoding="utf-8") as file:
            series = torch.tensor([float(row["passengers"]) for row in csv.DictReader(file)]).log()
        windows = series.unfold(0, CONTEXT + HORIZON, 1)
        self.train, self.val = windows[: -2 * HORIZON], windows[-HORIZON:]  # no month of a forecast is trained on

    def train_dataloader(self):
        return self.train_loader(ShuffledSamples(self.train, seed=self.seed))

    def val_dataloader(self):
        return self.evaluation_loader(PaddedItems(self.val), collate=collate_padded)
