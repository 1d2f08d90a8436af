"""Denoising diffusion models of images: the task, the samples that it draws, and their distance from real images.

Shapes: `B` images, `C` channels, `H` by `W` pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule
from torch import Tensor, nn

from lightning_adam_mini.factory import OptimizerFactory
from lightning_adam_mini.hints import require_package
from lightning_adam_mini.schedule import Schedule

from ..atomic_files import new_folder, replacing
from ..base import PrimaryMetric, Task
from ..callbacks import WeightEMA
from ..metrics import MeanLoss
from .frechet import check_images, compare_with_real
from .noise import (
    BetaSchedule,
    Prediction,
    build_schedule,
    check_sample_steps,
    ddim_sample,
    evaluation_draws,
    loss_weights,
    seeded_noise,
    target,
)
from .unet import build_unet, check_unet, fit_to_data

if TYPE_CHECKING:
    from diffusers import UNet2DModel

__all__ = ["DiffusionModel"]

_PREDICTS = {"epsilon": "noise", "v_prediction": "velocity", "sample": "image"}
# Images that go through the network at once when samples are made.
_SAMPLE_BATCH = 128
# Smaller images are enlarged in a grid.
_MIN_TILE = 48


class DiffusionModel(Task):
    """A diffusion model (Ho et al. 2020): diffusers' UNet2DModel, trained to predict the noise in an image.

    Validation is the same in every run: each image has a fixed timestep and fixed noise, and the squared error is not
    weighted. With `ema_decay`, validation, samples and checkpoints use the averaged weights.

    Args:
        optimizer: Factory of the optimizer.
        schedule: Learning-rate schedule.
        config: Fields of UNet2DModel, such as `block_out_channels`; diffusers' defaults for the others. Size and
            channels come from the data.
        num_train_timesteps: Timesteps of the noise schedule.
        beta_schedule: diffusers' name of the noise schedule; `squaredcos_cap_v2` is the cosine schedule.
        prediction_type: What the network predicts: the noise (`epsilon`), the velocity or the image (`sample`).
        min_snr_gamma: Weight the timesteps of the training loss by min-SNR with this gamma (Hang et al. 2023; 5 in the
            paper); equal weights by default.
        ema_decay: Decay of the moving average of the weights, after its warm-up; null for none.
        activation_checkpointing: Recompute activations in the backward pass, to save memory.
        compile: Compile the model with torch.compile.
        sample_every: Draw a grid of samples in every nth validation, and at the end; 0 for never.
        num_samples: Images of a grid of samples.
        sample_steps: Steps of DDIM, for samples and `predict`. Numbers for which it would begin before images are noise
            are rejected, such as 2, 300 and 600 of 1000 timesteps.
        sample_seed: Seed of the first image of a grid; the next images have the next seeds.
        pca_features: Compare samples with real images at the end of training and in `test`: the Frechet distance in
            this many principal components of the training images. 0 for no comparison.
        frechet_images: Number of samples to compare, and of training images for the distance between real images; 512
            by default.

    Raises:
        ValueError: A number is out of range, diffusers cannot build the network, or a package is missing.
    """

    unit: ClassVar[str] = "images"
    batch_kind = "images"
    logged_metrics = ("train_loss", "val_loss")
    primary_metric = PrimaryMetric(metric="val_loss", mode="min", label="validation MSE of the noise")
    export_folder: ClassVar[str] = "diffusers"
    """Name of the folder that `adam-mini export` writes in the run folder."""

    def __init__(
        self,
        optimizer: OptimizerFactory | None = None,
        schedule: Schedule | None = None,
        config: dict[str, Any] | None = None,
        num_train_timesteps: int = 1000,
        beta_schedule: BetaSchedule = "squaredcos_cap_v2",
        prediction_type: Prediction = "epsilon",
        min_snr_gamma: float | None = None,
        ema_decay: float | None = 0.9999,
        activation_checkpointing: bool = False,
        compile: bool = False,  # noqa: A002 - the field's word
        sample_every: int = 1,
        num_samples: int = 64,
        sample_steps: int = 50,
        sample_seed: int = 0,
        pca_features: int = 0,
        frechet_images: int | None = None,
    ) -> None:
        super().__init__(optimizer, schedule)
        for package in ("diffusers", "torchvision"):
            require_package(package, type(self).__name__, extra="diffusion")
        for name, value, least in (
            ("num_samples", num_samples, 1),
            ("sample_steps", sample_steps, 1),
            ("sample_every", sample_every, 0),
            ("sample_seed", sample_seed, 0),
            ("pca_features", pca_features, 0),
            ("frechet_images", frechet_images, 2),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        if frechet_images is not None and not pca_features:
            raise ValueError(
                "frechet_images is given, but pca_features is 0, so nothing is compared: set model.pca_features, or "
                "leave out model.frechet_images (null)"
            )
        if min_snr_gamma is not None and not min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma must be positive, not {min_snr_gamma}; null weights timesteps equally")
        if ema_decay is not None:
            WeightEMA(ema_decay)  # a wrong decay raises here, before any data are read
        self.save_hyperparameters()
        self.config = dict(config or {})
        check_unet(self.config)  # wrong options raise here, before any data are read
        self.noise_schedule = build_schedule(num_train_timesteps, beta_schedule, prediction_type)
        check_sample_steps(sample_steps, num_train_timesteps)
        self.primary_metric = replace(
            type(self).primary_metric, label=f"validation MSE of the {_PREDICTS[prediction_type]}"
        )
        self.ema_decay = ema_decay
        self.activation_checkpointing = activation_checkpointing
        self.compile_model = compile
        self.sample_every = sample_every
        self.num_samples = num_samples
        self.sample_steps = sample_steps
        self.sample_seed = sample_seed
        self.pca_features = pca_features
        self.frechet_images = 512 if frechet_images is None else frechet_images
        alphas = self.noise_schedule.alphas_cumprod
        self.loss_weights = None if min_snr_gamma is None else loss_weights(alphas, prediction_type, min_snr_gamma)
        self.val_mean = MeanLoss()
        self._validations = 0
        self._frechet: tuple[float, float] | None = None
        self._grid: Path | None = None

    def configure_model(self) -> None:
        """Build the network for the size and the channels of the data's images.

        Raises:
            ValueError: The U-Net does not fit the images.
        """
        if self.model is None:
            self.build(lambda: self._build(self.data_module()), compile=self.compile_model)

    def configure_meta_model(self, data: LightningDataModule, device: str = "meta") -> list[str]:
        """See `Task.configure_meta_model`."""
        with torch.device(device):
            self.model = self._build(data)
        return []

    def _build(self, data: Any) -> nn.Module:
        model = build_unet(fit_to_data(self.config, getattr(data, "image_shape", None)))
        if self.activation_checkpointing:
            model.enable_gradient_checkpointing()
        return model

    def setup(self, stage: str) -> None:
        """See `Task.setup`.

        Raises:
            ValueError: There are too few images for the comparison with real images.
        """
        super().setup(stage)
        if self.pca_features and stage != "predict":
            check_images(self.data_module(), self.pca_features)

    def on_fit_start(self) -> None:
        """See `Task.on_fit_start`; the loss weights are not a buffer, because they stay in float32."""
        super().on_fit_start()
        if self.loss_weights is not None:
            self.loss_weights = self.loss_weights.to(self.device)

    def configure_callbacks(self) -> list[Callback]:
        """The moving average of the weights."""
        return [] if self.ema_decay is None else [WeightEMA(self.ema_decay)]

    @property
    def network(self) -> UNet2DModel:
        """The U-Net, once `configure_model` has made it."""
        assert self.model is not None
        return cast("UNet2DModel", self.model)

    @property
    def num_timesteps(self) -> int:
        """Timesteps of the noise schedule."""
        return int(self.noise_schedule.config.num_train_timesteps)

    def forward(self, images: Tensor, timesteps: Tensor) -> Tensor:
        """The network's prediction, float32 `(B, C, H, W)`, from noisy images `(B, C, H, W)` and timesteps `(B,)`."""
        # diffusers' own `dtype` walks over all modules in each forward pass.
        dtype = next(self.network.parameters()).dtype
        predicted: Tensor = self.network(images.to(dtype), timesteps).sample
        return predicted.float()

    def squared_errors(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Squared errors `(B, C, H, W)` of the prediction, in float32 for any precision of the network.

        Args:
            images: `(B, C, H, W)` in [-1, 1].
            noise: The same shape, standard normal.
            timesteps: `(B,)`.
        """
        images, noise = images.float(), noise.float()
        noisy = self.noise_schedule.add_noise(images, noise, timesteps)
        wanted = target(self.noise_schedule, images, noise, timesteps)
        return F.mse_loss(self(noisy, timesteps), wanted, reduction="none")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean squared error of a batch of images at random timesteps; weighted if `min_snr_gamma` is given."""
        noise = torch.randn(batch.shape, device=batch.device)
        timesteps = torch.randint(self.num_timesteps, (len(batch),), device=batch.device)
        errors = self.squared_errors(batch, noise, timesteps)
        if self.loss_weights is not None:
            errors = errors.flatten(1).mean(1) * self.loss_weights[timesteps]
        loss = errors.mean()
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Reset the mean."""
        self.val_mean.reset()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Sum the squared errors, each image at the timestep and with the noise of its index."""
        indices, images = batch
        shape = cast("tuple[int, int, int]", tuple(images.shape[1:]))
        counted = len(images)
        if not counted:  # collectives of other ranks wait for this one, and diffusers' attention rejects empty batches
            indices, images = indices.new_zeros(1), images.new_zeros(1, *shape)
        timesteps, noise = evaluation_draws(indices.tolist(), shape, self.num_timesteps, seed=0)
        errors = self.squared_errors(images, noise.to(images.device), timesteps.to(images.device))
        self.val_mean.update(errors[:counted].flatten(1).mean(1).sum(), counted)

    def on_validation_epoch_end(self) -> None:
        """Log the mean over all images of all ranks; draw samples if they are due."""
        loss = self.val_mean.compute()
        # The values are equal on all ranks already; without sync_dist Lightning would warn.
        stage = "test" if self.trainer.testing else "val"
        self.log(f"{stage}_loss", loss, prog_bar=True, sync_dist=True)
        if self.pca_features and self.trainer.state.fn in ("test", "validate"):
            self._frechet = self.compare("test" if stage == "test" else "val")
            self.log(f"{stage}_pca_frechet", torch.tensor(self._frechet[0], dtype=torch.float32), sync_dist=True)
        if self._is_training_validation():
            self._validations += 1
            if self.sample_every and self._validations % self.sample_every == 0:
                self.draw_grid()

    def on_train_end(self) -> None:
        """Draw the last samples, and compare others with real images, with the averaged weights."""
        if getattr(self.trainer, "fast_dev_run", False):
            return
        with self.evaluating():
            if self.sample_every:
                self.draw_grid()
            if self.pca_features:
                self._frechet = self.compare("val")
                value = {"val_pca_frechet": self._frechet[0]}
                for logger in self.trainer.loggers:
                    logger.log_metrics(value, step=self.trainer.global_step - 1)  # Lightning counts steps from 0 here
                self.trainer.callback_metrics.update({name: torch.tensor(each) for name, each in value.items()})

    def batch_units(self, batch: Tensor) -> int:
        """Images of a batch."""
        return len(batch)

    def summary(self) -> dict[str, str]:
        """Final loss, and the distance of samples from real images."""
        lines: dict[str, str] = {}
        loss = self.trainer.callback_metrics.get("val_loss")
        if loss is not None:
            predicted = _PREDICTS[self.noise_schedule.config.prediction_type]
            lines["validation loss"] = f"{loss:.4f}, mean squared error of the {predicted}"
        if self._frechet is not None:
            generated, real = self._frechet
            lines["Frechet distance"] = (
                f"{generated:.3f} in {self.pca_features} principal components, {self.frechet_images} samples from the "
                f"validation images; training images: {real:.3f}"
            )
        return lines

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save also the number of validations, which decides when samples are drawn."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["validations"] = self._validations

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `Task.on_load_checkpoint`."""
        super().on_load_checkpoint(checkpoint)
        self._validations = checkpoint.get("validations", 0)

    def sample(self, seeds: list[int]) -> Tensor:
        """New images `(B, C, H, W)` in [-1, 1], on the CPU, each from the noise of its seed alone."""
        if not seeds:
            return torch.empty(0, *self._image_shape())
        batches = []
        with self.evaluating():
            for start in range(0, len(seeds), _SAMPLE_BATCH):
                noise = seeded_noise(seeds[start : start + _SAMPLE_BATCH], self._image_shape()).to(self.device)
                batches.append(ddim_sample(self._predict, self.noise_schedule, noise, self.sample_steps).cpu())
        return torch.cat(batches)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        """Write the image of each seed as PNG to `predictions/`: `{"image": path in the run folder, "seed": ...}`."""
        seeds = batch[1].tolist()
        folder = Path(self.trainer.default_root_dir)
        rows = []
        for seed, image in zip(seeds, self.sample(seeds), strict=True):
            name = f"predictions/seed_{seed:06d}.png"
            if self.trainer.is_global_zero or not self.is_sharded:  # ranks of a sharded model make the same images
                _write_png(image.float() / 2 + 0.5, folder / name)
            rows.append({"image": name, "seed": seed})
        return rows

    def export(self, folder: str | Path) -> Path:
        """Save U-Net and noise schedule for diffusers' `DDPMPipeline.from_pretrained`; the folder appears complete.

        Args:
            folder: A folder that does not exist yet.

        Raises:
            ValueError: The folder exists.
        """
        from diffusers import DDPMPipeline

        path = Path(folder).expanduser()
        with new_folder(path) as temporary:
            DDPMPipeline(unet=self.network, scheduler=self.noise_schedule).save_pretrained(temporary)
        return path

    def pictures(self, folder: Path) -> dict[str, Path]:
        """The last grid of samples."""
        return {} if self._grid is None else {"samples": self._grid}

    def draw_grid(self) -> None:
        """Write samples in rows of eight to `samples/step_000600.png`; all ranks make them, rank zero writes."""
        from torchvision.utils import make_grid

        path = Path(self.trainer.default_root_dir) / "samples" / f"step_{self.trainer.global_step:06d}.png"
        if self._grid == path:  # the last validation has drawn it already
            return
        images = self.sample(list(range(self.sample_seed, self.sample_seed + self.num_samples)))
        self._grid = path
        if self.trainer.is_global_zero:
            scale = max(1, _MIN_TILE // images.shape[-1])
            enlarged = F.interpolate(images.float(), scale_factor=scale, mode="nearest")
            _write_png(make_grid(enlarged / 2 + 0.5, nrow=8), path)

    def compare(self, part: Literal["val", "test"]) -> tuple[float, float]:
        """See `compare_with_real`."""
        # The seeds of the grids are skipped, so that these images are new.
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
        """Turn dropout and gradients off."""
        was_training = self.network.training
        self.network.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.network.train(was_training)

    def _predict(self, images: Tensor, timesteps: Tensor) -> Tensor:
        """`forward` in the precision of the trainer, which Lightning sets within its steps only."""
        trainer = self._trainer
        with contextlib.nullcontext() if trainer is None else trainer.precision_plugin.forward_context():
            predicted: Tensor = self(images, timesteps)
        return predicted

    def _image_shape(self) -> tuple[int, int, int]:
        config = self.network.config
        size = config.sample_size
        if size is None:
            raise ValueError("set model.config.sample_size: without data the size of new images is unknown")
        return config.in_channels, size, size

    def _is_training_validation(self) -> bool:
        trainer = self.trainer
        return trainer.state.fn == "fit" and not trainer.sanity_checking and not getattr(trainer, "fast_dev_run", False)


def _write_png(image: Tensor, path: Path) -> None:
    """Write an image or a grid `(C, H, W)` in [0, 1] as PNG."""
    from torchvision.utils import save_image

    with replacing(path) as temporary:
        save_image(image, temporary, format="png")
