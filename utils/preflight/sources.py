"""What a run is made from and what it will do: subjects, photos, prompts, the plan, and where it starts."""

from argparse import Namespace
from collections import Counter
from pathlib import Path

from utils.data.class_images import check_class_images
from utils.data.concepts import Concept, load_photos, read_concepts
from utils.dataset import InstanceDataset
from utils.errors import UserError
from utils.files.json_files import read_json
from utils.models.folder import BaseModel, num_parameters, prediction_type
from utils.models.layout import DEFAULTS, with_defaults
from utils.preflight.numbers import check_schedule, describe_launcher, describe_rounding
from utils.preflight.photos import describe_captions, describe_duplicates, describe_photo
from utils.preflight.prompt import check_tokens, describe_prompt, learned_tokens
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
    crop = (args.resolution, args.center_crop, args.alpha_mask)
    dataset = table.run("photos", load_photos, concepts, *crop) if concepts else None
    if dataset is not None:
        _describe_photos(table, dataset)
    if base is not None and concepts:
        said = [photo.prompt for photo in dataset.photos] if dataset else [each.instance_prompt for each in concepts]
        for prompt in dict.fromkeys(said):
            _check_prompt(table, args.tokenizer_name, base, prompt)
        _check_tokens(table, args, base, [*said, *(each.class_prompt for each in concepts)])
    if base is not None and args.with_prior_preservation:
        for concept in {concept.class_data_dir: concept for concept in concepts or []}.values():
            where = (concept.class_data_dir, concept.class_prompt, base.folder, args.num_class_images)
            table.add_run("class images", check_class_images, *where)
    if base is None or not concepts or dataset is None or save_dtype is None:
        return None, None
    return _check_start(table, args, save_dtype, base, concepts, dataset)


def _describe_photos(table: PreflightTable, dataset: InstanceDataset) -> None:
    for folder, count in Counter(photo.path.parent.resolve() for photo in dataset.photos).items():
        table.add("photos", f"{count} in {folder}")
    for photo in dataset.photos:
        finding, verdict = describe_photo(photo, dataset)
        table.add("photo", f"{photo.path.name}: {finding}", verdict)
    if captions := describe_captions(dataset):
        table.add("captions", *captions)
    for finding in describe_duplicates(dataset.photos):
        table.add("photo", finding, NOTE)
    for path, reason in dataset.skipped:
        is_meant = reason == "hidden" or path.name.lower().startswith(("readme", "license", "licence"))
        table.add("skipped", f"{path.name}: {reason}", OK if is_meant else NOTE)


def _check_prompt(table: PreflightTable, tokenizer_name: Path | None, base: BaseModel, prompt: str) -> None:
    folder = tokenizer_name or base.folder / "tokenizer"
    if tokenizer_name and not (folder / "tokenizer_config.json").is_file():
        table.run("prompt", _refuse_tokenizer, folder)
    else:
        table.add_run("prompt", describe_prompt, prompt, folder)


def _check_tokens(table: PreflightTable, args: Namespace, base: BaseModel, prompts: list[str | None]) -> None:
    """The text encoder knows every token of every prompt."""
    folder = args.tokenizer_name or base.folder / "tokenizer"
    config = read_json(base.folder / "text_encoder" / "config.json")
    vocab_size = with_defaults("text_encoder", config)["vocab_size"]
    other = learned_tokens(folder) or args.tokenizer_name or vocab_size < DEFAULTS["text_encoder"]["vocab_size"]
    if other and (folder / "tokenizer_config.json").is_file():
        drawn = [*(args.validation_prompt or []), args.validation_negative_prompt]
        for prompt in dict.fromkeys(prompt for prompt in (*prompts, *drawn) if prompt):
            table.run("prompt", check_tokens, prompt, folder, vocab_size)


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


def _describe_base(table: PreflightTable, base: BaseModel, count: int, save_dtype: str) -> None:
    """`count` are the UNet's parameters."""
    size = f"{count / 1e6:.1f} million parameters in the UNet, saved in {save_dtype}"
    kind = ", which predicts velocity" if prediction_type(base.folder) == "v_prediction" else ""
    table.add("base model", str(base.folder.resolve()))
    table.add("base model", f"Stable Diffusion v1{kind}, {size}")
    if ".non_ema" in base.unet_weights[0].name:
        table.add("base model", f"{base.unet_weights[0].name} is trained on: the UNet has no other weights", NOTE)


def _check_start(
    table: PreflightTable,
    args: Namespace,
    save_dtype: str,
    base: BaseModel,
    concepts: list[Concept],
    dataset: InstanceDataset,
) -> tuple[Plan, Sources | None]:
    count, num_ranks = num_parameters(base), environment.num_ranks()
    _describe_base(table, base, count, save_dtype)
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
    table.add("output", str(plan.output_dir.resolve()))
    table.add("start", f"{origin}step {first_step} of {plan.num_steps}")
    every = plan.checkpointing_steps
    planned = dict(plan.checkpoints, num_checkpoints=plan.num_steps // every - first_step // every)
    _check_numbers(table, plan, base)
    table.add_run("disk", check_disk, base, plan.output_dir, **planned, export_single_file=plan.export_single_file)
    if gpu_is_possible() and not table.is_quick:
        table.add_run("device", check_device, plan.needs, args.low_memory)
    else:
        table.add("device", "no GPU: training on the CPU")
    return plan, Sources(base, concepts, dataset, start)
