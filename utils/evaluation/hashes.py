"""What each model of an evaluation is made from, as SHA-256; without torch, so that it begins before its import."""

import sys
from pathlib import Path

from utils.evaluation.plan import EvaluationPlan
from utils.evaluation.samples import BASELINE, Model, settings_sha256
from utils.files.hashing import sha256_of_all
from utils.files.ownership import run_of
from utils.models.check import replaced_file
from utils.models.folder import part_files


def model_folders(plan: EvaluationPlan) -> dict[Model, tuple[Path, Path]]:
    """(pipeline's folder, folder with the UNet's unet/) of every model."""
    baseline, finetuned = plan.pretrained_model_name_or_path, plan.finetuned_model_name_or_path
    pairs = {model: (finetuned, finetuned / (model.checkpoint or "")) for model in plan.all_models}
    return pairs | {model: (baseline, baseline) for model in pairs if model.name == BASELINE}


def hash_models(plan: EvaluationPlan) -> dict[str, dict[str, str]]:
    """Of every model, one SHA-256 a component, over the names and digests of the files that are loaded.

    A blended UNet's is over its strength and those of both ends.
    """
    files = {}
    for model, (folder, unet) in model_folders(plan).items():
        for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
            files[model.name, part] = part_files(unet if part == "unet" else folder, part)
    digests = sha256_of_all(path for paths in files.values() for path in paths.values())
    own = {path: digest for path, digest in digests.items() if plan.pretrained_model_name_or_path in path.parents}
    if replaced := replaced_file(plan.pretrained_model_name_or_path, own, run_of(plan.finetuned_model_name_or_path)):
        line = f"{replaced} is not what {plan.finetuned_model_name_or_path} was trained from: compare with that base"
        print(f"warning: {line}", file=sys.stderr, flush=True)
    hashes: dict = {}
    for (name, part), paths in files.items():
        hashes.setdefault(name, {})[part] = settings_sha256({file: digests[path] for file, path in paths.items()})
    for model in plan.all_models:
        if model.strength != 1:
            ends = dict(base=hashes[BASELINE]["unet"], tuned=hashes[model.name]["unet"])
            hashes[model.name]["unet"] = settings_sha256(ends | dict(strength=model.strength))
    return hashes
