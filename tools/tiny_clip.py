"""The miniature's CLIP: learned by contrast, and from a teacher's features."""

import torch
from torch import nn
from torch.nn import functional as F

from tools.tiny_models import IMAGE_MEAN, IMAGE_STD, VISION_CONFIG
from tools.tiny_training import autocast, new_optimizer, set_lr, to_unit, update


def clip_normalised(pixel_values):
    """Pictures in [-1, 1] -> what CLIP's image processor gives."""
    mean = pixel_values.new_tensor(IMAGE_MEAN)[:, None, None]
    std = pixel_values.new_tensor(IMAGE_STD)[:, None, None]
    return (pixel_values / 2 + 0.5 - mean) / std


def text_embeddings(clip, input_ids):
    return F.normalize(clip.text_projection(clip.text_model(input_ids=input_ids).pooler_output).float(), dim=-1)


def jittered(pixel_values):
    """Each picture with its own brightness, contrast and tint, and moved by up to 6 pixels: the photos are few."""
    batch, device = len(pixel_values), pixel_values.device
    gain = 1 + 0.25 * torch.randn(batch, 1, 1, 1, device=device) + 0.06 * torch.randn(batch, 3, 1, 1, device=device)
    shift = 0.15 * torch.randn(batch, 1, 1, 1, device=device) + 0.06 * torch.randn(batch, 3, 1, 1, device=device)
    zoom = 1 - 0.25 * torch.rand(batch, 1, 1, device=device)
    theta = torch.zeros(batch, 2, 3, device=device)
    theta[:, :, :2] = torch.eye(2, device=device) * zoom
    theta[:, :, 2] = (torch.rand(batch, 2, device=device) * 2 - 1) * (1.1 - zoom[:, 0])
    grid = F.affine_grid(theta, list(pixel_values.shape), align_corners=False)
    moved = F.grid_sample(pixel_values, grid, padding_mode="reflection", align_corners=False)
    return (moved * gain + shift).clamp(-1, 1)


def contrastive_loss(images, texts, same, scale):
    """CLIP's symmetric loss, where every pair with an equal caption is a positive: same [B, B] is boolean."""
    logits = scale * images @ texts.T
    target = same.float() / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train_clip(clip, pictures, budget, batch_size):
    """By contrast, while a linear reading of its image tower learns the teacher's features of the same pictures."""
    device = budget.device
    head = nn.Linear(VISION_CONFIG["hidden_size"], pictures.features.shape[1]).to(device)
    parameters = [*clip.parameters(), *head.parameters()]
    optimizer = new_optimizer(parameters, device, weight_decay=0.05, betas=(0.9, 0.98))
    budget.keep(clip=clip, head=head, optimizer=optimizer)
    ids = pictures.input_ids
    length = int((ids != ids[0, -1]).sum(1).max()) + 1  # up to the first end token: the rest changes nothing
    for step, fraction in budget:
        set_lr(optimizer, 7e-4, step, fraction)
        chosen = pictures.choose(batch_size)
        captions = pictures.caption_index[chosen]
        pixel_values = jittered(to_unit(pictures.pixels[chosen]))
        with autocast(device):
            pooled = clip.vision_model(pixel_values=clip_normalised(pixel_values)).pooler_output
            images = F.normalize(clip.visual_projection(pooled).float(), dim=-1)
            texts = text_embeddings(clip, ids[captions, :length])
            read = F.normalize(head(pooled).float(), dim=-1)
        scale = clip.logit_scale.exp().clamp(max=100)
        contrast = contrastive_loss(images, texts, captions[:, None] == captions[None, :], scale)
        taught = (1 - (read * pictures.features[chosen].float()).sum(1)).mean()
        update(optimizer, contrast + 2 * taught, parameters)
        budget.note(step, fraction, loss=contrast, taught=taught, scale=scale)


@torch.no_grad()
def encode_captions(clip, input_ids, batch_size=1024):
    """Token ids [M, 77] -> the frozen text encoder's hidden states [M, 77, 64], in half the memory on a GPU."""
    dtype = torch.bfloat16 if input_ids.is_cuda else torch.float32
    return torch.cat(
        [clip.text_model(input_ids=part).last_hidden_state.to(dtype) for part in input_ids.split(batch_size)]
    )
