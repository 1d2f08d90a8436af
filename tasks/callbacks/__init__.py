"""Callbacks: checkpoints, metrics, the report, predictions, averaged weights, early ends, and statistics to add."""

from .checkpoint import MonitorCheck, RunCheckpoint
from .ema import WeightEMA
from .monitoring import GradientSpread, PerformanceMonitor
from .report import PredictionFile, RunReport
from .second_moments import SecondMomentStatistics
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
    "SecondMomentStatistics",
    "StopOnDivergence",
    "WeightEMA",
]
