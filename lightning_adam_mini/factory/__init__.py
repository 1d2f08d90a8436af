"""Optimizer factories: one frozen dataclass an optimizer, which builds it for any module.

Adding an optimizer is adding one dataclass. Every field is an option of the command line, and unknown options raise.
Rules that no library has right are under `rules`. Their equations and sources are in `docs/optimizers.md`.
"""

from lightning_adam_mini.factory.adam import Adam, AdamMini, AdamW
from lightning_adam_mini.factory.base import OptimizerFactory
from lightning_adam_mini.factory.factored import CAME, SM3, Adafactor
from lightning_adam_mini.factory.layerwise import LAMB, NovoGrad
from lightning_adam_mini.factory.momentum import SGD, Lion
from lightning_adam_mini.factory.muon import Muon

__all__ = [
    "CAME",
    "LAMB",
    "SGD",
    "SM3",
    "Adafactor",
    "Adam",
    "AdamMini",
    "AdamW",
    "Lion",
    "Muon",
    "NovoGrad",
    "OptimizerFactory",
]
