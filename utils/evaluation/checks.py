"""What is looked for in a model's numbers: a function a check."""

from dataclasses import replace

from utils.evaluation.findings import (
    AIM,
    FOUND,
    NOT_FOUND,
    NOT_LOOKED_FOR,
    NOTE,
    UNCERTAIN,
    WARNING,
    Check,
    Comparison,
)
from utils.evaluation.samples import BASELINE
from utils.evaluation.visible import compare, effect, fidelity_metric, in_words, is_drawn, is_like_photos, main_encoder
from utils.evaluation.wording import change_in_words, listed, number

COLLAPSED_SHARE = 0.25  # of the baseline's diversity
ALIKE_PHOTOS = 0.95  # REAL above which the photos are all but one photo
TAKEN_OVER_SHARE = 0.5  # of the subject's gain, gone into the bare class too
COPIED_SHARE = 0.1  # of the images
TELLING_PICTURES = 5  # if half of all pictures showed the subject, none of five would in 3 cases of 100

BLANK_BASELINE = "Images of one colour among the baseline's"
LESS_TRAINING = "Train for fewer steps or at a lower learning rate."
ONE_PHOTO = "needs two different photos or more"
MORE_IMAGES = "More images tell: --num_images."
MORE_OTHER_IMAGES = "More images tell: --num_drift_images, --drift_prompt."
# What each check looks for, as the end of a sentence that begins with "It is not known".
QUESTIONS = {
    "subject": "whether it draws your subject",
    "prompt": "whether it still follows the prompt",
    "blank": "whether images are of one colour",
    "memorisation": "whether it copies your photos",
    "collapse": "whether every seed gives the same image",
    "drift": "whether other prompts are still followed",
    "spread": "whether your subject appears in other pictures",
    "class": "whether the class has become your subject",
    "photos": "whether your photos are almost the same",
}


def all_checks(metrics: dict, model: str) -> tuple[Check, ...]:
    """What is looked for in one model of metrics.json; whether it draws the subject comes first."""
    encoder = main_encoder(metrics)
    subject = check_subject(metrics, model)
    return (
        subject,
        check_prompt(metrics, model),
        check_blank_images(metrics, model),
        check_memorisation(metrics, model, encoder),
        check_collapse(metrics, model, encoder),
        check_drift(metrics, model),
        check_spread(metrics, model),
        check_class(metrics, model, encoder, subject),
        check_photos(metrics, encoder),
    )


def missing(metrics: dict, model: str, kind: str, level: str, key: str) -> Check:
    """A check whose metric has no value, with metrics.json's reason."""
    reason = metrics["models"][model].get(key, {}).get("reason") or "needs a metric that is not in metrics.json"
    return not_looked_for(kind, level, reason)


def not_looked_for(kind: str, level: str, reason: str) -> Check:
    """`reason` begins with "needs"."""
    title = f"Not looked for: {QUESTIONS[kind]}"
    return Check(kind, level, NOT_LOOKED_FOR, title, f"This {reason}.")


def uncertain(kind: str, level: str, comparison: Comparison, advice: str) -> Check:
    """A check that these images are too few for."""
    text = f"{in_words(comparison)}" + (f"; {comparison.visible:g} is visible." if comparison.visible else ".")
    if comparison.interval is None:
        text = f"{in_words(comparison)}, which can be chance: so few images give no interval."
    title = f"Too few images to tell {QUESTIONS[kind]}"
    return Check(kind, level, UNCERTAIN, title, text, advice, (comparison,))


def check_subject(metrics: dict, model: str) -> Check:
    """Subject fidelity has risen; what the training was for."""
    key = fidelity_metric(metrics)
    comparison = compare(metrics, model, key, f"real_{main_encoder(metrics)}")
    if comparison is None:
        return missing(metrics, model, "subject", AIM, key)
    state = effect(comparison, 1)
    if state == UNCERTAIN:
        return uncertain("subject", AIM, comparison, MORE_IMAGES)
    title, advice = "It looks no more like your subject than before", "Train for more steps."
    if state == FOUND:
        title, advice = "It draws your subject", ""
        if not is_drawn(comparison):
            title, advice = "It looks more like your subject, but not like it yet", "Train for more steps."
    elif effect(comparison, -1) == FOUND:
        title = "It looks less like your subject than before"
    text = f"{in_words(comparison)}"
    text += f"; your photos among themselves have {number(comparison.photos)}." if comparison.photos else "."
    return Check("subject", AIM, state, title, text, advice, (comparison,))


