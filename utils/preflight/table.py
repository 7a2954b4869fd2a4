"""Everything that is checked before a model is loaded, as one table with one verdict."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from utils.data.concepts import Concept, load_photos, read_concepts
from utils.dataset import InstanceDataset
from utils.errors import EXIT_USER_ERROR, UserError
from utils.models.check import check_base_model
from utils.models.folder import BaseModel, default_save_dtype, num_parameters
from utils.preflight.output import check_output_dir, check_resolution
from utils.preflight.photos import describe_duplicates, describe_photo
from utils.preflight.prompt import describe_prompt
from utils.preflight.resources import check_device, check_disk
from utils.run.plan import Plan, fill_in_defaults, make_plan
from utils.run.resume import Sources, prepare_start
from utils.runtime import environment
from utils.runtime.gpu import gpu_is_possible, gpu_is_usable

OK, NOTE, STOP = "ok", "note", "STOP"
T = TypeVar("T")


class PreflightResult(NamedTuple):
    """What a run does and what it is made from; both None if a check failed, which only a dry run survives.

    `exit_code` is a dry run's.
    """

    plan: Plan | None
    sources: Sources | None
    exit_code: int


class PreflightTable:
    """Rows of (check, finding, verdict). Without `collects`, the first problem is raised instead."""

    def __init__(self, collects: bool):
        self.collects = collects
        self.rows: list[tuple[str, str, str]] = []

    def add(self, check: str, finding: str, verdict: str = OK) -> None:
        """One row; what a file's name might do to a terminal is made visible."""
        plain = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in finding)
        self.rows.append((check, plain, verdict))

    def run(self, check: str, function: Callable[..., T], *args: object, **options: object) -> T | None:
        """What `function` returns; None if it raised a UserError, which is then a row."""
        try:
            return function(*args, **options)
        except UserError as error:
            if not self.collects:
                raise
            self.add(check, str(error), STOP)
            return None

    def add_run(self, check: str, function: Callable[..., tuple[str, str]], *args: object, **options: object) -> None:
        """A row with what `function` returns: a finding and a verdict."""
        row = self.run(check, function, *args, **options)
        if row is not None:
            self.add(check, *row)

    @property
    def num_problems(self) -> int:
        """Rows that stop the run."""
        return sum(verdict == STOP for *_, verdict in self.rows)

    def __str__(self) -> str:
        width = max(len(check) for check, *_ in self.rows)
        lines = [f"{verdict:<4}  {check:<{width}}  {finding}" for check, finding, verdict in self.rows]
        notes = sum(verdict == NOTE for *_, verdict in self.rows)
        counted = f"{len(self.rows)} checks, {notes} notes"
        verdict = f"NOT READY: {self.num_problems} to fix" if self.num_problems else "ready to train"
        return "\n".join(["preflight", *lines, f"{verdict} ({counted})"])


def run_preflight(args: Namespace) -> PreflightResult:
    """Makes all the checks and prints the table on rank 0.

    Raises UserError at the first problem, but with --dry_run lists all of them.
    """
    table = PreflightTable(collects=args.dry_run)
    base, save_dtype = _check_model_and_output(table, args)
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
    plan, sources = None, None
    if base is not None and concepts and dataset is not None and save_dtype is not None:
        plan, sources = _check_start(table, args, save_dtype, base, concepts, dataset)
    if environment.is_main():
        print(table, flush=True)
    return PreflightResult(plan, sources, EXIT_USER_ERROR if table.num_problems else 0)


def _check_model_and_output(table: PreflightTable, args: Namespace) -> tuple[BaseModel | None, str | None]:
    """The base, and the dtype of its UNet's file, which the result has by default."""
    base = table.run("base model", check_base_model, args.pretrained_model_name_or_path)
    if base is not None:
        table.run("resolution", check_resolution, args.resolution, base)
    others = ("pretrained_model_name_or_path", "instance_data_dir", "tokenizer_name")
    folders = {flag: getattr(args, flag) for flag in others}
    table.run("output", check_output_dir, args.output_dir, folders, args.export_single_file)
    if base is None or args.save_dtype:
        return base, args.save_dtype
    return base, table.run("base model", default_save_dtype, base.unet_weights)


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
    counts = dict(num_photos=len(dataset), num_ranks=num_ranks)
    args = fill_in_defaults(args, on_gpu=gpu_is_usable(), save_dtype=save_dtype, **counts)
    plan = make_plan(args, num_parameters=count, num_ranks=num_ranks)
    start = table.run("start", prepare_start, plan, base, concepts, dataset, dry_run=args.dry_run)
    if start is None:
        return plan, None
    first_step = start.checkpoint.step if start.checkpoint else 0
    origin = f"{start.checkpoint.path}, " if start.checkpoint else ""
    table.add("start", f"{origin}step {first_step} of {plan.num_steps}, into {plan.output_dir}")
    every = plan.checkpointing_steps
    planned = dict(plan.checkpoints, num_checkpoints=plan.num_steps // every - first_step // every)
    table.add_run("disk", check_disk, base, plan.output_dir, **planned)
    if gpu_is_possible():
        table.add_run("device", check_device, plan.needs, args.low_memory)
    else:
        table.add("device", "no GPU: training on the CPU")
    return plan, Sources(base, concepts, dataset, start)
