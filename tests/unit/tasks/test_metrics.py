"""Sums over an evaluation keep their precision, whatever the trainer converts the task to."""

import pytest
import torch
from torch import nn

from lightning_adam_mini.tasks.metrics import MeanLoss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("convert", [lambda m, t: m.to(t), lambda m, t: m.to(torch.device("cpu"), t)])
def test_a_mean_over_many_batches_is_exact_in_a_converted_task(dtype, convert):
    task = nn.Module()
    task.mean = MeanLoss()
    convert(task, dtype)
    for _ in range(2):
        task.mean.reset()
        for _ in range(2000):
            task.mean.update(torch.tensor(100.0, dtype=dtype), 25)
        assert task.mean.compute() == 4.0
        assert task.mean.compute().dtype == torch.float32


def test_a_loss_that_is_not_a_number_shows():
    mean = MeanLoss()
    mean.update(torch.tensor(1.0), 1)
    mean.update(torch.tensor(float("nan")), 1)
    assert mean.compute().isnan()
    assert MeanLoss().compute().isnan()
