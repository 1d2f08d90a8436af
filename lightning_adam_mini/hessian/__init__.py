"""Spectra of a model's Hessian, whole and block by block: why Adam works, and which blocks Adam-mini takes."""

from lightning_adam_mini.hessian.blocks_of import ParameterBlock, block_of, blocks_of, parameter_blocks
from lightning_adam_mini.hessian.lanczos import Tridiagonal, choose, lanczos
from lightning_adam_mini.hessian.operators import HessianOperator
from lightning_adam_mini.hessian.quadrature import (
    Quadrature,
    SpectralDensity,
    density,
    density_of_eigenvalues,
    make_grid,
    moments,
    quadrature,
)
from lightning_adam_mini.hessian.spectra import block_tridiagonals, model_tridiagonals
from lightning_adam_mini.hessian.trace import Estimate, RitzValues, block_traces, top_eigenvalues, trace

__all__ = [
    "Estimate",
    "HessianOperator",
    "ParameterBlock",
    "Quadrature",
    "RitzValues",
    "SpectralDensity",
    "Tridiagonal",
    "block_of",
    "block_traces",
    "block_tridiagonals",
    "blocks_of",
    "choose",
    "density",
    "density_of_eigenvalues",
    "lanczos",
    "make_grid",
    "model_tridiagonals",
    "moments",
    "parameter_blocks",
    "quadrature",
    "top_eigenvalues",
    "trace",
]
