"""Networks of two libraries by name, for images of any channels and size, or one line that says why not."""

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("timm")

from lightning_adam_mini.tasks.vision.models import build_model, check_name, inspect_model

TINY = "timm/test_resnet"


def build(name, **options):
    settings = {"num_classes": 7, "in_channels": 3, "small_input": False, "options": {}}
    return build_model(name, **(settings | options))


def on_meta(name, **options):
    with torch.device("meta"):
        return build(name, **options)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 28),
        ("vgg16", 64),
        ("vit_b_16", 224),
        ("convnext_tiny", 64),
        (TINY, 32),
        ("timm/mixer_s16_224", 224),
    ],
)
def test_networks_take_images_of_any_number_of_channels(name, size, channels):
    model = on_meta(name, in_channels=channels)
    assert inspect_model(model, name, (channels, size, size), 7) > 0
    for other in {1, 3, 4} - {channels}:
        with pytest.raises(ValueError, match=f"{name} cannot take images of {other}x{size}x{size}"):
            inspect_model(model, name, (other, size, size), 7)


def test_a_replaced_convolution_is_as_spread_as_the_one_it_replaces():
    own, replaced = (build("resnet18", in_channels=channels).conv1.requires_grad_(False) for channels in (3, 1))
    assert replaced.weight.shape == (64, 1, 7, 7)
    assert (replaced.stride, replaced.padding, replaced.bias) == (own.stride, own.padding, None)
    assert float(replaced.weight.std()) == pytest.approx(float(own.weight.std()), rel=0.05)


def test_a_small_input_keeps_its_size_up_to_the_first_stage():
    model = build("resnet18", in_channels=1, small_input=True).requires_grad_(False)
    assert model.conv1.weight.shape == (64, 1, 3, 3)
    # Kaiming's rule for 3x3 instead of 7x7: sqrt(2 / (64 * 9)).
    assert float(model.conv1.weight.std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)
    stem = nn.Sequential(model.conv1, model.maxpool)
    assert stem(torch.zeros(1, 1, 28, 28)).shape == (1, 64, 28, 28)
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 7)
    with pytest.raises(ValueError, match=r"small_input is for ResNets, and vgg16 is not one"):
        on_meta("vgg16", small_input=True)
    with pytest.raises(ValueError, match=r"needs one first convolution; timm/resnet10t has a stem of several"):
        on_meta("timm/resnet10t", small_input=True)


def test_operations_are_those_of_the_papers():
    """Multiply-adds of a forward pass: 1.81e9 (torchvision's table for ResNet18), 17.56e9 (ViT-B/16)."""
    for name, expected in (("resnet18", 1.81e9), ("vit_b_16", 17.56e9)):
        model = on_meta(name, num_classes=1000)
        assert inspect_model(model, name, (3, 224, 224), 1000) / 6 == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("resnet19", r"torchvision has no classification model 'resnet19'; did you mean resnet1"),
        ("timm/resnet18x", r"timm has no model 'resnet18x'; did you mean timm/resnet18"),
        ("deeplabv3_resnet50", "torchvision has no classification model"),
        ("qqq", "such as resnet18; those of timm are timm/NAME"),
    ],
)
def test_a_name_that_is_none_is_told_with_near_ones(name, told):
    with pytest.raises(ValueError, match=told) as error:
        check_name(name)
    assert "\n" not in str(error.value)


def test_options_reach_the_network_and_unknown_ones_are_told():
    assert on_meta("vit_b_16", options={"image_size": 32}).image_size == 32
    assert on_meta("timm/test_vit", options={"drop_path_rate": 0.2}).blocks[-1].drop_path1.drop_prob == pytest.approx(
        0.2
    )
    for name in ("resnet18", TINY):
        with pytest.raises(ValueError, match=rf"model\.options: {name} cannot be built with .*: .*dropp"):
            on_meta(name, options={"dropp": 0.1})


def test_images_of_a_wrong_size_are_told():
    with pytest.raises(ValueError, match=r"vit_b_16 cannot take images of 3x28x28 .*224.*set data\.transforms\.size"):
        inspect_model(on_meta("vit_b_16"), "vit_b_16", (3, 28, 28), 7)


def test_auxiliary_outputs_are_told():
    with pytest.raises(ValueError, match=r"googlenet returns several outputs in training; .*aux_logits"):
        inspect_model(on_meta("googlenet"), "googlenet", (3, 224, 224), 7)
    model = on_meta("googlenet", options={"aux_logits": False})
    assert inspect_model(model, "googlenet", (3, 224, 224), 7) > 0


def test_another_number_of_outputs_is_told():
    with pytest.raises(ValueError, match=r"returns \(7,\) for an image, not one score for each of 8"):
        inspect_model(on_meta("resnet18"), "resnet18", (3, 32, 32), 8)
