"""The diffusion task by itself: options, loss, validation, samples, distances and export, without a command line."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

pytest.importorskip("diffusers")

from lightning_adam_mini import factory
from lightning_adam_mini.schedule import Schedule
from lightning_adam_mini.tasks.data.sampling import collate_padded
from lightning_adam_mini.tasks.diffusion import DiffusionModel
from lightning_adam_mini.tasks.diffusion.data import DigitImages
from lightning_adam_mini.tasks.diffusion.frechet import PrincipalComponents, frechet_distance
from lightning_adam_mini.tasks.diffusion.noise import (
    build_schedule,
    check_sample_steps,
    evaluation_draws,
    loss_weights,
    target,
)

CONFIG = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "in_channels": 1,
    "sample_size": 8,
}
FEW = {"num_train_timesteps": 10, "sample_steps": 10, "num_samples": 4}


def built(**options):
    task = DiffusionModel(**{"config": CONFIG, **FEW} | options)
    task.configure_model()
    task.log = lambda name, value, **_: task.logged.update({name: float(value.detach())})
    task.logged = {}
    return task


def images(number=6):
    data = DigitImages()
    data.setup("fit")
    return data.real_images("val", number)


def without(name):
    return {key: value for key, value in CONFIG.items() if key != name}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"block_out_chanels": [8]}, "UNet2DModel has no option 'block_out_chanels'; did you mean block_out_channels"),
        ({"num_class_embeds": 10}, "num_class_embeds: class-conditional models are not supported; leave it out"),
        ({"in_channels": 3, "out_channels": 6}, "out_channels is 6 and in_channels 3: both are the channels"),
        ({"sample_size": "8"}, "sample_size must be a number of pixels, not '8'"),
        ({"norm_num_groups": 3}, "cannot be built from model.config: .*num_channels"),
        ({"down_block_types": ["DownBlock2D", "Nothing"]}, "cannot be built from model.config: Nothing does not exist"),
        ({"block_out_channels": [8]}, "cannot be built from model.config: Must provide the same number"),
        ({"layers_per_block": "two"}, "cannot be built from model.config: "),
    ],
)
def test_refused_networks(config, told):
    with pytest.raises(ValueError, match=told):
        DiffusionModel(config=CONFIG | config)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, not 0"),
        ({"sample_steps": 0}, "sample_steps must be at least 1, not 0"),
        ({"sample_every": -1}, "sample_every must be at least 0"),
        ({"sample_seed": -1}, "sample_seed must be at least 0"),
        ({"pca_features": -1}, "pca_features must be at least 0"),
        ({"frechet_images": 1}, "frechet_images must be at least 2, not 1"),
        ({"sample_steps": 11}, "sample_steps is 11, more than num_train_timesteps, 10: lower it"),
        ({"sample_steps": 3}, r"sample_steps 3 would begin at timestep 6 of 10, .* set model.sample_steps to 10"),
        (
            {"frechet_images": 8},
            r"frechet_images is given, but pca_features is 0, .*: set model.pca_features, or leave",
        ),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma must be positive"),
        ({"ema_decay": 1.0}, r"average must be in \(0, 1\), not 1.0"),
        ({"beta_schedule": "cosine"}, "no beta_schedule 'cosine'"),
    ],
)
def test_refused_options(options, told):
    with pytest.raises(ValueError, match=told):
        DiffusionModel(**{"config": CONFIG, **FEW} | options)


@pytest.mark.parametrize(
    ("config", "shape", "told"),
    [
        (CONFIG, (3, 8, 8), "the images have 3 channels, but model.config.in_channels is 1; leave it out"),
        (CONFIG, (1, 16, 16), "the images have 16 pixels a side, but model.config.sample_size is 8; leave it out"),
        (without("sample_size"), (1, 7, 7), "7 x 7 pixels: this U-Net halves a square 1 times, .* a multiple of 2"),
    ],
)
def test_networks_that_do_not_fit_the_data(config, shape, told):
    with pytest.raises(ValueError, match=told):
        DiffusionModel(config=config).configure_meta_model(SimpleNamespace(image_shape=shape))


def test_size_and_channels_are_those_of_the_data():
    task = DiffusionModel(config=without("in_channels"))
    assert task.configure_meta_model(DigitImages()) == []
    assert (task.model.config.in_channels, task.model.config.out_channels, task.model.config.sample_size) == (1, 1, 8)
    assert all(parameter.is_meta for parameter in task.parameters())


def test_the_task_keeps_its_options_for_the_checkpoint():
    task = DiffusionModel(factory.AdamW(lr=0.5), Schedule(floor=0.5), config=CONFIG, num_samples=7)
    assert task.hparams["optimizer"] == factory.AdamW(lr=0.5)
    assert (task.hparams["num_samples"], task.hparams["config"]) == (7, CONFIG)


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_training_loss(prediction_type, gamma):
    """As by hand, with the numbers that the global generator gives."""
    task, batch = built(prediction_type=prediction_type, min_snr_gamma=gamma), images()
    torch.manual_seed(5)
    loss = task.training_step(batch, 0)
    torch.manual_seed(5)
    noise = torch.randn(batch.shape)
    timesteps = torch.randint(10, (len(batch),))
    alphas = task.noise_schedule.alphas_cumprod
    a, s = (each[timesteps].sqrt().view(-1, 1, 1, 1) for each in (alphas, 1 - alphas))
    predicted = task.model(a * batch + s * noise, timesteps).sample
    errors = (predicted - target(task.noise_schedule, batch, noise, timesteps)).square().mean((1, 2, 3))
    weights = torch.ones(10) if gamma is None else loss_weights(alphas, prediction_type, gamma)
    torch.testing.assert_close(loss, (weights[timesteps] * errors).mean())
    assert task.logged["train_loss"] == loss.item()


def validated(task, parts):
    """The validation loss over batches of `(index, image)` pairs, as one rank has it."""
    task.on_validation_epoch_start()
    with torch.no_grad():
        for number, part in enumerate(parts):
            task.validation_step(collate_padded(part), number)
    return task.val_mean.compute()


def test_validation_is_the_mean_over_images_however_they_are_divided():
    task = built(min_snr_gamma=0.1).eval()
    items = list(enumerate(images(7)))
    padding = (-1, items[0][1])
    whole = validated(task, [items])
    timesteps, noise = evaluation_draws(range(7), (1, 8, 8), 10, seed=0)
    batch = torch.stack([image for _, image in items])
    with torch.no_grad():
        predicted = task(task.noise_schedule.add_noise(batch, noise, timesteps), timesteps)
    torch.testing.assert_close(whole, functional.mse_loss(predicted, noise), msg="unweighted, whatever training does")
    for parts in ([items[:4], items[4:]], [items[:5], [items[6], padding], [items[5]], [padding, padding]]):
        torch.testing.assert_close(validated(task, parts), whole)
    torch.manual_seed(123)
    assert validated(task, [items]) == whole


def test_samples_depend_on_their_seeds_alone():
    task = built()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    made = task.sample([0, 1, 2])
    assert torch.equal(torch.get_rng_state(), before)
    assert task.model.training, "as it was"
    assert made.shape == (3, 1, 8, 8)
    assert -1 <= made.min() < made.max() <= 1
    torch.manual_seed(2)
    assert torch.equal(task.sample([0, 1, 2]), made)
    torch.testing.assert_close(task.sample([2]), made[2:], rtol=1e-4, atol=1e-4)
    assert not torch.equal(made[0], made[1])


def first_timestep(num_steps):
    schedule = build_schedule(1000, "squaredcos_cap_v2", "epsilon")
    sampler = pytest.importorskip("diffusers").DDIMScheduler.from_config(schedule.config)
    sampler.set_timesteps(num_steps)
    return int(sampler.timesteps[0])


def test_samples_begin_where_images_are_noise():
    """Every number of steps is either taken, and begins there, or refused with one near it that does."""
    for num_steps, instead in {1: 20, 2: 20, 3: 20, 10: 20, 64: 65, 300: 318, 600: 500, 950: 951}.items():
        told = f"begin at timestep {first_timestep(num_steps)} of 1000, .* set model.sample_steps to {instead}$"
        with pytest.raises(ValueError, match=told):
            check_sample_steps(num_steps, 1000)
        with pytest.raises(ValueError, match=told):
            DiffusionModel(config=CONFIG, sample_steps=num_steps)
        assert first_timestep(instead) >= 950
    for num_steps in (20, 25, 50, 100, 125, 200, 250, 318, 333, 500, 951, 1000):
        assert first_timestep(num_steps) >= 950
        check_sample_steps(num_steps, 1000)
    for num_timesteps in (2, 3, 10, 19, 20, 21, 37):
        check_sample_steps(num_timesteps, num_timesteps)


def test_the_primary_metric_is_the_error_of_what_is_predicted():
    labels = {"epsilon": "noise", "v_prediction": "velocity", "sample": "image"}
    for prediction_type, word in labels.items():
        task = DiffusionModel(config=CONFIG, prediction_type=prediction_type)
        assert task.primary_metric.label == f"validation MSE of the {word}"
        assert (task.primary_metric.metric, task.primary_metric.mode) == ("val_loss", "min")


def test_images_of_the_comparison():
    assert DiffusionModel(config=CONFIG, pca_features=4).frechet_images == 512
    assert DiffusionModel(config=CONFIG, pca_features=4, frechet_images=8).frechet_images == 8


@pytest.mark.parametrize("package", ["diffusers", "torchvision"])
def test_a_missing_package_is_told(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    told = (
        rf"^DiffusionModel needs the package {package}; install it with pip install 'lightning-adam-mini\[diffusion\]'$"
    )
    with pytest.raises(ValueError, match=told):
        DiffusionModel(config=CONFIG)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_network_that_knows_the_image_makes_it(prediction_type):
    task = built(prediction_type=prediction_type, num_train_timesteps=1000, sample_steps=50)
    (image,) = images(1)
    alphas = task.noise_schedule.alphas_cumprod

    def knows(noisy, timesteps):
        a, s = (each[timesteps].sqrt().view(-1, 1, 1, 1) for each in (alphas, 1 - alphas))
        noise = (noisy - a * image) / s
        return {"epsilon": noise, "v_prediction": a * noise - s * image, "sample": image}[prediction_type]

    task._predict = knows
    assert (task.sample([3])[0] - image).abs().max() < 0.05


def test_in_half_precision():
    task = built()
    assert task(images(2), torch.tensor([1, 9])).isfinite().all(), "the dtype may change afterwards"
    task.bfloat16()
    assert task.squared_errors(images(2), torch.randn(2, 1, 8, 8), torch.tensor([1, 9])).dtype == torch.float32
    assert task.sample([0]).isfinite().all()


def test_the_distance_of_normal_distributions():
    """Against the nuclear norm of the product of both centred samples, in float64."""
    one, other = torch.randn(50, 6, dtype=torch.float64), 2 * torch.randn(70, 6, dtype=torch.float64) + 1
    centred, others = one - one.mean(0), other - other.mean(0)
    crossed = torch.linalg.matrix_norm(centred @ others.T, ord="nuc") / (49 * 69) ** 0.5
    spread = centred.square().sum() / 49 + others.square().sum() / 69
    expected = (one.mean(0) - other.mean(0)).square().sum() + spread - 2 * crossed
    assert frechet_distance(one, other) == pytest.approx(expected.item(), rel=1e-10)
    assert frechet_distance(other, one) == pytest.approx(expected.item(), rel=1e-10)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-10)
    shift = torch.arange(6, dtype=torch.float64)
    assert frechet_distance(one, one + shift) == pytest.approx(55)


def test_principal_components_keep_distances():
    real = images(100)
    features = PrincipalComponents(real, 64)(real)
    assert features.shape == (100, 64)
    torch.testing.assert_close(torch.pdist(features), torch.pdist(real.flatten(1).double()))
    assert (features.var(0).diff() <= 1e-12).all(), "from large to small"
    with pytest.raises(ValueError, match=r"65 principal components .* 100 images of 64 numbers: lower model.pca_feat"):
        PrincipalComponents(real, 65)
    with pytest.raises(ValueError, match="20 images of 64 numbers"):
        PrincipalComponents(real[:20], 20)


def test_exported_folders_are_diffusers_own(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    task = built(prediction_type="v_prediction").eval()
    assert task.export(tmp_path / "out") == tmp_path / "out"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out")
    batch, timesteps = images(2), torch.tensor([1, 9])
    with torch.no_grad():
        assert torch.equal(pipeline.unet(batch, timesteps).sample, task(batch, timesteps))
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert torch.equal(pipeline.scheduler.alphas_cumprod, task.noise_schedule.alphas_cumprod)
    assert pipeline(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)
    with pytest.raises(ValueError, match="out exists; choose another folder"):
        task.export(tmp_path / "out")


def test_checkpointed_activations_give_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        task = built(activation_checkpointing=checkpointing)
        torch.manual_seed(1)
        task.training_step(images(), 0).backward()
        gradients.append([parameter.grad for parameter in task.parameters()])
    assert task.model.is_gradient_checkpointing
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
