"""What --alpha_mask does on the embedded model: two runs on the same photos, cut out, with the flag and without.

python -m bench.studies.alpha_mask DIR [--steps 300] [--num_images 16]

The photos are those of instance/ with a soft ellipse as their transparency, on white as every transparent photo. Each
pipeline draws the prompt with the same seeds. `white border` is the share of pixels in the images' outer eighth that
are nearly white (all channels at least 0.9): how much of the photos' background was learned. `subject` is the mean
cosine (tiny-clip) of the images' middles with the middles of the photos, which are all subject. Prints a table in
Markdown and writes DIR/sheet.png: the photos, the baseline, without and with the flag.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from utils.dataset import decode, find_photos
from utils.evaluation.encoders import load_clip
from utils.evaluation.metrics import photo_similarity

ROOT = Path(__file__).resolve().parents[2]
MODEL, CLIP, PROMPT = ROOT / "model/tiny-stable-diffusion", ROOT / "model/tiny-clip", "a photo of my cat."
SIDE = 64
SHOWN = 8  # images a row of the sheet


def cut_out(folder: Path) -> list[Path]:
    """The photos of instance/ with a soft ellipse around the middle, as PNGs in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in find_photos(ROOT / "instance")[0]:
        photo = decode(path)
        y, x = np.mgrid[-1 : 1 : photo.height * 1j, -1 : 1 : photo.width * 1j]
        inside = Image.fromarray(np.where((x / 0.6) ** 2 + (y / 0.7) ** 2 < 1, 255, 0).astype(np.uint8))
        photo.putalpha(inside.filter(ImageFilter.GaussianBlur(photo.width / 64)))
        photo.save(folder / f"{path.stem}.png")
    return find_photos(folder)[0]


def train(photos: Path, output: Path, steps: int, *flags: str) -> None:
    """As run.sh does, if it was not done before."""
    if (output / "model_index.json").exists():
        return
    command = [sys.executable, "train_dreambooth_colossalai.py", f"--pretrained_model_name_or_path={MODEL}"]
    command += [f"--instance_data_dir={photos}", f"--output_dir={output}", f"--instance_prompt={PROMPT}"]
    command += [f"--resolution={SIDE}", "--train_batch_size=4", "--mixed_precision=no", "--learning_rate=1e-4"]
    command += ["--lr_warmup_steps=0", f"--max_train_steps={steps}", "--overwrite_output_dir", *flags]
    subprocess.run(command, cwd=ROOT, check=True)


def draw(pipeline: Path, folder: Path, num_images: int) -> dict[str, list[Image.Image]]:
    """The baseline's and the pipeline's images of the prompt, by evaluate.py."""
    command = [sys.executable, "evaluate.py", f"--finetuned_model_name_or_path={pipeline}", f"--output_dir={folder}"]
    command += ["--only=generate", f"--num_images={num_images}", "--num_drift_images=0", "--num_inference_steps=25"]
    subprocess.run(command, cwd=ROOT, check=True)
    numbers = range(1, num_images + 1)
    return {name: [decode(folder / f"{name}-{number}.png") for number in numbers] for name in ("baseline", "output")}


def middle(image: Image.Image) -> Image.Image:
    """The inner half, all of it subject in the photos."""
    width, height = image.size
    return image.crop((width // 4, height // 4, width - width // 4, height - height // 4))


def white_border(images: list[Image.Image]) -> float:
    """The share of nearly white pixels in the outer eighth."""
    pixels = np.stack([np.asarray(image.resize((SIDE, SIDE))) for image in images])
    border = np.ones((SIDE, SIDE), bool)
    border[SIDE // 8 : -SIDE // 8, SIDE // 8 : -SIDE // 8] = False
    return float((pixels[:, border].min(-1) >= 0.9 * 255).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--num_images", type=int, default=16)
    args = parser.parse_args()
    paths = cut_out(args.folder / "photos")
    rows = {"the photos": [decode(path) for path in paths]}
    for name, flags in (("without", ()), ("with", ("--alpha_mask",))):
        train(args.folder / "photos", args.folder / name, args.steps, *flags)
        images = draw(args.folder / name, args.folder / f"{name}-images", args.num_images)
        rows |= {"baseline": images["baseline"], f"{name} `--alpha_mask`": images["output"]}
    clip = load_clip(CLIP, torch.device("cpu"))
    photos = clip.images([middle(photo) for photo in rows["the photos"]])
    print("| | white border | subject |\n|---|---|---|")
    for name, images in rows.items():
        likeness = photo_similarity(clip.images([middle(image) for image in images]), photos).mean()
        print(f"| {name} | {white_border(images):.0%} | {likeness:.3f} |")
    sheet = Image.new("RGB", (SHOWN * 96, len(rows) * 96), "grey")
    for top, images in enumerate(rows.values()):
        for left, image in enumerate(images[:SHOWN]):
            sheet.paste(image.resize((92, 92), Image.Resampling.BICUBIC), (left * 96 + 2, top * 96 + 2))
    sheet.save(args.folder / "sheet.png")


if __name__ == "__main__":
    main()
