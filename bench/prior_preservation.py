"""What fine-tuning did to other prompts: CLIP-T by prompt and CLIP-I against the photos, for several pipelines.

python bench/prior_preservation.py --clip model/tiny-clip --instance_data_dir instance --output_dir DIR NAME=FOLDER ...

Every pipeline draws the same prompts with the same seeds. CLIP-T is the mean cosine of an image and its prompt, CLIP-I
the mean cosine of an image and the photos. Writes scores.json, grid.jpg (a row a prompt, three images a pipeline) and
DIR/NAME/*.png; images that are there already are scored, not drawn again.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils.class_generation import draw, load_class_pipeline
from utils.dataset import decode, find_photos
from utils.models import quiet_libraries

SUBJECT = "a photo of my cat."
OTHERS = tuple(f"a photo of a {thing}" for thing in ("cat", "dog", "car", "house", "fish", "tree", "boat", "flower"))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", type=Path, required=True, help="folder of a CLIPModel")
    parser.add_argument("--instance_data_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_images", type=int, default=8, help="per prompt")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("pipelines", nargs="+", metavar="NAME=FOLDER")
    return parser.parse_args()


class Clip:
    """Unit vectors of images and texts."""

    def __init__(self, folder: Path):
        from transformers import CLIPModel, CLIPTokenizer

        with quiet_libraries():
            self.model = CLIPModel.from_pretrained(folder).eval()
            self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.config = json.loads((folder / "preprocessor_config.json").read_text())

    @torch.no_grad()
    def images(self, images: list[Image.Image]) -> torch.Tensor:
        """[N,D]; bicubic to the model's size, centre crop, normalised."""
        side = self.config["crop_size"]["height"]
        mean, std = (np.array(self.config[name]) for name in ("image_mean", "image_std"))
        pixels = []
        for image in images:
            width, height = image.size
            scale = side / min(width, height)
            image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            pixels.append((np.asarray(image.crop((left, top, left + side, top + side))) / 255 - mean) / std)
        pixel_values = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()
        pooled = self.model.vision_model(pixel_values).pooler_output
        return torch.nn.functional.normalize(self.model.visual_projection(pooled), dim=1)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> torch.Tensor:
        """[N,D]."""
        tokens = self.tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        pooled = self.model.text_model(input_ids=tokens.input_ids).pooler_output
        return torch.nn.functional.normalize(self.model.text_projection(pooled), dim=1)


def load_or_sample(folder: Path, kept: Path, args) -> dict[str, list[Image.Image]]:
    """Images by prompt, from `kept` where they are there."""
    names = {
        prompt: [f"{row}-{n}.png" for n in range(args.num_images)] for row, prompt in enumerate((SUBJECT, *OTHERS))
    }
    if not all((kept / name).is_file() for row in names.values() for name in row):
        kept.mkdir(parents=True, exist_ok=True)
        for prompt, images in sample(folder, args).items():
            for name, image in zip(names[prompt], images, strict=True):
                image.save(kept / name)
    return {prompt: [Image.open(kept / name).convert("RGB") for name in row] for prompt, row in names.items()}


def sample(folder: Path, args) -> dict[str, list[Image.Image]]:
    """Images by prompt, seeds 0, 1, 2, ..."""
    pipeline = load_class_pipeline(folder, torch.float32, torch.device("cpu"))
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    settings = dict(height=side, width=side, num_inference_steps=args.num_inference_steps, guidance_scale=7.5)
    found = {}
    for prompt in (SUBJECT, *OTHERS):
        images = draw(pipeline, settings | dict(prompt=prompt), list(range(args.num_images)))
        found[prompt] = [Image.fromarray((image * 255).round().astype(np.uint8)) for image in images]
    return found


def scores(clip: Clip, images: dict[str, list[Image.Image]], photos: torch.Tensor) -> dict:
    """CLIP-T and CLIP-I by prompt."""
    texts = clip.texts(list(images))
    result = {}
    for text, (prompt, pictures) in zip(texts, images.items(), strict=True):
        vectors = clip.images(pictures)
        result[prompt] = dict(clip_t=float((vectors @ text).mean()), clip_i=float((vectors @ photos.T).mean()))
    return result


def grid(sampled: dict[str, dict[str, list[Image.Image]]], columns: int = 3) -> Image.Image:
    """A row a prompt; `columns` images of each pipeline side by side."""
    prompts = [SUBJECT, *OTHERS]
    side, label, head, gap = 64, 130, 18, 8
    width = label + len(sampled) * (columns * side + gap)
    sheet = Image.new("RGB", (width, head + len(prompts) * (side + 2)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (name, images) in enumerate(sampled.items()):
        left = label + place * (columns * side + gap)
        pen.text((left, 3), name, fill="black")
        for row, prompt in enumerate(prompts):
            pen.text((4, head + row * (side + 2) + side // 2 - 6), prompt, fill="black")
            for column, image in enumerate(images[prompt][:columns]):
                sheet.paste(image.resize((side, side)), (left + column * side, head + row * (side + 2)))
    return sheet


def main() -> None:
    args = parse_args()
    clip = Clip(args.clip)
    photos = clip.images([decode(path) for path in find_photos(args.instance_data_dir)[0]])
    args.output_dir.mkdir(parents=True, exist_ok=True)
    sampled, table = {}, {}
    for entry in args.pipelines:
        name, _, folder = entry.partition("=")
        sampled[name] = load_or_sample(Path(folder), args.output_dir / name, args)
        table[name] = scores(clip, sampled[name], photos)
        print(name, {prompt: {k: round(v, 3) for k, v in s.items()} for prompt, s in table[name].items()}, flush=True)
    (args.output_dir / "scores.json").write_text(json.dumps(table, indent=2))
    grid(sampled).save(args.output_dir / "grid.jpg", quality=90)


if __name__ == "__main__":
    main()
