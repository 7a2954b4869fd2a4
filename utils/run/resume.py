"""Whether a run that resumes would still be the same: what it is made from, as hashes."""

import hashlib
import importlib
import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from utils.arguments import training_parser
from utils.concepts import Concept
from utils.data.class_images import plan_classes
from utils.dataset import InstanceDataset, Photo
from utils.errors import UserError, shortened
from utils.files.hashing import in_background, sha256_of
from utils.files.ownership import EXPORTED_FROM, result_of, run_of
from utils.models.folder import FROZEN_PARTS, MODEL_INDEX, MODEL_PARTS, BaseModel
from utils.run import lineage
from utils.run.lineage import Checkpoint
from utils.run.plan import Plan
from utils.runtime import environment
from utils.runtime.process import typed

INPUT_PLACES = (
    *("pretrained_model_name_or_path", "pretrained_vae_name_or_path", "tokenizer_name"),
    *("instance_data_dir", "concepts_list", "class_data_dir"),
)
# Rank 0 alone reads or writes there.
OUTPUT_PLACES = ("output_dir", "logging_dir", "export_single_file", "config")
# Every other argument changes what is trained: a new flag is compared unless it is named here.
NOT_COMPARED = set(
    (
        # Their files are compared by their hashes.
        f"{' '.join(INPUT_PLACES)} "
        # How class images are made; how long the run is, which is compared if the learning rate depends on it.
        "sample_batch_size prior_generation_precision num_train_epochs max_train_steps "
        # The same bits, or the same to rounding.
        "gradient_checkpointing offload_optimizer low_memory no_cuda_graph "
        # What is written, where and when.
        "output_dir save_dtype save_format export_single_file logging_dir report_to "
        "validation_prompt validation_negative_prompt validation_inference_steps validation_guidance_scale "
        "validation_steps num_validation_images checkpointing_steps checkpoints_total_limit "
        # How the run starts and ends.
        "config debug dry_run json resume_from_checkpoint allow_changes overwrite_output_dir max_nonfinite_steps"
    ).split()
)
TRAINED_ON = (*MODEL_PARTS, MODEL_INDEX)  # of a base; the rest of it is copied alone
SCHEDULES_WITHOUT_END = ("constant", "constant_with_warmup")
FLAGS_OF_ONE_START = ("--resume_from_checkpoint", "--overwrite_output_dir", "--allow_changes", "--dry_run", "--json")


class Sources(NamedTuple):
    """What a run is made from, and the checkpoint that it resumes from, if there is one.

    `base_files` are the base's files as they were, {path: (size, mtime)}. `base_hashes` will be what hash_files
    returns; None on other ranks, and in a dry run that needs none.
    """

    base: BaseModel
    concepts: list[Concept]
    dataset: InstanceDataset
    checkpoint: Checkpoint | None
    base_files: dict[Path, tuple[int, int]]
    base_hashes: Future | None
    changes: Sequence[str] = ()  # differences from the run that the checkpoint is of; on rank 0

    @property
    def first_step(self) -> int:
        """Steps that were made before."""
        return self.checkpoint.step if self.checkpoint else 0


def find_sources(
    plan: Plan, base: BaseModel, concepts: list[Concept], dataset: InstanceDataset, *, dry_run: bool
) -> Sources:
    """Finds the checkpoint to resume from; rank 0 compares its run with this one. UserError if it is another."""
    wanted, output_dir = plan.arguments["resume_from_checkpoint"], plan.output_dir
    checkpoint = lineage.find_checkpoint(output_dir, wanted, may_start_over=plan.arguments["overwrite_output_dir"])
    if checkpoint is not None and checkpoint.step > plan.num_steps:
        raise UserError(f"{checkpoint.path} is beyond --max_train_steps {plan.num_steps}: give more or an earlier one")
    files, hashes, replaced = base_files(base), None, {}
    if not plan.arguments["overwrite_output_dir"] and (checkpoint is None or checkpoint.path.parent != output_dir):
        replaced = result_of(output_dir)
    is_compared = environment.is_main() and bool(checkpoint or replaced)
    if is_compared or not dry_run:  # ranks agree on the base, too
        hashes = in_background(hash_files, base)
    sources = Sources(base, concepts, dataset, checkpoint, files, hashes)
    if not environment.is_main():
        return sources
    found = _found(plan, sources) if is_compared else {}
    if replaced:
        check_result(plan, found, replaced)
    if checkpoint is None:
        if wanted:
            print(f"no checkpoint in {output_dir} yet: starting anew", flush=True)
        return sources
    if not dry_run:
        importlib.import_module("utils.runtime.colossal")  # training needs it: it takes as long as the hashing does
    may_spread = environment.is_restarted(run_of(output_dir).get("launch"), may_start_over=False)
    changes = check_same_run(checkpoint, found, plan.arguments, may_spread)
    for change in shortened(changes):
        print(f"changed since the checkpoint: {change}", flush=True)
    _say_what_is_left(output_dir, checkpoint)
    return sources._replace(changes=changes)


