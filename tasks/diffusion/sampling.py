"""Images from a diffusion model, without any random number of the training, and grids of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..atomic_files import replacing

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

__all__ = ["check_sample_steps", "ddim_sample", "write_grid", "write_image"]

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
