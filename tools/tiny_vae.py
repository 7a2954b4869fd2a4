"""The miniature's autoencoder: pixels, a teacher's view of them and a discriminator's."""

import functools

import torch
from torch import nn
from torch.nn import functional as F

from tools.tiny_training import Average, autocast, captured, new_optimizer, set_lr, to_unit, update

# Weights of the teacher's distance and of the discriminator, which joins in after this fraction of the time.
JOINT, DECODER_ONLY = (0.6, 0.2, 0.3), (0.6, 0.15, 0.15)
NUM_JUDGED = 32  # pictures of a batch that the teacher looks at


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


class Step:
    """A step of the autoencoder and of the discriminator on a third of drawings and the rest photo crops.

    decoder_only: the latents stay what they are, so that a UNet can be trained on them meanwhile.
    """

    def __init__(self, vae, teacher, pictures, batch_size, decoder_only):
        self.vae, self.teacher, self.pictures = vae, teacher, pictures
        self.device, self.decoder_only = pictures[0].device, decoder_only
        self.counts = batch_size // 3, batch_size - batch_size // 3
        parts = (vae.decoder, vae.post_quant_conv) if decoder_only else (vae,)
        self.parameters = [parameter for part in parts for parameter in part.parameters()]
        self.optimizer = new_optimizer(self.parameters, self.device, weight_decay=0.0, betas=(0.9, 0.99))
        self.discriminator = PatchDiscriminator().to(self.device)
        judges = self.discriminator.parameters()
        self.judge = new_optimizer(judges, self.device, weight_decay=0.0, betas=(0.5, 0.9))

    def batch(self):
        """Pixel values [B, 3, 64, 64]."""
        chosen = [
            pictures[torch.randint(len(pictures), (count,), device=self.device)]
            for pictures, count in zip(self.pictures, self.counts, strict=True)
        ]
        return to_unit(torch.cat(chosen))

    def __call__(self, judged, asked):
        """judged: the discriminator learns; asked: the decoder learns from it. -> L1, teacher's distance, verdict."""
        perceptual_weight, adversarial_weight, _ = DECODER_ONLY if self.decoder_only else JOINT
        pixel_values = self.batch()
        with autocast(self.device):
            with torch.set_grad_enabled(not self.decoder_only):
                posterior = self.vae.encode(pixel_values).latent_dist
            decoded = self.vae.decode(posterior.sample()).sample.float()
            seen = self.teacher.distance(decoded[:NUM_JUDGED], pixel_values[:NUM_JUDGED])
            loss = reconstruction_loss(decoded, pixel_values) + perceptual_weight * seen
            loss = loss + 1e-6 * posterior.kl().float().mean()
            verdict = loss.new_zeros(())
            if judged:
                verdict = discriminator_loss(self.discriminator, pixel_values, decoded.detach())
                update(self.judge, verdict, list(self.discriminator.parameters()))
            if asked:
                last_weight = self.vae.decoder.conv_out.weight
                loss = loss + adversarial_weight * adversarial_term(self.discriminator, decoded, loss, last_weight)
        update(self.optimizer, loss, self.parameters)
        return torch.stack([(decoded - pixel_values).abs().mean(), seen, verdict]).detach()


def train_vae(vae, teacher, drawings, details, budget, batch_size, decoder_only=False):
    """Drawings and photo crops: uint8 [N, 3, 64, 64]. vae becomes the average."""
    step_function = Step(vae, teacher, (drawings, details), batch_size, decoder_only)
    optimizer, judge = step_function.optimizer, step_function.judge
    average = Average(step_function.parameters)
    parts = dict(discriminator=step_function.discriminator, optimizer=optimizer, judge=judge, average=average)
    budget.keep(vae=vae, **parts)
    phase = (DECODER_ONLY if decoder_only else JOINT)[-1]
    phases = {}
    for step, fraction in budget:
        set_lr(optimizer, (3e-4 if decoder_only else 8e-4) * budget.rate, step, fraction)
        set_lr(judge, 4e-4, step, fraction)
        judged = fraction >= phase
        asked = judged and fraction >= phase + 0.02  # it must have learned something before it is asked
        if (judged, asked) not in phases:
            phases[judged, asked] = captured(functools.partial(step_function, judged, asked), budget.device)
        l1, seen, verdict = phases[judged, asked]()
        average.update(step, 0.998)
        budget.note(step, fraction, l1=l1, seen=seen, discriminator=verdict)
    average.apply()


@torch.no_grad()
def encode_pictures(vae, pixels, batch_size=256):
    """uint8 [N, 3, 64, 64] -> mean and standard deviation of the unscaled latents, each [N, 4, 16, 16]."""
    means, stds = [], []
    for part in pixels.split(batch_size):
        posterior = vae.encode(part.float() / 127.5 - 1).latent_dist
        means.append(posterior.mean)
        stds.append(posterior.std)
    return torch.cat(means), torch.cat(stds)
