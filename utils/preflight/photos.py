"""What the preflight table says of photos and prompts."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from utils.concepts import Concept
from utils.dataset import InstanceDataset, Photo
from utils.errors import UserError

LARGE_PIXELS = 50_000_000
SMALL_FACTOR = 1.5  # enlarging a photo more than so is worth a note
SMALL_SHARE = 0.5  # of a photo in a crop
NEAR_BITS = 6  # of the 64 of a difference hash
MAX_TOKENS = 77
PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's


def describe_photos(dataset: InstanceDataset) -> Iterator[tuple[str, str, str]]:
    """The table's rows: folders, each photo, captions, duplicates, and what was skipped."""
    for folder, count in Counter(photo.path.parent.resolve() for photo in dataset.photos).items():
        yield "photos", f"{count} in {folder}", "ok"
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
    notes += [f"enlarged {factor:.1f} times, it will look soft"] if factor > SMALL_FACTOR else []
    notes += [f"very large ({width * height / 1e6:.0f} megapixels)"] if width * height > LARGE_PIXELS else []
    if photo.bars:
        sides = ", ".join(f"{side} {pixels}" for side, pixels in photo.bars.items())
        notes.append(f"bars of one colour are learned too, cut them off ({sides} pixels)")
    rows, columns = photo.pixels.shape[1:]
    share = dataset.resolution**2 / (rows * columns)
    if share < 1:
        shown = f"the middle {share:.0%} is used" if dataset.center_crop else f"each crop shows {share:.0%}"
        (notes if share < SMALL_SHARE else said).append(shown)
    if dataset.alpha_mask and photo.opacity is None:
        notes.append("no transparency: all of it counts in the loss")
    elif photo.opacity is not None and dataset.alpha_mask:
        said.append(f"{photo.opacity.mean() / 255:.0%} of it counts in the loss")
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


def difference_hash(pixels: np.ndarray) -> int:
    """64 bits of whether brightness grows from left to right, of uint8 [3,H,W]."""
    image = Image.fromarray(pixels.transpose(1, 2, 0)).convert("L").resize((9, 8), Image.Resampling.BOX)
    values = list(image.tobytes())
    bits = [values[row * 9 + column] < values[row * 9 + column + 1] for row in range(8) for column in range(8)]
    return sum(bit << place for place, bit in enumerate(bits))


def describe_duplicates(photos: list[Photo]) -> list[str]:
    """A phrase for photos that are one file again, and one for those that are nearly the same; none if all differ."""
    again: dict[int, list[str]] = defaultdict(list)  # {number of the first: names of the others}
    near: dict[int, list[str]] = defaultdict(list)
    hashes = [difference_hash(photo.pixels) for photo in photos]
    for later, photo in enumerate(photos):
        for earlier, other in enumerate(photos[:later]):
            is_again = photo.sha256 == other.sha256
            if is_again or (hashes[later] ^ hashes[earlier]).bit_count() <= NEAR_BITS:
                (again if is_again else near)[earlier].append(photo.path.name)
                break
    said = "the same file twice: {}: keep one of them", "nearly alike: {}; other views and places teach more"
    names = [
        "; ".join(", ".join([photos[first].path.name, *others]) for first, others in group.items())
        for group in (again, near)
    ]
    return [phrase.format(group) for phrase, group in zip(said, names, strict=True) if group]


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
