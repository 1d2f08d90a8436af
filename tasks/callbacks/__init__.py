"""Callbacks of every run: checkpoints, metrics, the report, predictions, averaged weights, and early ends."""

from .checkpoint import MonitorCheck, RunCheckpoint
from .ema import WeightEMA
from .monitoring import GradientSpread, PerformanceMonitor
from .report import PredictionFile, RunReport
from .stopping import DivergenceError, GracefulInterrupt, StopOnDivergence

__all__ = [
    "DivergenceError",
    "GracefulInterrupt",
    "GradientSpread",
    "MonitorCheck",
    "PerformanceMonitor",
    "PredictionFile",
    "RunCheckpoint",
    "RunReport",
    "StopOnDivergence",
    "WeightEMA",
]