def check_prompt(metrics: dict, model: str) -> Check:
    """The subject's prompts are followed visibly less, and visibly less than the photos themselves follow them."""
    comparison = compare(metrics, model, "clip_t", "clip_t")
    if comparison is None:
        return missing(metrics, model, "prompt", NOTE, "clip_t")
    state = effect(comparison, -1)
    if state == UNCERTAIN:
        return uncertain("prompt", NOTE, comparison, MORE_IMAGES)
    text = f"{in_words(comparison)}"
    text += f"; your photos themselves have {number(comparison.photos)}." if comparison.photos is not None else "."
    if state == FOUND and not is_like_photos(comparison):
        return Check("prompt", NOTE, FOUND, "It follows the prompt visibly less", text, LESS_TRAINING, (comparison,))
    title = "It follows the prompt " + ("better" if effect(comparison, 1) == FOUND else "about as well")
    if state == FOUND:
        title = "It follows the prompt as well as your photos do"
    return Check("prompt", NOTE, NOT_FOUND, title, text, "", (comparison,))


def check_blank_images(metrics: dict, model: str) -> Check:
    """Images of one colour, which every metric counts as images: the model's, or the baseline's."""
    own, before = (tuple(metrics["models"][name]["blank_images"]) for name in (model, BASELINE))
    files = own + before
    if not files:
        return Check("blank", WARNING, NOT_FOUND, "No image is of one colour", "")
    images = "1 image is" if len(files) == 1 else f"{len(files)} images are"
    text = f"{images} of one colour, and all numbers count them as images: {', '.join(files[:3])}"
    text += ", ..." if len(files) > 3 else "."
    advice = "If the safety checker was on, it may have blacked them out; else try --mixed_precision no."
    title = "Images of one colour" if own else BLANK_BASELINE
    return Check("blank", WARNING, FOUND, title, text, advice, files=files)


def check_memorisation(metrics: dict, model: str, encoder: str) -> Check:
    """Images nearer to a photo than that photo's nearest other photo is."""
    kind, key = "memorisation", f"copy_{encoder}"
    copy = metrics["models"][model].get(key, {})
    if copy.get("value") is None:
        return missing(metrics, model, kind, WARNING, key)
    nearest, copies = metrics["photos"].get(f"nearest_{encoder}", {}), copy.get("num_above_photos")
    if nearest.get("value") is None or copies is None:
        return not_looked_for(kind, WARNING, nearest.get("reason") or ONE_PHOTO)
    comparison = compare(metrics, model, key, f"nearest_{encoder}")
    assert comparison is not None
    largest = metrics["models"][model][f"{key}_max"]
    text = (
        f"{copies} of {copy['num_images']} images: nearer to one of your photos than any other photo is (COPY up to "
    )
    text += f"{number(largest['value'])}; photo to nearest photo {number(nearest['value'])} on average)."
    of_baseline = metrics["models"][BASELINE].get(key, {}).get("num_above_photos") or 0
    if copies < max(1, COPIED_SHARE * copy["num_images"]) or copies <= of_baseline:
        return Check(kind, WARNING, NOT_FOUND, "No memorised photos", text, "", (comparison,))
    advice = "Train for fewer steps, at a lower learning rate, or with more varied photos."
    files = (largest["file"],) if "file" in largest else ()
    return Check(kind, WARNING, FOUND, "Memorised photos", text, advice, (comparison,), files)


def check_collapse(metrics: dict, model: str, encoder: str) -> Check:
    """Images of different seeds that hardly differ: less than the photos, and far less than the baseline's."""
    kind, key = "collapse", f"div_{encoder}"
    comparison = compare(metrics, model, key)
    real = metrics["photos"].get(f"real_{encoder}", {})
    if comparison is None or comparison.baseline is None:
        return missing(metrics, model, kind, WARNING, key)
    if real.get("value") is None:
        return not_looked_for(kind, WARNING, real.get("reason") or ONE_PHOTO)
    text = f"Images of different seeds differ by {number(comparison.value)} (DIV) on average, "
    text += f"your photos by {number(1 - real['value'])}, the baseline's images by {number(comparison.baseline)}."
    if comparison.value >= 1 - real["value"] or comparison.value >= COLLAPSED_SHARE * comparison.baseline:
        return Check(kind, WARNING, NOT_FOUND, "Different seeds give different images", text, "", (comparison,))
    if comparison.interval is None or comparison.interval[1] >= 0:
        return uncertain(kind, WARNING, comparison, MORE_IMAGES)
    return Check(kind, WARNING, FOUND, "Every seed gives the same image", text, LESS_TRAINING, (comparison,))


def check_drift(metrics: dict, model: str) -> Check:
    """Prompts without the subject, or one of them, are followed visibly less than by the baseline."""
    comparison = compare(metrics, model, "clip_t_other")
    if comparison is None:
        return missing(metrics, model, "drift", WARNING, "clip_t_other")
    worst = strongest_prompts(metrics, model, comparison, -1)
    state = FOUND if worst else effect(comparison, -1)
    if state == UNCERTAIN:
        return uncertain("drift", WARNING, comparison, MORE_OTHER_IMAGES)
    title, advice = "Other prompts are followed as before", ""
    if state == FOUND:
        title, advice = "Other things have drifted", f"{LESS_TRAINING[:-1]}, or with prior preservation."
    text = f"Prompts about other things: {in_words(comparison)}; {comparison.visible:g} is visible. {worst}".strip()
    return Check("drift", WARNING, state, title, text, advice, (comparison,))


