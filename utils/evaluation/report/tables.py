"""The report's tables: the metrics beside the paper's numbers, the settings, and the commands that repeat it all."""

from pathlib import Path

from utils import verdict
from utils.evaluation.report.html import Markup, escape, table, tag
from utils.samples import BASELINE, FINETUNED

# DreamBooth, arXiv 2208.12242, table 1: real images, DreamBooth on Stable Diffusion, Textual Inversion on the same.
PAPER = {"dino": (0.774, 0.668, 0.569), "clip_i": (0.885, 0.803, 0.780), "clip_t": (None, 0.305, 0.255)}
METRICS = (
    ("dino", "DINO", "subject fidelity: mean cosine to your photos, DINO features"),
    ("clip_i", "CLIP-I", "subject fidelity: mean cosine to your photos, CLIP features"),
    ("clip_t", "CLIP-T", "prompt fidelity: cosine of image and prompt, the subject's name left out"),
    ("clip_t_with_token", "CLIP-T, with name", "prompt fidelity with the prompt as it stands"),
    ("copy_dino", "COPY (DINO)", "cosine to the nearest photo; as near as photos are: memorised"),
    ("copy_clip", "COPY (CLIP)", "cosine to the nearest photo; as near as photos are: memorised"),
    ("copy_dino_max", "COPY max (DINO)", "the image that is most like a photo"),
    ("copy_clip_max", "COPY max (CLIP)", "the image that is most like a photo"),
    ("div_dino", "DIV (DINO)", "variety: mean distance of two seeds of a prompt"),
    ("div_clip", "DIV (CLIP)", "variety: mean distance of two seeds of a prompt"),
    ("div_lpips", "DIV (LPIPS)", "variety: mean LPIPS distance of two seeds of a prompt"),
    ("pres_dino", "PRES (DINO)", "likeness of the bare class to your photos; lower is better"),
    ("pres_clip", "PRES (CLIP)", "likeness of the bare class to your photos; lower is better"),
    ("clip_t_class", "CLIP-T, class", "prompt fidelity on the bare class"),
    ("clip_t_other", "CLIP-T, other things", "prompt fidelity without the subject"),
)
REAL = {"dino": "real_dino", "clip_i": "real_clip", "copy_dino": "nearest_dino", "copy_clip": "nearest_clip"}
REAL["clip_t_class"] = "clip_t_class"


def metrics_section(samples: dict, metrics: dict | None) -> Markup:
    """Every metric of every model, the photos' own values, and the paper's."""
    title = tag("h2", "Metrics", id="metrics")
    if metrics is None:
        return tag("section", title, tag("p", "Not scored yet."))
    models = [name for name in samples["models"] if name != FINETUNED] + [FINETUNED]
    names = [name.replace("finetuned", "fine-tuned") for name in models]
    head = ["", *names, "change", "your photos", "paper: photos", "paper: DreamBooth", "paper: Textual Inversion"]
    rows, absent = [], {}
    for key, name, meaning in METRICS:
        entries = [metrics["models"][model][key] for model in models]
        if all(entry["value"] is None for entry in entries):
            absent.setdefault(entries[-1]["reason"], []).append(name)
            continue
        row = [[name, tag("small", meaning)], *(value_cell(entry) for entry in entries), change_cell(metrics, key)]
        photo = metrics["photos"].get(REAL.get(key, ""), {}).get("value")
        rows.append([*row, number(photo), *(number(value) for value in PAPER.get(key, (None,) * 3))])
    note = (
        "In grey: 95% bootstrap intervals over prompts and seeds. The paper's numbers are means over 30 subjects, 25 "
        "prompts and 4 images by its own encoders: compare differences, and the digits only with the same encoders."
    )
    parts = [title, tag("p", note, class_="meta")]
    if rows:
        parts.append(table(head, rows, class_="numbers", label="Metrics"))
    if absent:
        items = [tag("li", tag("b", ", ".join(names)), reason) for reason, names in absent.items()]
        parts += [tag("h3", "Not computed"), tag("ul", items, class_="flags")]
    return tag("section", parts)


def value_cell(entry: dict) -> Markup:
    """A value, and its interval below it."""
    if entry["value"] is None:
        return tag("span", "\u2013", class_="absent", title=entry["reason"])
    interval = entry.get("interval")
    below = tag("small", f"{number(interval[0])} to {number(interval[1])}", class_="range") if interval else ""
    return escape([number(entry["value"]), below])


def change_cell(metrics: dict, key: str) -> Markup:
    change = metrics["changes"][FINETUNED].get(key)
    return value_cell_signed(change) if change else Markup()


def value_cell_signed(change: dict) -> Markup:
    interval = change["interval"]
    text = f"{verdict.signed(interval[0])} to {verdict.signed(interval[1])}" if interval else ""
    return escape([verdict.signed(change["value"]), tag("small", text, class_="range") if text else ""])


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}".replace("-", verdict.MINUS)


def settings_section(samples: dict, metrics: dict | None, run: dict) -> Markup:
    """Everything that decides the images and the numbers."""
    names = ("num_images", "num_drift_images", "seed", "num_inference_steps", "guidance_scale", "negative_prompt")
    names += ("height", "width", "mixed_precision", "safety_checker", "identifier", "class_name", "batch_size")
    sampling = {name: samples[name] for name in names}
    sampling |= {"device": samples["device"], **{f"{name} version": v for name, v in samples["versions"].items()}}
    groups = [("Sampling", sampling)]
    groups += [(f"Model: {name.replace('finetuned', 'fine-tuned')}", flat(model))
               for name, model in samples["models"].items()]  # fmt: skip
    if metrics is not None:
        for name, encoder in metrics["encoders"].items():
            if encoder is not None:
                groups.append((f"Encoder: {name.upper()}", flat(encoder)))
        groups.append(("Bootstrap", metrics["bootstrap"]))
        photos = {photo["file"]: f"SHA-256 {photo['sha256']}" for photo in metrics["photos"]["files"]}
        groups.append(("Photos", photos))
    if arguments := run.get("arguments"):
        result = {key: value for key, value in (run.get("result") or {}).items() if value is not None}
        groups.append(("Training", flat(arguments) | result | {"device": run.get("device")}))
    parts = [tag("h2", "Settings", id="settings")]
    for number_of_group, (title, values) in enumerate(groups):
        rows = [[key, "" if value is None else str(value)] for key, value in values.items()]
        content = table(["setting", "value"], rows, class_="numbers settings", label=title)
        parts.append(tag("details", tag("summary", title), content, open="" if number_of_group == 0 else None))
    return tag("section", parts)


def flat(values: dict, prefix: str = "") -> dict:
    """Nested dictionaries as one, their keys joined by spaces."""
    result = {}
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ") if prefix else str(key)
        result |= flat(value, f"{name} ") if isinstance(value, dict) else {name: value}
    return result


def repeat_section(samples: dict, run: dict) -> Markup:
    """The commands that made all this."""
    commands = [("Training", run.get("command")), ("Evaluation", samples.get("command"))]
    parts = [tag("h2", "Do it again", id="repeat")]
    for title, command in commands:
        if command:
            parts += [tag("h3", title), tag("pre", tag("code", command), tabindex="0", aria_label=f"{title} command")]
    folder = Path(samples["models"][BASELINE]["path"]).name
    note = f"Baseline: {folder}. Images, samples.json, metrics.json and metrics.csv lie beside this page."
    return tag("section", parts, tag("footer", note))
