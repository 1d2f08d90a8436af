"""Training of image classifiers.

Shapes: `B` images, `C` channels, `H` and `W` height and width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule
from torch import Tensor, nn

from lightning_adam_mini.factory import OptimizerFactory
from lightning_adam_mini.schedule import Schedule

from ..base import PrimaryMetric, Task
from ..callbacks.ema import WeightEMA
from ..metrics import read_metrics
from .mixing import BatchMixing, check_mixing
from .models import build_model, check_name, inspect_model
from .pictures import draw_accuracy, draw_confusion
from .scores import ClassificationSums

__all__ = ["ImageClassifier"]

_IMAGENET_CLASSES = 1000


class ImageClassifier(Task):
    """A classifier of torchvision or timm with random weights, trained with cross-entropy.

    Args:
        optimizer: Factory of the optimizer.
        schedule: Learning-rate schedule.
        architecture: A classification model of torchvision, such as `resnet18` or `vit_b_16`, or one of timm as
            `timm/NAME`.
        num_classes: Outputs; the data's classes by default.
        in_channels: Channels of an image; the data's by default.
        small_input: For ResNets on small images: a 3x3 first convolution of stride 1, and no max pooling.
        options: Arguments of the model's own function, such as `image_size`, `dropout` or `drop_path_rate`.
        label_smoothing: Share of a label that is spread over all classes.
        mixup_alpha: Of the Beta distribution of mixup's weight; 0 for no mixup.
        cutmix_alpha: Of the Beta distribution of cutmix's area; 0 for no cutmix. With both, each batch takes one.
        mix_probability: That a batch is mixed, with mixup or cutmix; 1 by default.
        ema_decay: Decay of an average of the weights, which validation and checkpoints then have; None for none.
        channels_last: Keep weights and images with channels innermost, which is faster on GPUs.
        compile: Compile the model with torch.compile.
    """

    unit: ClassVar[str] = "images"
    batch_kind = "labelled images"
    logged_metrics = ("train_loss", "val_loss", "val_top1", "val_top5")
    primary_metric = PrimaryMetric(metric="val_top1", mode="max", label="validation top-1 accuracy")

    def __init__(
        self,
        optimizer: OptimizerFactory | None = None,
        schedule: Schedule | None = None,
        architecture: str = "resnet18",
        num_classes: int | None = None,
        in_channels: int | None = None,
        small_input: bool = False,
        options: dict[str, Any] | None = None,
        label_smoothing: float = 0.0,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        mix_probability: float | None = None,
        ema_decay: float | None = None,
        channels_last: bool = False,
        compile: bool = False,  # noqa: A002 - the field's word
    ) -> None:
        super().__init__(optimizer, schedule)
        for name, number in {"num_classes": num_classes, "in_channels": in_channels}.items():
            if number is not None and number < 1:
                raise ValueError(f"model.{name} must be at least 1, not {number}")
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"model.label_smoothing must be in [0, 1), not {label_smoothing}")
        check_mixing(mixup_alpha, cutmix_alpha, mix_probability)
        if ema_decay is not None:
            WeightEMA(ema_decay)
        check_name(architecture)
        self.save_hyperparameters()
        self.architecture = architecture
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.small_input = small_input
        self.options = dict(options or {})
        self.label_smoothing = label_smoothing
        self.mixing_options: dict[str, Any] = {
            "mixup_alpha": mixup_alpha,
            "cutmix_alpha": cutmix_alpha,
            "probability": mix_probability,
        }
        self.ema_decay = ema_decay
        self.channels_last = channels_last
        self.compile_model = compile
        self.sums: ClassificationSums | None = None
        self._mix: BatchMixing | None = None
        self._confusion: Tensor | None = None
        self._flops: float | None = None

    def configure_model(self) -> None:
        """Make the network for the classes and the images of the data.

        Raises:
            ValueError: The network cannot take the images, or has fewer outputs than there are classes.
        """
        if self.model is not None:
            return
        data = self.data_module()
        num_classes, in_channels = self._sizes(data, getattr(data, "num_classes", None))
        shapes = {name: getattr(data, name, None) for name in ("image_shape", "evaluation_shape")}
        with torch.device("meta"):
            outline = self._build(num_classes, in_channels)
        for shape in dict.fromkeys(shape for shape in shapes.values() if shape is not None):
            flops = inspect_model(outline, self.architecture, (in_channels, *shape[1:]), num_classes)
            self._flops = self._flops or flops
        self._check_synchronised_norms(outline)
        form = torch.channels_last if self.channels_last else torch.preserve_format
        self.sums = ClassificationSums(num_classes)
        self._mix = BatchMixing(**self.mixing_options, num_classes=num_classes)
        self.build(
            lambda: self._build(num_classes, in_channels).to(memory_format=form),
            compile=self.compile_model,
        )

    def configure_meta_model(self, data: LightningDataModule, device: str = "meta") -> list[str]:
        """See `Task.configure_meta_model`: the classes are those that the settings of the data tell.

        Raises:
            ValueError: As `configure_model`.
        """
        planned, told = getattr(data, "planned_num_classes", None), []
        if planned is None and self.num_classes is None:
            planned = _IMAGENET_CLASSES
            told.append(f"the data are not there, so their classes are unknown: {planned} are assumed")
        with torch.device(device):
            self.model = self._build(*self._sizes(data, planned))
        return told

    def configure_callbacks(self) -> list[Callback]:
        """The average of the weights, in training."""
        fitting = self._trainer is not None and self.trainer.state.fn == "fit"
        return [WeightEMA(self.ema_decay)] if self.ema_decay is not None and fitting else []

    def forward(self, images: Tensor) -> Tensor:
        """Scores of the classes `(B, num_classes)`, at least float32, of normalised images `(B, C, H, W)`."""
        assert self.model is not None
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        scores: Tensor = self.model(images)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy in nats of a batch, mixed and smoothed as set."""
        assert self._mix is not None
        images, labels = self._mix(batch["image"], batch["label"])
        scores = self(images)
        targets = labels.to(scores.dtype) if labels.is_floating_point() else labels
        loss = F.cross_entropy(scores, targets, label_smoothing=self.label_smoothing)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew."""
        assert self.sums is not None
        self.sums.reset()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count the hits of a batch."""
        assert self.sums is not None
        self.sums.update(self._scores(batch["image"]), batch["label"])

    def on_validation_epoch_end(self) -> None:
        """Log loss and accuracies over all images of all ranks."""
        assert self.sums is not None
        means = self.sums.compute()
        confusion = means.pop("confusion", None)
        if not self.trainer.testing:
            self._confusion = None if confusion is None else confusion.cpu()
        stage = "test" if self.trainer.testing else "val"
        # The same on all ranks already; sync_dist says so to Lightning.
        self.log_dict({f"{stage}_{name}": mean for name, mean in means.items()}, prog_bar=True, sync_dist=True)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        """Each image with its most likely class, that one's probability, and the five most likely ones."""
        data: Any = self.data_module()
        images = data.part("predict")
        chances = self._scores(batch["image"]).softmax(dim=1)
        best = chances.topk(min(5, chances.shape[1]))
        names = _class_names(data, chances.shape[1])
        rows = []
        for index, values, classes in zip(*(x.tolist() for x in (batch["index"], *best)), strict=True):
            top = {names[number]: round(value, 4) for number, value in zip(classes, values, strict=True)}
            first = next(iter(top))
            rows.append({"image": images.name(index), "class": first, "probability": top[first], "top5": top})
        return rows

    def batch_units(self, batch: dict[str, Tensor]) -> int:
        """Images of a batch."""
        return len(batch["label"])

    def flops_per_unit(self, batch: dict[str, Tensor]) -> float | None:
        """FLOPs an image, forward and backward."""
        return self._flops

    def summary(self) -> dict[str, str]:
        """Final accuracies beside what is easily reached on the same images."""
        lines: dict[str, str] = {}
        metrics = self.trainer.callback_metrics
        for name, label in (("val_top1", "validation top-1"), ("val_top5", "validation top-5")):
            if name in metrics:
                lines[label] = f"{float(metrics[name]):.2%}"
        data = self.data_module()
        if "val_top1" in metrics and hasattr(data, "baseline"):
            how, accuracy = data.baseline()
            lines["baseline"] = f"{accuracy:.2%} top-1 by {how}"
        if "val_loss" in metrics:
            lines["validation loss"] = f"{float(metrics['val_loss']):.4f} nats"
        return lines

    def pictures(self, folder: Path) -> dict[str, Path]:
        """The accuracy over training, and the confusion matrix of the last validation where there are few classes."""
        drawn = {}
        metrics = read_metrics(folder)
        if "val_top1" in metrics:
            drawn["accuracy"] = folder / "accuracy.png"
            draw_accuracy(metrics, drawn["accuracy"])
        if self._confusion is not None:
            drawn["confusion matrix"] = folder / "confusion_matrix.png"
            names = _class_names(self.data_module(), len(self._confusion))
            draw_confusion(self._confusion, names, drawn["confusion matrix"])
        return drawn

    def _sizes(self, data: Any, data_classes: int | None) -> tuple[int, int]:
        """Outputs and channels, from the options and the data.

        Raises:
            ValueError: Neither tells them, or they contradict each other.
        """
        shape = getattr(data, "image_shape", None)
        data_channels = None if shape is None else shape[0]
        num_classes = self.num_classes or data_classes
        if num_classes is None:
            raise ValueError("the number of classes is unknown without data; give model.num_classes")
        if data_classes is not None and num_classes < data_classes:
            raise ValueError(
                f"the data have {data_classes} classes, model.num_classes is {num_classes}; leave it out, or raise it"
            )
        if self.in_channels is not None and data_channels not in (None, self.in_channels):
            raise ValueError(
                f"the data have images of {data_channels} channels, model.in_channels is {self.in_channels}; leave it "
                "out, or change the data's channels"
            )
        return num_classes, self.in_channels or data_channels or 3

    def _check_synchronised_norms(self, model: nn.Module) -> None:
        """Refuse synchronised batch norm where it cannot work, before torch converts the layers.

        Raises:
            ValueError: It would run on a CPU, or the conversion would drop activations of the network.
        """
        trainer = self._trainer
        strategy = trainer.strategy if trainer is not None and trainer.state.fn == "fit" else None
        if getattr(strategy, "_layer_sync", None) is None:  # Lightning keeps trainer.sync_batchnorm nowhere else
            return
        if self.trainer.strategy.root_device.type == "cpu":
            raise ValueError("trainer.sync_batchnorm needs GPUs: torch has no SyncBatchNorm for the CPU; leave it out")
        if activated := sum(type(module).__name__ == "BatchNormAct2d" for module in model.modules()):
            raise ValueError(
                f"trainer.sync_batchnorm would drop the activations in the {activated} norms of {self.architecture} "
                "(timm's BatchNormAct2d); leave it out, or take a model with plain batch norm"
            )

    def _build(self, num_classes: int, in_channels: int) -> nn.Module:
        return build_model(
            self.architecture,
            num_classes=num_classes,
            in_channels=in_channels,
            small_input=self.small_input,
            options=self.options,
        )

    def _scores(self, images: Tensor) -> Tensor:
        """Scores of a batch that may be empty: the model then runs on a grey image, as other ranks' collectives ask."""
        given = images if len(images) else images.new_zeros(1, *images.shape[1:])
        scores: Tensor = self(given)
        return scores[: len(images)]


def _class_names(data: Any, num_classes: int) -> list[str]:
    """A name for each output: the data's, and numbers for those that the data have no class for."""
    names = getattr(data, "class_names", None) or ()
    return [*names, *map(str, range(len(names), num_classes))]
