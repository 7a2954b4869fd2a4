"""Samples the fine-tuned pipeline beside its baseline, with the same seeds: output-1.png, baseline-1.png and so on."""

import argparse
import sys
import time
from pathlib import Path

from tqdm import tqdm

from utils.errors import UserError, run_main
from utils.evaluate_arguments import (
    COMPARISON_FILE,
    SAMPLES_FILE,
    WRITTEN_BY,
    check,
    image_names,
    own_files,
    parse_args,
)


def main(argv: list[str] | None = None) -> None:
    """Samples both pipelines and writes the images, samples.json and comparison.png into --output_dir."""
    args = parse_args(argv)
    for note in check(args):
        print(note, file=sys.stderr if note.startswith("warning") else sys.stdout, flush=True)

    # Imported here: torch takes seconds, and neither --help nor a mistake needs to wait for it.
    from utils import comparison, sampling
    from utils.models import WEIGHT_DTYPES

    photos = comparison.load_photos(args.instance_data_dir) if args.instance_data_dir is not None else []
    if args.instance_data_dir is not None and not photos:
        warn(f"--instance_data_dir {args.instance_data_dir} holds no readable photo: {COMPARISON_FILE} shows none")
    device = sampling.pick_device()
    args.mixed_precision = args.mixed_precision or ("fp16" if device.type == "cuda" else "no")
    if device.type == "cpu" and args.mixed_precision == "fp16":
        warn("--mixed_precision fp16 on a CPU is about 25 times slower than `no`")

    loading = dict(weight_dtype=WEIGHT_DTYPES[args.mixed_precision], device=device, safety_checker=args.safety_checker)
    baseline = sampling.load_pipeline(args.pretrained_model_name_or_path, **loading)
    finetuned = sampling.load_pipeline(args.finetuned_model_name_or_path, shared_with=baseline, **loading)
    if {"unet", "text_encoder", "vae"} <= set(sampling.shared_components(finetuned, baseline)):
        warn("the fine-tuned weights equal the baseline's: both rows will be the same")
    if unseen := sampling.truncated_text(baseline, args.prompt):
        warn(f'the prompt is too long for the text encoder, which does not see its end: "{unseen}"')

    seeds = [args.seed + number for number in range(args.num_images)]
    settings = dict(
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        negative_prompt=args.negative_prompt,
        batch_size=args.batch_size,
        height=args.height,
        width=args.width,
    )
    num_steps = sum(
        sampling.num_denoising_steps(pipeline, args.num_images, args.num_inference_steps, args.batch_size)
        for pipeline in (baseline, finetuned)
    )
    interval = 0.1 if sys.stderr.isatty() else 10.0  # a log file gets a line every ten seconds
    start = time.perf_counter()
    with tqdm(total=num_steps, unit="step", mininterval=interval, dynamic_ncols=True) as progress_bar:
        progress_bar.set_description("baseline")
        baseline_images = sampling.sample(baseline, args.prompt, seeds, on_step=progress_bar.update, **settings)
        progress_bar.set_description("fine-tuned")
        finetuned_images = sampling.sample(finetuned, args.prompt, seeds, on_step=progress_bar.update, **settings)
    seconds = time.perf_counter() - start

    images = dict(zip(image_names("baseline", args), baseline_images, strict=True))
    images |= dict(zip(image_names("output", args), finetuned_images, strict=True))
    warn_of_blank_images([name for name, image in images.items() if sampling.is_blank(image)], args.safety_checker)
    sheet = comparison.make_comparison(
        args.prompt,
        sheet_subtitle(args),
        seeds,
        [
            comparison.Row("baseline", args.pretrained_model_name_or_path.resolve().name, baseline_images),
            comparison.Row("fine-tuned", args.finetuned_model_name_or_path.resolve().name, finetuned_images),
        ],
        photos or None,
    )
    try:
        save(args.output_dir, images, sheet, describe(args, seeds, baseline, finetuned))
    except OSError as error:
        mend = "make room there, or name another folder"
        raise UserError(f"--output_dir {args.output_dir}: {error.strerror or error}: {mend}") from error
    print(f"{len(images)} images in {seconds:.1f} s: {len(images) / seconds:.2f} images per second ({device.type})")
    print(f"Look at {args.output_dir / COMPARISON_FILE}")


def describe(args: argparse.Namespace, seeds: list[int], baseline, finetuned) -> dict:
    """What samples.json records: all that it takes to make the images again."""
    from utils import sampling

    folders = dict(baseline=args.pretrained_model_name_or_path, finetuned=args.finetuned_model_name_or_path)
    pipelines = dict(baseline=baseline, finetuned=finetuned)
    models = {
        model: dict(path=str(folders[model]), scheduler=type(pipeline.scheduler).__name__)
        for model, pipeline in pipelines.items()
    }
    models["finetuned"]["shared_with_baseline"] = sampling.shared_components(finetuned, baseline)
    images = [
        dict(file=file, model=model, seed=seed)
        for model, stem in (("baseline", "baseline"), ("finetuned", "output"))
        for file, seed in zip(image_names(stem, args), seeds, strict=True)
    ]
    names = ("prompt", "negative_prompt", "num_images", "seed", "num_inference_steps", "guidance_scale", "batch_size")
    names += ("height", "width", "mixed_precision", "safety_checker")
    settings = {name: getattr(args, name) for name in names}
    return settings | dict(device=str(baseline.device), versions=sampling.versions(), models=models, images=images)


def save(output_dir: Path, images: dict, sheet, record: dict) -> None:
    """Writes the files, each whole or not at all, and removes an earlier run's images that this one does not make."""
    from utils.pipeline import write_json
    from utils.sampling import save_png

    output_dir.mkdir(parents=True, exist_ok=True)
    before, files = own_files(output_dir), [*images, COMPARISON_FILE]
    # First which files are going to be ours, so that a run cut off below can be repeated.
    write_json(output_dir / SAMPLES_FILE, dict(written_by=WRITTEN_BY, complete=False, files=sorted({*before, *files})))
    settings = {name: record[name] for name in ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale")}
    for entry in record["images"]:
        texts = settings | dict(seed=entry["seed"], model=record["models"][entry["model"]]["path"])
        save_png(output_dir / entry["file"], images[entry["file"]], texts)
    save_png(output_dir / COMPARISON_FILE, sheet, settings)
    for name in before.difference(files):
        (output_dir / name).unlink(missing_ok=True)
    write_json(output_dir / SAMPLES_FILE, dict(written_by=WRITTEN_BY, complete=True, files=files) | record)


def sheet_subtitle(args: argparse.Namespace) -> str:
    text = f"{args.num_inference_steps} steps, guidance {args.guidance_scale:g}, {args.width} x {args.height} pixels"
    return f"{text}, steered away from: {args.negative_prompt}" if args.negative_prompt else text


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def warn_of_blank_images(names: list[str], safety_checker: bool) -> None:
    cause = "the safety checker blacked it out, or " if safety_checker else ""
    cause += "fp16 overflowed in the VAE, or training diverged: try --mixed_precision no"
    if names:
        warn(f"one colour only: {', '.join(names)} ({cause})")


if __name__ == "__main__":
    sys.exit(run_main(main))
