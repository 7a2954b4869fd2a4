"""The miniature's CLIP: learned by contrast, and from a teacher's features and opinions."""

import math
import re

import torch
from torch import nn
from torch.nn import functional as F

from tools.tiny_models import IMAGE_MEAN, IMAGE_STD, VISION_CONFIG
from tools.tiny_training import autocast, captured, new_optimizer, set_lr, to_unit, update

# What a picture can be of: what captions say, and the classes of ImageNet that the teacher would say then.
KINDS = {
    "cat": ("cat", range(281, 286)),
    "dog": ("dog", range(151, 269)),
    "bird": ("bird", (*range(7, 25), *range(80, 101), *range(127, 147))),
    "fish": ("fish", (*range(7), *range(389, 398))),
    "backpack": ("backpack", (414,)),
    "clock": ("clock", (409, 530, 892)),
    "teapot": ("teapot", (849,)),
    "vase": ("vase", (883,)),
    "bowl": ("bowl", (659, 809)),
    "cup": ("cup|coffee", (504, 968)),
    "toy": ("toy|stuffed animal|plush toy", (850,)),
    "car": ("car", (436, 511, 656, 751, 817)),
    "house": ("house", (425, 449, 663, 698)),
    "boat": ("boat", (472, 576, 625, 814, 914)),
    "candle": ("candle", (470,)),
    "shoe": ("shoe|sneaker|boot", (514, 630, 770, 774)),
    "sunglasses": ("(?:sun)?glasses", (836, 837)),
    "flower": ("flower", (985, 986)),
    "mushroom": ("mushroom", (947, *range(991, 998))),
    "chair": ("chair", (423, 559, 765, 857)),
    "ball": ("ball", (430, 522, 574, 722, 805, 852, 890)),
    "apple": ("apple", (948,)),
    "tree": ("tree", ()),
    "star": ("star", ()),
    "can": ("can", ()),
    "astronaut": ("astronaut", ()),
}


def clip_normalised(pixel_values):
    """Pictures in [-1, 1] -> what CLIP's image processor gives; plain numbers, so that a graph can hold it."""
    channels = zip(pixel_values.unbind(1), IMAGE_MEAN, IMAGE_STD, strict=True)
    return torch.stack([(channel / 2 + 0.5 - mean) / std for channel, mean, std in channels], 1)


def text_embeddings(clip, input_ids):
    return F.normalize(clip.text_projection(clip.text_model(input_ids=input_ids).pooler_output).float(), dim=-1)


def jittered(pixel_values, largest=1.0):
    """Each picture with its own brightness, contrast and tint, moved and enlarged a little: the photos are few.

    largest: how many times its size the window on a picture is at most, mirrored outwards.
    """
    batch, device = len(pixel_values), pixel_values.device
    gain = 1 + 0.25 * torch.randn(batch, 1, 1, 1, device=device) + 0.06 * torch.randn(batch, 3, 1, 1, device=device)
    shift = 0.15 * torch.randn(batch, 1, 1, 1, device=device) + 0.06 * torch.randn(batch, 3, 1, 1, device=device)
    zoom = 0.75 + (largest - 0.75) * torch.rand(batch, 1, 1, device=device)
    theta = torch.zeros(batch, 2, 3, device=device)
    theta[:, :, :2] = torch.eye(2, device=device) * zoom
    theta[:, :, 2] = (torch.rand(batch, 2, device=device) * 2 - 1) * (1.1 - zoom[:, 0]).abs()
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
        set_lr(optimizer, 7e-4 * budget.rate, step, fraction)
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


def kinds_of(captions):
    """-> for each caption the place in KINDS of the last kind that it names, or -1."""
    patterns = [re.compile(rf"\b(?:{words})\b") for words, _ in KINDS.values()]
    return [max((at for at, pattern in enumerate(patterns) if pattern.search(text)), default=-1) for text in captions]


def varied(pixel_values):
    """What the image tower learns from: jittered, a third of it grey, a third of it a mixture of two pictures."""
    pictures = jittered(pixel_values, largest=1.6)
    a, b, share = torch.rand(3, len(pictures), 1, 1, 1, device=pictures.device)
    pictures = torch.where(a < 0.33, pictures.mean(1, keepdim=True), pictures)
    return torch.where(b < 0.33, pictures.lerp(pictures.flip(0), share / 2), pictures)


class Opinions:
    """What the teacher would say of a picture in the words of KINDS that ImageNet has classes for."""

    def __init__(self, teacher, device):
        self.teacher = teacher
        rows = [(at, list(classes)) for at, (_, classes) in enumerate(KINDS.values()) if classes]
        self.known = torch.tensor([at for at, _ in rows], device=device)
        # a kind is the mean of its classes' probabilities: there are 118 dogs and one teapot
        self.member = torch.full((len(rows), 1000), -torch.inf, device=device)
        for row, (_, classes) in enumerate(rows):
            self.member[row, classes] = -math.log(len(classes))

    @torch.no_grad()
    def __call__(self, pixel_values):
        """Pictures in [-1, 1] -> features of unit length [B, 1280], log-probabilities of the known kinds [B, K]."""
        pooled = self.teacher.maps(pixel_values)[-1].float().mean((2, 3))
        logits = self.teacher.network._fc(pooled).float()
        by_kind = torch.logsumexp(logits[:, None] + self.member, dim=2)
        return F.normalize(pooled, dim=1), by_kind.log_softmax(1)


