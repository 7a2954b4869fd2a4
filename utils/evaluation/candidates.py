"""The candidates of --choose: which models are drawn quickly to choose from, and the commands that write them."""

import shlex
from pathlib import Path

from utils.evaluation.samples import BASELINE, FINETUNED, Model, plan_models, step_of
from utils.files.ownership import run_of
from utils.runtime.process import typed_module

STRENGTHS = (0.5, 0.75, 1.0)  # of the result; a checkpoint as it is lies near one of them (docs/more_than_one_wish.md)
NUM_CHECKPOINTS = 3
NUM_INFERENCE_STEPS = 8  # of DPM-Solver++; with 6, pictures of other things are others than in 50 steps
NUM_CHOOSING, NUM_TELLING = 6, 4  # seeds of the subject's prompt: that choose, and that tell how far the chosen one is
FOLDER = "candidates"  # their images', in the output folder


def candidate_models(checkpoints: list[str], last_step: int | None) -> list[Model]:
    """Baseline, the result at each strength, and a few checkpoints, evenly spread; the result's own is not one.

    Args:
        last_step: of the result; a checkpoint of that step is the result.
    """
    earlier = [name for name in checkpoints if step_of(name) != last_step]
    count = min(NUM_CHECKPOINTS, len(earlier))
    spread = [earlier[len(earlier) * (2 * number + 1) // (2 * count)] for number in range(count)]
    return list(dict.fromkeys(plan_models([], STRENGTHS) + plan_models(spread, [1.0])))


def distance(name: str, last_step: int | None) -> float:
    """How far a model is from the baseline: its strength times its share of the training; 1 is the result."""
    model, _, strength = name.partition("@")
    share = 1.0 if model == FINETUNED else step_of(model) / max(last_step or 0, step_of(model) + 1)
    return share * float(strength or 1)


def label(name: str) -> str:
    """A model's name for people."""
    model, _, strength = name.partition("@")
    said = {BASELINE: "the base", FINETUNED: "the result"}.get(model) or f"step {step_of(model)}"
    return f"{said} at strength {strength}" if strength else said


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
