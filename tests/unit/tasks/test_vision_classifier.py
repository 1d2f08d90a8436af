"""The classifier's loss, counts, mixing and messages, against plain arithmetic."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("timm")

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm

from lightning_adam_mini.tasks.vision import ImageClassifier
from lightning_adam_mini.tasks.vision.classifier import LARGEST_CONFUSION, BatchMixing, ClassificationSums

TINY = "timm/test_resnet"


def classifier(**options):
    task = ImageClassifier(**({"architecture": TINY, "num_classes": 7} | options))
    task.configure_model()
    task.log = lambda *args, **kwargs: None  # there is no trainer
    return task


def batch(number=6, size=32):
    return {"image": torch.randn(number, 3, size, size), "label": torch.arange(number) % 7}


def test_the_loss_is_the_smoothed_cross_entropy():
    task, given = classifier(label_smoothing=0.1), batch()
    loss = task.training_step(given, 0)
    chances = task(given["image"]).log_softmax(1)
    picked = chances.gather(1, given["label"][:, None])[:, 0]
    torch.testing.assert_close(loss, -(0.9 * picked + 0.1 * chances.mean(1)).mean())


def test_channels_last_changes_the_layout_alone():
    """Convolutions sum in another order, so results agree to rounding."""
    torch.manual_seed(0)
    plain = classifier().double()
    torch.manual_seed(0)
    last = classifier(channels_last=True).double()
    given = {"image": batch()["image"].double(), "label": batch()["label"]}
    losses = []
    for task in (plain, last):
        loss = task.training_step(given, 0)
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)
    assert last.model.conv1[0].weight.is_contiguous(memory_format=torch.channels_last)
    for one, other in zip(plain.parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alphas", [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_mixed_labels_are_the_shares_of_the_mixed_images(alphas):
    """Images that are their label everywhere: what is left of a pixel's value tells the share."""
    mix = BatchMixing(mixup_alpha=alphas[0], cutmix_alpha=alphas[1], probability=1.0, num_classes=5)
    labels = torch.arange(5)
    images = F.one_hot(labels).float()[:, :, None, None].expand(5, 5, 20, 20).contiguous()
    for _ in range(20):
        mixed, shares = mix(images, labels)
        torch.testing.assert_close(mixed.mean(dim=(2, 3)), shares, rtol=0, atol=1e-5)
        assert shares.sum(1).allclose(torch.ones(5))


def test_mixing_draws_from_the_seed_of_the_step_and_as_often_as_set():
    mix = BatchMixing(mixup_alpha=0.2, cutmix_alpha=1.0, probability=0.3, num_classes=5)
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append([mix(images, labels) for _ in range(200)])
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(*drawn, strict=True))
    mixed = sum(shares.ndim == 2 for _, shares in drawn[0])
    assert 40 < mixed < 80
    off = BatchMixing(mixup_alpha=0.0, cutmix_alpha=0.0, probability=None, num_classes=5)
    assert off(images, labels)[0] is images


@pytest.mark.parametrize("num_classes", [3, 5, 6, 10, LARGEST_CONFUSION, LARGEST_CONFUSION + 1])
def test_sums_count_hits_over_batches_of_any_size(num_classes):
    logits, labels = torch.randn(23, num_classes), torch.randint(num_classes, (23,))
    sums = ClassificationSums(num_classes)
    for start, end in ((0, 10), (10, 10), (10, 22), (22, 23)):
        sums.update(logits[start:end], labels[start:end])
    means = sums.compute()
    order = logits.argsort(dim=1, descending=True)
    assert float(means["top1"]) == pytest.approx(float((order[:, 0] == labels).double().mean()))
    assert float(means["loss"]) == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)
    assert ("top5" in means) == (num_classes > 5)
    if num_classes > 5:
        assert float(means["top5"]) == pytest.approx(float((order[:, :5] == labels[:, None]).any(1).double().mean()))
    assert ("confusion" in means) == (num_classes <= LARGEST_CONFUSION)
    if num_classes <= LARGEST_CONFUSION:
        expected = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        for true, predicted in zip(labels.tolist(), order[:, 0].tolist(), strict=True):
            expected[true, predicted] += 1
        assert torch.equal(means["confusion"], expected)


def test_an_empty_batch_runs_the_model_and_counts_nothing():
    task, ran = classifier(), []
    task.eval()
    task.model.register_forward_hook(lambda *_: ran.append(1))
    task.on_validation_epoch_start()
    task.validation_step({"image": torch.zeros(0, 3, 32, 32), "label": torch.zeros(0, dtype=torch.int64)}, 0)
    assert ran
    assert task.sums.count == 0
    assert task.sums.loss == 0


