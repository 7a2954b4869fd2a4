"""What a run is about: its subjects, each with photos and a prompt, and with a class where the prior is preserved."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from utils.dataset import InstanceDataset
from utils.errors import UserError
from utils.files.ownership import overlap
from utils.values import as_path, as_prompt, meant, read_text

FIELDS = ("instance_prompt", "instance_data_dir", "class_prompt", "class_data_dir")


class Concept(NamedTuple):
    """One subject; class_prompt and class_data_dir are None if nothing names them."""

    instance_prompt: str
    instance_data_dir: Path
    class_prompt: str | None
    class_data_dir: Path | None


def read_concepts(
    subject: Concept, concepts_list: Path | None, output_dir: Path, *, with_prior_preservation: bool
) -> list[Concept]:
    """The subjects of --concepts_list, or `subject`, the flags' own; UserError for a wrong list or shared folders."""
    concepts = [subject]
    if concepts_list:
        concepts = read_list(concepts_list, with_prior_preservation=with_prior_preservation)
        if not with_prior_preservation:
            concepts = [concept._replace(class_prompt=None, class_data_dir=None) for concept in concepts]
    _check_folders(concepts, output_dir)
    return concepts


def read_list(path: Path, *, with_prior_preservation: bool = False) -> list[Concept]:
    """The subjects of a --concepts_list; with prior preservation each has its class. Raises UserError."""
    try:
        entries = json.loads(read_text(path, f"--concepts_list {path}"))
    except json.JSONDecodeError as error:
        raise UserError(f"--concepts_list {path} cannot be read as JSON: {error}") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"--concepts_list {path} is not a list of objects with {', '.join(FIELDS)}")
    return [
        _concept(entry, f"--concepts_list {path}, concept {number}", with_prior_preservation)
        for number, entry in enumerate(entries, 1)
    ]


def _concept(entry: dict, where: str, with_prior_preservation: bool) -> Concept:
    unknown = sorted(entry.keys() - set(FIELDS))
    if unknown:
        raise UserError(f"{where}: there is no field {unknown[0]!r}; the fields are {', '.join(FIELDS)}")
    texts = {name: text for name, text in entry.items() if isinstance(text, str) and meant(text)}
    for field in FIELDS if with_prior_preservation else FIELDS[:2]:
        if field not in texts:
            why = ", which --with_prior_preservation needs" if field in FIELDS[2:] else ""
            raise UserError(f"{where}: {field!r} is missing or empty{why}")
    kinds: dict[str, Callable[[str, str], Any]] = dict(zip(FIELDS, (as_prompt, as_path) * 2, strict=True))
    values = {name: kinds[name](text, f"{where}: {name} ") for name, text in texts.items()}
    return Concept(**dict.fromkeys(FIELDS) | values)


def _check_folders(concepts: list[Concept], output_dir: Path) -> None:
    class_prompts: dict[Path, str | None] = {}
    for concept in concepts:
        if overlap(concept.instance_data_dir, output_dir):
            raise UserError(f"--output_dir {output_dir} overlaps the photos' folder {concept.instance_data_dir}")
        folder = concept.class_data_dir
        if folder is None:
            continue
        if os.path.lexists(folder) and not folder.is_dir():
            raise UserError(f"--class_data_dir {folder} is not a folder")
        for other in (output_dir, *(each.instance_data_dir for each in concepts)):
            if overlap(folder, other):
                raise UserError(f"--class_data_dir {folder} overlaps {other}; give the class images their own folder")
        if class_prompts.setdefault(folder.resolve(), concept.class_prompt) != concept.class_prompt:
            raise UserError(f"--class_data_dir {folder} is given for two class prompts: give each a folder of its own")


def load_photos(concepts: list[Concept], resolution: int, **options: bool) -> InstanceDataset:
    """One InstanceDataset of all subjects' photos, with its options."""
    dataset, *others = [
        InstanceDataset(concept.instance_data_dir, resolution, prompt=concept.instance_prompt, **options)
        for concept in concepts
    ]
    for other in others:
        dataset.extend(other)
    return dataset
