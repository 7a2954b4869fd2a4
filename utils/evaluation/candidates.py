"""The candidates of --choose: a run's checkpoints, and its result at lower strengths, drawn quickly and compared.

They answer one question, which of them to use, so they get fewer images and steps than the rows of the evaluation.
"""

import shlex
from pathlib import Path

from utils.evaluation import choice
from utils.evaluation.choice import Standing, standings_of
from utils.evaluation.findings import Comparison
from utils.evaluation.prompts import CLASS, OTHER, SUBJECT, Prompt
from utils.evaluation.samples import BASELINE, FINETUNED, Model, plan_models, step_of
from utils.evaluation.wording import LABELS, MINUS
from utils.files.ownership import run_of
from utils.runtime.process import typed_module

STRENGTHS = (0.5, 0.75, 1.0)  # of the result; a checkpoint as it is lies near one of them (docs/strength.md)
NUM_CHECKPOINTS = 3
NUM_INFERENCE_STEPS = 8  # of DPM-Solver++; with 6, pictures of other things are others than in 50 steps
NUM_IMAGES, NUM_OTHER_IMAGES = 3, 3  # of two seeds the interval would leave any loss possible
BATCH_SIZE = 9  # of several prompts at once: for the embedded model a sixth faster than 3, and one graph on a GPU
SHOWN_PROMPTS = 2  # of each role, on the strip
FOLDER = "candidates"  # their images', in the output folder


