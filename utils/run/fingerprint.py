"""What a run is made from: the arguments, the photos and the base's files, as hashes and as they lie on the disk."""

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from utils.arguments import training_parser
from utils.concepts import Concept
from utils.data.class_images import plan_classes
from utils.dataset import InstanceDataset, Photo
from utils.files.hashing import sha256_of
from utils.models.folder import FROZEN_PARTS, MODEL_INDEX, MODEL_PARTS, BaseModel
from utils.run.plan import Plan

# Every other argument changes what is trained: a new flag is compared unless it is named here.
NOT_COMPARED = set(
    (
        # Their files are compared by their hashes.
        "pretrained_model_name_or_path pretrained_vae_name_or_path tokenizer_name "
        "instance_data_dir concepts_list class_data_dir "
        # How class images are made; how long the run is, which is compared if the learning rate depends on it.
        "sample_batch_size prior_generation_precision num_train_epochs max_train_steps "
        # The same bits, or the same to rounding.
        "gradient_checkpointing offload_optimizer low_memory no_cuda_graph "
        # What is written, where and when.
        "output_dir save_dtype save_format export_single_file logging_dir report_to "
        "validation_prompt validation_negative_prompt validation_inference_steps validation_guidance_scale "
        "validation_steps num_validation_images checkpointing_steps checkpoints_total_limit "
        # How the run starts and ends.
        "config debug dry_run resume_from_checkpoint allow_changes overwrite_output_dir max_nonfinite_steps"
    ).split()
)
SCHEDULES_WITHOUT_END = ("constant", "constant_with_warmup")


def compared_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of a Plan's arguments, those that the weights after a given step depend on."""
    compared = {name: value for name, value in arguments.items() if name not in NOT_COMPARED}
    if arguments["lr_scheduler"] not in SCHEDULES_WITHOUT_END:
        compared["max_train_steps"] = arguments["max_train_steps"]
    return compared


def training_defaults(arguments: Iterable[str]) -> dict:
    """{argument: its flag's default}, as JSON values, of those that change what is trained."""
    parser = training_parser()
    return {name: parser.get_default(name) for name in arguments if name not in NOT_COMPARED}


def photo_hashes(photos: list[Photo], instance_prompt: str | None) -> dict[str, str]:
    """{file: SHA-256}, with the prompt if the flags do not say it; files are named as by in_numbered_folders."""
    hashes = {}
    for photo in photos:
        said = "" if photo.prompt == instance_prompt else f" {photo.prompt!r}"
        hashes[str(photo.path)] = photo.sha256 + said
    return in_numbered_folders(hashes)


def in_numbered_folders(hashes: Mapping[str, str]) -> dict[str, str]:
    """Files by their names, of several folders by the folder's number too: how a folder is spelled does not matter."""
    paths = [PurePath(file) for file in hashes]
    folders = list(dict.fromkeys(path.parent for path in paths))
    names = [f"{folders.index(path.parent) + 1}/{path.name}" if len(folders) > 1 else path.name for path in paths]
    return dict(zip(names, hashes.values(), strict=True))


def used_class_images(concepts: list[Concept], num_class_images: int) -> list[Path]:
    """Those that a run would train on, each class's in order; the missing ones among them are not there yet."""
    return [path for plan in plan_classes(concepts, num_class_images, lambda prompt: {}) for path in plan.used]


def determinants(plan: Plan, class_images: list[Path], dataset: InstanceDataset, base_hashes: dict[str, Any]) -> dict:
    """Everything that the weights after a given step depend on, as {name: JSON value}.

    `base_hashes` are hash_files'. Reads the class images and another tokenizer.
    """
    name = plan.arguments["tokenizer_name"]
    tokenizer = sorted(Path(name).glob("*")) if name else []
    return dict(
        arguments=compared_arguments(plan.arguments),
        num_ranks=plan.num_ranks,
        photos=photo_hashes(dataset.photos, plan.arguments["instance_prompt"]),
        class_images=in_numbered_folders({str(path): sha256_of(path) for path in class_images if path.is_file()}),
        base_model=base_hashes["sha256"],
        tokenizer={path.name: sha256_of(path) for path in tokenizer if path.is_file()},
    )


def base_files(base: BaseModel) -> dict[Path, tuple[int, int]]:
    """Size and time of change of every file of the base that the run reads or copies."""
    parts = (*FROZEN_PARTS, "unet")
    found = [base.folder / MODEL_INDEX, *(path for part in parts for path in (base.folder / part).rglob("*"))]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in found if path.is_file()}


def hash_files(base: BaseModel) -> dict[str, Any]:
    """Folder and SHA-256 of every file of the base that training reads."""
    files = [base.folder / MODEL_INDEX]
    files += sorted(path for part in MODEL_PARTS for path in (base.folder / part).glob("*") if path.is_file())
    return dict(folder=str(base.folder), sha256={str(p.relative_to(base.folder)): sha256_of(p) for p in files})
