"""What an evaluation samples: its arguments, filled in and checked."""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError
from utils.evaluation import candidates
from utils.evaluation.arguments import BASELINE_FLAG, FINETUNED_FLAG
from utils.evaluation.filling import Notes, fill_from_run_json
from utils.evaluation.prompts import Prompt, all_prompts, places_for
from utils.evaluation.samples import (
    COMPARISON_FILE,
    EMBEDDINGS_FILE,
    METRICS_CSV,
    METRICS_JSON,
    REPORT_FILE,
    Model,
    check_writable,
    plan_models,
    plan_samples,
    step_of,
)
from utils.files.ownership import RUN_FILE, is_writable, nearest_existing, run_of
from utils.models.base import base_folder
from utils.models.check import check_is_folder, check_pipeline, check_same_unet
from utils.models.folder import BaseModel
from utils.run.lineage import lineage_of, list_checkpoints


class EvaluationPlan(NamedTuple):
    """What an evaluation does: flags of these names, with what run.json knows filled in.

    Models, prompts and image sizes are only there if images are made.
    """

    stages: tuple[str, ...]
    command: str
    output_dir: Path
    pretrained_model_name_or_path: Path | None
    finetuned_model_name_or_path: Path
    models: list[Model]
    candidates: "EvaluationPlan | None"
    instance_data_dir: Path | None
    clip_model: Path | None
    dino_model: Path | None
    prompts: list[Prompt]
    identifier: str | None
    class_name: str | None
    dreambench: str | None
    guessed: list[str]  # of class_name and identifier, those that no flag gave
    num_images: int
    num_drift_images: int
    seed: int
    num_inference_steps: int
    guidance_scale: float
    negative_prompt: str | None
    batch_size: int | None
    height: int | None
    width: int | None
    mixed_precision: str | None
    safety_checker: bool
    notes: Notes

    @property
    def baseline_folder(self) -> Path:
        """Of the baseline, which is known if images are made."""
        assert self.pretrained_model_name_or_path is not None
        return self.pretrained_model_name_or_path

    @property
    def all_models(self) -> list[Model]:
        """All that draw, the candidates among them."""
        return list(dict.fromkeys(self.models + (self.candidates.models if self.candidates else [])))

    @property
    def counts(self) -> tuple[int, int, int]:
        """plan_samples' num_images, num_drift_images and seed."""
        return self.num_images, self.num_drift_images, self.seed


def make_plan(args: argparse.Namespace) -> EvaluationPlan:
    """Fills in what run.json knows, and checks folders and sizes. Raises UserError."""
    filled = argparse.Namespace(**vars(args), prompts=[], guessed=[], models=[], candidates=None)
    filled.strength = list(dict.fromkeys(args.strength or [1.0]))
    notes = _check(filled)
    given = {name: getattr(filled, name) for name in EvaluationPlan._fields if name != "notes"}
    plan = EvaluationPlan(**given, notes=notes)
    return plan._replace(candidates=plan_candidates(plan)) if args.choose and "generate" in plan.stages else plan


def plan_candidates(plan: EvaluationPlan) -> EvaluationPlan:
    """The same for the models to choose among, with fewer prompts and steps, and other seeds."""
    run = run_of(plan.finetuned_model_name_or_path)
    own, _ = own_checkpoints(plan.finetuned_model_name_or_path)
    models = candidates.candidate_models(own, (run.get("result") or {}).get("num_steps"))
    check_same_unet(plan.baseline_folder, plan.finetuned_model_name_or_path)
    return plan._replace(
        models=models,
        prompts=candidates.candidate_prompts(plan.prompts),
        num_images=min(candidates.NUM_CHOOSING + candidates.NUM_TELLING, 2 * plan.num_images + 2),
        num_drift_images=min(plan.num_drift_images, 1),
        seed=plan.seed + plan.num_images,
        num_inference_steps=min(plan.num_inference_steps, candidates.NUM_INFERENCE_STEPS),
    )


def _check(args: argparse.Namespace) -> Notes:
    notes = check_generate(args) if "generate" in args.stages else []
    if args.instance_data_dir is not None:
        check_is_folder(
            args.instance_data_dir, "--instance_data_dir", "name the folder of your photos, or leave it out"
        )
    for flag in ("clip_model", "dino_model"):
        if getattr(args, flag) is not None:
            check_is_folder(getattr(args, flag), f"--{flag}", "name the folder of such a model, or leave it out")
    check_output_dir(args)
    return notes


