"""What a run is made from and what it will do: subjects, photos, prompts, the plan, and where it starts."""

from collections.abc import Iterator

from utils.concepts import Concept, load_photos, read_concepts
from utils.data.class_images import check_class_images
from utils.errors import UserError
from utils.models.folder import BaseModel
from utils.preflight import resources
from utils.preflight.photos import describe_names, describe_photos, describe_prompt, load_quick_tokenizer
from utils.preflight.table import NOTE, OK, Check, Found, Row
from utils.run.plan import make_plan
from utils.run.resume import find_sources
from utils.runtime import environment
from utils.runtime.gpu import gpu_is_possible, gpu_is_usable, gpu_without_bf16


def find_concepts(found: Found) -> None:
    """The subjects that the flags name."""
    args = found.args
    subject = Concept(args.instance_prompt, args.instance_data_dir, args.class_prompt, args.class_data_dir)
    options = dict(with_prior_preservation=args.with_prior_preservation)
    found.concepts = read_concepts(subject, args.concepts_list, args.output_dir, **options)


def find_photos(found: Found) -> Iterator[Row]:
    """Their photos, all decoded."""
    args = found.args
    options = dict(center_crop=args.center_crop, crop_bars=args.crop_bars)
    try:
        found.dataset = load_photos(found.concepts, args.resolution, **options)
    except UserError as error:
        raise UserError(f"{error} (docs/photos.md)") from None
    yield from describe_photos(found.dataset)


def check_prompts(found: Found) -> Iterator[Row]:
    """Each prompt's tokens, and whether captions name the subject."""
    concepts, args = found.concepts, found.args
    folder = args.tokenizer_name or found.base.folder / "tokenizer"
    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"--tokenizer_name {folder} is not a tokenizer's folder: no tokenizer_config.json in it")
    tokenizer = load_quick_tokenizer(folder)
    photos = found.dataset.photos if hasattr(found, "dataset") else []
    yield from (("captions", finding, NOTE) for finding in describe_names(concepts, photos, tokenizer))
    prompts = [photo.prompt for photo in photos] or [each.instance_prompt for each in concepts]
    prompts += [each.class_prompt for each in concepts if each.class_prompt] if args.with_prior_preservation else []
    if args.validation_prompt:
        is_guided = args.validation_guidance_scale > 1 and args.validation_negative_prompt
        prompts += [*args.validation_prompt, *([args.validation_negative_prompt] if is_guided else [])]
    for prompt in dict.fromkeys(prompts):
        yield "prompt", *describe_prompt(prompt, tokenizer)


def check_classes(found: Found) -> Iterator[Row]:
    """Which class images there are, with prior preservation."""
    classes = {concept.class_data_dir: concept.class_prompt for concept in found.concepts}
    for folder, prompt in classes.items() if found.args.with_prior_preservation else ():
        if folder is not None and prompt is not None:
            yield "class images", *check_class_images(folder, prompt, found.base, found.args.num_class_images)


def make_the_plan(found: Found) -> Iterator[Row]:
    """What follows from the arguments, the base, the photos and the device."""
    args, base, is_quick = found.args, found.base, found.is_quick
    yield from _describe_base(base, args.save_dtype or base.save_dtype)
    bf16 = "bf16" in (args.mixed_precision, args.prior_generation_precision) and not is_quick
    old_gpu = gpu_without_bf16() if bf16 else None
    if old_gpu:
        yield "device", f"{old_gpu} has no bf16 arithmetic: fp16 in its place", NOTE
    found.plan = make_plan(
        args,
        num_parameters=base.num_parameters,
        num_photos=len(found.dataset),
        num_ranks=environment.num_ranks(),
        on_gpu=gpu_is_possible() if is_quick else gpu_is_usable(),
        save_dtype=base.save_dtype,
        has_bf16=old_gpu is None,
    )


def _describe_base(base: BaseModel, save_dtype: str) -> Iterator[Row]:
    size = f"{base.num_parameters / 1e6:.1f} million parameters in the UNet, saved in {save_dtype}"
    kind = ", which predicts velocity" if base.prediction_type == "v_prediction" else ""
    yield "base model", str(base.folder.resolve()), OK
    yield "base model", f"Stable Diffusion v1{kind}, {size}", OK
    file = next(iter(base.weights["unet"].files))
    if file.name not in base.weights["unet"].plain_names:
        yield "base model", f"{file.name} is trained on: the UNet has no other weights", NOTE
    if "safety_checker" not in base.weights and (base.index.get("safety_checker") or [None])[0]:
        yield "base model", f"the result gets no safety checker, nor is it measured with it: {base.no_checker}", NOTE
    used, there = base.text_layers
    if used < there:
        said = f"{used} of the {there} layers of its text encoder are used (clip skip {1 + there - used})"
        yield "base model", f"{said}: in ComfyUI and A1111 set the same", NOTE


def find_start(found: Found) -> Iterator[Row]:
    """The checkpoint to resume from, if the run is still the same."""
    plan, only_checks = found.plan, found.args.dry_run or found.is_quick
    found.sources = find_sources(plan, found.base, found.concepts, found.dataset, dry_run=only_checks)
    checkpoint = found.sources.checkpoint
    origin = f"{checkpoint.path}, " if checkpoint else ""
    yield "output", str(plan.output_dir.resolve()), OK
    yield "start", f"{origin}step {found.sources.first_step} of {plan.num_steps}", OK


def check_numbers(found: Found) -> Iterator[Row]:
    """Flags without effect, and numbers that can hardly be meant."""
    yield from (("flag", finding, NOTE) for finding in resources.describe_flags(found.plan, len(found.dataset)))
    named = dict(schedule=resources.check_schedule, save_dtype=resources.describe_rounding)
    yield from ((name, finding, NOTE) for name, say in named.items() if (finding := say(found.plan)))


def check_disk_space(found: Found) -> Iterator[Row]:
    """The disk, against what the run takes of it."""
    yield "disk", *resources.check_disk(found.plan, found.sources.base, found.sources.first_step)


def check_the_device(found: Found) -> Iterator[Row]:
    """Where the run would train."""
    if gpu_is_possible() and not found.is_quick:
        yield "device", *resources.check_device(found.plan.needs, found.args.low_memory)
    else:
        yield "device", "no GPU: training on the CPU", OK


CHECKS: tuple[Check, ...] = (
    ("subjects", "", find_concepts),
    ("photos", "concepts", find_photos),
    ("prompt", "base concepts", check_prompts),
    ("class images", "base concepts", check_classes),
    ("base model", "base dataset", make_the_plan),
    ("start", "plan", find_start),
    ("schedule", "sources", check_numbers),
    ("disk", "sources", check_disk_space),
    ("device", "sources", check_the_device),
)
