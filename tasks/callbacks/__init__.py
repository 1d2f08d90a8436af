"""Callbacks of every run: checkpoints, figures, a report, predictions, averaged weights, and when to stop."""

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
