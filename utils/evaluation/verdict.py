"""What the numbers say in plain words: warnings with the numbers behind them, the headline, the best checkpoint.

docs/evaluation.md gives the measurements on which the thresholds rest.
"""

VISIBLE_CLIP_T = 0.05  # a difference that people see
COLLAPSED_SHARE = 0.25  # of the baseline's diversity
ALIKE_PHOTOS = 0.95  # REAL above which the photos are all but one photo
TAKEN_OVER_SHARE = 0.5  # of the subject's gain, gone into the bare class too
COPIED_SHARE = 0.1  # of the images
MINUS = "\u2212"


def find_warnings(metrics: dict, model: str) -> list[dict]:
    """Warnings and notes on one model: dicts of kind, level ("warning" or "note"), title, text."""
    encoder = main_encoder(metrics)
    if encoder is None:
        return []
    found = [
        memorisation(metrics, model, encoder),
        collapse(metrics, model, encoder),
        drift(metrics, model),
        class_taken_over(metrics, model, encoder),
        alike_photos(metrics, encoder),
    ]
    return [warning for warning in found if warning is not None]


def main_encoder(metrics: dict) -> str | None:
    """dino where its numbers are there, as in the paper, else clip, else None."""
    return next((name for name in ("dino", "clip") if metrics["encoders"][name] is not None), None)


def fidelity_metric(metrics: dict) -> str:
    """The metric that speaks for subject fidelity."""
    return "dino" if main_encoder(metrics) == "dino" else "clip_i"


def memorisation(metrics: dict, model: str, encoder: str) -> dict | None:
    """Images nearer to a photo than that photo's nearest fellow is."""
    nearest = metrics["photos"][f"nearest_{encoder}"]["value"]
    copy = metrics["models"][model].get(f"copy_{encoder}", {})
    number = copy.get("num_above_photos")
    if nearest is None or number is None or number < max(1, COPIED_SHARE * copy["num_images"]):
        return None
    largest = metrics["models"][model][f"copy_{encoder}_max"]["value"]
    text = (
        f"{number} of {copy['num_images']} images: nearer to one of your photos than any other photo is "
        f"(COPY up to {largest:.3f}; photo to nearest photo {nearest:.3f} on average). "
        "Train for fewer steps, at a lower learning rate, or with more varied photos."
    )
    return dict(kind="memorisation", level="warning", title="Memorised photos", text=text)


def collapse(metrics: dict, model: str, encoder: str) -> dict | None:
    """Images of different seeds that hardly differ: less than the photos, and far less than the baseline's."""
    ours, baseline = (metrics["models"][name][f"div_{encoder}"]["value"] for name in (model, "baseline"))
    real = metrics["photos"][f"real_{encoder}"]["value"]
    if ours is None or baseline is None or real is None:
        return None
    if ours >= 1 - real or ours >= COLLAPSED_SHARE * baseline:
        return None
    text = (
        f"Images of different seeds differ by {ours:.3f} (DIV) on average: less than your photos do ({1 - real:.3f}), "
        f"and the baseline's differ by {baseline:.3f}. Train for fewer steps or at a lower learning rate."
    )
    return dict(kind="collapse", level="warning", title="Every seed gives the same image", text=text)


def drift(metrics: dict, model: str) -> dict | None:
    """Prompts without the subject are followed visibly less than by the baseline."""
    change = metrics["changes"][model].get("clip_t_other")
    if change is None or change["value"] > -VISIBLE_CLIP_T:
        return None
    ours, baseline = (metrics["models"][name]["clip_t_other"]["value"] for name in (model, "baseline"))
    text = (
        f"Prompts about other things are followed less: CLIP-T {ours:.3f}, the baseline's {baseline:.3f} "
        f"({signed(change['value'])}{in_words(change['interval'])}; {VISIBLE_CLIP_T:g} is visible). "
        "Train for fewer steps, at a lower learning rate, or with prior preservation."
    )
    return dict(kind="drift", level="warning", title="Other things have drifted", text=text)


def class_taken_over(metrics: dict, model: str, encoder: str) -> dict | None:
    """The bare class now shows the subject: expected without prior preservation, so a note."""
    pres = metrics["changes"][model].get(f"pres_{encoder}")
    subject = metrics["changes"][model].get(fidelity_metric(metrics))
    if pres is None or subject is None or subject["value"] <= 0:
        return None
    if pres["value"] < TAKEN_OVER_SHARE * subject["value"]:
        return None
    ours, baseline = (metrics["models"][name][f"pres_{encoder}"]["value"] for name in (model, "baseline"))
    text = (
        f"The prompt that names only the class draws your subject as well: PRES {ours:.3f}, the baseline's "
        f"{baseline:.3f}. Training without prior preservation does this."
    )
    return dict(kind="class", level="note", title="The class has become your subject", text=text)


