"""The noise of a diffusion model: schedule, training target, weights of the loss, and draws that are fixed by a number.

Shapes: `B` images, `C` channels, `H` by `W` pixels, `S` timesteps of training.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from ..data.sampling import seed_of

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

__all__ = ["BetaSchedule", "Prediction", "build_schedule", "evaluation_draws", "loss_weights", "seeded_noise", "target"]

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]
Prediction = Literal["epsilon", "v_prediction", "sample"]

_GOLDEN = (5**0.5 - 1) / 2


def build_schedule(num_train_timesteps: int, beta_schedule: BetaSchedule, prediction_type: Prediction) -> DDPMScheduler:
    """The variances of the forward process and what the network predicts, as diffusers' DDPMScheduler.

    Args:
        num_train_timesteps: Timesteps of training, S.
        beta_schedule: Name of the schedule in diffusers; `squaredcos_cap_v2` is the cosine of Nichol and Dhariwal 2021.
        prediction_type: What the network predicts: the noise, the velocity or the image.

    Raises:
        ValueError: A number or a name is wrong.
    """
    from diffusers import DDPMScheduler

    if num_train_timesteps < 2:
        raise ValueError(f"num_train_timesteps must be at least 2, not {num_train_timesteps}")
    for name, value, known in (
        ("beta_schedule", beta_schedule, get_args(BetaSchedule)),
        ("prediction_type", prediction_type, get_args(Prediction)),
    ):
        if value not in known:
            raise ValueError(f"there is no {name} {value!r}; choose one of {', '.join(known)}")
    return DDPMScheduler(
        num_train_timesteps=num_train_timesteps, beta_schedule=beta_schedule, prediction_type=prediction_type
    )


def target(schedule: DDPMScheduler, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the network is to predict from noisy images, `(B, C, H, W)`.

    The noise `e`; the velocity `a e - s x` of Salimans and Ho 2022, with `a^2` the schedule's cumulative alpha and
    `a^2 + s^2 = 1`; or the image `x`.

    Args:
        schedule: Of `build_schedule`.
        images: `(B, C, H, W)` in [-1, 1].
        noise: The same shape, normal.
        timesteps: `(B,)`, from 0 to S - 1.
    """
    match schedule.config.prediction_type:
        case "epsilon":
            return noise
        case "v_prediction":
            return schedule.get_velocity(images, noise, timesteps)
        case _:
            return images


def loss_weights(alphas_cumprod: Tensor, prediction_type: Prediction, gamma: float) -> Tensor:
    """Weights `(S,)` of the squared error by timestep, so that the image's error weighs `min(SNR, gamma)`.

    Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", section 3.4. The error of the noise
    is SNR times, that of the velocity SNR + 1 times the image's: their weights are `min(1, gamma / SNR)` and
    `min(SNR, gamma) / (SNR + 1)`.

    Args:
        alphas_cumprod: `(S,)`, the cumulative alphas of the schedule; SNR = alpha / (1 - alpha).
        prediction_type: What the network predicts.
        gamma: Signal-to-noise ratio from which on weights stay; 5 in the paper.

    Returns:
        In the dtype of `alphas_cumprod`.
    """
    alphas = alphas_cumprod.double()
    snr = alphas / (1 - alphas)
    match prediction_type:
        case "epsilon":
            weights = (gamma / snr).clamp(max=1)  # also where a last timestep has no signal left
        case "v_prediction":
            weights = snr.clamp(max=gamma) / (snr + 1)
        case _:
            weights = snr.clamp(max=gamma)
    return weights.to(alphas_cumprod.dtype)


def evaluation_draws(
    indices: Iterable[int], shape: tuple[int, int, int], num_timesteps: int, *, seed: int
) -> tuple[Tensor, Tensor]:
    """The timestep and the noise that each validation image always gets, whatever the batch, the rank and the run.

    The timesteps of consecutive images are spread evenly (multiples of the golden ratio), so that a few hundred images
    cover all of them.

    Args:
        indices: Positions of the images in the validation part.
        shape: `(C, H, W)`.
        num_timesteps: S.
        seed: Of the noise.

    Returns:
        Timesteps `(B,)` and noise `(B, C, H, W)`, on the CPU.
    """
    numbers = list(indices)
    timesteps = [int(num_timesteps * ((0.5 + number * _GOLDEN) % 1)) for number in numbers]
    noise = seeded_noise((seed_of("evaluation", seed, number) for number in numbers), shape)
    return torch.tensor(timesteps, dtype=torch.int64), noise


def seeded_noise(seeds: Iterable[int], shape: tuple[int, int, int]) -> Tensor:
    """Normal noise `(B, C, H, W)` on the CPU, each image's from its own seed alone."""
    draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(draws) if draws else torch.empty(0, *shape)
