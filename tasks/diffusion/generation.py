"""What a diffusion model makes once it has a network: grids of samples, new images, and their distance from real ones.

Shapes: `B` images, `C` channels, `H` by `W` pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from ..base import Task
from .comparison import compare_with_real
from .noise import seeded_noise
from .pipeline_folder import save_pipeline
from .sampling import ddim_sample, write_grid, write_image

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DModel

__all__ = ["GeneratingTask"]

# Images that go through the network at once where samples are made.
_SAMPLE_BATCH = 128


class GeneratingTask(Task):
    """A task that makes images from seeds, without any random number of the training.

    A subclass sets the options below, and `forward` predicts from noisy images and their timesteps.
    """

    noise_schedule: DDPMScheduler
    num_samples: int
    sample_steps: int
    sample_seed: int
    pca_features: int
    frechet_images: int
    _grid: Path | None = None

    @property
    def network(self) -> UNet2DModel:
        """The U-Net, once `configure_model` has made it."""
        assert self.model is not None
        return cast("UNet2DModel", self.model)

    def sample(self, seeds: list[int]) -> Tensor:
        """New images `(B, C, H, W)` in [-1, 1], on the CPU, each from the noise of its seed alone."""
        with self.evaluating():
            made = [self._sample(seeds[at : at + _SAMPLE_BATCH]) for at in range(0, len(seeds), _SAMPLE_BATCH)]
        return torch.cat(made) if made else torch.empty(0, *self._image_shape())

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        """Make the image of each seed, as PNG in `predictions/`: `{"image": path in the run folder, "seed": ...}`."""
        seeds = batch[1].tolist()
        folder = Path(self.trainer.default_root_dir)
        rows = []
        for seed, image in zip(seeds, self.sample(seeds), strict=True):
            name = f"predictions/seed_{seed:06d}.png"
            if self.trainer.is_global_zero or not self.is_sharded:  # all ranks make the same images where it is
                write_image(image, folder / name)
            rows.append({"image": name, "seed": seed})
        return rows

    def export(self, folder: str | Path) -> Path:
        """See `save_pipeline`."""
        return save_pipeline(self.network, self.noise_schedule, folder)

    def pictures(self, folder: Path) -> dict[str, Path]:
        """The last grid of samples."""
        return {} if self._grid is None else {"samples": self._grid}

    def draw_grid(self) -> None:
        """Write samples to `samples/step_000600.png`, once a step; all ranks make them, the first one writes."""
        path = Path(self.trainer.default_root_dir) / "samples" / f"step_{self.trainer.global_step:06d}.png"
        if self._grid == path:
            return
        images = self.sample(list(range(self.sample_seed, self.sample_seed + self.num_samples)))
        self._grid = path
        if self.trainer.is_global_zero:
            write_grid(images, path)

    def compare(self, part: Literal["val", "test"]) -> tuple[float, float]:
        """See `compare_with_real`."""
        # Seeds of the grids are left out: these images are new.
        first = self.sample_seed + self.num_samples
        return compare_with_real(
            self.data_module(),
            part,
            lambda number: self.sample(list(range(first, first + number))),
            num_features=self.pca_features,
            num_images=self.frechet_images,
        )

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without dropout and gradients."""
        was_training = self.network.training
        self.network.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.network.train(was_training)

    def _sample(self, seeds: list[int]) -> Tensor:
        noise = seeded_noise(seeds, self._image_shape()).to(self.device)
        return ddim_sample(self._predict, self.noise_schedule, noise, self.sample_steps).cpu()

    def _predict(self, images: Tensor, timesteps: Tensor) -> Tensor:
        """`forward` in the precision of the trainer, which holds in its steps only."""
        trainer = self._trainer
        with contextlib.nullcontext() if trainer is None else trainer.precision_plugin.forward_context():
            predicted: Tensor = self(images, timesteps)
        return predicted

    def _image_shape(self) -> tuple[int, int, int]:
        config = self.network.config
        size = config.sample_size
        if size is None:
            raise ValueError("set model.config.sample_size: without data nobody knows the size of the images to make")
        return config.in_channels, size, size
