"""What a run is made from and what it will do: subjects, photos, prompts, the plan, and where it starts."""

from argparse import Namespace
from pathlib import Path

from utils.data.concepts import Concept, load_photos, read_concepts
from utils.dataset import InstanceDataset
from utils.errors import UserError
from utils.models.folder import BaseModel, num_parameters
from utils.preflight.numbers import check_schedule, describe_launcher, describe_rounding
from utils.preflight.photos import describe_duplicates, describe_photo
from utils.preflight.prompt import describe_prompt
from utils.preflight.resources import check_device, check_disk
from utils.preflight.table import NOTE, OK, PreflightTable
from utils.run.plan import Plan, fill_in_defaults, make_plan
from utils.run.resume import Sources, prepare_start
from utils.runtime import environment
from utils.runtime.gpu import gpu_is_possible, gpu_is_usable, gpu_without_bf16


def check_sources(
    table: PreflightTable, args: Namespace, base: BaseModel | None, save_dtype: str | None
) -> tuple[Plan | None, Sources | None]:
    """Adds a row for each finding; the plan and the sources of a run that can start, else None.

    `save_dtype` is that of the base's own file, or the one asked for.
    """
    subject = Concept(args.instance_prompt, args.instance_data_dir, args.class_prompt, args.class_data_dir)
    options = dict(with_prior_preservation=args.with_prior_preservation)
    concepts = table.run("subjects", read_concepts, subject, args.concepts_list, args.output_dir, **options)
    dataset = table.run("photos", load_photos, concepts, args.resolution, args.center_crop) if concepts else None
    if dataset is not None:
        _describe_photos(table, dataset)
    if base is not None and concepts:
        said = [photo.prompt for photo in dataset.photos] if dataset else [each.instance_prompt for each in concepts]
        for prompt in dict.fromkeys(said):
            _check_prompt(table, args.tokenizer_name, base, prompt)
    if base is None or not concepts or dataset is None or save_dtype is None:
        return None, None
    return _check_start(table, args, save_dtype, base, concepts, dataset)


def _describe_photos(table: PreflightTable, dataset: InstanceDataset) -> None:
    for photo in dataset.photos:
        finding, verdict = describe_photo(photo, dataset.resolution)
        table.add("photo", f"{photo.path.name}: {finding}", verdict)
    for finding in describe_duplicates(dataset.photos):
        table.add("photo", finding, NOTE)
    for path, reason in dataset.skipped:
        table.add("skipped", f"{path.name}: {reason}", OK if reason == "hidden" else NOTE)


def _check_prompt(table: PreflightTable, tokenizer_name: Path | None, base: BaseModel, prompt: str) -> None:
    folder = tokenizer_name or base.folder / "tokenizer"
    if tokenizer_name and not (folder / "tokenizer_config.json").is_file():
        table.run("prompt", _refuse_tokenizer, folder)
    else:
        table.add_run("prompt", describe_prompt, prompt, folder)


def _check_numbers(table: PreflightTable, plan: Plan, base: BaseModel) -> None:
    for check, finding in (
        ("schedule", table.run("schedule", check_schedule, plan)),
        ("save_dtype", describe_rounding(plan, base)),
        ("precision", describe_launcher(plan)),
    ):
        if finding:
            table.add(check, finding, NOTE)


def _refuse_tokenizer(folder: Path) -> None:
    raise UserError(f"--tokenizer_name {folder} is not a tokenizer's folder: no tokenizer_config.json in it")


def _check_start(
    table: PreflightTable,
    args: Namespace,
    save_dtype: str,
    base: BaseModel,
    concepts: list[Concept],
    dataset: InstanceDataset,
) -> tuple[Plan, Sources | None]:
    count, num_ranks = num_parameters(base), environment.num_ranks()
    size = f"{count / 1e6:.1f} million parameters in the UNet, saved in {save_dtype}"
    table.add("base model", f"{base.folder}: Stable Diffusion v1, {size}")
    bf16 = "bf16" in (args.mixed_precision, args.prior_generation_precision) and not table.is_quick
    old_gpu = gpu_without_bf16() if bf16 else None
    if old_gpu:
        table.add("device", f"{old_gpu} has no bf16 arithmetic: fp16 in its place", NOTE)
    args = fill_in_defaults(
        args,
        num_photos=len(dataset),
        num_ranks=num_ranks,
        on_gpu=gpu_is_possible() if table.is_quick else gpu_is_usable(),
        save_dtype=save_dtype,
        has_bf16=old_gpu is None,
    )
    plan = make_plan(args, num_parameters=count, num_ranks=num_ranks)
    only_checks = args.dry_run or table.is_quick
    start = table.run("start", prepare_start, plan, base, concepts, dataset, dry_run=only_checks)
    if start is None:
        return plan, None
    first_step = start.checkpoint.step if start.checkpoint else 0
    origin = f"{start.checkpoint.path}, " if start.checkpoint else ""
    table.add("start", f"{origin}step {first_step} of {plan.num_steps}, into {plan.output_dir}")
    every = plan.checkpointing_steps
    planned = dict(plan.checkpoints, num_checkpoints=plan.num_steps // every - first_step // every)
    _check_numbers(table, plan, base)
    table.add_run("disk", check_disk, base, plan.output_dir, **planned)
    if gpu_is_possible() and not table.is_quick:
        table.add_run("device", check_device, plan.needs, args.low_memory)
    else:
        table.add("device", "no GPU: training on the CPU")
    return plan, Sources(base, concepts, dataset, start)
