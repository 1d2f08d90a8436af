"""Verify a partition against the forward pass of the model."""

from lightning_adam_mini.verify.observations import Status, VerifiedParameter
from lightning_adam_mini.verify.verification import Verification, verify_partition

__all__ = ["Status", "Verification", "VerifiedParameter", "verify_partition"]
