"""Spectra of a model's Hessian, whole and block by block: why Adam works, and which blocks Adam-mini takes."""

from lightning_adam_mini.hessian.advice import ModelAdvice, advise
from lightning_adam_mini.hessian.block_structure import candidate_structures, exact_scores, sketched_scores
from lightning_adam_mini.hessian.exact import DenseHessian, dense_block, dense_hessian
from lightning_adam_mini.hessian.heterogeneity import Heterogeneity, Scale, compare_spectra, heterogeneity_of
from lightning_adam_mini.hessian.lanczos import Tridiagonal, lanczos
from lightning_adam_mini.hessian.operators import HessianOperator
from lightning_adam_mini.hessian.spectrum import (
    Quadrature,
    RitzValues,
    SpectralDensity,
    TraceEstimate,
    block_traces,
    block_tridiagonals,
    density,
    density_of_eigenvalues,
    make_grid,
    model_tridiagonals,
    moments,
    quadrature,
    top_eigenvalues,
    trace,
)
from lightning_adam_mini.hessian.vectors import ParameterBlock, block_of, blocks_of, parameter_blocks

__all__ = [
    "DenseHessian",
    "HessianOperator",
    "Heterogeneity",
    "ModelAdvice",
    "ParameterBlock",
    "Quadrature",
    "RitzValues",
    "Scale",
    "SpectralDensity",
    "TraceEstimate",
    "Tridiagonal",
    "advise",
    "block_of",
    "block_traces",
    "block_tridiagonals",
    "blocks_of",
    "candidate_structures",
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
