"""What `evaluate.py` leaves before its report is written, made without any model."""

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image

import evaluate
from tests.helpers.measured import entry
from utils.command_line import run_main
from utils.evaluation.report.page import REPORTED_METRICS
from utils.evaluation.samples import METRICS_CSV, METRICS_FORMAT, SETTINGS_KEY, SamplingSettings, samples_id


def write_result(
    folder: Path, photos: Path, *, prompt: str, num_prompts: int = 1, side: int = 64, grain: int = 8
) -> Path:
    """What generate and score leave, with three models; the images are noise of `grain` pixels."""
    draws = np.random.default_rng(0)
    output = folder / "output"
    output.mkdir(parents=True)
    losses = [json.dumps(dict(step=step, loss=1 / step + draws.uniform(0, 0.2))) for step in range(1, 500)]
    (output / "metrics.jsonl").write_text("\n".join(losses))
    (output / "run.json").write_text(json.dumps(dict(command=f"torchrun '{prompt}'", result=dict(num_steps=500))))
    result = folder / "result"
    entries = []
    prompts = [(f"{prompt} {number}" if number else prompt, "subject") for number in range(num_prompts)]
    prompts.append(("a photo of a dog", "other"))
    for model in ("baseline", "finetuned", "checkpoint-250"):
        for number, (text, role) in enumerate(prompts):
            for seed in range(4):
                file = f"images/{model}/{number:03d}-x/seed-{seed}.png"
                (result / file).parent.mkdir(parents=True, exist_ok=True)
                noise = draws.integers(0, 256, (side // grain, side // grain, 3), np.uint8)
                Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(result / file)
                sample = dict(file=file, model=model, role=role, prompt=text, seed=seed)
                entries.append(sample | {SETTINGS_KEY: str(seed)})
    models = dict(baseline=dict(path="model/sd", sha256=dict(unet="0")), finetuned=dict(path=str(output)))
    models["checkpoint-250"] = dict(path=str(output / "checkpoint-250"))
    names = ("num_images", "num_drift_images", "seed", *SamplingSettings._fields, "identifier", "class_name")
    samples = dict(written_by="evaluate.py", complete=True, files=[], samples_id=samples_id(entries), images=entries)
    samples |= dict(prompts=[dict(text=text, role=role) for text, role in prompts], models=models, device="cpu")
    samples |= dict(command=f"python evaluate.py --prompt '{prompt}'", versions=dict(torch="2"))
    samples |= dict.fromkeys(names, prompt) | dict(instance_data_dir=str(photos))
    (result / "samples.json").write_text(json.dumps(samples))
    (result / "metrics.json").write_text(json.dumps(measured(samples)))
    columns = ("file", "model", "role", "prompt", "seed")
    with (result / METRICS_CSV).open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.DictWriter(file, [*columns, "clip_i", "dino", "clip_t"])
        writer.writeheader()
        for number, sample in enumerate(entries):
            values = dict(clip_i=0.5, dino=round(0.001 * number, 3), clip_t=0.3)
            writer.writerow({key: sample[key] for key in columns} | values)
    return result


def measured(samples: dict) -> dict:
    values = {}
    for place, model in enumerate(samples["models"]):
        value = entry(0.2 + 0.3 * place, [0.1 + 0.3 * place, 0.3 * place + 0.25])
        values[model] = {key: dict(value) for key, *_ in REPORTED_METRICS}
        values[model]["clip_t_with_token"] = dict(value=None, reason="needs <b>text</b>")
        values[model]["copy_dino"].update(num_above_photos=3, num_images=8)
    photos = {name: entry(0.9) for name in ("real_clip", "real_dino", "nearest_clip", "nearest_dino", "clip_t_class")}
    encoder = dict(name="CLIP", folder="model/clip", sha256={"model.safetensors": "0" * 64}, transform=dict(crop=224))
    for model in values.values():
        model.update(clip_i_other=entry(0.1), dino_other=entry(0.1), blank_images=[])
    record = dict(written_by="evaluate.py", format=METRICS_FORMAT, samples_id=samples["samples_id"], models=values)
    record |= dict(
        encoders=dict(clip=encoder, dino=encoder), photos=dict(photos, files=[]), intervals=dict(confidence=0.95)
    )
    change = entry(-0.2, [-0.3, -0.1])
    names = ("clip_i", "dino", "clip_t", "clip_t_other", "clip_i_other", "dino_other", "pres_dino")
    record["changes"] = {model: dict.fromkeys(names, change) for model in list(values)[1:]}
    return record | dict(subject=dict(identifier="sks", class_name="dog"))


def report(result: Path) -> str:
    assert run_main(evaluate.main, ["--only", "report", "--output_dir", str(result)]) == 0
    return (result / "report.html").read_text(encoding="utf-8")