def check_generate(args: argparse.Namespace) -> Notes:
    """The checks that making images needs; sets args.prompts."""
    args.finetuned_model_name_or_path = base_folder(args.finetuned_model_name_or_path, FINETUNED_FLAG)
    check_is_folder(args.finetuned_model_name_or_path, FINETUNED_FLAG, "train first (run.sh), or name another folder")
    checker = dict(safety_checker=args.safety_checker)
    finetuned = check_pipeline(args.finetuned_model_name_or_path, FINETUNED_FLAG, **checker)
    notes = fill_from_run_json(args)
    args.pretrained_model_name_or_path = base_folder(
        args.pretrained_model_name_or_path, BASELINE_FLAG, args.pretrained_vae_name_or_path
    )
    baseline = check_pipeline(args.pretrained_model_name_or_path, BASELINE_FLAG, **checker)
    if args.pretrained_model_name_or_path.samefile(args.finetuned_model_name_or_path):
        notes.append(
            ("warning", f"{BASELINE_FLAG} and {FINETUNED_FLAG} are the same folder: both rows will be the same")
        )
    if args.negative_prompt and args.guidance_scale <= 1:
        notes.append(("note", f"--guidance_scale {args.guidance_scale:g}: --negative_prompt has no effect"))
        args.negative_prompt = None
    args.checkpoint, foreign = find_checkpoints(args.finetuned_model_name_or_path, args.checkpoint or [])
    notes += foreign
    if args.strength != [1.0]:
        check_same_unet(args.pretrained_model_name_or_path, args.finetuned_model_name_or_path)
    args.models = plan_models(args.checkpoint, args.strength)
    places = places_for(args.pretrained_model_name_or_path) if args.num_drift_images else ()
    args.prompts = all_prompts(args.prompt, args.class_name, args.drift_prompt, places)
    set_image_size(args, baseline, finetuned)
    check_steps(args.num_inference_steps, baseline, finetuned)
    return notes


def find_checkpoints(folder: Path, names: list[str]) -> tuple[list[str], Notes]:
    """Names of the wanted checkpoints, by step, and a note on each that is of another run than the result.

    "all" are those of the run that made the folder's result; if it has no run.json, all there are. Raises UserError if
    one is not there.
    """
    own, there = own_checkpoints(folder)
    wanted: set[str] = set()
    for name in names:
        name = f"checkpoint-{name}" if name.isdecimal() else name
        if name == "all":
            wanted |= set(own)
        elif name in there:
            wanted.add(name)
        else:
            listed = ", ".join(there) or "none"
            raise UserError(f"--checkpoint {name}: {folder} holds no whole {name} (it holds: {listed})")
    if names and not wanted:
        raise UserError(f"--checkpoint all: {folder} holds no checkpoint of its run: leave the flag out")
    foreign = wanted.difference(own)
    notes = [
        ("note", f"{folder / name} is of another run than {folder / RUN_FILE} records") for name in sorted(foreign)
    ]
    return sorted(wanted, key=step_of), notes


def own_checkpoints(folder: Path) -> tuple[list[str], list[str]]:
    """(checkpoints of the run that made the folder's result, all checkpoints there are), by step."""
    record = run_of(folder)
    lineage = lineage_of(record) if record.get("run_id") else None
    found = list_checkpoints(folder)
    own = [checkpoint for checkpoint in found if lineage is None or lineage.holds(checkpoint)]
    return [checkpoint.path.name for checkpoint in own], [checkpoint.path.name for checkpoint in found]


def set_image_size(args: argparse.Namespace, *models: BaseModel) -> None:
    """Sets --height and --width to the baseline's own if not given, and checks that the VAEs can make them."""
    for model in models:
        height, width = model.image_size
        args.height, args.width = args.height or height, args.width or width
        multiple = math.lcm(8, model.vae_scale_factor)  # diffusers wants a multiple of 8 whatever the VAE
        for flag in ("height", "width"):
            value = getattr(args, flag)
            if value % multiple:
                near = max(multiple, round(value / multiple) * multiple)
                raise UserError(f"--{flag} is {value}: give a multiple of {multiple}, such as {near}")


def check_steps(num_inference_steps: int, *models: BaseModel) -> None:
    """Checks that the schedulers have as many timesteps as --num_inference_steps asks for."""
    for model in models:
        most = model.configs["scheduler"].get("num_train_timesteps", 1000)
        if num_inference_steps > most:
            raise UserError(
                f"--num_inference_steps is {num_inference_steps}: {model.folder} has {most} timesteps at most"
            )


def check_output_dir(args: argparse.Namespace) -> None:
    """Checks that writing the results touches no file that evaluate.py did not write. Raises UserError."""
    output_dir = args.output_dir
    resolved = output_dir.resolve()
    for flag in ("pretrained_model_name_or_path", "finetuned_model_name_or_path", "instance_data_dir"):
        folder = getattr(args, flag)
        if folder is not None and (resolved == folder.resolve() or folder.resolve() in resolved.parents):
            raise UserError(f"--output_dir {output_dir} is --{flag} or inside it: name a folder of its own")
    existing = nearest_existing(resolved)
    if not existing.is_dir():
        raise UserError(f"--output_dir {output_dir}: {existing} is a file: name another folder")
    if not is_writable(existing):
        raise UserError(f"--output_dir {output_dir}: no permission to write in {existing}: name another folder")
    names = [METRICS_JSON, METRICS_CSV, EMBEDDINGS_FILE] if "score" in args.stages else []
    names += [REPORT_FILE] if "report" in args.stages else []
    if "generate" in args.stages:
        counts = (args.num_images, args.num_drift_images, args.seed)
        names += [COMPARISON_FILE, *(sample.file for sample in plan_samples(args.prompts, args.models, *counts))]
    check_writable(output_dir, names)
