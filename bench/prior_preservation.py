"""What fine-tuning did to other prompts: CLIP-T by prompt and CLIP-I against the photos, for several pipelines.

python -m bench.prior_preservation --clip model/tiny-clip --instance_data_dir instance --output_dir DIR NAME=FOLDER ...

NAME=FOLDER,FOLDER,...: runs that differ in their seed; the table gives their mean and range, the picture shows the
first. Every pipeline draws the same prompts with the same seeds, and its own instance prompt (from its run.json; the
baseline draws --subject_prompt). CLIP-T is the mean cosine of an image and its prompt, CLIP-I the mean cosine of an
image and the photos. Writes scores.json, table.md, grid.jpg (a row a prompt, three images a pipeline) and
DIR/NAME-0/*.png; images that are there already are scored, not drawn again.
"""

import json
from pathlib import Path
from typing import NamedTuple

from utils.runtime.libraries import quiet_libraries

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from bench.command_line import make_parser
from utils.data.class_generation import draw
from utils.dataset import decode, find_photos
from utils.evaluation.prompts import slug
from utils.models.loading import load_pipeline

CLASS = "a photo of a cat"
NEAR = "a photo of a dog"  # what drifts first after the class
OTHERS = (NEAR, *(f"a photo of a {thing}" for thing in ("car", "house", "fish", "tree", "boat", "flower")))


class Run(NamedTuple):
    """A pipeline's folder, its subject's prompt, and its images by prompt."""

    folder: Path
    subject: str
    images: dict[str, list[Image.Image]]


def parse_args(argv=None):
    parser = make_parser(__doc__, __spec__.name)
    parser.add_argument("--clip", type=Path, required=True, help="folder of a CLIPModel")
    parser.add_argument("--instance_data_dir", type=Path, required=True, help="the subject's photos")
    parser.add_argument("--output_dir", type=Path, required=True, help="where scores and pictures go")
    parser.add_argument("--subject_prompt", default="a photo of my cat.", help="of pipelines without a run.json")
    parser.add_argument("--num_images", type=int, default=8, help="per prompt")
    parser.add_argument("--num_inference_steps", type=int, default=25, help="denoising steps an image (25)")
    parser.add_argument(
        "pipelines",
        nargs="+",
        metavar="NAME=FOLDER[,FOLDER...]",
        help="pipelines to compare; several folders of one name are runs with other seeds",
    )
    return parser.parse_args(argv)


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


def subject_prompt(folder: Path, otherwise: str) -> str:
    """What the pipeline was fine-tuned on, else `otherwise`."""
    record = folder / "run.json"
    return json.loads(record.read_text())["arguments"]["instance_prompt"] if record.is_file() else otherwise


def load_or_sample(folder: Path, kept: Path, args) -> Run:
    """A pipeline with its images, from `kept` where they are there."""
    subject = subject_prompt(folder, args.subject_prompt)
    names = {text: [f"{slug(text)}-{n}.png" for n in range(args.num_images)] for text in (subject, CLASS, *OTHERS)}
    missing = [text for text, row in names.items() if not all((kept / name).is_file() for name in row)]
    kept.mkdir(parents=True, exist_ok=True)
    for text, images in sample(folder, missing, args.num_images, args.num_inference_steps):
        for name, image in zip(names[text], images, strict=True):
            image.save(kept / name)
    loaded = {text: [Image.open(kept / name).convert("RGB") for name in row] for text, row in names.items()}
    return Run(folder, subject, loaded)


def sample(folder: Path, prompts: list[str], num_images: int, num_inference_steps: int):
    """Yields (prompt, images), seeds 0, 1, 2, ..."""
    if not prompts:
        return
    pipeline = load_pipeline(folder, torch.float32, torch.device("cpu"))
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    settings = dict(height=side, width=side, num_inference_steps=num_inference_steps, guidance_scale=7.5)
    for prompt in prompts:
        images = draw(pipeline, settings | dict(prompt=prompt), list(range(num_images)))
        yield prompt, [Image.fromarray((image * 255).round().astype(np.uint8)) for image in images]


def scores(clip: Clip, run: Run, photos: torch.Tensor) -> dict[str, float]:
    """The table's column of one run: its rows by name."""
    texts = dict(zip(run.images, clip.texts(list(run.images)), strict=True))
    vectors = {prompt: clip.images(images) for prompt, images in run.images.items()}
    clip_i = {prompt: float((rows @ photos.T).mean()) for prompt, rows in vectors.items()}
    clip_t = {prompt: float((rows @ texts[prompt]).mean()) for prompt, rows in vectors.items()}
    found = {"CLIP-I, the subject's prompt": clip_i[run.subject]}
    found |= {f"CLIP-I, *{prompt}*": clip_i[prompt] for prompt in (CLASS, NEAR)}
    found |= {f"CLIP-T, *{prompt}*": clip_t[prompt] for prompt in (CLASS, *OTHERS)}
    found[f"CLIP-T, mean of the {len(OTHERS)} that are no cat"] = float(np.mean([clip_t[text] for text in OTHERS]))
    return found


def markdown(columns: dict[str, list[dict[str, float]]]) -> str:
    """The table: the mean of each pipeline's runs, and their range."""
    rows = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for row in next(iter(columns.values()))[0]:
        cells = []
        for runs in columns.values():
            values = [run[row] for run in runs]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}")
        rows.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def grid(runs: dict[str, Run], photos: list[Image.Image], columns: int = 3) -> Image.Image:
    """The photos on top, below them a row a prompt with `columns` images of each pipeline side by side."""
    side, label, head, gap = 96, 168, 24, 14
    block = columns * side + gap
    font = ImageFont.load_default(13)
    sheet = Image.new("RGB", (label + len(runs) * block, head + (len(OTHERS) + 3) * (side + 3) + head), "white")
    pen = ImageDraw.Draw(sheet)

    def put(row: int, text: str, images: list[Image.Image], left: int, offset: int = 0) -> None:
        top = offset + row * (side + 3)
        pen.text((8, top + side // 2 - 8), text, fill="black", font=font)
        for column, image in enumerate(images):
            shown = image.resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(shown, (left + column * side, top))

    put(0, "the photos", photos, label, offset=4)
    for place, (name, run) in enumerate(runs.items()):
        left = label + place * block
        pen.text((left, side + 10), name, fill="black", font=font)
        named = ("the subject's prompt", *(text for text in (CLASS, *OTHERS)))
        for row, (text, prompt) in enumerate(zip(named, (run.subject, CLASS, *OTHERS), strict=True), start=1):
            put(row, text, run.images[prompt][:columns], left, offset=head + 4)
    return sheet


def main(argv=None) -> None:
    args = parse_args(argv)
    clip = Clip(args.clip)
    instance = [decode(path) for path in find_photos(args.instance_data_dir)[0]]
    photos = clip.images(instance)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    shown, columns = {}, {}
    for entry in args.pipelines:
        name, _, folders = entry.partition("=")
        for number, folder in enumerate(folders.split(",")):
            run = load_or_sample(Path(folder), args.output_dir / f"{slug(name)}-{number}", args)
            shown.setdefault(name, run)
            columns.setdefault(name, []).append(scores(clip, run, photos))
            print(f"{name} {number}: {columns[name][-1]}", flush=True)
    (args.output_dir / "scores.json").write_text(json.dumps(columns, indent=2))
    (args.output_dir / "table.md").write_text(markdown(columns))
    print(markdown(columns))
    grid(shown, instance).save(args.output_dir / "grid.jpg", quality=88)


if __name__ == "__main__":
    main()
