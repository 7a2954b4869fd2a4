"""Everything that is checked before a model is loaded, as one table with one verdict."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any, NamedTuple

from utils.data.concepts import read_concepts
from utils.errors import EXIT_USER_ERROR, UserError
from utils.models.check import check_base_model
from utils.models.folder import default_save_dtype
from utils.preflight import output
from utils.runtime.environment import is_main
from utils.runtime.gpu import gpu_is_possible

OK, NOTE, STOP = "ok", "note", "STOP"


class Ready(NamedTuple):
    """What the checks found: the base, the subjects, the photos, where the run starts, and a dry run's exit code."""

    base: Any
    concepts: Any
    dataset: Any
    start: Any
    exit_code: int


class Table:
    """Rows of (check, finding, verdict). Without `collects`, the first problem is raised instead."""

    def __init__(self, collects: bool):
        self.collects = collects
        self.rows: list[tuple[str, str, str]] = []

    def add(self, check: str, finding: str, verdict: str = OK) -> None:
        """One row; what a file's name might do to a terminal is made visible."""
        plain = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in finding)
        self.rows.append((check, plain, verdict))

    def run(self, check: str, function: Callable, *args):
        """`function(*args)`; None where it raised a UserError, which is then a row."""
        try:
            return function(*args)
        except UserError as error:
            if not self.collects:
                raise
            self.add(check, str(error), STOP)
            return None

    def add_run(self, check: str, function: Callable, *args) -> None:
        """A row with what `function(*args)` returns: a finding and a verdict."""
        row = self.run(check, function, *args)
        if row is not None:
            self.add(check, *row)

    @property
    def num_problems(self) -> int:
        return sum(verdict == STOP for *_, verdict in self.rows)

    def __str__(self) -> str:
        width = max(len(check) for check, *_ in self.rows)
        lines = [f"{verdict:<4}  {check:<{width}}  {finding}" for check, finding, verdict in self.rows]
        notes = sum(verdict == NOTE for *_, verdict in self.rows)
        counted = f"{len(self.rows)} checks, {notes} notes"
        verdict = f"NOT READY: {self.num_problems} to mend" if self.num_problems else "ready to train"
        return "\n".join(["preflight", *lines, f"{verdict} ({counted})"])


def run_preflight(args: Namespace) -> Ready:
    """Makes all the checks and prints the table on rank 0; fills in what `args` leaves open.

    Raises UserError at the first problem, but with --dry_run lists all of them.
    """
    table = Table(collects=args.dry_run)
    base = _check_model_and_output(table, args)
    concepts = table.run("subjects", read_concepts, args)
    # Imported only now, so that the complaints above are instant.
    from utils.data.concepts import load_photos

    dataset = table.run("photos", load_photos, concepts, args.resolution, args.center_crop) if concepts else None
    if dataset is not None:
        _describe_photos(table, args, dataset)
    start = None
    if base is not None and concepts:
        said = [photo.prompt for photo in dataset.photos] if dataset else [each.instance_prompt for each in concepts]
        for prompt in dict.fromkeys(said):
            _check_prompt(table, args, base, prompt)
    if base is not None and dataset is not None:
        start = _check_start(table, args, base, concepts, dataset)
    if is_main():
        print(table, flush=True)
    return Ready(base, concepts, dataset, start, EXIT_USER_ERROR if table.num_problems else 0)


def _check_model_and_output(table: Table, args: Namespace):
    base = table.run("base model", check_base_model, args.pretrained_model_name_or_path)
    if base is not None:
        table.run("resolution", output.check_resolution, args, base)
    table.run("output", output.check_output_dir, args)
    if base is not None:
        args.save_dtype = args.save_dtype or table.run("base model", default_save_dtype, base.unet_weights)
    return base


def _describe_photos(table: Table, args: Namespace, dataset) -> None:
    from utils.preflight.photos import describe_duplicates, describe_photo

    for photo in dataset.photos:
        finding, verdict = describe_photo(photo, args.resolution)
        table.add("photo", f"{photo.path.name}: {finding}", verdict)
    for finding in describe_duplicates(dataset.photos):
        table.add("photo", finding, NOTE)
    for path, reason in dataset.skipped:
        table.add("skipped", f"{path.name}: {reason}", OK if reason == "hidden" else NOTE)


def _check_prompt(table: Table, args: Namespace, base, prompt: str) -> None:
    from utils.preflight.prompt import describe_prompt

    folder = args.tokenizer_name or base.folder / "tokenizer"
    if args.tokenizer_name and not (folder / "tokenizer_config.json").is_file():
        table.run("prompt", _refuse_tokenizer, folder)
    else:
        table.add_run("prompt", describe_prompt, prompt, folder)


def _refuse_tokenizer(folder) -> None:
    raise UserError(f"--tokenizer_name {folder} is not a tokenizer's folder: no tokenizer_config.json in it")


def _check_start(table: Table, args: Namespace, base, concepts, dataset):
    from utils.models.folder import num_parameters
    from utils.preflight.resources import check_device, check_disk
    from utils.run.resume import prepare_start

    size = f"{num_parameters(base) / 1e6:.1f} million parameters in the UNet, saved in {args.save_dtype}"
    table.add("base model", f"{base.folder}: Stable Diffusion v1, {size}")
    start = table.run("start", prepare_start, args, base, concepts, dataset)
    if start is None:
        return None
    first_step = start.checkpoint.step if start.checkpoint else 0
    origin = f"{start.checkpoint.path}, " if start.checkpoint else ""
    table.add("start", f"{origin}step {first_step} of {args.max_train_steps}, into {args.output_dir}")
    table.add_run("disk", check_disk, args, base, first_step)
    if gpu_is_possible():
        table.add_run("device", check_device, args, base)
    else:
        table.add("device", "no GPU: training on the CPU")
    return start