class EyesStep:
    """A step of the image tower and of both projections; the text tower stays, since the UNet knows it as it is.

    Half of a batch has captions, each kind as often as the others; the rest are windows of photos. The tower learns to
    tell the kinds, which caption is whose, the teacher's features, and the teacher's opinion of every picture.
    """

    def __init__(self, clip, teacher, pictures, prompts, kinds, batch_size):
        self.clip, self.pictures, self.half = clip, pictures, batch_size // 2
        self.device = pictures.pixels.device
        self.opinions = Opinions(teacher, self.device)
        with torch.no_grad():
            texts = [clip.text_model(input_ids=part).pooler_output for part in pictures.input_ids.split(1024)]
            self.prompts = clip.text_model(input_ids=prompts.to(self.device)).pooler_output
        self.texts = torch.cat(texts)
        self.kinds = torch.tensor(kinds, device=self.device)[pictures.caption_index]
        self.order = self.kinds.argsort()
        counts = torch.bincount(self.kinds + 1, minlength=len(KINDS) + 1)
        self.first, self.counts = counts.cumsum(0)[:-1], counts[1:]
        self.present = self.counts.nonzero()[:, 0]
        self.head = nn.Linear(VISION_CONFIG["hidden_size"], 1280).to(self.device)
        trained = (clip.vision_model, clip.visual_projection, clip.text_projection, self.head)
        self.parameters = [clip.logit_scale, *(value for part in trained for value in part.parameters())]
        self.optimizer = new_optimizer(self.parameters, self.device, weight_decay=0.05, betas=(0.9, 0.98))

    def choose(self):
        """Rows of pictures, each kind as often as the others."""
        kind = self.present[torch.randint(len(self.present), (self.half,), device=self.device)]
        place = torch.rand(self.half, device=self.device) * self.counts[kind]
        return self.order[self.first[kind] + place.long()]

    def embedded(self, pooled):
        return F.normalize(self.clip.text_projection(pooled).float(), dim=-1)

    def __call__(self):
        """-> the losses of kinds, captions, features, opinions."""
        pictures, half, chosen = self.pictures, self.half, self.choose()
        free = torch.randint(len(pictures.details), (half,), device=self.device)
        captioned = jittered(to_unit(pictures.pixels[chosen]), largest=1.6)
        seen = torch.cat([captioned, varied(to_unit(pictures.details[free]))])
        with autocast(self.device):
            features, opinions = self.opinions(seen)
            pooled = self.clip.vision_model(pixel_values=clip_normalised(seen)).pooler_output
            images = F.normalize(self.clip.visual_projection(pooled).float(), dim=-1)
            read = F.normalize(self.head(pooled).float(), dim=-1)
            prompts = self.embedded(self.prompts)
            texts = self.embedded(self.texts[pictures.caption_index[chosen]])
        scale = self.clip.logit_scale.exp().clamp(max=100)
        said = scale * images @ prompts.T
        kind = F.cross_entropy(said[:half], self.kinds[chosen], label_smoothing=0.1)
        captions = pictures.caption_index[chosen]
        contrast = contrastive_loss(images[:half], texts, captions[:, None] == captions[None, :], scale)
        taught = (1 - (read * features).sum(1)).mean()
        agreed = F.kl_div(
            said[:, self.opinions.known].log_softmax(1), opinions, log_target=True, reduction="batchmean"
        )
        update(self.optimizer, kind + 0.5 * contrast + 4 * taught + agreed, self.parameters)
        return torch.stack([kind, contrast, taught, agreed]).detach()


def train_eyes(clip, teacher, pictures, prompts, kinds, budget, batch_size):
    """The image tower and both projections, on freshly varied pictures.

    prompts: token ids [K, 77] of "a photo of a KIND" for each of KINDS; kinds: of each row of input_ids.
    """
    step_function = EyesStep(clip, teacher, pictures, prompts, kinds, batch_size)
    budget.keep(clip=clip, head=step_function.head, optimizer=step_function.optimizer)
    set_lr(step_function.optimizer, 1e-3 * budget.rate, budget.step, budget.fraction)
    run_step = captured(step_function, budget.device)
    for step, fraction in budget:
        set_lr(step_function.optimizer, 1e-3 * budget.rate, step, fraction)
        kind, contrast, taught, agreed = run_step()
        budget.note(step, fraction, kind=kind, contrast=contrast, taught=taught, agreed=agreed)


@torch.no_grad()
def encode_captions(clip, input_ids, batch_size=1024):
    """Token ids [M, 77] -> the frozen text encoder's hidden states [M, 77, 64], in half the memory on a GPU."""
    dtype = torch.bfloat16 if input_ids.is_cuda else torch.float32
    return torch.cat(
        [clip.text_model(input_ids=part).last_hidden_state.to(dtype) for part in input_ids.split(batch_size)]
    )
