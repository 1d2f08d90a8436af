"""Training targets, min-SNR weights, and the noise that validation images always get."""

import pytest
import torch

pytest.importorskip("diffusers")

from lightning_adam_mini.tasks.diffusion.noise import (
    build_schedule,
    evaluation_draws,
    loss_weights,
    seeded_noise,
    target,
)

SHAPE = (1, 4, 4)


@pytest.mark.parametrize("gamma", [0.5, 5.0])
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_the_error_of_the_image(prediction_type, beta_schedule, gamma):
    """Hang et al. 2023: whatever the network predicts, the error of the image it means weighs min(SNR, gamma)."""
    schedule = build_schedule(1000, beta_schedule, prediction_type)
    alphas = schedule.alphas_cumprod.double()
    timesteps = torch.tensor([0, 1, 10, 300, 700, 990])
    a, s = (each[timesteps].sqrt().view(-1, 1, 1, 1) for each in (alphas, 1 - alphas))
    image, meant, noise = torch.randn(3, len(timesteps), *SHAPE, dtype=torch.float64)
    noisy = a * image + s * noise
    meant_noise = (noisy - a * meant) / s
    predicted = {"epsilon": meant_noise, "v_prediction": a * meant_noise - s * meant, "sample": meant}[prediction_type]
    errors = (target(schedule, image, noise, timesteps) - predicted).square().flatten(1).mean(1)
    weighted = loss_weights(alphas, prediction_type, gamma)[timesteps] * errors
    snr = alphas[timesteps] / (1 - alphas[timesteps])
    torch.testing.assert_close(weighted, snr.clamp(max=gamma) * (image - meant).square().flatten(1).mean(1))


def test_weights_are_those_of_the_paper():
    alphas = torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64)  # SNR 9, 1 and 0
    expected = {"epsilon": [5 / 9, 1.0, 1.0], "v_prediction": [0.5, 0.5, 0.0], "sample": [5.0, 1.0, 0.0]}
    for prediction_type, weights in expected.items():
        assert loss_weights(alphas, prediction_type, 5.0).tolist() == pytest.approx(weights)


def test_the_velocity_is_that_of_salimans_and_ho():
    schedule = build_schedule(10, "linear", "v_prediction")
    image, noise = torch.randn(2, 3, *SHAPE)
    timesteps = torch.tensor([0, 4, 9])
    a, s = (each[timesteps].sqrt().view(-1, 1, 1, 1) for each in (schedule.alphas_cumprod, 1 - schedule.alphas_cumprod))
    torch.testing.assert_close(target(schedule, image, noise, timesteps), a * noise - s * image)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((1, "linear", "epsilon"), "num_train_timesteps must be at least 2, not 1"),
        ((10, "cosine", "epsilon"), "no beta_schedule 'cosine'; choose one of linear, .*squaredcos_cap_v2"),
        ((10, "linear", "noise"), "no prediction_type 'noise'; choose one of epsilon, v_prediction, sample"),
    ],
)
def test_refused_schedules(options, told):
    with pytest.raises(ValueError, match=told):
        build_schedule(*options)


def test_draws_depend_on_the_index_and_the_seed_alone():
    timesteps, noise = evaluation_draws(range(8), SHAPE, 1000, seed=0)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    some_timesteps, some = evaluation_draws([5, 2], SHAPE, 1000, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(some, noise[[5, 2]])
    assert torch.equal(some_timesteps, timesteps[[5, 2]])
    assert not torch.equal(evaluation_draws([5], SHAPE, 1000, seed=1)[1], noise[[5]])
    assert len({tuple(image.flatten().tolist()) for image in noise}) == 8
    assert evaluation_draws([], SHAPE, 1000, seed=0)[1].shape == (0, *SHAPE)


def test_few_images_cover_all_timesteps():
    timesteps, _ = evaluation_draws(range(100), SHAPE, 1000, seed=0)
    assert 0 <= timesteps.min() < timesteps.max() < 1000
    gaps = timesteps.sort().values.diff()
    assert gaps.max() <= 3 * 1000 / 100


def test_noise_is_normal_and_of_its_seed():
    noise = seeded_noise(range(200), SHAPE)
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.1
    assert torch.equal(seeded_noise([7], SHAPE)[0], noise[7])
