"""Callbacks of every run: checkpoints, figures, a report, predictions, averaged weights, and when to stop."""

from .checkpoint import RunCheckpoint
from .divergence import DivergenceError, StopOnDivergence
from .ema import WeightEMA
from .gradient_spread import GradientSpread
from .interrupt import GracefulInterrupt
from .monitors import MonitorCheck
from .performance import PerformanceMonitor
from .predictions import PredictionFile
from .report import RunReport

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