def check_result(plan: Plan, determines: dict, replaced: dict) -> None:
    """UserError unless the result that a run would replace, by its run.json, is of the same run, and no longer one."""
    found = ["one of an earlier version"]
    if kept := replaced.get("determines"):
        changes = changes_since(kept, determines, plan.arguments)
        found = [each for each in changes if not each.startswith("class_images:")]  # what is missing is made again
    if (replaced.get("result", {}).get("num_steps") or 0) > plan.num_steps:
        found.append(f"--max_train_steps: {replaced['result']['num_steps']} -> {plan.num_steps}")
    if EXPORTED_FROM in replaced:
        found.append(f"an export of {replaced[EXPORTED_FROM]}")
    if found:
        raise UserError(
            f"--output_dir {plan.output_dir} holds the result of another run ({'; '.join(shortened(found))}): give "
            f"this one a folder of its own (OUTPUT_DIR under run.sh), or replace that with --overwrite_output_dir"
        )


def _found(plan: Plan, sources: Sources) -> dict:
    """The determinants of a run that has not begun: some of the class images may be missing yet."""
    assert sources.base_hashes is not None
    classes = plan_classes(sources.concepts, plan.arguments["num_class_images"], lambda prompt: {})
    class_images = [path for each in classes for path in each.used]
    return determinants(plan, class_images, sources.dataset, sources.base_hashes.result())


def rank_inputs(plan: Plan, sources: Sources) -> dict:
    """What every rank of a run reads from its own command line, environment and disk, as determinants are."""
    places, checkpoint = (*INPUT_PLACES, *OUTPUT_PLACES), sources.checkpoint
    state = hashlib.sha256(json.dumps(checkpoint.state, sort_keys=True).encode()).hexdigest() if checkpoint else ""
    return _found(plan, sources) | dict(
        arguments={name: value for name, value in plan.arguments.items() if name not in places},
        start=f"step {sources.first_step} {state[:8]}".strip(),
    )


def _say_what_is_left(output_dir: Path, checkpoint: Checkpoint) -> None:
    names = ", ".join(later.path.name for later in lineage.left_behind(output_dir, checkpoint))
    if names:
        kept = "they are kept until a checkpoint of that name, or the result, takes their place"
        print(f"the run branches off at step {checkpoint.step}: 'latest' passes over {names}; {kept}", flush=True)


def differences(old: dict, new: dict) -> list[str]:
    """What differs between two results of determinants, a phrase each: "--seed: 0 -> 1"."""
    found = []
    for group in sorted(old.keys() | new.keys()):
        before, after = old.get(group), new.get(group)
        if not (isinstance(before, dict) and isinstance(after, dict)):
            found += [f"{group}: {before!r} -> {after!r}"] if before != after else []
        elif group == "arguments":
            names = sorted(before.keys() | after.keys())
            pairs = [(name, before.get(name), after.get(name)) for name in names]
            found += [f"--{name}: {one!r} -> {other!r}" for name, one, other in pairs if one != other]
        else:
            found += [f"{group}: {name!r} has gone" for name in before if name not in after]
            found += [f"{group}: {name!r} is new" for name in after if name not in before]
            changed = [name for name in before if name in after and before[name] != after[name]]
            found += [f"{group}: {name!r} has changed" for name in changed]
    return found


def changes_since(kept: Mapping, determines: dict, arguments: Mapping[str, Any]) -> list[str]:
    """`differences` from an earlier run; a newer flag counts as left out then, one that has gone is passed over."""
    before = training_defaults(determines["arguments"])
    before |= {name: value for name, value in kept.get("arguments", {}).items() if name in arguments}
    return differences({**kept, "arguments": before}, determines)


