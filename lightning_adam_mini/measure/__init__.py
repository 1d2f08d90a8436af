"""What training costs: memory and floating-point operations, and where the memory goes."""

from lightning_adam_mini.measure.explanation import ExplainedParameter, Explanation, explain
from lightning_adam_mini.measure.machine import (
    cpu_name,
    describe_machine,
    package_versions,
    peak_flops,
    transformer_flops_per_token,
)
from lightning_adam_mini.measure.memory import adamw_state_bytes, optimizer_state_bytes, peak_memory_bytes

__all__ = [
    "ExplainedParameter",
    "Explanation",
    "adamw_state_bytes",
    "cpu_name",
    "describe_machine",
    "explain",
    "optimizer_state_bytes",
    "package_versions",
    "peak_flops",
    "peak_memory_bytes",
    "transformer_flops_per_token",
]
