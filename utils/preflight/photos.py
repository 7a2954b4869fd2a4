"""What the preflight table says of photos and prompts."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from utils.concepts import Concept
from utils.dataset import InstanceDataset, Photo
from utils.errors import UserError

SMALL_SHARE = 0.5  # of a photo in a crop
# Measured on real photos (docs/photos.md).
FEW_PHOTOS = 3
BLURRED = 0.55  # blur effect, of crops of SHARP_PIXELS or more
SHARP_PIXELS = 192
SMALL_FACTOR = 2.0  # enlarged by it, most sharp photos are as soft as a blurred one
NEAR_BITS = 8  # of the 64 of a difference hash
MAX_TOKENS = 77
PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's


def describe_photos(dataset: InstanceDataset) -> Iterator[tuple[str, str, str]]:
    """The table's rows: folders, each photo, captions, duplicates, and what was skipped."""
    for folder, count in Counter(photo.path.parent.resolve() for photo in dataset.photos).items():
        few = "; with fewer than three the model learns the pictures, not the subject" if count < FEW_PHOTOS else ""
        yield "photos", f"{count} in {folder}{few}", "note" if few else "ok"
    for photo in dataset.photos:
        finding, verdict = describe_photo(photo, dataset)
        yield "photo", f"{photo.path.name}: {finding}", verdict
    if captions := describe_captions(dataset):
        yield "captions", *captions
    for finding in describe_duplicates(dataset.photos):
        yield "photo", finding, "note"
    for path, reason in dataset.skipped:
        is_meant = reason == "hidden" or path.name.lower().startswith(("readme", "license", "licence"))
        yield "skipped", f"{path.name}: {reason}", "ok" if is_meant else "note"


def describe_photo(photo: Photo, dataset: InstanceDataset) -> tuple[str, str]:
    """Format, size, what is done to one of a dataset's photos and how much of it is used, and "ok" or "note"."""
    width, height = photo.original_size
    said, notes = list(photo.done), list(photo.notes)
    factor = dataset.resolution / min(width, height)
    if factor >= SMALL_FACTOR:
        notes.append(f"enlarged {factor:.1f} times, it will look soft")
    elif factor <= 1 and dataset.resolution >= SHARP_PIXELS and blur_effect(photo.pixels) > BLURRED:
        notes.append("blurred: use a sharper one")
    rows, columns = photo.pixels.shape[1:]
    share = dataset.resolution**2 / (rows * columns)
    if share < 1:
        shown = f"the middle {share:.0%} is used" if dataset.center_crop else f"each crop shows {share:.0%}"
        (notes if share < SMALL_SHARE else said).append(shown)
    return ", ".join(said + notes), "note" if notes else "ok"


def describe_captions(dataset: InstanceDataset) -> tuple[str, str] | None:
    """How many photos have a caption, and "ok" or "note"; None if none has."""
    given, total = dataset.num_captions, len(dataset)
    if not given:
        return None
    if given == total:
        return f"of all {total} photos", "ok"
    without = [photo.path.name for photo in dataset.photos if photo.prompt == dataset.instance_prompt]
    rest = f"; the others, such as {without[0]}, show {dataset.instance_prompt!r}" if without else ""
    return f"of {given} of {total} photos{rest}", "note"


def blur_effect(pixels: np.ndarray) -> float:
    """0 to 1 of uint8 [3,H,W]: how much of the differences between neighbours stays when they are blurred again (Crete
    et al., The blur effect, 2007), in the direction in which more does.
    """
    grey, found = pixels.mean(axis=0, dtype=np.float32), [0.0]
    for image in (grey, grey.T):
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(image, ((0, 0), (4, 4)), mode="edge"), 9, axis=1)
        before, after = (np.abs(np.diff(each, axis=1)) for each in (image, windows.mean(axis=-1)))
        if before.any():
            found.append(1 - float(np.maximum(before - after, 0).sum() / before.sum()))
    return max(found)


