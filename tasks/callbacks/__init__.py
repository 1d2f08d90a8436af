"""Callbacks of every run: checkpoints, performance figures, a report, predictions on disk, and a clean stop."""

from .checkpoint import RunCheckpoint
from .interrupt import GracefulInterrupt
from .performance import PerformanceMonitor
from .predictions import PredictionFile
from .report import RunReport

__all__ = ["GracefulInterrupt", "PerformanceMonitor", "PredictionFile", "RunCheckpoint", "RunReport"]
