"""Update rules that no library has as their papers say, as torch optimizers."""

from lightning_adam_mini.factory.rules.lamb import LAMB
from lightning_adam_mini.factory.rules.muon_with_adamw import MuonWithAdamW
from lightning_adam_mini.factory.rules.novograd import NovoGrad
from lightning_adam_mini.factory.rules.sm3 import SM3

__all__ = ["LAMB", "SM3", "MuonWithAdamW", "NovoGrad"]
