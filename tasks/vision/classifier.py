"""Training of image classifiers: the task, mixup and cutmix, exact accuracies, and the pictures of a run.

Shapes: `B` images, `C` channels, `H` and `W` height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from ..metrics import ExactMetric, read_metrics
from ..plots import draw_curves, save_figure
from .models import build_model, check_name, inspect_model

__all__ = ["LARGEST_CONFUSION", "BatchMixing", "ClassificationSums", "ImageClassifier"]

LARGEST_CONFUSION = 50
"""With more classes than this, no confusion matrix is computed."""
_IMAGENET_CLASSES = 1000


class ImageClassifier(Task):
    """A classifier of torchvision or timm with random weights, trained with cross-entropy.

    Args:
        optimizer: Factory of the optimizer.
        schedule: Learning-rate schedule.
        architecture: A classification model of torchvision, such as `resnet18` or `vit_b_16`, or one of timm as
            `timm/NAME`.
        num_classes: Number of outputs; the data's number of classes by default.
        in_channels: Channels of an image; the data's by default.
        small_input: For ResNets on small images: a 3x3 first convolution of stride 1, and no max pooling.
        options: Arguments of the model's constructor, such as `image_size`, `dropout` or `drop_path_rate`.
        label_smoothing: Fraction of a label that is spread over all classes.
        mixup_alpha: Parameter of the Beta distribution of mixup's weight; 0 turns mixup off.
        cutmix_alpha: Parameter of the Beta distribution of cutmix's area; 0 turns cutmix off. With both, each batch
            gets one of them.
        mix_probability: Probability that a batch is mixed, by mixup or cutmix; 1 by default.
        ema_decay: Decay of the moving average of the weights, which validation and checkpoints use; None for none.
        channels_last: Store weights and images with channels innermost, which is faster on GPUs.
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
        """Build the network for the classes and the images of the data.

        Raises:
            ValueError: The network does not accept the images, or has fewer outputs than there are classes.
        """
        if self.model is not None:
            return
        data = self.data_module()
        num_classes, in_channels = self._sizes(data, getattr(data, "num_classes", None))
        shapes = {name: getattr(data, name, None) for name in ("image_shape", "evaluation_shape")}
        with torch.device("meta"):
            meta_model = self._build(num_classes, in_channels)
        for shape in dict.fromkeys(shape for shape in shapes.values() if shape is not None):
            flops = inspect_model(meta_model, self.architecture, (in_channels, *shape[1:]), num_classes)
            self._flops = self._flops or flops
        self._check_synchronised_norms(meta_model)
        form = torch.channels_last if self.channels_last else torch.preserve_format
        self.sums = ClassificationSums(num_classes)
        self._mix = BatchMixing(**self.mixing_options, num_classes=num_classes)
        self.build(
            lambda: self._build(num_classes, in_channels).to(memory_format=form),
            compile=self.compile_model,
        )

    def configure_meta_model(self, data: LightningDataModule, device: str = "meta") -> list[str]:
        """See `Task.configure_meta_model`: the number of classes follows from the settings of the data.

        Raises:
            ValueError: As `configure_model`.
        """
        planned, notes = getattr(data, "planned_num_classes", None), []
        if planned is None and self.num_classes is None:
            planned = _IMAGENET_CLASSES
            notes.append(f"the data are not there, so their classes are unknown: {planned} are assumed")
        with torch.device(device):
            self.model = self._build(*self._sizes(data, planned))
        return notes

    def configure_callbacks(self) -> list[Callback]:
        """The moving average of the weights, in training."""
        fitting = self._trainer is not None and self.trainer.state.fn == "fit"
        return [WeightEMA(self.ema_decay)] if self.ema_decay is not None and fitting else []

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, num_classes)`, at least float32, of normalised images `(B, C, H, W)`."""
        assert self.model is not None
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        scores: Tensor = self.model(images)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy of a batch in nats, with mixing and label smoothing."""
        assert self._mix is not None
        images, labels = self._mix(batch["image"], batch["label"])
        scores = self(images)
        targets = labels.to(scores.dtype) if labels.is_floating_point() else labels
        loss = F.cross_entropy(scores, targets, label_smoothing=self.label_smoothing)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Reset the sums."""
        assert self.sums is not None
        self.sums.reset()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the sums."""
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
        # The values are equal on all ranks already; without sync_dist Lightning would warn.
        self.log_dict({f"{stage}_{name}": mean for name, mean in means.items()}, prog_bar=True, sync_dist=True)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        """Each image with its most likely class, its probability, and the five most likely classes."""
        data: Any = self.data_module()
        images = data.part("predict")
        probabilities = self._scores(batch["image"]).softmax(dim=1)
        best = probabilities.topk(min(5, probabilities.shape[1]))
        names = _class_names(data, probabilities.shape[1])
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
        """FLOPs per image, forward and backward."""
        return self._flops

    def summary(self) -> dict[str, str]:
        """Final accuracies, and a simple baseline on the same images."""
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
        """The accuracy over training, and the confusion matrix of the last validation if there are few classes."""
        drawn = {}
        metrics = read_metrics(folder)
        if "val_top1" in metrics:
            drawn["accuracy"] = folder / "accuracy.png"
            style = {"marker": "o", "markersize": 4}
            curves = [("val_top1", "top-1", style), ("val_top5", "top-5", style)]
            draw_curves(drawn["accuracy"], metrics, curves, ylabel="validation accuracy, %", scale=100)
        if self._confusion is not None:
            drawn["confusion matrix"] = folder / "confusion_matrix.png"
            names = _class_names(self.data_module(), len(self._confusion))
            _draw_confusion(self._confusion, names, drawn["confusion matrix"])
        return drawn

    def _sizes(self, data: Any, data_classes: int | None) -> tuple[int, int]:
        """Number of outputs and of channels, from the options and the data.

        Raises:
            ValueError: Neither gives them, or they contradict each other.
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
        """Reject synchronised batch norm where it cannot work, before torch converts the layers.

        Raises:
            ValueError: It would run on a CPU, or the conversion would drop activations of the network.
        """
        trainer = self._trainer
        strategy = trainer.strategy if trainer is not None and trainer.state.fn == "fit" else None
        if getattr(strategy, "_layer_sync", None) is None:  # Lightning stores trainer.sync_batchnorm nowhere else
            return
        if self.trainer.strategy.root_device.type == "cpu":
            raise ValueError("trainer.sync_batchnorm needs GPUs: torch has no SyncBatchNorm for the CPU; leave it out")
        if activated := sum(type(module).__name__ == "BatchNormAct2d" for module in model.modules()):
            raise ValueError(
                f"trainer.sync_batchnorm would drop the activations in the {activated} norms of {self.architecture} "
                "(timm's BatchNormAct2d); leave it out, or use a model with plain batch norm"
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
        """Logits of a batch; an empty one runs on a dummy image, since other ranks wait for this one."""
        scores: Tensor = self(images if len(images) else images.new_zeros(1, *images.shape[1:]))
        return scores[: len(images)]


def _class_names(data: Any, num_classes: int) -> list[str]:
    """A name for each output: the data's class names, and numbers for outputs without a class in the data."""
    names = getattr(data, "class_names", None) or ()
    return [*names, *map(str, range(len(names), num_classes))]


class BatchMixing:
    """Mixes each image of a batch with its neighbour, by mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019).

    Draws from torch's CPU generator, so that no step waits for the device. If both are on, each batch draws one.

    Args:
        mixup_alpha: Parameter of the Beta distribution of mixup's weight; 0 for no mixup.
        cutmix_alpha: Parameter of the Beta distribution of cutmix's area; 0 for no cutmix.
        probability: Probability that a batch is mixed; None for 1.
        num_classes: Number of classes.

    Raises:
        ValueError: See `check_mixing`.
    """

    def __init__(self, *, mixup_alpha: float, cutmix_alpha: float, probability: float | None, num_classes: int) -> None:
        check_mixing(mixup_alpha, cutmix_alpha, probability)
        from torchvision.transforms import v2

        kinds = ((v2.MixUp, mixup_alpha), (v2.CutMix, cutmix_alpha))
        self.transforms: list[Any] = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha > 0]
        self.probability = 1.0 if probability is None else probability

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            images: `(B, C, H, W)`.
            labels: `(B,)`, int64.

        Returns:
            The images, and their labels: unchanged, or as class probabilities `(B, num_classes)`.
        """
        if not self.transforms or torch.rand(()) >= self.probability:
            return images, labels
        chosen = int(torch.randint(len(self.transforms), ()))
        return self.transforms[chosen](images, labels)


def check_mixing(mixup_alpha: float, cutmix_alpha: float, probability: float | None) -> None:
    """Check the options of mixing, before any data are read.

    Args:
        mixup_alpha: See `BatchMixing`.
        cutmix_alpha: See `BatchMixing`.
        probability: See `BatchMixing`.

    Raises:
        ValueError: A number is out of range, or a probability is given without mixup or cutmix.
    """
    for name, alpha in {"mixup_alpha": mixup_alpha, "cutmix_alpha": cutmix_alpha}.items():
        if not 0.0 <= alpha < float("inf"):
            raise ValueError(f"model.{name} must be a number of at least 0, not {alpha}; 0 turns it off")
    if probability is None:
        return
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"model.mix_probability is a probability in [0, 1], not {probability}")
    if not mixup_alpha and not cutmix_alpha:
        raise ValueError(
            "model.mix_probability is for mixup and cutmix: set mixup_alpha or cutmix_alpha too, or leave it out"
        )


class ClassificationSums(ExactMetric):
    """Counts the correct predictions over all batches of all ranks.

    Counts are integers, so that accuracies do not depend on the order of batches or the number of ranks.

    Args:
        num_classes: Number of classes.
    """

    loss: Tensor
    count: Tensor
    top1: Tensor
    top5: Tensor
    confusion: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("loss", torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")
        for name in ("count", "top1", "top5"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        size = num_classes if num_classes <= LARGEST_CONFUSION else 0
        self.add_state("confusion", torch.zeros(size, size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            logits: `(B, num_classes)`; B may be 0.
            labels: `(B,)`, int64.
        """
        logits = logits.float()
        self.loss += F.cross_entropy(logits, labels, reduction="sum")
        self.count += len(labels)
        best = logits.topk(min(5, self.num_classes)).indices
        hits = best == labels[:, None]
        self.top1 += hits[:, 0].sum()
        self.top5 += hits.sum()
        if size := len(self.confusion):
            pairs = labels * size + best[:, 0]
            self.confusion += pairs.bincount(minlength=size**2).view(size, size)

    def compute(self) -> dict[str, Tensor]:
        """Means over all images: `loss` in nats, `top1`, and `top5` with more than five classes.

        With at most `LARGEST_CONFUSION` classes also `confusion`: counts by true class (row) and prediction (column).
        """
        means = {"loss": self.loss / self.count, "top1": self.top1 / self.count}
        if self.num_classes > 5:
            means["top5"] = self.top5 / self.count
        if len(self.confusion):
            means["confusion"] = self.confusion
        return means


def _draw_confusion(confusion: Tensor, class_names: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix in percent of each true class; `confusion` has the counts, as `ClassificationSums`."""
    from matplotlib.figure import Figure

    number = len(confusion)
    share = (100 * confusion.double() / confusion.sum(dim=1, keepdim=True).clamp(min=1)).tolist()
    side = max(4.0, 2.0 + 0.42 * number)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(number), class_names, rotation=90)
    axes.set_yticks(range(number), class_names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title("% of the true class")
    if number <= 20:
        for row, values in enumerate(share):
            for column, value in enumerate(values):
                if value >= 0.05:
                    color = "white" if value > 50 else "black"
                    axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7, color=color)
    save_figure(figure, path)