def alike_photos(metrics: dict, encoder: str) -> dict | None:
    """Photos that are nearly one photo: likeness and copy cannot be told apart by them."""
    real = metrics["photos"][f"real_{encoder}"]["value"]
    if real is None or real < ALIKE_PHOTOS:
        return None
    text = (
        f"REAL, their mean likeness, is {real:.3f}. By such photos a faithful image and a copy are hard to tell "
        "apart, for the model and for the metrics: more varied ones serve both."
    )
    return dict(kind="photos", level="note", title="Your photos are almost the same", text=text)


def headline(metrics: dict, model: str) -> list[str]:
    """The verdict in plain sentences."""
    name = fidelity_metric(metrics)
    label = "DINO" if name == "dino" else "CLIP-I"
    changes = metrics["changes"][model]
    sentences = []
    if name in changes:
        change = changes[name]
        ours, baseline = (metrics["models"][m][name]["value"] for m in (model, "baseline"))
        sentences.append(
            f"{verdict_on_subject(change)}: {label} went from {baseline:.3f} to {ours:.3f} "
            f"({signed(change['value'])}{in_words(change['interval'])})."
        )
    if "clip_t" in changes:
        change = changes["clip_t"]
        ours, baseline = (metrics["models"][m]["clip_t"]["value"] for m in (model, "baseline"))
        sentences.append(
            f"{verdict_on_prompt(change['value'])}: CLIP-T went from {baseline:.3f} to {ours:.3f} "
            f"({signed(change['value'])}{in_words(change['interval'])})."
        )
        photos = metrics["photos"]["clip_t_class"]["value"]
        if change["value"] <= -VISIBLE_CLIP_T and photos is not None:
            sentences.append(f"Your photos themselves score {photos:.3f} on the class's prompt.")
    return sentences


def verdict_on_subject(change: dict) -> str:
    interval = change["interval"] or [change["value"]] * 2
    if interval[0] > 0:
        return "It looks more like your subject"
    return "It looks less like your subject" if interval[1] < 0 else "It looks no more like your subject than before"


def verdict_on_prompt(change: float) -> str:
    if change <= -VISIBLE_CLIP_T:
        return "It follows the prompt visibly less"
    return "It follows the prompt better" if change >= VISIBLE_CLIP_T else "It follows the prompt about as well"


def best_model(metrics: dict) -> tuple[str, str] | None:
    """(name, why) among the fine-tuned model and its checkpoints; None where there is no choice or no number.

    The largest sum of changes in subject fidelity, prompt fidelity, and fidelity to prompts without the subject; a
    model that has memorised photos or lost its variety comes after those that have not.
    """
    names = list(metrics["changes"])
    fidelity = fidelity_metric(metrics)
    if len(names) < 2 or any(fidelity not in metrics["changes"][name] for name in names):
        return None
    labels = {fidelity: "DINO" if fidelity == "dino" else "CLIP-I", "clip_t": "CLIP-T"}
    labels["clip_t_other"] = "CLIP-T on other things"
    counted = [key for key in labels if all(key in metrics["changes"][name] for name in names)]

    def gain(name: str) -> float:
        return sum(metrics["changes"][name][key]["value"] for key in counted)

    sound = [name for name in names if not is_spoilt(metrics, name)]
    best = max(sound or names, key=gain)
    why = f"the largest change against the baseline in {' plus '.join(labels[key] for key in counted)}"
    why += f" ({signed(gain(best))})"
    if sound and len(sound) < len(names):
        why += f", among the {len(sound)} of {len(names)} that neither memorised photos nor lost their variety"
    return best, why


def is_spoilt(metrics: dict, model: str) -> bool:
    return any(warning["kind"] in ("memorisation", "collapse") for warning in metrics["warnings"][model])


def signed(value: float) -> str:
    """+0.123 or -0.123, with a real minus sign."""
    return f"{value:+.3f}".replace("-", MINUS)


def in_words(interval: list[float] | None) -> str:
    return f", 95% interval {signed(interval[0])} to {signed(interval[1])}" if interval else ""


def summary(metrics: dict) -> list[str]:
    """What was measured, in a few lines: a metric that has no value is left out here (the report says why)."""
    lines = []
    shown = (("CLIP-I", "clip_i"), ("DINO", "dino"), ("CLIP-T", "clip_t"), ("COPY", "copy_clip"), ("DIV", "div_clip"))
    for model, values in metrics["models"].items():
        cells = [f"{name} {values[key]['value']:.3f}" for name, key in shown if values[key]["value"] is not None]
        if cells:
            lines.append(f"{model}: {', '.join(cells)}")
    for model, warnings in metrics["warnings"].items():
        found = [warning for warning in warnings if warning["level"] == "warning"]
        lines += [f"{model}: {warning['title']}. {warning['text']}" for warning in found]
    return lines
