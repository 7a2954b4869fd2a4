"""What `evaluate.py` leaves before its report is written, made without any model."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

import evaluate
from utils.command_line import run_main
from utils.dataset import find_photos
from utils.evaluation.metrics import METRICS
from utils.evaluation.samples import METRICS_FORMAT, PIXELS, SETTINGS_KEY, samples_id


def write_result(
    folder: Path, photos: Path, *, prompt: str, num_prompts: int = 1, side: int = 64, grain: int = 8
) -> Path:
    """What generate and score leave, with three models and a choice; the images are noise of `grain` pixels."""
    draws = np.random.default_rng(0)
    output = folder / "output"
    output.mkdir(parents=True)
    (output / "run.json").write_text(json.dumps(dict(command=f"torchrun '{prompt}'", result=dict(num_steps=500))))
    result = folder / "result"

    def draw(root: str, model: str, text: str, role: str, number: int) -> dict:
        seed = 1000 * (role == "place") * texts.index(text) + number
        file = f"{root}/{model}/{texts.index(text):03d}-x/seed-{seed}.png"
        (result / file).parent.mkdir(parents=True, exist_ok=True)
        noise = draws.integers(0, 256, (side // grain, side // grain, 3), np.uint8)
        Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(result / file)
        return dict(file=file, model=model, role=role, prompt=text, seed=seed) | {SETTINGS_KEY: str(seed)}

    prompts = [(f"{prompt} {number}" if number else prompt, "subject") for number in range(num_prompts)]
    prompts += [(f"{prompt} in place {number}", "place") for number in range(4 if num_prompts < 5 else 0)]
    prompts.append(("a photo of a dog", "other"))
    texts = [text for text, _ in prompts]
    models = dict(baseline=dict(path="model/sd", sha256=dict(unet="0")), finetuned=dict(path=str(output)))
    models["checkpoint-250"] = dict(path=str(output / "checkpoint-250"))
    counts = dict(subject=4, place=1, other=4)
    entries = [draw("images", m, *each, seed) for m in models for each in prompts for seed in range(counts[each[1]])]
    quick = [
        draw("candidates", m, *each, seed) for m in models for each in (prompts[0], prompts[-1]) for seed in range(2)
    ]
    names = ("num_images", "num_drift_images", "seed", "batch_size", *PIXELS, "identifier", "class_name")
    samples = dict(written_by="evaluate.py", complete=True, files=[], samples_id=samples_id(entries), images=entries)
    samples |= dict(prompts=[dict(text=text, role=role) for text, role in prompts], models=models, device="cpu")
    samples |= dict(command=f"python evaluate.py --prompt '{prompt}'", versions=dict(torch="2"))
    samples |= dict.fromkeys(names, prompt) | dict(instance_data_dir=str(photos))
    samples |= dict(candidates=dict(models=models, images=quick, num_inference_steps=8))
    (result / "samples.json").write_text(json.dumps(samples))
    (result / "metrics.json").write_text(json.dumps(measured(samples)))
    return result


def measured(samples: dict) -> dict:
    """metrics.json of these images, with numbers that nothing was measured for."""
    models = {
        name: {key: dict(value=0.2 + 0.3 * place) for key in METRICS} | dict(blank_images=[])
        for place, name in enumerate(samples["models"])
    }
    for values in models.values():
        values["pres_dino"] = dict(value=None, reason="needs <b>text</b>")
    tuned = list(models)[1:]
    encoder = dict(name="CLIP", folder="model/clip", sha256={"model.safetensors": "0" * 64}, transform=dict(crop=224))
    change = dict(value=-0.2, interval=[-0.3, -0.1], unit="prompts", text="fell by 0.2")
    others = [
        dict(file=e["file"], prompt=e["prompt"], nearest=e["prompt"], kept=True)
        for e in samples["images"]
        if e["role"] == "other"
    ]
    copied = next(e["file"] for e in samples["images"] if e["model"] == "finetuned")
    photo = find_photos(Path(samples["instance_data_dir"]))[0][0].name
    copies = [dict(file=copied, photo=photo, sameness=0.9)]
    quick = samples["candidates"]["images"]
    entries = [
        dict(name=name, label=f"the {name}", command=f"export {name}", note=note, copies=[])
        for name, note in (("checkpoint-250", "loses <b>"), ("finetuned", ""))
    ]
    entries[0]["copies"] = [dict(file=quick[-1]["file"], photo=photo, sameness=0.9)]
    texts = dict(way="62% of the way from the base's pictures to your photos (95%: 51% to 73%), by DINO.")
    texts |= dict(
        others="3 of 4 pictures of other things (95%: 19% to 99%) fit their own prompt best; of the base's 4 of 4."
    )
    texts |= dict(copies="1 of 8 pictures of your subject is one of your photos again (95%: 0% to 53%).")
    says = dict(
        sentences=[dict(kind=kind, text=text) for kind, text in texts.items()], unmeasured=["Not <b>: --dino_model"]
    )
    choice = dict(answer="take", chosen="finetuned", sentence="Take the finetuned.", why="It <i>.", command=None)
    return dict(
        written_by="evaluate.py",
        format=METRICS_FORMAT,
        samples_id=samples["samples_id"],
        command=samples["command"],
        encoders=dict(clip=encoder, dino=encoder),
        scorer=dict(knows=True, encoder="dino", line=""),
        says=dict.fromkeys(tuned, says),
        models=models,
        changes={model: dict.fromkeys(METRICS, change) for model in tuned},
        photos=dict(
            folder=samples["instance_data_dir"],
            files=[],
            real_dino=dict(value=0.9),
            real_clip=dict(value=0.9),
        ),
        others={model: [other for other in others if f"/{model}/" in other["file"]] for model in models},
        places={model: [] for model in models},
        copies={model: copies if model == "finetuned" else [] for model in tuned},
        choice=choice | dict(equal=[], entries=entries),
        paper={},
    )


def report(result: Path) -> str:
    assert run_main(evaluate.main, ["--only", "report", "--output_dir", str(result)]) == 0
    return (result / "report.html").read_text(encoding="utf-8")
