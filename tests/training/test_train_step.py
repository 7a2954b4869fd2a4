"""The loss of a step: min-SNR and prior preservation."""

import pytest
import torch
from diffusers import DDPMScheduler

from tests.helpers.pipelines import SCHEDULER_CONFIG
from utils.diffusion import denoising_loss, min_snr_weights
from utils.training.train_step import instance_and_class_loss


def make_scheduler(**options) -> DDPMScheduler:
    schedule = {key: SCHEDULER_CONFIG[key] for key in ("beta_start", "beta_end", "beta_schedule")}
    return DDPMScheduler(**schedule, **options)


class TestLossWeights:
    """min-SNR and prior preservation against their closed forms."""

    @pytest.mark.parametrize("gamma", [1.0, 5.0])
    def test_min_snr_for_the_noise(self, gamma):
        scheduler = make_scheduler()
        alphas = scheduler.alphas_cumprod.double()
        snr = alphas / (1 - alphas)
        expected = torch.minimum(snr, torch.tensor(gamma, dtype=torch.float64)) / snr
        weights = min_snr_weights(scheduler, gamma)
        torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=0)
        assert weights[-1] == 1 and weights[0] < 0.01 * gamma

    def test_min_snr_for_the_velocity(self):
        scheduler = make_scheduler(prediction_type="v_prediction")
        alphas = scheduler.alphas_cumprod.double()
        snr = alphas / (1 - alphas)
        torch.testing.assert_close(min_snr_weights(scheduler, 5.0).double(), snr.clamp(max=5) / (snr + 1))

    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
    def test_a_schedule_that_ends_in_pure_noise(self, prediction_type):
        scheduler = make_scheduler(prediction_type=prediction_type, rescale_betas_zero_snr=True)
        assert torch.isfinite(min_snr_weights(scheduler, 5.0)).all()

    def test_both_predictions_weigh_an_error_of_the_clean_latents_alike(self):
        """The point of min-SNR: what the network predicts must not change what an error costs."""
        weights = [min_snr_weights(make_scheduler(prediction_type=p), 5.0) for p in ("epsilon", "v_prediction")]
        alphas = make_scheduler().alphas_cumprod.double()
        # An error e of the clean latents is an error sqrt(snr) e of the noise and e / sqrt(1 - alpha) of the velocity.
        cost = [weights[0] * alphas / (1 - alphas), weights[1] / (1 - alphas)]
        torch.testing.assert_close(cost[0], cost[1], rtol=1e-5, atol=0)

    def test_weights_stay_with_their_half(self):
        generator = torch.Generator().manual_seed(0)
        model_pred, target = torch.randn(2, 6, 4, 2, 2, generator=generator)
        table = torch.rand(10, generator=generator)
        timesteps = torch.tensor([1, 4, 9, 0, 0, 7])
        instance_loss, class_loss = instance_and_class_loss(model_pred, target, table[timesteps], True)
        each = (model_pred - target).double().square().flatten(1).mean(1) * table[timesteps]
        torch.testing.assert_close(instance_loss.double(), each[:3].mean())
        torch.testing.assert_close(class_loss.double(), each[3:].mean())

    def test_position_weights_are_of_the_photos_alone(self):
        generator = torch.Generator().manual_seed(0)
        model_pred, target = torch.randn(2, 6, 4, 2, 2, generator=generator)
        position_weights = torch.rand(3, 1, 2, 2, generator=generator)
        instance_loss, class_loss = instance_and_class_loss(model_pred, target, None, True, position_weights)
        torch.testing.assert_close(
            instance_loss, denoising_loss(model_pred[:3], target[:3], None, position_weights), rtol=0, atol=0
        )
        torch.testing.assert_close(class_loss, denoising_loss(model_pred[3:], target[3:]), rtol=0, atol=0)

    def test_weights_of_one_change_nothing(self):
        model_pred, target = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(
            denoising_loss(model_pred, target, torch.ones(3)), denoising_loss(model_pred, target)
        )