def candidate_models(checkpoints: list[str], last_step: int | None) -> list[Model]:
    """Baseline, the result at each strength, and a few checkpoints, evenly spread; the result's own is not one.

    Args:
        last_step: of the result; a checkpoint of that step is the result.
    """
    earlier = [name for name in checkpoints if step_of(name) != last_step]
    count = min(NUM_CHECKPOINTS, len(earlier))
    spread = [earlier[len(earlier) * (2 * number + 1) // (2 * count)] for number in range(count)]
    models = plan_models([], STRENGTHS) + plan_models(spread, [1.0])
    return list(dict.fromkeys(models))


def candidate_prompts(prompts: list[Prompt]) -> list[Prompt]:
    """The subject's first prompts and those of other things; the bare class says nothing that the choice asks."""
    subject = [prompt for prompt in prompts if prompt.role == SUBJECT][:SHOWN_PROMPTS]
    return subject + [prompt for prompt in prompts if prompt.role not in (SUBJECT, CLASS)]


def describe(metrics: dict, samples: dict, baseline: Path, finetuned: Path) -> dict | None:
    """metrics.json's "candidates": the choice, and every candidate's place; None if there is nothing to choose.

    Args:
        metrics: what score.py measured on the models' images.
        samples: samples.json, or its "candidates".
        baseline, finetuned: the pipelines' folders.
    """
    chosen = choice.choose(metrics)
    if chosen is None:
        return None
    standings = sorted(standings_of(metrics), key=lambda standing: _order(standing.name))
    unets = {name: model.get("sha256", {}).get("unet", name) for name, model in samples["models"].items()}
    last = {unets[standing.name]: standing for standing in standings}
    standings = [each for each in standings if last[unets[each.name]] is each]  # the last checkpoint may be the result
    best = last[unets[chosen.model]]
    y = _faithfulness(metrics)
    baseline_y = _value(metrics["models"][BASELINE], y)
    x = best.likeness
    return dict(
        x=dict(metric=x.metric, label=x.label, baseline=x.baseline, photos=x.photos),
        y=dict(metric=y, label=LABELS[y] if y == "clip_t_other" else f"1 {MINUS} {LABELS[y]}", baseline=baseline_y),
        y_limit=None if baseline_y is None or best.faithfulness is None else baseline_y - choice.visible_in(best),
        chosen=best.name,
        is_good=chosen.is_good,
        sentence=chosen.sentence,
        why=chosen.why,
        num_inference_steps=samples["num_inference_steps"],
        entries=[
            _entry(metrics, samples, standing, y) | dict(command=export_command(finetuned, baseline, standing.name))
            for standing in standings
        ],
    )


def _entry(metrics: dict, samples: dict, standing: Standing, y: str) -> dict:
    values = metrics["models"][standing.name]
    return dict(
        name=standing.name,
        label=label(standing.name),
        value=dict(x=standing.likeness.value, y=_value(values, y)),
        interval=dict(x=_around_baseline(standing.likeness), y=_around_baseline(standing.faithfulness)),
        images=_shown(samples, standing.name),
        note=note(standing),
    )


def label(name: str) -> str:
    """For the chart and the strip."""
    model, _, strength = name.partition("@")
    said = "the result" if model == FINETUNED else f"step {step_of(model)}"
    return f"{said}, strength {strength}" if strength else said


def note(standing: Standing) -> str:
    """A few words on why it is out; nothing if it is not."""
    if standing.copies:
        return "copies a photo"
    if not standing.keeps_others:
        return "other prompts visibly worse"
    return "" if standing.is_fit else "does not draw the subject yet"


def export_command(folder: Path, baseline: Path, name: str) -> str | None:
    """The command that writes a candidate as a pipeline folder; None for the result, which is there."""
    if name == FINETUNED:
        return None
    model, _, strength = name.partition("@")
    named = folder if folder.name not in ("", "..") else folder.resolve()  # beside the folder, also if that is "."
    command = [*typed_module("utils.export"), str(folder), str(named.with_name(f"{named.name}-chosen"))]
    command += ["--checkpoint", model] if model != FINETUNED else []
    command += ["--strength", strength] if strength else []
    recorded = run_of(folder).get("arguments", {}).get("pretrained_model_name_or_path")
    is_recorded = recorded is not None and Path(recorded).resolve() == baseline.resolve()
    command += ["--pretrained_model_name_or_path", str(baseline)] if strength and not is_recorded else []
    return shlex.join(command)


def summary(candidates: dict | None, folder: Path) -> list[str]:
    """The choice in one sentence, its reason, and the command, for the terminal."""
    if candidates is None:
        return ["Which one to use: likeness to your subject could not be measured (the report says why)."]
    chosen = next(entry for entry in candidates["entries"] if entry["name"] == candidates["chosen"])
    lines = [f"Which one to use: {candidates['sentence']} {candidates['why']}"]
    if chosen["command"] is None:
        return [*lines, f"It is what {folder} holds."]
    return [*lines, "This writes it (as one file if the name ends in .safetensors):", f"  {chosen['command']}"]


def _order(name: str) -> tuple:
    """Weakest first: checkpoints by step, then the result by strength."""
    model, _, strength = name.partition("@")
    return (model == FINETUNED, 0 if model == FINETUNED else step_of(model), float(strength or 1))


def _faithfulness(metrics: dict) -> str:
    return choice.faithfulness_metric(metrics)[0]


def _value(values: dict, metric: str) -> float | None:
    """Higher is better: likeness where no subject was asked for is taken from 1."""
    value = values.get(metric, {}).get("value")
    return value if value is None or metric == "clip_t_other" else 1 - value


def _around_baseline(comparison: Comparison | None) -> list[float] | None:
    """The interval of the change, image by image, from the baseline on: prompts differ more, but for all alike."""
    if comparison is None or comparison.interval is None or comparison.baseline is None:
        return None
    low, high = (comparison.baseline + bound for bound in comparison.interval)
    is_inverted = comparison.metric.endswith("_other") and comparison.metric != "clip_t_other"
    return [1 - high, 1 - low] if is_inverted else [low, high]


def _shown(samples: dict, name: str) -> list[dict]:
    """Two images of the subject and one of each of two other things: the same for every candidate."""
    entries = [entry for entry in samples["images"] if entry["model"] == name]
    subject = [entry for entry in entries if entry["role"] == SUBJECT][:SHOWN_PROMPTS]
    others = {entry["prompt"]: entry for entry in reversed(entries) if entry["role"] == OTHER}
    shown = subject + list(reversed(others.values()))[:SHOWN_PROMPTS]
    return [dict(file=entry["file"], prompt=entry["prompt"], seed=entry["seed"]) for entry in shown]