def check_same_run(
    checkpoint: Checkpoint, determines: dict, arguments: Mapping[str, Any], may_spread: bool = False
) -> list[str]:
    """Differences from the checkpoint's run; UserError without --allow_changes, unless only ranks may differ."""
    found = changes_since(checkpoint.state.get("determines", {}), determines, arguments)
    is_spread_only = may_spread and all(each.startswith("num_ranks:") for each in found)
    if found and not is_spread_only and not arguments["allow_changes"]:
        raise UserError(
            f"{checkpoint.path} is of a run with other inputs: {'; '.join(shortened(found))}. Give it the same "
            f"inputs, or --allow_changes to continue with the new ones"
        )
    return found


def resume_command(argv: list[str]) -> str:
    """The command line that resumes from the latest checkpoint."""
    kept, skip = [], False
    for word in argv:
        flag, equals, _ = word.partition("=")
        if flag in FLAGS_OF_ONE_START:
            skip = flag == FLAGS_OF_ONE_START[0] and not equals
        elif skip:
            skip = False
        else:
            kept.append(word)
    script = sys.argv[0] if Path(sys.argv[0]).name == "train_dreambooth_colossalai.py" else None
    command = [typed("torchrun"), *environment.torchrun_flags(), script or "train_dreambooth_colossalai.py", *kept]
    return shlex.join([*command, "--resume_from_checkpoint", "latest"])


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


def photo_hashes(photos: Iterable[Photo], instance_prompt: str | None) -> dict[str, str]:
    """{file: SHA-256}, with the prompt if the flags do not say it."""
    said = ((photo, "" if photo.prompt == instance_prompt else f" {photo.prompt!r}") for photo in photos)
    return in_numbered_folders({str(photo.path): photo.sha256 + prompt for photo, prompt in said})


def in_numbered_folders(hashes: Mapping[str, str]) -> dict[str, str]:
    """Files by their names, of several folders by the folder's number too: how a folder is spelled does not matter."""
    paths = [PurePath(file) for file in hashes]
    folders = list(dict.fromkeys(path.parent for path in paths))
    names = [f"{folders.index(path.parent) + 1}/{path.name}" if len(folders) > 1 else path.name for path in paths]
    return dict(zip(names, hashes.values(), strict=True))


def determinants(plan: Plan, class_images: list[Path], dataset: InstanceDataset, base_hashes: dict[str, Any]) -> dict:
    """Everything that the weights after a step depend on, as {name: JSON value}; reads class images and tokenizer."""
    name = plan.arguments["tokenizer_name"]
    tokenizer = sorted(Path(name).glob("*")) if name else []
    return dict(
        arguments=compared_arguments(plan.arguments),
        num_ranks=plan.num_ranks,
        photos=photo_hashes(dataset.photos, plan.arguments["instance_prompt"]),
        class_images=in_numbered_folders({str(path): sha256_of(path) for path in class_images if path.is_file()}),
        base_model={name: each for name, each in base_hashes["sha256"].items() if name.split("/")[0] in TRAINED_ON},
        tokenizer={path.name: sha256_of(path) for path in tokenizer if path.is_file()},
    )


def base_files(base: BaseModel) -> dict[Path, tuple[int, int]]:
    """Size and time of change of every file of the base that the run reads or copies."""
    parts = (*FROZEN_PARTS, "unet")
    found = [base.folder / MODEL_INDEX, *(path for part in parts for path in base.files(part).values())]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in found if path.is_file()}


def hash_files(base: BaseModel) -> dict[str, Any]:
    """Folder and SHA-256 of base_files, by their names in the folder."""
    digests = {path.relative_to(base.folder).as_posix(): sha256_of(path) for path in base_files(base)}
    return dict(folder=str(base.folder), sha256=digests)


def changed_file(sources: Sources) -> Path | None:
    """The first file of the base that is not what it was; where the time of change is another its content decides."""
    before, now = sources.base_files, base_files(sources.base)
    touched = [path for path in before | now if before.get(path) != now.get(path)]
    known = sources.base_hashes.result()["sha256"] if sources.base_hashes and touched else {}
    names = {path: path.relative_to(sources.base.folder).as_posix() for path in touched}
    changed = (path for path in touched if path not in now or sha256_of(path) != known.get(names[path]))
    return next(changed, None)
