"""Optimizer factories: one frozen dataclass an optimizer, which builds it for any module.

To add an optimizer, add one dataclass to the module of its family and its name here. Every field is an option of the
command line, and an unknown option is an error. Where no library follows the paper, the family's module has the torch
optimizer too, named `...Optimizer`. `docs/optimizers.md` has the equations and sources.

Factories have the names of their optimizers, since users type them (`--optimizer AdamMini`); they are the only classes
that share a name with another.
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
