"""Crops and augmentation keep bytes and sizes, and wrong settings are told."""

import pytest
import torch

pytest.importorskip("torchvision")

from PIL import Image

from lightning_adam_mini.tasks.vision.data import Mnist5k, TorchvisionData, Transforms
from lightning_adam_mini.tasks.vision.data.module import settled

RGB = {"flip": 0.5, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)}
GREY = {"flip": 0.5, "mean": (0.5,), "std": (0.2,)}


def ramp(channels, height, width):
    return torch.arange(channels * height * width).remainder(251).to(torch.uint8).view(channels, height, width)


@pytest.mark.parametrize("crop", ["resized", "padded", "center"])
@pytest.mark.parametrize("policy", ["none", "randaugment", "autoaugment", "trivialaugment"])
@pytest.mark.parametrize("kind", ["tensor", "pillow"])
def test_training_gives_bytes_of_the_size(crop, policy, kind):
    transform = Transforms(size=24, crop=crop, policy=policy, erasing=1.0, **RGB).training()
    image = ramp(3, 40, 30)
    given = Image.fromarray(image.permute(1, 2, 0).numpy()) if kind == "pillow" else image
    for _ in range(5):
        made = transform(given)
        assert (made.shape, made.dtype) == ((3, 24, 24), torch.uint8)


@pytest.mark.parametrize("policy", ["none", "randaugment", "trivialaugment"])
def test_one_channel_is_augmented_too(policy):
    transform = Transforms(size=28, policy=policy, erasing=0.5, **GREY).training()
    for _ in range(20):
        assert transform(ramp(1, 28, 28)).shape == (1, 28, 28)


def test_training_draws_from_torchs_generator_alone():
    transform = Transforms(size=24, crop="resized", policy="randaugment", erasing=0.5, **RGB).training()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append([transform(ramp(3, 40, 30)) for _ in range(5)])
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[2], strict=True))


def test_padded_crops_are_windows_of_the_padded_image():
    image = ramp(1, 8, 8)
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
    windows = [padded[:, top : top + 8, left : left + 8] for top in range(5) for left in range(5)]
    transform = Transforms(size=8, padding=2, **(GREY | {"flip": 0.0})).training()
    found = {next(n for n, window in enumerate(windows) if torch.equal(made, window))
             for made in (transform(image) for _ in range(200))}  # fmt: skip
    assert len(found) == 25


def test_images_that_have_the_size_are_left_alone_in_evaluation():
    image = ramp(1, 28, 28)
    assert torch.equal(Transforms(size=28, **GREY).evaluation()(image), image)


def test_evaluation_takes_the_middle_of_the_resized_image():
    image = ramp(3, 40, 60)
    made = Transforms(size=20, resize=40, **RGB).evaluation()(image)
    assert torch.equal(made, image[:, 10:30, 20:40])
    assert Transforms(size=20, eval_size=24, **RGB).evaluation()(image).shape == (3, 24, 24)


def test_erasing_fills_with_the_mean():
    transform = Transforms(size=20, crop="center", erasing=1.0, **(RGB | {"flip": 0.0})).training()
    image = torch.full((3, 20, 20), 7, dtype=torch.uint8)
    made = transform(image).flatten(1)
    for channel, value in zip(made, (128, 102, 76), strict=True):
        assert set(channel.tolist()) == {7, value}


def test_values_of_the_data_set_fill_what_is_not_given():
    transforms = settled(Transforms(size=20), size=28, flip=0.0, mean=(0.5,), std=(0.5,))
    assert (transforms.size, transforms.flip, transforms.mean) == (20, 0.0, (0.5,))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"size": 0}, r"transforms\.size must be at least 1"),
        ({"flip": 1.5}, r"transforms\.flip is a probability"),
        ({"erasing": -0.1}, r"transforms\.erasing is a probability"),
        ({"padding": -1}, r"transforms\.padding must not be negative"),
        ({"magnitude": 31}, r"transforms\.magnitude must be in 0 to 30"),
        ({"scale": (0.9, 0.1)}, r"transforms\.scale is two fractions of the area"),
        ({"mean": (123.7, 116.3, 103.5)}, r"divide values of bytes by 255"),
        ({"std": (0.0, 0.1, 0.1)}, r"transforms\.std is of pixels in"),
        ({"size": 224, "resize": 200}, r"transforms\.resize = 200 is below the crop of 224"),
        ({"mean": (float("nan"),)}, r"transforms\.mean is of pixels"),
        ({"scale": (0.5, 1.0)}, r"transforms\.scale is for crop resized, but crop is padded"),
        ({"crop": "center", "padding": 2}, r"leave it out, or set transforms\.crop padded"),
        ({"operations": 3}, r"transforms\.operations is for policy randaugment"),
        ({"policy": "trivialaugment", "magnitude": 5}, r"transforms\.magnitude is for policy randaugment"),
    ],
)
def test_settings_out_of_range_are_told(options, told):
    with pytest.raises(ValueError, match=told):
        Transforms(**options)


def test_options_of_a_crop_and_a_policy_reach_torchvision():
    given = {"size": 24, "policy": "randaugment", **RGB}
    own = Transforms(crop="resized", scale=(0.5, 0.6), operations=3, magnitude=0, **given).training().steps
    assert (own[0].scale, own[2].num_ops, own[2].magnitude) == ((0.5, 0.6), 3, 0)
    usual = Transforms(crop="resized", **given).training().steps
    assert (usual[0].scale, usual[2].num_ops, usual[2].magnitude) == ((0.08, 1.0), 2, 9)
    assert Transforms(**given).training().steps[1].padding == [4] * 4
    assert len(Transforms(padding=0, **given).training().steps) == len(usual)


def test_the_padding_of_the_data_set_is_for_padded_crops_alone():
    assert Mnist5k().transforms.training().steps[1].padding == [2] * 4
    assert Mnist5k(transforms=Transforms(padding=3)).transforms.padding == 3
    assert Mnist5k(transforms=Transforms(crop="center")).transforms.padding is None


def test_settings_that_do_not_fit_the_channels_are_told():
    with pytest.raises(ValueError, match=r"transforms\.mean has 3 values for images of 1 channels"):
        Mnist5k(transforms=Transforms(mean=(0.5, 0.5, 0.5)))
    with pytest.raises(ValueError, match="autoaugment is for RGB images"):
        TorchvisionData(name="MNIST", transforms=Transforms(policy="autoaugment"))