def strongest_prompts(metrics: dict, model: str, comparison: Comparison, direction: int) -> str:
    """The prompts whose own change is found, in a sentence; "" if there is none."""
    entries = metrics["changes"][model][comparison.metric].get("prompts", [])
    entries = sorted(entries, key=lambda entry: -direction * entry["value"])
    found = []
    for entry in entries:
        own = replace(comparison, change=entry["value"], interval=entry["interval"])
        if effect(own, direction) == FOUND:
            found.append(f"“{entry['prompt']}” ({change_in_words(entry['value'], entry['interval'])})")
    return f"Most of all: {listed(found[:3])}." if found else ""


def check_spread(metrics: dict, model: str) -> Check:
    """Prompts without the subject have come to show it, which needs no text tower to be seen."""
    key = f"{fidelity_metric(metrics)}_other"
    comparison = compare(metrics, model, key)
    if comparison is None:
        return missing(metrics, model, "spread", WARNING, key)
    ours, before = (metrics["models"][name][key] for name in (model, BASELINE))
    files, of_baseline = (tuple(values.get("like_subject", ())) for values in (ours, before))
    num_counted = ours["num_images"] if "like_subject" in ours else 0
    counted = f"Like your subject: {len(files)} of {num_counted} pictures of other things. " if num_counted else ""
    is_counted = len(files) >= max(1, COPIED_SHARE * num_counted) and len(files) > len(of_baseline)
    state = FOUND if is_counted else effect(comparison, 1)
    if state == UNCERTAIN and num_counted < TELLING_PICTURES:
        found = uncertain("spread", WARNING, comparison, MORE_OTHER_IMAGES)
        return replace(found, text=counted + found.text)
    text = f"{counted}Likeness to your photos in pictures of other things: {in_words(comparison)}; "
    text += f"{comparison.visible:g} is visible."
    if state == FOUND:
        title, advice = "Your subject appears in other pictures", f"{LESS_TRAINING[:-1]}, or with prior preservation."
        return Check("spread", WARNING, FOUND, title, text, advice, (comparison,), files)
    title = "Your subject appears in few other pictures" if files else "Your subject stays out of other pictures"
    if num_counted and not files:
        title = f"Your subject is in none of {num_counted} other pictures"
        text += f" So many rule out (95%) that more than {1 - 0.05 ** (1 / num_counted):.0%} of such pictures show it."
    return Check("spread", WARNING, NOT_FOUND, title, text, "", (comparison,), files)


def check_class(metrics: dict, model: str, encoder: str, subject: Check) -> Check:
    """The bare class now shows the subject: expected without prior preservation, so a note."""
    key = f"pres_{encoder}"
    comparison = compare(metrics, model, key)
    if comparison is None:
        return missing(metrics, model, "class", NOTE, key)
    state = effect(comparison, 1)
    if state == UNCERTAIN and subject.state != NOT_FOUND:  # what it does not draw has not taken the class over
        return uncertain("class", NOTE, comparison, MORE_OTHER_IMAGES)
    gain = subject.comparisons[0].change if subject.state == FOUND else None
    text = f"The prompt that names only the class: {in_words(comparison)}; {comparison.visible:g} is visible."
    if state == FOUND and gain is not None and (comparison.change or 0) >= TAKEN_OVER_SHARE * gain:
        text += " Training without prior preservation does this."
        advice = "--with_prior_preservation keeps the class."
        return Check("class", NOTE, FOUND, "The class has become your subject", text, advice, (comparison,))
    return Check("class", NOTE, NOT_FOUND, "The class has not become your subject", text, "", (comparison,))


def check_photos(metrics: dict, encoder: str) -> Check:
    """Photos that are nearly one photo: likeness and copy cannot be told apart by them."""
    real = metrics["photos"].get(f"real_{encoder}", {})
    if real.get("value") is None:
        return not_looked_for("photos", NOTE, real.get("reason") or ONE_PHOTO)
    text = f"REAL, their mean likeness, is {number(real['value'])}."
    if real["value"] < ALIKE_PHOTOS:
        return Check("photos", NOTE, NOT_FOUND, "Your photos differ from one another", text)
    text += " By such photos a faithful image and a copy are hard to tell apart, for the model and for the metrics."
    advice = "More varied photos serve both."
    return Check("photos", NOTE, FOUND, "Your photos are almost the same", text, advice)
