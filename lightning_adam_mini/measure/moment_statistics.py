"""Which structure of the second moment each matrix needs, measured from AdamW's own second moment in a run.

AdamW keeps a value `v` for each element. A structure keeps fewer and stands for `v` by an estimate. Two numbers say how
well: the signal-to-noise ratio of `v` within blocks, by which SlimAdam decides (Kalra et al. 2025, "When Can You Get
Away with Low Memory Adam?", arXiv 2503.01843), and the deviation of the logarithm of `v` from that of its estimate.

Shapes: `v` has the shape of its parameter, `(R, C)` for a matrix of `R` outputs and `C` inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_adam_mini.blocks import Blocks, Kind
from lightning_adam_mini.partition import Layouts, Role, Structure, expressible_structures, merge_overrides
from lightning_adam_mini.partition.inference import infer_roles
from lightning_adam_mini.partition.tree import plain_names

__all__ = [
    "MatrixStatistics",
    "SecondMomentRecord",
    "StructureStatistics",
    "least_memory_rule",
    "log_deviation",
    "signal_to_noise",
    "slimadam_rule",
]

_SAME = 1e-14
"""Deviation within a block, as a fraction of its mean, up to which its elements are equal: float64 sums round so."""
THRESHOLD = 1.0
"""SlimAdam's threshold of the signal-to-noise ratio."""


def signal_to_noise(v: Tensor, blocks: Blocks) -> float:
    """The signal-to-noise ratio of a second moment within its blocks.

        SNR_K = E_blocks[ (mean_K v)^2 / var_K v ],    K the elements of a block  (Kalra et al. 2025)

    Above 1, the mean of a block stands for its elements. Blocks that are all zero, such as tokens that no batch had,
    are left out.

    Args:
        v: AdamW's second moment.
        blocks: Blocks of its shape, of `Kind.MEAN`.

    Returns:
        The ratio: infinite if the elements of a block are equal; NaN if blocks have one element, or all are zero.

    Raises:
        ValueError: The structure has no blocks to average over.
    """
    if blocks.kind is not Kind.MEAN:
        raise ValueError(f"a signal-to-noise ratio is one of blocks, and {blocks.kind} has none; take rows or columns")
    if blocks.num_values == v.numel():
        return math.nan
    v = _wide(v)
    (mean,) = _means(v, blocks)
    (variance,) = blocks.mean_square(v - blocks.second_moment(mean), dtype=torch.float64)
    signal = mean.square()
    ratio = torch.where(variance > _SAME**2 * signal, signal / variance, math.inf)[mean > 0]
    return ratio.mean().item()


def log_deviation(v: Tensor, blocks: Blocks) -> float:
    """The standard deviation over elements of `log(v / v_hat)`, where `v_hat` is the estimate of the structure.

    A step of Adam divides by the root of the second moment, so half of this is the deviation of the logarithm of step
    sizes from AdamW's. Elements with `v = 0` are left out.

    Args:
        v: AdamW's second moment.
        blocks: Any structure of its shape; for a factored one the estimate is `row * column / mean(row)`.

    Returns:
        The deviation, in nats: 0 if each element has a value of its own; NaN if all elements are zero.
    """
    v = _wide(v)
    estimate = blocks.second_moment(*_means(v, blocks)).expand_as(v)
    seen = v > 0
    logs = (v[seen] / estimate[seen]).log()
    return logs.std(correction=0).item() if logs.numel() else math.nan


def _wide(v: Tensor) -> Tensor:
    v = v.detach()
    return (v.cpu() if v.device.type == "mps" else v).double()  # MPS has no float64


def _means(v: Tensor, blocks: Blocks) -> tuple[Tensor, ...]:
    """What the structure keeps of `v`."""
    return (v,) if blocks.kind is Kind.ELEMENT else blocks.mean_square(v.sqrt(), dtype=torch.float64)


@dataclass(frozen=True)
class StructureStatistics:
    """How well a structure stands for the second moment of a matrix, as means over observations.

    Args:
        num_values: Numbers that it keeps.
        signal_to_noise: See `signal_to_noise`; NaN for `element` and `factored`, which have no blocks.
        log_deviation: See `log_deviation`.
    """

    num_values: int
    signal_to_noise: float
    log_deviation: float