def difference_hash(pixels: np.ndarray) -> np.ndarray:
    """64 times whether brightness grows from left to right, bool [8,8], of uint8 [3,H,W]."""
    image = Image.fromarray(pixels.transpose(1, 2, 0)).convert("L").resize((9, 8), Image.Resampling.BOX)
    return np.asarray(image)[:, :-1] < np.asarray(image)[:, 1:]


def describe_duplicates(photos: list[Photo]) -> Iterator[str]:
    """A phrase for photos that are one file again, and one for those that are nearly the same."""
    hashes = {photo.sha256: difference_hash(photo.pixels) for photo in photos}

    def in_groups(among: list[Photo], is_like: Callable[[Photo, Photo], bool]) -> str:
        groups: list[list[Photo]] = []
        for photo in among:
            group = next((group for group in groups if is_like(group[0], photo)), [])
            groups += [] if group else [group]
            group.append(photo)
        return "; ".join(", ".join(photo.path.name for photo in group) for group in groups if group[1:])

    if again := in_groups(photos, lambda one, other: one.sha256 == other.sha256):
        yield f"the same file twice: {again}: keep one of them"
    once = list({photo.sha256: photo for photo in photos}.values())
    if near := in_groups(once, lambda one, other: (hashes[one.sha256] != hashes[other.sha256]).sum() <= NEAR_BITS):
        yield f"nearly alike: {near}; keep one and add other views"


def load_quick_tokenizer(folder: Path) -> Tokenizer:
    """The folder's CLIP tokenizer without transformers, whose import takes seconds; it has no learned tokens."""
    try:
        if not (folder / "vocab.json").is_file():
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        split = (line.split() for line in lines if line and not line.startswith("#version"))
        merges = [(left, right) for left, right in split]
        unknown = "<|endoftext|>"
        bpe = models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=unknown, fuse_unk=False)
    except Exception as error:  # tokenizers raises Exception itself
        reason = " ".join(str(error).split())
        raise UserError(f"{folder} holds no CLIP tokenizer ({reason}); copy or download it again") from None
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    return tokenizer


def rarest_word(prompt: str, tokenizer: Tokenizer) -> str:
    """Of what the prompt shows, before any 'on' or 'with': the word of most tokens, or of the largest number."""
    shown = re.split(r"\b(?:at|by|in|near|on|with)\b", re.split(r"\bof\b", prompt, maxsplit=1)[-1])[0]
    ids = {word: tokenizer.encode(word, add_special_tokens=False).ids for word in re.findall(r"\w+", shown)}
    return max(ids, key=lambda word: (len(ids[word]), ids[word]), default="")


def describe_names(concepts: Sequence[Concept], photos: Sequence[Photo], tokenizer: Tokenizer) -> Iterator[str]:
    """A phrase for each subject that is not named in the captions which replace its prompt."""
    for concept in concepts:
        prompts = [photo.prompt for photo in photos if photo.path.parent == concept.instance_data_dir]
        word = rarest_word(concept.instance_prompt, tokenizer)
        without = [each for each in prompts if not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", each, re.IGNORECASE)]
        if word and without:
            yield (
                f"{len(without)} of {len(prompts)} photos have a caption without {word!r}: what they show is not "
                f"learned under that word; write it into them, or remove them"
            )


def describe_prompt(prompt: str, tokenizer: Tokenizer) -> tuple[str, str]:
    """How many tokens the prompt has, and what is cut off beyond 77 of them."""
    encoding = tokenizer.encode(prompt, add_special_tokens=False)
    count, room = len(encoding.tokens) + 2, MAX_TOKENS - 2  # start and end
    if count > MAX_TOKENS:
        cut_off = prompt[encoding.offsets[room][0] :]
        return f"{count} tokens, but {MAX_TOKENS} are read; cut off: {cut_off!r}", "note"
    return f"{prompt!r}: {count} of {MAX_TOKENS} tokens", "ok"