def test_scores_are_float32_at_least():
    task = classifier().bfloat16()
    assert task(torch.zeros(2, 3, 32, 32, dtype=torch.bfloat16)).dtype == torch.float32
    assert task.double()(torch.zeros(2, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"label_smoothing": 1.0}, r"model\.label_smoothing must be in \[0, 1\)"),
        ({"mixup_alpha": -1.0}, r"model\.mixup_alpha must be a number of at least 0"),
        ({"cutmix_alpha": float("nan")}, r"model\.cutmix_alpha must be"),
        ({"mix_probability": 2.0}, r"model\.mix_probability is a probability"),
        ({"mix_probability": 0.5}, r"is for mixup and cutmix: set mixup_alpha or cutmix_alpha too"),
        ({"ema_decay": 1.0}, r"decay of the weights' average must be in \(0, 1\)"),
        ({"num_classes": 0}, r"model\.num_classes must be at least 1"),
        ({"num_classes": None}, "the number of classes is unknown without data; give model.num_classes"),
        ({"architecture": "resnet17"}, "did you mean resnet1"),
    ],
)
def test_options_out_of_range_are_told(options, told):
    with pytest.raises(ValueError, match=told):
        classifier(**options)


def fake_data(**facts):
    facts = {"num_classes": 10, "image_shape": (1, 28, 28), "evaluation_shape": (1, 28, 28)} | facts
    return type("Data", (), facts)()


def with_data(data, **options):
    task = ImageClassifier(**({"architecture": TINY} | options))
    task.data_module = lambda: data
    task.configure_model()
    return task


def test_classes_and_channels_are_the_datas():
    task = with_data(fake_data())
    assert task(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert task.flops_per_unit({}) > 0
    assert with_data(fake_data(), num_classes=12)(torch.zeros(2, 1, 28, 28)).shape == (2, 12)


def test_outputs_without_a_class_are_named_by_their_number(tmp_path):
    """In predictions and in the confusion matrix, where the model has more outputs than the data have classes."""
    data = fake_data(num_classes=3, class_names=["ant", "bee", "cat"], image_shape=(3, 32, 32))
    data.evaluation_shape, data.part = data.image_shape, lambda part: SimpleNamespace(name=str)
    task = with_data(data, num_classes=6).eval()
    with torch.no_grad():
        (row,) = task.predict_step({"image": batch(1)["image"], "index": torch.tensor([4])}, 0)
        scores = task(batch(1)["image"])
    assert row["image"] == "4"
    assert set(row["top5"]) < {"ant", "bee", "cat", "3", "4", "5"}
    sums = ClassificationSums(6)
    sums.update(scores, torch.tensor([2]))
    task._confusion = sums.compute()["confusion"]
    (picture,) = task.pictures(tmp_path).values()
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("facts", "options", "told"),
    [
        ({}, {"num_classes": 9}, r"the data have 10 classes, model\.num_classes is 9"),
        ({}, {"in_channels": 3}, r"images of 1 channels, model\.in_channels is 3"),
        ({}, {"architecture": "vit_b_16"}, r"vit_b_16 cannot take images of 1x28x28"),
        ({"image_shape": (3, 224, 224), "evaluation_shape": (3, 256, 256)}, {"architecture": "vit_b_16"}, "3x256x256"),
    ],
)
def test_data_that_do_not_fit_the_model_are_told(facts, options, told):
    with pytest.raises(ValueError, match=told):
        with_data(fake_data(**facts), **options)


def under_sync_batchnorm(task, device):
    """A fit on one of several devices, by a strategy that will convert the layers."""
    strategy = SimpleNamespace(_layer_sync=TorchSyncBatchNorm(), root_device=torch.device(device))
    task._trainer = SimpleNamespace(strategy=strategy, datamodule=None, state=SimpleNamespace(fn="fit"))
    return task


@pytest.mark.parametrize("architecture", ["resnet18", "timm/resnet18"])
def test_lightning_synchronises_every_batch_norm(architecture):
    task = under_sync_batchnorm(ImageClassifier(architecture=architecture, num_classes=7), "cuda")
    task.configure_model()
    norms = [name for name, module in task.named_modules() if isinstance(module, nn.BatchNorm2d)]
    task._trainer.strategy._layer_sync.apply(task)
    assert len(norms) == 20
    assert all(isinstance(task.get_submodule(name), nn.SyncBatchNorm) for name in norms)


@pytest.mark.parametrize(
    ("architecture", "device", "told"),
    [
        ("resnet18", "cpu", "trainer.sync_batchnorm needs GPUs"),
        ("timm/test_efficientnet", "cuda", r"drop the activations in the \d+ norms of timm/test_efficientnet"),
    ],
)
def test_synchronised_batch_norm_that_cannot_work_is_refused(architecture, device, told):
    task = under_sync_batchnorm(ImageClassifier(architecture=architecture, num_classes=7), device)
    with pytest.raises(ValueError, match=told):
        task.configure_model()


def test_the_outline_assumes_imagenet_where_the_data_are_not_there():
    task = ImageClassifier(architecture="resnet18")
    (told,) = task.configure_meta_model(fake_data(planned_num_classes=None, image_shape=(3, 224, 224)))
    assert "1000 are assumed" in told
    assert task.model.fc.weight.shape == (1000, 512)
    assert task.model.fc.weight.is_meta
    task = ImageClassifier(architecture="resnet18")
    assert task.configure_meta_model(fake_data(planned_num_classes=10)) == []
    assert task.model.conv1.weight.shape[1] == 1


def test_callbacks_average_weights_in_training_alone():
    task = ImageClassifier(architecture=TINY, num_classes=7, ema_decay=0.99)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    task._trainer = trainer
    assert task.configure_callbacks() == []
    trainer.state.fn = "fit"
    (callback,) = task.configure_callbacks()
    assert callback.decay == 0.99
