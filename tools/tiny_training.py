"""How the miniature is trained, in Stable Diffusion's order: CLIP by contrast, the VAE, the UNet on its latents.

Every stage has a time budget, and its learning rate follows the fraction of it that is spent.
"""

import math
import time

import torch
from torch import nn
from torch.nn import functional as F

from tools.tiny_models import IMAGE_MEAN, IMAGE_STD, SCHEDULER_CONFIG

CONTEXT_LENGTH = 77  # tokens
PHASE = 0.5  # fraction of the VAE's time after which its reconstructions must also fool a discriminator


class Budget:
    """Iterates over (step, fraction of the time spent), and reports the loss now and then."""

    def __init__(self, name, seconds, device, report, min_steps=4):
        self.name, self.seconds, self.device, self.report = name, seconds, device, report
        self.min_steps = min_steps
        self.num_reports = 0

    def __iter__(self):
        start, step, fraction = time.monotonic(), 0, 0.0
        while fraction < 1 or step < self.min_steps:
            yield step, min(fraction, 1.0)
            step += 1
            if self.device.type == "cuda" and step % 10 == 0:
                torch.cuda.synchronize()  # else the clock would run ahead of the work
            fraction = (time.monotonic() - start) / self.seconds
        self.report(f"{self.name}: {step} steps in {time.monotonic() - start:.0f} s")

    def note(self, step, fraction, **values):
        """Reports about 25 times a stage; `values` are read back only then."""
        if fraction * 25 >= self.num_reports:
            self.num_reports += 1
            numbers = " ".join(f"{name} {value.item():.4f}" for name, value in values.items())
            self.report(f"{self.name} step {step} ({fraction:.0%}): {numbers}")


def new_optimizer(parameters, device, **options):
    """AdamW whose learning rate is a tensor on a GPU, so that a captured step can see it change."""
    if device.type == "cuda":
        return torch.optim.AdamW(parameters, torch.tensor(0.0, device=device), fused=True, capturable=True, **options)
    return torch.optim.AdamW(parameters, 0.0, **options)


def set_lr(optimizer, peak, step, fraction, warmup_steps=200):
    """Linear warm-up in steps, then half a cosine in time, down to 1% of the peak."""
    lr = peak * min(1.0, (step + 1) / warmup_steps) * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * fraction)))
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def update(optimizer, loss, parameters):
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def to_unit(pixels):
    """uint8 [B, 3, 64, 64] -> float in [-1, 1], each picture mirrored with probability one half."""
    pixels = pixels.float() / 127.5 - 1
    mirrored = torch.rand(len(pixels), 1, 1, 1, device=pixels.device) < 0.5
    return torch.where(mirrored, pixels.flip(-1), pixels)


def clip_normalised(pixel_values):
    """Pictures in [-1, 1] -> what CLIP's image processor gives."""
    mean = pixel_values.new_tensor(IMAGE_MEAN)[:, None, None]
    std = pixel_values.new_tensor(IMAGE_STD)[:, None, None]
    return (pixel_values / 2 + 0.5 - mean) / std


def image_embeddings(clip, pixel_values):
    """Pictures in [-1, 1] -> unit vectors [B, 64]."""
    pooled = clip.vision_model(pixel_values=clip_normalised(pixel_values)).pooler_output
    return F.normalize(clip.visual_projection(pooled).float(), dim=-1)


def text_embeddings(clip, input_ids):
    return F.normalize(clip.text_projection(clip.text_model(input_ids=input_ids).pooler_output).float(), dim=-1)


def contrastive_loss(images, texts, same, scale):
    """CLIP's symmetric loss, where every pair with an equal caption is a positive: same [B, B] is boolean."""
    logits = scale * images @ texts.T
    target = same.float() / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train_clip(clip, pixels, input_ids, caption_index, budget, batch_size):
    """pixels uint8 [N, 3, 64, 64]; input_ids [M, 77] of the M distinct captions; caption_index [N] into them."""
    device, parameters = budget.device, list(clip.parameters())
    length = (
        int((input_ids != input_ids[0, -1]).sum(1).max()) + 1
    )  # up to the first end token: the rest changes nothing
    optimizer = new_optimizer(parameters, device, weight_decay=0.02, betas=(0.9, 0.98))
    for step, fraction in budget:
        set_lr(optimizer, 7e-4, step, fraction)
        chosen = torch.randint(len(pixels), (batch_size,), device=device)
        captions = caption_index[chosen]
        with autocast(device):
            images = image_embeddings(clip, to_unit(pixels[chosen]))
            texts = text_embeddings(clip, input_ids[captions, :length])
        scale = clip.logit_scale.exp().clamp(max=100)
        loss = contrastive_loss(images, texts, captions[:, None] == captions[None, :], scale)
        update(optimizer, loss, parameters)
        budget.note(step, fraction, loss=loss, scale=scale)


class PatchDiscriminator(nn.Sequential):
    """Says for each patch of about 20 pixels whether it is of a photo or of a reconstruction."""

    def __init__(self, width=64):
        super().__init__(
            nn.Conv2d(3, width, 3, 1, 1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, width * 2, 4, 2, 1),
            nn.GroupNorm(16, width * 2),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width * 2, width * 4, 4, 2, 1),
            nn.GroupNorm(16, width * 4),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width * 4, 1, 3, 1, 1),
        )


def reconstruction_loss(decoded, pixel_values):
    """L1 on the pixels, on their differences to the right and below, and on the picture at half the size."""
    error = decoded - pixel_values
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 0.5 * edges + 0.5 * F.avg_pool2d(error, 2).abs().mean()


