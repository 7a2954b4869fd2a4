"""The method's formulas against their closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from tests.helpers.pipelines import SCHEDULER_CONFIG
from utils.dataset import InstanceDataset
from utils.diffusion import Loss, encode_images, encode_prompt, min_snr_weights, sample_latents, training_target
from utils.models.folder import read_base
from utils.models.loading import load_frozen, load_noise_scheduler, load_tokenizer, tokenize

LOSS = Loss(None, "cpu")
TIMESTEPS = torch.tensor([0, 1, 500, 999])


def make_scheduler(**options) -> DDPMScheduler:
    schedule = {key: SCHEDULER_CONFIG[key] for key in ("beta_start", "beta_end", "beta_schedule")}
    return DDPMScheduler(**schedule, **options)


def alphas_cumprod() -> torch.Tensor:
    """float64 [1000]: Stable Diffusion's schedule, betas linear in their square roots."""
    betas = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def draw(seed: int) -> torch.Tensor:
    return torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_latents_agree_with_diffusers_own_sample(tiny_pipeline_dir, photos_dir):
    vae = load_frozen(read_base(tiny_pipeline_dir), "vae", torch.float32, "cpu")
    pixel_values = InstanceDataset(photos_dir, 32).pixel_values(0, 0, 0)[None]
    mean, std = encode_images(vae, pixel_values)
    distribution = vae.encode(pixel_values).latent_dist
    expected = distribution.sample(torch.Generator().manual_seed(3)) * vae.config.scaling_factor
    latent_noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(sample_latents(mean, std, latent_noise, vae.config.scaling_factor), expected)


def test_noisy_latents_and_the_velocity_are_the_closed_forms(tiny_pipeline_dir):
    scheduler = load_noise_scheduler(read_base(tiny_pipeline_dir))
    latents, noise = draw(0), draw(1)
    alpha = alphas_cumprod()[TIMESTEPS].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * latents.double() + (1 - alpha).sqrt() * noise.double()
    torch.testing.assert_close(scheduler.add_noise(latents, noise, TIMESTEPS).double(), noisy, rtol=1e-5, atol=1e-5)
    velocity = alpha.sqrt() * noise.double() - (1 - alpha).sqrt() * latents.double()
    target = training_target(make_scheduler(prediction_type="v_prediction"), latents, noise, TIMESTEPS)
    torch.testing.assert_close(target.double(), velocity, rtol=1e-5, atol=1e-5)


def test_the_target_is_the_noise():
    noise = draw(1)
    assert torch.equal(training_target(make_scheduler(), draw(0), noise, TIMESTEPS), noise)


def test_other_prediction_types_are_refused():
    with pytest.raises(ValueError, match="prediction_type is 'sample', not 'epsilon' or 'v_prediction'"):
        training_target(make_scheduler(prediction_type="sample"), draw(0), draw(1), TIMESTEPS)


def test_the_loss_is_a_mean_square_in_fp32():
    model_pred, target = draw(0), draw(1)
    expected = (model_pred.double() - target.double()).square().mean()
    torch.testing.assert_close(LOSS.mean(model_pred, target).double(), expected)
    # 400 squared is 160000: above float16's largest number, 65504.
    loss = LOSS.mean(torch.full((2, 4), 400.0, dtype=torch.float16), torch.zeros(2, 4, dtype=torch.float16))
    assert loss.dtype == torch.float32 and loss.shape == () and loss.item() == 160000
    # and 1e-4 squared is below half of its smallest, 6e-8.
    small = LOSS.mean(torch.full((2, 4), 1e-4, dtype=torch.float16), torch.zeros(2, 4))
    assert small.item() == pytest.approx(1e-8, rel=1e-2)


def test_the_losss_gradient_reaches_the_prediction_in_its_own_dtype():
    model_pred = torch.full((4,), 2.0, dtype=torch.float16, requires_grad=True)
    LOSS.mean(model_pred, torch.ones(4)).backward()
    assert model_pred.grad.dtype == torch.float16
    torch.testing.assert_close(model_pred.grad.float(), torch.full((4,), 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_prompt_is_padded_to_77_tokens_and_encoded_without_gradient(tiny_pipeline_dir, dtype):
    text_encoder = load_frozen(read_base(tiny_pipeline_dir), "text_encoder", dtype, "cpu")
    tokenizer = load_tokenizer(tiny_pipeline_dir / "tokenizer")
    for prompt in ("a", "a photo of my cat. " * 50):
        input_ids = tokenize(prompt, tokenizer, text_encoder)
        assert input_ids.shape == (1, 77) and input_ids[0, 0] == tokenizer.bos_token_id
        assert tokenizer.eos_token_id in input_ids[0]
        hidden = encode_prompt(text_encoder, input_ids)
        assert hidden.shape == (1, 77, 16) and hidden.dtype == dtype and not hidden.requires_grad
    torch.testing.assert_close(hidden, text_encoder(input_ids).last_hidden_state)
    assert not text_encoder.training and not any(p.requires_grad for p in text_encoder.parameters())


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
        timesteps = torch.tensor([100, 400, 900, 0, 0, 700])
        table = min_snr_weights(make_scheduler(), 5.0)
        loss = Loss(make_scheduler(), "cpu", snr_gamma=5.0, prior_loss_weight=0.5)
        both, instance_loss, class_loss = loss(model_pred, target, timesteps)
        each = (model_pred - target).double().square().flatten(1).mean(1) * table[timesteps]
        torch.testing.assert_close(instance_loss.double(), each[:3].mean())
        torch.testing.assert_close(class_loss.double(), each[3:].mean())
        torch.testing.assert_close(both, instance_loss + 0.5 * class_loss)

    def test_another_kind_of_loss_is_one_method(self):
        """Photos, class images, weights and validation follow it: no way to the mean goes around it."""

        class Absolute(Loss):
            def errors(self, model_pred, target, reduction):
                return F.l1_loss(model_pred, target, reduction=reduction)

        model_pred, target = torch.randn(2, 4, 4, 2, 2, generator=torch.Generator().manual_seed(0))
        each = (model_pred - target).abs().flatten(1).mean(1)
        loss = Absolute(make_scheduler(), "cpu", prior_loss_weight=1.0)
        for weights in (None, torch.ones(4)):
            torch.testing.assert_close(loss.mean(model_pred, target, weights), each.mean())
        _, *halves = loss(model_pred, target, torch.zeros(4, dtype=torch.int64))
        torch.testing.assert_close(torch.stack(halves), each.view(2, 2).mean(1))
