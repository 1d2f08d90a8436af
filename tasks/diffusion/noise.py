"""The noise process of a diffusion model: schedule, training target, loss weights, seeded draws, and DDIM sampling.

Shapes: `B` images, `C` channels, `H` by `W` pixels, `S` timesteps of training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from ..data.sampling import seed_of

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

__all__ = [
    "BetaSchedule",
    "Prediction",
    "build_schedule",
    "check_sample_steps",
    "ddim_sample",
    "evaluation_draws",
    "loss_weights",
    "seeded_noise",
    "target",
]

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]
Prediction = Literal["epsilon", "v_prediction", "sample"]

_GOLDEN = (5**0.5 - 1) / 2
# From this fraction of the training timesteps on, images count as pure noise.
_NOISE_FROM = 0.95


def build_schedule(num_train_timesteps: int, beta_schedule: BetaSchedule, prediction_type: Prediction) -> DDPMScheduler:
    """Diffusers' DDPMScheduler, which has the variances of the forward process and the prediction type.

    Args:
        num_train_timesteps: Timesteps of training, S.
        beta_schedule: diffusers' name; `squaredcos_cap_v2` is the cosine schedule of Nichol and Dhariwal 2021.
        prediction_type: What the network predicts: the noise, the velocity or the image.

    Raises:
        ValueError: The number of timesteps is too small, or a name is unknown.
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
    """The training target for noisy images, `(B, C, H, W)`.

    The noise `e`; the velocity `a e - s x` of Salimans and Ho 2022, with `a^2` the schedule's cumulative alpha and
    `a^2 + s^2 = 1`; or the image `x`.

    Args:
        schedule: See `build_schedule`.
        images: `(B, C, H, W)` in [-1, 1].
        noise: The same shape, standard normal.
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
    """Weights `(S,)` of the squared error by timestep that give the error of the image the weight `min(SNR, gamma)`.

    Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", section 3.4. The error of the noise
    is SNR times the error of the image, that of the velocity SNR + 1 times, so their weights are `min(1, gamma / SNR)`
    and `min(SNR, gamma) / (SNR + 1)`.

    Args:
        alphas_cumprod: `(S,)`, the cumulative alphas of the schedule; SNR = alpha / (1 - alpha).
        prediction_type: What the network predicts.
        gamma: Upper limit of the signal-to-noise ratio in the weights; 5 in the paper.

    Returns:
        Weights in the dtype of `alphas_cumprod`.
    """
    alphas = alphas_cumprod.double()
    snr = alphas / (1 - alphas)
    match prediction_type:
        case "epsilon":
            weights = (gamma / snr).clamp(max=1)  # finite also if the last timestep has no signal left
        case "v_prediction":
            weights = snr.clamp(max=gamma) / (snr + 1)
        case _:
            weights = snr.clamp(max=gamma)
    return weights.to(alphas_cumprod.dtype)


def evaluation_draws(
    indices: Iterable[int], shape: tuple[int, int, int], num_timesteps: int, *, seed: int
) -> tuple[Tensor, Tensor]:
    """The timestep and the noise of each validation image, which do not depend on batch, rank or run.

    The timesteps of consecutive images are spread evenly (multiples of the golden ratio), so that a few hundred images
    cover all timesteps.

    Args:
        indices: Positions of the images in the validation part.
        shape: `(C, H, W)`.
        num_timesteps: S.
        seed: Seed of the noise.

    Returns:
        Timesteps `(B,)` and noise `(B, C, H, W)`, on the CPU.
    """
    numbers = list(indices)
    timesteps = [int(num_timesteps * ((0.5 + number * _GOLDEN) % 1)) for number in numbers]
    noise = seeded_noise((seed_of("evaluation", seed, number) for number in numbers), shape)
    return torch.tensor(timesteps, dtype=torch.int64), noise


def seeded_noise(seeds: Iterable[int], shape: tuple[int, int, int]) -> Tensor:
    """Standard normal noise `(B, C, H, W)` on the CPU, each image's from its own seed alone."""
    draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(draws) if draws else torch.empty(0, *shape)


def check_sample_steps(num_steps: int, num_timesteps: int) -> None:
    """Check that DDIM, whose input is pure noise, begins at a timestep where training images are noise.

    diffusers' spacing (`leading`) begins at the timestep `(num_steps - 1) * (num_timesteps // num_steps)`: with 1000
    timesteps, at 0 for 1 step and at 599 for 600 steps.

    Args:
        num_steps: Steps of DDIM.
        num_timesteps: Timesteps of training.

    Raises:
        ValueError: It begins before 0.95 of the timesteps, or takes more steps than there are; the message has a
            number that works.
    """
    if num_steps > num_timesteps:
        raise ValueError(f"sample_steps is {num_steps}, more than num_train_timesteps, {num_timesteps}: lower it")
    # The last timestep counts as noise for any number of timesteps.
    needed = min(_NOISE_FROM * num_timesteps, num_timesteps - 1)
    if _first_timestep(num_steps, num_timesteps) < needed:
        fitting = (each for each in range(1, num_timesteps + 1) if _first_timestep(each, num_timesteps) >= needed)
        nearest = min(fitting, key=lambda each: abs(each - num_steps))
        raise ValueError(
            f"sample_steps {num_steps} would begin at timestep {_first_timestep(num_steps, num_timesteps)} of "
            f"{num_timesteps}, where images are not noise yet; set model.sample_steps to {nearest}"
        )


def _first_timestep(num_steps: int, num_timesteps: int) -> int:
    return (num_steps - 1) * (num_timesteps // num_steps)


@torch.no_grad()
def ddim_sample(
    network: Callable[[Tensor, Tensor], Tensor], schedule: DDPMScheduler, noise: Tensor, num_steps: int
) -> Tensor:
    """Turn noise into images by deterministic DDIM (Song et al. 2021, equation 12 with sigma = 0).

    Args:
        network: Prediction `(B, C, H, W)` from noisy images and their timesteps `(B,)`.
        schedule: The noise schedule of training.
        noise: `(B, C, H, W)`, standard normal.
        num_steps: Calls of the network; see `check_sample_steps`.

    Returns:
        `(B, C, H, W)` in [-1, 1].
    """
    from diffusers import DDIMScheduler

    sampler = DDIMScheduler.from_config(schedule.config)
    sampler.set_timesteps(num_steps)
    images = noise
    for timestep in sampler.timesteps:
        timesteps = timestep.to(images.device).expand(len(images))
        predicted = network(images, timesteps)
        # Compute the noise from the image after it is clipped to [-1, 1], not from the network's unclipped prediction.
        images = sampler.step(predicted, timestep, images, use_clipped_model_output=True).prev_sample
    return images.clamp(-1, 1)
