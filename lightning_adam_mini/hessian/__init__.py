"""Spectra of a model's Hessian, whole and block by block: why Adam works, and which blocks Adam-mini takes."""

from lightning_adam_mini.hessian.advice import Advice, advise
from lightning_adam_mini.hessian.block_structure import candidate_cuts, exact_scores
from lightning_adam_mini.hessian.blocks_of import ParameterBlock, block_of, blocks_of, parameter_blocks
from lightning_adam_mini.hessian.common_grid import Scale
from lightning_adam_mini.hessian.exact import DenseHessian, dense_block, dense_hessian
from lightning_adam_mini.hessian.heterogeneity import Heterogeneity, compare_spectra, heterogeneity_of
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
from lightning_adam_mini.hessian.sketched_diagonality import sketched_scores
from lightning_adam_mini.hessian.spectrum import block_tridiagonals, model_tridiagonals
from lightning_adam_mini.hessian.trace import Estimate, RitzValues, block_traces, top_eigenvalues, trace

__all__ = [
    "Advice",
    "DenseHessian",
    "Estimate",
    "HessianOperator",
    "Heterogeneity",
    "ParameterBlock",
    "Quadrature",
    "RitzValues",
    "Scale",
    "SpectralDensity",
    "Tridiagonal",
    "advise",
    "block_of",
    "block_traces",
    "block_tridiagonals",
    "blocks_of",
    "candidate_cuts",
    "choose",
    "compare_spectra",
    "dense_block",
    "dense_hessian",
    "density",
    "density_of_eigenvalues",
    "exact_scores",
    "heterogeneity_of",
    "lanczos",
    "make_grid",
    "model_tridiagonals",
    "moments",
    "parameter_blocks",
    "quadrature",
    "sketched_scores",
    "top_eigenvalues",
    "trace",
]