def adversarial_term(discriminator, decoded, reconstruction, last_weight):
    """The generator's loss, weighted so that its gradient at the last layer is as long as the reconstruction's."""
    fooled = -discriminator(decoded).float().mean()
    wanted = torch.autograd.grad(reconstruction, last_weight, retain_graph=True)[0].norm()
    given = torch.autograd.grad(fooled, last_weight, retain_graph=True)[0].norm()
    return fooled * (wanted / (given + 1e-6)).clamp(max=100).detach()


def discriminator_loss(discriminator, real, fake):
    """Hinge loss: real patches above 1, reconstructed ones below -1."""
    return (F.relu(1 - discriminator(real)).mean() + F.relu(1 + discriminator(fake)).mean()).float()


def train_vae(vae, drawings, details, budget, batch_size, adversarial_weight, at_phase):
    """Half of each batch are drawings, half photo crops; uint8 [N, 3, 64, 64]. at_phase() is called between phases."""
    device, parameters = budget.device, list(vae.parameters())
    optimizer = new_optimizer(parameters, device, weight_decay=0.0, betas=(0.9, 0.99))
    discriminator = PatchDiscriminator().to(device)
    judge = new_optimizer(discriminator.parameters(), device, weight_decay=0.0, betas=(0.5, 0.9))
    phase_step = None
    for step, fraction in budget:
        set_lr(optimizer, 8e-4, step, fraction)
        set_lr(judge, 4e-4, step, fraction)
        halves = [part[torch.randint(len(part), (batch_size // 2,), device=device)] for part in (drawings, details)]
        pixel_values = to_unit(torch.cat(halves))
        with autocast(device):
            posterior = vae.encode(pixel_values).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
            reconstruction = reconstruction_loss(decoded, pixel_values)
            loss = reconstruction + 1e-6 * posterior.kl().float().mean()
            values = dict(l1=(decoded - pixel_values).abs().mean().detach(), reconstruction=reconstruction.detach())
            if fraction >= PHASE and adversarial_weight:
                if phase_step is None:
                    at_phase()
                    phase_step = step
                verdict = discriminator_loss(discriminator, pixel_values, decoded.detach())
                update(judge, verdict, discriminator.parameters())
                values["discriminator"] = verdict.detach()
                if step >= phase_step + 50:  # it must have learned something before it is asked
                    term = adversarial_term(discriminator, decoded, reconstruction, vae.decoder.conv_out.weight)
                    loss = loss + adversarial_weight * term
        update(optimizer, loss, parameters)
        budget.note(step, fraction, **values)


@torch.no_grad()
def encode_pictures(vae, pixels, batch_size=256):
    """uint8 [N, 3, 64, 64] -> mean and standard deviation of the unscaled latents, each [N, 4, 16, 16]."""
    means, stds = [], []
    for part in pixels.split(batch_size):
        posterior = vae.encode(part.float() / 127.5 - 1).latent_dist
        means.append(posterior.mean)
        stds.append(posterior.std)
    return torch.cat(means), torch.cat(stds)


@torch.no_grad()
def encode_captions(clip, input_ids, batch_size=1024):
    """Token ids [M, 77] -> the frozen text encoder's hidden states [M, 77, 64], in half the memory on a GPU."""
    dtype = torch.bfloat16 if input_ids.is_cuda else torch.float32
    return torch.cat(
        [clip.text_model(input_ids=part).last_hidden_state.to(dtype) for part in input_ids.split(batch_size)]
    )


def alphas_cumprod(device):
    """Stable Diffusion's noise schedule: float [1000]."""
    start, end = SCHEDULER_CONFIG["beta_start"], SCHEDULER_CONFIG["beta_end"]
    betas = torch.linspace(start**0.5, end**0.5, SCHEDULER_CONFIG["num_train_timesteps"], dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float().to(device)


def noise_prediction_loss(unet, latents, encoder_hidden_states, alphas):
    """The loss of Stable Diffusion on scaled latents [B, 4, 16, 16]."""
    noise = torch.randn_like(latents)
    timesteps = torch.randint(len(alphas), (len(latents),), device=latents.device)
    alpha = alphas[timesteps][:, None, None, None]
    noisy_latents = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    model_pred = unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
    return F.mse_loss(model_pred.float(), noise)


def captured(step_function):
    """The same step as one CUDA graph: small layers are bound by the launching of their kernels otherwise."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(4):
            step_function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step_function()

    def replay():
        graph.replay()
        return loss

    return replay


def train_unet(unet, cache, budget, batch_size, use_graph):
    """cache: scaled latent mean, std [N, 4, 16, 16]; hidden states [M, 77, 64] (0: no prompt); caption rows [N]."""
    mean, std, hidden_states, caption_index = cache
    device, parameters = budget.device, list(unet.parameters())
    optimizer, alphas = new_optimizer(parameters, device, weight_decay=0.01), alphas_cumprod(device)
    average = [parameter.detach().clone() for parameter in parameters]

    def step_function():
        chosen = torch.randint(len(mean), (batch_size,), device=device)
        latents = mean[chosen] + std[chosen] * torch.randn_like(mean[chosen])
        without = torch.rand(batch_size, device=device) < 0.1
        captions = torch.where(without, 0, caption_index[chosen])
        with autocast(device):
            loss = noise_prediction_loss(unet, latents, hidden_states[captions], alphas)
        update(optimizer, loss, parameters)
        return loss.detach()

    set_lr(optimizer, 1e-3, 0, 0.0)
    run_step = captured(step_function) if use_graph else step_function
    recent = None
    for step, fraction in budget:
        set_lr(optimizer, 1e-3, step, fraction)
        loss = run_step()
        recent = loss.clone() if recent is None else recent.lerp(loss, 0.02)
        decay = min(0.9995, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 - decay)
        budget.note(step, fraction, loss=recent)
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
