"""What an evaluation samples: its arguments, filled in and checked."""

import argparse
import math
from pathlib import Path

from utils.errors import UserError
from utils.evaluation import candidates
from utils.evaluation.arguments import BASELINE_FLAG, FINETUNED_FLAG
from utils.evaluation.filling import Notes, fill_from_run_json
from utils.evaluation.prompts import OTHER, all_prompts, places_for
from utils.evaluation.samples import (
    COMPARISON_FILE,
    EMBEDDINGS_FILE,
    METRICS_JSON,
    REPORT_FILE,
    Model,
    check_same_model,
    check_writable,
    drawn_from,
    plan_models,
    plan_samples,
    step_of,
    trained_on,
)
from utils.files import ownership
from utils.files.ownership import run_of
from utils.models.base import base_folder
from utils.models.check import check_is_folder, check_pipeline, check_same_unet
from utils.models.folder import BaseModel
from utils.run.lineage import lineage_of, list_checkpoints


class EvaluationPlan(argparse.Namespace):
    """The flags of evaluate.py, with what run.json knows filled in.

    Attributes:
        models, prompts, drawn_from: what is drawn, of which model; only there, as sizes are, if images are made.
        candidates: the plan of what --choose draws; None without.
        notes: what was filled in, and what is to be warned of.
    """

    @property
    def all_models(self) -> list[Model]:
        """All that draw, the candidates among them."""
        return list(dict.fromkeys(self.models + (self.candidates.models if self.candidates else [])))


def make_plan(args: argparse.Namespace) -> EvaluationPlan:
    """Fills in what run.json knows, and checks folders and sizes. Raises UserError."""
    plan = EvaluationPlan(**vars(args) | dict(strength=list(dict.fromkeys(args.strength or [1.0]))))
    plan.prompts, plan.models, plan.candidates = [], [], None
    plan.notes = _check(plan)
    if plan.choose and "generate" in plan.stages:
        tuned = plan.finetuned_model_name_or_path
        check_same_unet(plan.pretrained_model_name_or_path, tuned)
        last_step = (run_of(tuned).get("result") or {}).get("num_steps")
        plan.candidates = plan_candidates(plan, own_checkpoints(tuned)[0], last_step)
    return plan


def plan_candidates(plan: EvaluationPlan, checkpoints: list[str], last_step: int | None) -> EvaluationPlan:
    """The same for the models to choose among, with fewer prompts and steps, and other seeds."""
    changed = dict(
        models=candidates.candidate_models(checkpoints, last_step),
        prompts=plan.prompts[:1] + [prompt for prompt in plan.prompts if prompt.role == OTHER],
        num_images=min(candidates.NUM_CHOOSING + candidates.NUM_TELLING, 2 * plan.num_images + 2),
        num_drift_images=min(plan.num_drift_images, 1),
        seed=plan.seed + plan.num_images,
        num_inference_steps=min(plan.num_inference_steps, candidates.NUM_INFERENCE_STEPS),
    )
    return EvaluationPlan(**vars(plan) | changed)


def _check(args: EvaluationPlan) -> Notes:
    notes = check_generate(args) if "generate" in args.stages else []
    for flag, what in dict(instance_data_dir="your photos", clip_model="CLIP", dino_model="DINO").items():
        if (folder := getattr(args, flag)) is not None:
            check_is_folder(folder, f"--{flag}", f"name the folder of {what}, or leave it out")
    check_output_dir(args)
    return notes


def check_generate(args: EvaluationPlan) -> Notes:
    """The checks that making images needs; sets args.prompts."""
    tuned = args.finetuned_model_name_or_path = base_folder(args.finetuned_model_name_or_path, FINETUNED_FLAG)
    check_is_folder(tuned, FINETUNED_FLAG, "train first (run.sh), or name another folder")
    finetuned = check_pipeline(tuned, FINETUNED_FLAG, safety_checker=args.safety_checker)
    notes = fill_from_run_json(args)
    base = base_folder(args.pretrained_model_name_or_path, BASELINE_FLAG, args.pretrained_vae_name_or_path)
    baseline = check_pipeline(base, BASELINE_FLAG, safety_checker=args.safety_checker)
    args.pretrained_model_name_or_path = base
    if args.negative_prompt and args.guidance_scale <= 1:
        notes.append(("note", f"--guidance_scale {args.guidance_scale:g}: --negative_prompt has no effect"))
        args.negative_prompt = None
    args.checkpoint = find_checkpoints(tuned, args.checkpoint or [])
    if args.strength != [1.0]:
        check_same_unet(base, tuned)
    args.models = plan_models(args.checkpoint, args.strength)
    places = places_for(base) if args.num_drift_images else ()
    args.prompts = all_prompts(args.prompt, args.class_name, args.drift_prompt, places)
    check_sampling(args, baseline, finetuned)
    return notes


def find_checkpoints(folder: Path, names: list[str]) -> list[str]:
    """Names of the wanted checkpoints, by step.

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
    return sorted(wanted, key=step_of)


def own_checkpoints(folder: Path) -> tuple[list[str], list[str]]:
    """(checkpoints of the run that made the folder's result, all checkpoints there are), by step."""
    record = run_of(folder)
    lineage = lineage_of(record) if record.get("run_id") else None
    found = list_checkpoints(folder)
    own = [checkpoint for checkpoint in found if lineage is None or lineage.holds(checkpoint)]
    return [checkpoint.path.name for checkpoint in own], [checkpoint.path.name for checkpoint in found]


def check_sampling(args: EvaluationPlan, *models: BaseModel) -> None:
    """Sets --height and --width to the baseline's own if not given; checks that VAEs and schedulers can do them."""
    for model in models:
        height, width = model.image_size
        args.height, args.width = args.height or height, args.width or width
        multiple = math.lcm(8, model.vae_scale_factor)  # diffusers wants a multiple of 8 whatever the VAE
        for flag in ("height", "width"):
            value = getattr(args, flag)
            if value % multiple:
                near = max(multiple, round(value / multiple) * multiple)
                raise UserError(f"--{flag} is {value}: give a multiple of {multiple}, such as {near}")
        most, asked = model.configs["scheduler"].get("num_train_timesteps", 1000), args.num_inference_steps
        if asked > most:
            raise UserError(f"--num_inference_steps is {asked}: {model.folder} has {most} timesteps at most")


def check_output_dir(args: EvaluationPlan) -> None:
    """Checks that writing the results touches no file that evaluate.py did not write. Raises UserError."""
    output_dir = args.output_dir
    for flag in ("pretrained_model_name_or_path", "finetuned_model_name_or_path", "instance_data_dir"):
        folder = getattr(args, flag)
        if folder is not None and output_dir.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"--output_dir {output_dir} is --{flag} or inside it: name a folder of its own")
    ownership.check_writable(output_dir, f"--output_dir {output_dir}")
    names = [METRICS_JSON, EMBEDDINGS_FILE] if "score" in args.stages else []
    names += [REPORT_FILE] if "report" in args.stages else []
    if "generate" in args.stages:
        tuned = args.finetuned_model_name_or_path
        args.drawn_from = drawn_from(tuned, trained_on(run_of(tuned)))
        if not args.overwrite_output_dir:
            check_same_model(output_dir, args.drawn_from)
        names += [COMPARISON_FILE, *(sample.file for sample in plan_samples(args))]
    check_writable(output_dir, names)
