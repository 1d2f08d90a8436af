"""Metrics of a run: sums that stay exact, and a file that is appended and never rewritten."""

import json

import pytest
import torch
from torch import nn

from lightning_adam_mini.tasks.metrics import MeanLoss, MetricsFile, read_metrics


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_rows_carry_steps_so_far_and_the_time(tmp_path):
    MetricsFile(str(tmp_path / "new" / "run")).log_metrics({"loss": 0.5}, step=0)
    (row,) = rows(tmp_path / "new" / "run")
    assert row.keys() == {"step", "time", "loss"}
    assert (row["step"], row["loss"]) == (1, 0.5), "Lightning counts steps from 0"


def test_a_second_logger_appends(tmp_path):
    for step in range(2):
        MetricsFile(str(tmp_path)).log_metrics({"loss": 1.0}, step=step)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_series_by_name_and_step(tmp_path):
    logger = MetricsFile(str(tmp_path))
    for step, metrics in ((4, {"a": 1.0, "epoch": 0}), (2, {"a": 2.0}), (4, {"b": 3.0})):
        logger.log_metrics(metrics, step=step)
    assert read_metrics(tmp_path) == {"a": {3: 2.0, 5: 1.0}, "b": {5: 3.0}}
    assert list(read_metrics(tmp_path)["a"]) == [3, 5], "in the order of steps"


def test_a_step_that_was_taken_again_has_its_later_value(tmp_path):
    for value in (1.0, 2.0):
        MetricsFile(str(tmp_path)).log_metrics({"loss": value}, step=7)
    assert read_metrics(tmp_path) == {"loss": {8: 2.0}}


def test_a_line_that_was_cut_off_is_skipped_and_spoils_no_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(str(tmp_path)).log_metrics({"loss": 1.0}, step=0)
    path.write_bytes(path.read_bytes() + b'{"step": 2, "lo')
    assert read_metrics(tmp_path) == {"loss": {1: 1.0}}
    logger = MetricsFile(str(tmp_path))
    for step in (1, 2):
        logger.log_metrics({"loss": 3.0}, step=step)
    assert read_metrics(tmp_path) == {"loss": {1: 1.0, 2: 3.0, 3: 3.0}}
    assert len(path.read_bytes().splitlines()) == 4


def test_no_file_no_metrics(tmp_path):
    assert read_metrics(tmp_path) == {}


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write the metrics .*; free space or set another --run_dir"):
        MetricsFile(str(tmp_path / "file")).log_metrics({"loss": 1.0}, step=0)


def test_infinity_survives(tmp_path):
    MetricsFile(str(tmp_path)).log_metrics({"loss": float("inf")}, step=0)
    assert read_metrics(tmp_path) == {"loss": {1: float("inf")}}


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
