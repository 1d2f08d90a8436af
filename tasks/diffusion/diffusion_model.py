"""Denoising diffusion models of images.

Shapes: `B` images, `C` channels, `H` by `W` pixels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule
from torch import Tensor, nn

from lightning_adam_mini.factory import OptimizerFactory
from lightning_adam_mini.hints import require_package
from lightning_adam_mini.schedule import Schedule

from ..callbacks import WeightEMA
from ..metrics import MeanLoss
from ..primary_metric import PrimaryMetric
from .comparison import check_images
from .generation import GeneratingTask
from .noise import BetaSchedule, Prediction, build_schedule, evaluation_draws, loss_weights, target
from .sampling import check_sample_steps
from .unet import build_unet, check_unet, fit_to_data

__all__ = ["DiffusionModel"]

_PREDICTS = {"epsilon": "noise", "v_prediction": "velocity", "sample": "image"}


class DiffusionModel(GeneratingTask):
    """A diffusion model (Ho et al. 2020): diffusers' UNet2DModel, trained to tell noise from image.

    Validation is the same in every run: each image has a timestep and a noise of its own, and the squared error counts
    unweighted. Validation, samples and checkpoints have the averaged weights, where `ema_decay` is given.

    Args:
        optimizer: Factory of the optimizer.
        schedule: Learning-rate schedule.
        config: Fields of UNet2DModel, such as `block_out_channels`; diffusers' defaults elsewhere. Size and channels
            are the data's.
        num_train_timesteps: Timesteps of the noise.
        beta_schedule: How noise grows over them, by diffusers' names; `squaredcos_cap_v2` is the cosine.
        prediction_type: What the network predicts: the noise (`epsilon`), the velocity or the image (`sample`).
        min_snr_gamma: Weigh the timesteps of the training loss by min-SNR (Hang et al. 2023; 5 in the paper); all alike
            by default.
        ema_decay: Decay of the moving average of the weights, which grows up to this; null for none.
        activation_checkpointing: Compute activations again in the backward pass, for memory.
        compile: Compile the model with torch.compile.
        sample_every: Draw samples in every so many validations, and at the end; 0 for never.
        num_samples: Images of a grid of samples.
        sample_steps: Steps of DDIM, for samples and `predict`. Numbers that would make it begin before images are noise
            are refused, such as 2, 300 and 600 of 1000 timesteps.
        sample_seed: Seed of the first image of a grid; the others follow.
        pca_features: Compare samples with real images at the end of training and in `test`: the Frechet distance in
            so many principal components of the training images. 0 for no comparison.
        frechet_images: Samples for it, and as many training images for the distance of real from real images; 512 by
            default.

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
                "leave model.frechet_images out (null)"
            )
        if min_snr_gamma is not None and not min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma must be positive, not {min_snr_gamma}; null weighs all timesteps alike")
        if ema_decay is not None:
            WeightEMA(ema_decay)  # a wrong decay raises here, before any data is read
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

    def configure_model(self) -> None:
        """Make the network, for the data's size and channels.

        Raises:
            ValueError: The U-Net does not fit the images.
        """
        if self.model is None:
            self.build(lambda: self._build(self.data_module()), compile=self.compile_model)

    def outline(self, data: LightningDataModule, device: str = "meta") -> list[str]:
        """See `Task.outline`."""
        with torch.device(device):
            self.model = self._build(data)
        return []

    def _build(self, data: Any) -> nn.Module:
        model = build_unet(fit_to_data(self.config, getattr(data, "image_shape", None)))
        if self.activation_checkpointing:
            model.enable_gradient_checkpointing()
        return model

    def setup(self, stage: str) -> None:
        """See `Task.setup`; the data must be enough for the comparison with real images.

        Raises:
            ValueError: They are not.
        """
        super().setup(stage)
        if self.pca_features and stage != "predict":
            check_images(self.data_module(), self.pca_features)

    def on_fit_start(self) -> None:
        """See `Task.on_fit_start`; the weights of the loss are no buffer, for they stay in float32."""
        super().on_fit_start()
        if self.loss_weights is not None:
            self.loss_weights = self.loss_weights.to(self.device)

    def configure_callbacks(self) -> list[Callback]:
        """The average of the weights."""
        return [] if self.ema_decay is None else [WeightEMA(self.ema_decay)]

    @property
    def num_timesteps(self) -> int:
        """Timesteps of the noise."""
        return int(self.noise_schedule.config.num_train_timesteps)

    def forward(self, images: Tensor, timesteps: Tensor) -> Tensor:
        """What the network predicts, float32 `(B, C, H, W)`, from noisy images `(B, C, H, W)` and `(B,)`."""
        # Not diffusers' `dtype`, which walks all modules for it, in each forward pass.
        dtype = next(self.network.parameters()).dtype
        predicted: Tensor = self.network(images.to(dtype), timesteps).sample
        return predicted.float()

    def squared_errors(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Squared errors `(B, C, H, W)` of the prediction, in float32 whatever the precision of the network.

        Args:
            images: `(B, C, H, W)` in [-1, 1].
            noise: The same shape, normal.
            timesteps: `(B,)`.
        """
        images, noise = images.float(), noise.float()
        noisy = self.noise_schedule.add_noise(images, noise, timesteps)
        wanted = target(self.noise_schedule, images, noise, timesteps)
        return F.mse_loss(self(noisy, timesteps), wanted, reduction="none")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean squared error of a batch of images, at random timesteps; weighted with `min_snr_gamma`."""
        noise = torch.randn(batch.shape, device=batch.device)
        timesteps = torch.randint(self.num_timesteps, (len(batch),), device=batch.device)
        errors = self.squared_errors(batch, noise, timesteps)
        if self.loss_weights is not None:
            errors = errors.flatten(1).mean(1) * self.loss_weights[timesteps]
        loss = errors.mean()
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start the mean anew."""
        self.val_mean.reset()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Sum the squared errors, each image at the timestep and with the noise of its index."""
        indices, images = batch
        shape = cast("tuple[int, int, int]", tuple(images.shape[1:]))
        counted = len(images)
        if not counted:  # other ranks wait for this one's collectives, and diffusers' attention takes no empty batch
            indices, images = indices.new_zeros(1), images.new_zeros(1, *shape)
        timesteps, noise = evaluation_draws(indices.tolist(), shape, self.num_timesteps, seed=0)
        errors = self.squared_errors(images, noise.to(images.device), timesteps.to(images.device))
        self.val_mean.update(errors[:counted].flatten(1).mean(1).sum(), counted)

    def on_validation_epoch_end(self) -> None:
        """Log the mean over all images of all ranks; draw samples where it is their turn."""
        loss = self.val_mean.compute()
        # The same on all ranks already; sync_dist says so to Lightning.
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
        """Draw the last samples, and compare others with real images; the averaged weights are in place."""
        if getattr(self.trainer, "fast_dev_run", False):
            return
        with self.evaluating():
            if self.sample_every:
                self.draw_grid()
            if self.pca_features:
                self._frechet = self.compare("val")
                value = {"val_pca_frechet": self._frechet[0]}
                for logger in self.trainer.loggers:
                    logger.log_metrics(value, step=self.trainer.global_step - 1)  # Lightning's number of the last step
                self.trainer.callback_metrics.update({name: torch.tensor(each) for name, each in value.items()})

    def batch_units(self, batch: Tensor) -> int:
        """Images of a batch."""
        return len(batch)

    def summary(self) -> dict[str, str]:
        """Final loss, and how far samples are from real images."""
        lines: dict[str, str] = {}
        loss = self.trainer.callback_metrics.get("val_loss")
        if loss is not None:
            predicted = _PREDICTS[self.noise_schedule.config.prediction_type]
            lines["validation loss"] = f"{loss:.4f}, mean squared error of the {predicted}"
        if self._frechet is not None:
            made, real = self._frechet
            lines["Frechet distance"] = (
                f"{made:.3f} in {self.pca_features} principal components, {self.frechet_images} samples from the "
                f"validation images; training images: {real:.3f}"
            )
        return lines

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the number of validations too, after which samples are drawn."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["validations"] = self._validations

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `Task.on_load_checkpoint`."""
        super().on_load_checkpoint(checkpoint)
        self._validations = checkpoint.get("validations", 0)

    def _is_training_validation(self) -> bool:
        trainer = self.trainer
        return trainer.state.fn == "fit" and not trainer.sanity_checking and not getattr(trainer, "fast_dev_run", False)
