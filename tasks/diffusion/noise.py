"""The noise of a diffusion model: schedule, training target, weights of the loss, and draws that are fixed by a number.

Shapes: `B` images, `C` channels, `H` by `W` pixels, `S` timesteps of training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..run_files import replacing
from ..seeds import seed_of

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
    "write_grid",
    "write_image",
]

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


# Smaller images are drawn larger in a grid.
_TILE = 48
# Share of the timesteps of training from which on an image is taken for noise alone.
_NOISE_FROM = 0.95


def check_sample_steps(num_steps: int, num_timesteps: int) -> None:
    """Check that DDIM begins where training images are noise, which is what it is given.

    diffusers' spacing (`leading`) begins at the timestep `(num_steps - 1) * (num_timesteps // num_steps)`: of 1000, at
    0 in 1 step and at 599 in 600 steps.

    Args:
        num_steps: Steps of DDIM.
        num_timesteps: Timesteps of training.

    Raises:
        ValueError: It begins before 0.95 of the timesteps, or takes more steps than there are; with a number that does.
    """
    if num_steps > num_timesteps:
        raise ValueError(f"sample_steps is {num_steps}, more than num_train_timesteps, {num_timesteps}: lower it")
    # The last timestep is noise, however few there are.
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
    """Turn noise into images by DDIM without noise of its own (Song et al. 2021, equation 12 with sigma = 0).

    Args:
        network: Prediction `(B, C, H, W)` from noisy images and their timesteps `(B,)`.
        schedule: The schedule of training.
        noise: `(B, C, H, W)`, normal.
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
        # The noise that belongs to the image within [-1, 1], not to what the network means before it is clipped.
        images = sampler.step(predicted, timestep, images, use_clipped_model_output=True).prev_sample
    return images.clamp(-1, 1)


def write_grid(images: Tensor, path: Path) -> None:
    """Write images `(B, C, H, W)` in [-1, 1] as one PNG, in rows of eight, beside and then renamed."""
    from torchvision.utils import make_grid

    scale = max(1, _TILE // images.shape[-1])
    larger = F.interpolate(images.float().cpu(), scale_factor=scale, mode="nearest")
    _write(make_grid(larger / 2 + 0.5, nrow=8), path)


def write_image(image: Tensor, path: Path) -> None:
    """Write one image `(C, H, W)` in [-1, 1] as PNG, pixel by pixel, beside and then renamed."""
    _write(image.float().cpu() / 2 + 0.5, path)


def _write(image: Tensor, path: Path) -> None:
    from torchvision.utils import save_image

    with replacing(path) as beside:
        save_image(image, beside, format="png")