@dataclass(frozen=True)
class MatrixStatistics:
    """The statistics of a matrix.

    Args:
        name: Its name, without the parts that wrappers add.
        shape: Its shape.
        role: Its role; several for a fused matrix.
        structures: Statistics of each structure that an override can ask for, by name.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    structures: Mapping[str, StructureStatistics]


Rule = Callable[[MatrixStatistics], str]
"""From the statistics of a matrix to the name of a structure."""


def slimadam_rule(matrix: MatrixStatistics) -> str:
    """SlimAdam's rule: average along the axes of the largest signal-to-noise ratio if it is above 1, else not at all.

    Args:
        matrix: Its statistics; rows average over inputs, columns over outputs, `whole` over both.

    Returns:
        `row`, `column`, `whole` or `element`.
    """
    ratios = {
        name: matrix.structures[name].signal_to_noise
        for name in (Structure.ROW, Structure.COLUMN, Structure.WHOLE)
        if name in matrix.structures
    }
    above = {name: ratio for name, ratio in ratios.items() if ratio > THRESHOLD}
    return str(max(above, key=above.__getitem__, default=Structure.ELEMENT))


def least_memory_rule(matrix: MatrixStatistics, bound: float) -> str:
    """The structure with the fewest numbers among those whose log-deviation is below a bound, else `element`.

    Args:
        matrix: Its statistics.
        bound: In nats; of equally small structures, the one with the smaller deviation wins.
    """
    near = {name: found for name, found in matrix.structures.items() if found.log_deviation < bound}
    order = {name: (found.num_values, found.log_deviation) for name, found in near.items()}
    return str(min(order, key=order.__getitem__, default=Structure.ELEMENT))


class SecondMomentRecord:
    """Statistics of the second moments of a model, averaged over observations.

    It covers trainable parameters with two dimensions or more of a size above 1. Vectors, norm scales and biases are
    never compressed.

    Args:
        module: The model.
        layouts: Layouts for classes of this model, as for `partition_module`.
    """

    def __init__(self, module: nn.Module, layouts: Layouts | None = None) -> None:
        self._plain_names = plain_names(module)
        roles = infer_roles(module, layouts)
        expressible = expressible_structures(module, layouts, factored=True)
        self._roles: dict[str, str] = {}
        self._structures: dict[str, dict[str, Blocks]] = {}
        for name, parameter in module.named_parameters():
            is_matrix = parameter.numel() and sum(size > 1 for size in parameter.shape) > 1
            if is_matrix and parameter.requires_grad and not {*roles[name].roles} <= {Role.NORM, Role.BIAS}:
                self._roles[name], self._structures[name] = roles[name].name, expressible[name]
        self._ratios: dict[tuple[str, str], _Mean] = {}
        self._deviations: dict[tuple[str, str], _Mean] = {}
        self.num_observations = 0
        """How often `observe` was called."""

    @property
    def names(self) -> tuple[str, ...]:
        """The matrices, by their names in `module.named_parameters()`."""
        return tuple(self._structures)

    def observe(self, second_moments: Mapping[str, Tensor]) -> None:
        """Add one observation.

        Args:
            second_moments: AdamW's second moment of each matrix by name. One without a gradient so far may be missing
                or zero, and is left out.
        """
        self.num_observations += 1
        for name, v in second_moments.items():
            if not v.any():
                continue
            for structure, blocks in self._structures[name].items():
                key = name, structure
                self._deviations.setdefault(key, _Mean()).add(log_deviation(v, blocks))
                if blocks.kind is Kind.MEAN:
                    self._ratios.setdefault(key, _Mean()).add(signal_to_noise(v, blocks))

    def matrices(self) -> list[MatrixStatistics]:
        """The statistics of each matrix that was observed, in the order of the model.

        Raises:
            ValueError: There was no observation.
        """
        if not self.num_observations:
            raise ValueError("no second moment was observed: train for some steps first, and past the first observed")
        return [
            MatrixStatistics(
                self._plain_names[name],
                next(iter(structures.values())).shape,
                self._roles[name],
                {
                    structure: StructureStatistics(
                        blocks.num_values,
                        self._ratios.get((name, structure), _Mean()).value,
                        self._deviations[name, structure].value,
                    )
                    for structure, blocks in structures.items()
                },
            )
            for name, structures in self._structures.items()
            if all((name, structure) in self._deviations for structure in structures)
        ]

    def overrides(self, rule: Rule) -> dict[str, str]:
        """What a rule advises, as overrides of the partition `element`.

        Raises:
            ValueError: There was no observation.
        """
        everywhere = dict.fromkeys(self._plain_names.values(), str(Structure.ELEMENT))
        return merge_overrides(
            everywhere | {matrix.name: rule(matrix) for matrix in self.matrices()}, Structure.ELEMENT
        )


class _Mean:
    """The mean of numbers that are not NaN."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def add(self, value: float) -> None:
        if not math.isnan(value):
            self._sum, self._count = self._sum + value, self._count + 1

    @property
    def value(self) -> float:
        return self._sum / self._count if self._count else math.nan
