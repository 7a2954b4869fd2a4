"""Prior preservation's class images: which there are, which are missing, and the dataset of those that are used.

The base model draws them (Ruiz et al. 2023, section 3.2). Each file is a PNG that names in its own metadata the
settings and the seed it was made with, so that a run that was killed continues where it stopped. Images made with
other settings are never mixed in.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from utils.concepts import Concept
from utils.dataset import decode, find_photos
from utils.errors import UserError, first_line
from utils.files.ownership import check_writable
from utils.files.png import save_png
from utils.models.folder import MODEL_PARTS, BaseModel
from utils.photos.captions import looks_like_captions

METADATA_KEY = "dreambooth_class_image"
NUM_INFERENCE_STEPS = 50
GUIDANCE_SCALE = 7.5
PNG_END = b"IEND\xaeB`\x82"


class ClassPlan(NamedTuple):
    """What becomes of one class: `num_found` are there, `missing` are made, `used` are trained on."""

    folder: Path
    prompt: str
    settings: dict
    num_found: int
    missing: list[int]
    used: list[Path]
    notes: list[str]

    def summary(self, num_ranks: int, batch_size: int) -> str:
        """Have, need, will make, will use."""
        spread = f" ({num_ranks} ranks, {batch_size} at a time)" if self.missing else ""
        lines = [
            f"class images {self.prompt!r} in {self.folder}: have {self.num_found}, need {len(self.used)}, "
            f"will make {len(self.missing)}{spread}, will use {len(self.used)}"
        ]
        return "\n".join(lines + self.notes)


def file_name(number: int) -> str:
    """Of class image `number`."""
    return f"class-{number:05d}.png"


def model_hash(base_hashes: dict[str, str]) -> str:
    """One hash of those of the base's files that drawing an image reads, from {path in the folder: SHA-256}."""
    digest = hashlib.sha256()
    for part in MODEL_PARTS:
        for name in sorted(base_hashes):
            if name.startswith(f"{part}/") and not name.startswith(f"{part}/."):
                digest.update(f"{name} {base_hashes[name]}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def generation_settings(base: BaseModel, model: str, prompt: str) -> dict:
    """Everything but the seed that decides what a class image shows; images of equal settings may be mixed."""
    height, width = base.image_size
    return dict(
        prompt=prompt,
        model=model,
        scheduler=base.configs["scheduler"].get("_class_name"),
        num_inference_steps=NUM_INFERENCE_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        height=height,
        width=width,
    )


def plan_class_images(folder: Path, prompt: str, settings: dict, num_class_images: int) -> ClassPlan:
    """What is there and what has to be made, by headers; UserError for images of another origin, or too few."""
    found, foreign = set(), []
    images, others = find_photos(folder, "--class_data_dir", may_be_empty=True) if folder.is_dir() else ([], [])
    if captions := [path for path, _ in others if looks_like_captions(path)]:
        raise UserError(f"--class_data_dir: {captions[0]} looks like captions, which are not read there: move it away")
    for path in images:
        metadata = read_metadata(path)
        if metadata is None:
            foreign.append(path)
            continue
        for name, value in settings.items():
            if (theirs := metadata["settings"].get(name)) != value:
                raise UserError(
                    f"--class_data_dir {folder} holds images made with another {name.replace('_', ' ')}, {theirs!r}, "
                    f"not {value!r}; name another folder, or empty this one"
                )
        found.add(metadata["number"])
    if foreign and not found:
        if len(foreign) < num_class_images:
            raise UserError(
                f"--class_data_dir {folder} holds {len(foreign)} images that this program did not make: give "
                f"--num_class_images {len(foreign)} to train on those, or name an empty folder"
            )
        note = f"this program did not make the images in {folder}: they are taken as {prompt!r}"
        return ClassPlan(folder, prompt, settings, len(foreign), [], foreign[:num_class_images], [note])
    absent = (number for number in itertools.count() if number not in found)
    missing = list(itertools.islice(absent, max(0, num_class_images - len(found))))
    used = [folder / file_name(number) for number in sorted([*found, *missing])[:num_class_images]]
    notes = [f"left out: {len(foreign)} images in {folder} that this program did not make"] if foreign else []
    return ClassPlan(folder, prompt, settings, len(found), missing, used, notes)


def plan_classes(
    concepts: list[Concept], num_class_images: int, settings_of: Callable[[str], dict]
) -> list[ClassPlan]:
    """plan_class_images of every class folder; `settings_of` says what images of a class prompt are made with."""
    classes = {
        concept.class_data_dir.resolve(): (concept.class_data_dir, concept.class_prompt)
        for concept in concepts
        if concept.class_data_dir and concept.class_prompt is not None
    }
    return [plan_class_images(*each, settings_of(each[1]), num_class_images) for each in classes.values()]


def check_class_images(folder: Path, prompt: str, base: BaseModel, num_class_images: int) -> tuple[str, str]:
    """A class's finding and verdict for the table, before the base is hashed; UserError as plan_class_images."""
    settings = generation_settings(base, "", prompt)
    del settings["model"]
    plan = plan_class_images(folder, prompt, settings, num_class_images)
    for path in filter(Path.is_file, plan.used):
        if read_metadata(path) is None:
            decode(path)
            continue
        try:  # one of this program's is known to be whole by its checksums
            with Image.open(path) as image:
                image.verify()
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{path} is damaged ({first_line(error)}); delete it: it will be made again") from None
    if plan.missing:
        check_writable(folder, f"--class_data_dir {folder}")
    found = f"have {plan.num_found}, will make {len(plan.missing)}, will use {len(plan.used)}"
    return "; ".join([f"{prompt!r} in {folder}: {found}", *plan.notes]), "note" if plan.notes else "ok"


def read_metadata(path: Path) -> dict | None:
    """What a class image of this program says of itself; None for others, and for one that is cut short or renamed."""
    if path.suffix != ".png":
        return None
    try:
        with Image.open(path) as image:
            metadata = json.loads(image.info[METADATA_KEY])
        with path.open("rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            whole = file.read() == PNG_END
        named = path.name == file_name(metadata["number"])
        return metadata if whole and named and {"settings", "seed"} <= metadata.keys() else None
    except (OSError, KeyError, TypeError, ValueError):
        return None


def write_class_image(path: Path, image: Image.Image, metadata: dict) -> None:
    """Writes an image as a PNG that read_metadata reads: whole, whenever the run is killed."""
    save_png(path, image, {METADATA_KEY: json.dumps(metadata)})


def check_used(plans: list[ClassPlan]) -> None:
    """Raises UserError if this rank cannot see an image that is to be used."""
    for plan in plans:
        absent = [path for path in plan.used if not path.is_file()]
        if absent:
            raise UserError(f"{absent[0]} cannot be seen from every rank: --class_data_dir has to be shared by all")
