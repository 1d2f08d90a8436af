"""What training costs, where the memory goes, and how well fewer second moments would stand for AdamW's."""

from lightning_adam_mini.measure.explanation import ExplainedParameter, Explanation, explain
from lightning_adam_mini.measure.machine import (
    cpu_name,
    describe_machine,
    package_versions,
    peak_flops,
    transformer_flops_per_token,
)
from lightning_adam_mini.measure.memory import adamw_state_bytes, optimizer_state_bytes, peak_memory_bytes
from lightning_adam_mini.measure.moment_statistics import (
    MatrixStatistics,
    SecondMomentRecord,
    StructureStatistics,
    least_memory_rule,
    log_deviation,
    signal_to_noise,
    slimadam_rule,
)

__all__ = [
    "ExplainedParameter",
    "Explanation",
    "MatrixStatistics",
    "SecondMomentRecord",
    "StructureStatistics",
    "adamw_state_bytes",
    "cpu_name",
    "describe_machine",
    "explain",
    "least_memory_rule",
    "log_deviation",
    "optimizer_state_bytes",
    "package_versions",
    "peak_flops",
    "peak_memory_bytes",
    "signal_to_noise",
    "slimadam_rule",
    "transformer_flops_per_token",
]
