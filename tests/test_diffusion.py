"""The method's formulas against their closed forms."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from tests.helpers.pipelines import SCHEDULER_CONFIG
from utils.dataset import InstanceDataset
from utils.diffusion import denoising_loss, encode_images, encode_prompt, sample_latents, training_target
from utils.models.loading import load_noise_scheduler, load_text_encoder, load_tokenizer, load_vae, tokenize

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


def test_latents_are_drawn_from_the_distribution_then_scaled():
    mean, std, noise = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0]), torch.tensor([2.0, 1.0])
    torch.testing.assert_close(sample_latents(mean, std, noise, 0.25), torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(sample_latents(mean, std, torch.zeros(2), 0.18215), mean * 0.18215)


def test_latents_agree_with_diffusers_own_sample(tiny_pipeline_dir, photos_dir):
    vae = load_vae(tiny_pipeline_dir, torch.float32, "cpu")
    pixel_values = InstanceDataset(photos_dir, 32).pixel_values(0, 0, 0)[None]
    mean, std = encode_images(vae, pixel_values)
    distribution = vae.encode(pixel_values).latent_dist
    expected = distribution.sample(torch.Generator().manual_seed(3)) * vae.config.scaling_factor
    latent_noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(sample_latents(mean, std, latent_noise, vae.config.scaling_factor), expected)


def test_noisy_latents_are_the_closed_form(tiny_pipeline_dir):
    scheduler = load_noise_scheduler(tiny_pipeline_dir)
    latents, noise = draw(0), draw(1)
    alpha = alphas_cumprod()[TIMESTEPS].view(-1, 1, 1, 1)
    expected = alpha.sqrt() * latents.double() + (1 - alpha).sqrt() * noise.double()
    torch.testing.assert_close(scheduler.add_noise(latents, noise, TIMESTEPS).double(), expected, rtol=1e-5, atol=1e-5)


def test_the_target_is_the_noise():
    noise = draw(1)
    assert torch.equal(training_target(make_scheduler(), draw(0), noise, TIMESTEPS), noise)


def test_the_velocity_is_the_closed_form():
    scheduler = make_scheduler(prediction_type="v_prediction")
    latents, noise = draw(0), draw(1)
    alpha = alphas_cumprod()[TIMESTEPS].view(-1, 1, 1, 1)
    expected = alpha.sqrt() * noise.double() - (1 - alpha).sqrt() * latents.double()
    target = training_target(scheduler, latents, noise, TIMESTEPS).double()
    torch.testing.assert_close(target, expected, rtol=1e-5, atol=1e-5)


def test_other_prediction_types_are_refused():
    with pytest.raises(ValueError, match="prediction_type is 'sample', not 'epsilon' or 'v_prediction'"):
        training_target(make_scheduler(prediction_type="sample"), draw(0), draw(1), TIMESTEPS)


def test_the_loss_is_a_mean_square_in_fp32():
    model_pred, target = draw(0), draw(1)
    expected = (model_pred.double() - target.double()).square().mean()
    torch.testing.assert_close(denoising_loss(model_pred, target).double(), expected)
    # 400 squared is 160000: above float16's largest number, 65504.
    loss = denoising_loss(torch.full((2, 4), 400.0, dtype=torch.float16), torch.zeros(2, 4, dtype=torch.float16))
    assert loss.dtype == torch.float32 and loss.shape == () and loss.item() == 160000
    # and 1e-4 squared is below half of its smallest, 6e-8.
    small = denoising_loss(torch.full((2, 4), 1e-4, dtype=torch.float16), torch.zeros(2, 4))
    assert small.item() == pytest.approx(1e-8, rel=1e-2)


def test_the_losss_gradient_reaches_the_prediction_in_its_own_dtype():
    model_pred = torch.full((4,), 2.0, dtype=torch.float16, requires_grad=True)
    denoising_loss(model_pred, torch.ones(4)).backward()
    assert model_pred.grad.dtype == torch.float16
    torch.testing.assert_close(model_pred.grad.float(), torch.full((4,), 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_prompt_is_padded_to_77_tokens_and_encoded_without_gradient(tiny_pipeline_dir, dtype):
    text_encoder = load_text_encoder(tiny_pipeline_dir, dtype, "cpu")
    tokenizer = load_tokenizer(tiny_pipeline_dir)
    for prompt in ("a", "a photo of my cat. " * 50):
        input_ids = tokenize(tokenizer, prompt)
        assert input_ids.shape == (1, 77) and input_ids[0, 0] == tokenizer.bos_token_id
        assert tokenizer.eos_token_id in input_ids[0]
        hidden = encode_prompt(text_encoder, input_ids)
        assert hidden.shape == (1, 77, 16) and hidden.dtype == dtype and not hidden.requires_grad
    torch.testing.assert_close(hidden, text_encoder(input_ids).last_hidden_state)
    assert not text_encoder.training and not any(p.requires_grad for p in text_encoder.parameters())


def test_positions_are_weighed_within_each_sample():
    """Each sample's error is its own weighted mean, so that a small subject counts as much as a large one."""
    generator = torch.Generator().manual_seed(0)
    model_pred, target = torch.randn(2, 3, 4, 6, 5, generator=generator)
    position_weights = torch.rand(3, 1, 6, 5, generator=generator)
    position_weights[1, :, :3] = 0
    sample_weights = torch.tensor([1.0, 0.5, 2.0])
    errors = (model_pred - target).double().square()
    each = [(e.mean(0) * w[0]).sum() / w.sum() for e, w in zip(errors, position_weights.double(), strict=True)]
    found = denoising_loss(model_pred, target, None, position_weights)
    torch.testing.assert_close(found.double(), torch.stack(each).mean())
    found = denoising_loss(model_pred, target, sample_weights, position_weights)
    torch.testing.assert_close(found.double(), (torch.stack(each) * sample_weights).mean())
    changed = target.clone()
    changed[1, :, :3] += 100
    assert torch.equal(denoising_loss(model_pred, changed, sample_weights, position_weights), found)


def test_weights_of_one_are_the_plain_mean_and_of_zero_nothing():
    model_pred, target = torch.randn(2, 2, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    plain = denoising_loss(model_pred, target)
    torch.testing.assert_close(denoising_loss(model_pred, target, None, torch.ones(2, 1, 6, 5)), plain)
    torch.testing.assert_close(denoising_loss(model_pred, target, None, torch.full((1, 1, 6, 5), 0.3)), plain)
    model_pred.requires_grad_()
    nothing = denoising_loss(model_pred, target, None, torch.zeros(2, 1, 6, 5))
    nothing.backward()
    assert nothing == 0 and not model_pred.grad.any()
