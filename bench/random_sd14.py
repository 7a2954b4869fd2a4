"""Writes a pipeline folder of Stable Diffusion v1.4's exact shape with random weights: enough to time and to test.

python -m bench.random_sd14 DIR [--device cuda]

The tokenizer is the embedded model's (CLIP's own vocabulary). Weights are torch's default initialisation at seed 0,
saved as float32 like the real folder's.
"""

import json
import shutil
from pathlib import Path

import torch

from bench.command_line import EMBEDDED, make_parser
from utils.models.check import V1

UNET_CONFIG, VAE_CONFIG, TEXT_CONFIG = (
    {name: value for name, value in V1[part].items() if not name.startswith("_")}
    for part in ("unet", "vae", "text_encoder")
)


def write_pipeline(folder: Path, device: str = "cpu") -> None:
    """Writes the folder: 4.2 GB."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    with torch.device(device):
        parts = dict(
            unet=UNet2DConditionModel(**UNET_CONFIG),
            vae=AutoencoderKL(**VAE_CONFIG),
            text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT_CONFIG)),
        )
    for name, module in parts.items():
        module.cpu().save_pretrained(folder / name)
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(EMBEDDED / name, folder / name, dirs_exist_ok=True)
    index = json.loads((EMBEDDED / "model_index.json").read_text())
    index.update(safety_checker=[None, None], feature_extractor=[None, None], requires_safety_checker=False)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def base_folder(given: Path | None, scratch: Path) -> Path:
    """What to measure with: `given`, written if it is not there; else such weights on a GPU, the embedded on a CPU."""
    on_gpu = torch.cuda.is_available()
    folder = given or (scratch / "sd14" if on_gpu else EMBEDDED)
    if not folder.exists():
        write_pipeline(folder, "cuda" if on_gpu else "cpu")
        torch.cuda.empty_cache()
    return folder


if __name__ == "__main__":
    parser = make_parser(__doc__, __spec__.name, results=False)
    parser.add_argument("folder", type=Path, help="where the pipeline goes")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu (cuda if there is one)"
    )
    arguments = parser.parse_args()
    write_pipeline(arguments.folder, arguments.device)
