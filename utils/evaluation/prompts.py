"""The prompts an evaluation draws, and what they call the subject.

They are the user's, the DreamBooth paper's 25, the subject in other places, and some without the subject.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from utils.files.json_files import read_json

SUBJECT, PLACE, CLASS, OTHER = "subject", "place", "class", "other"
# What other prompts show; the embedded model knows all of them.
OTHER_THINGS = ("dog", "house", "car", "tree", "flower", "boat", "chair", "apple", "clock", "cup", "bird", "cat")
WORDS = ("astronaut", "street", "cat", "dog", "bird", *OTHER_THINGS)  # what the class is told from
NUM_OTHERS, NUM_WORDS = 8, 12
PLACES = ("in the jungle", "in the snow", "on the beach", "with a city in the background")  # of the paper's
EMBEDDED_MODEL = "tiny-stable-diffusion"
EMBEDDED_PLACES = ("on a red background", "on grass", "on a blue background", "in front of a brick wall")
MOST_PROMPTS = 4  # of the subject; more are places themselves
ARTICLES = ("a", "an", "the")
PREPOSITIONS = (
    *("of", "with", "in", "on", "at", "by", "and", "for", "from", "near", "like", "under", "over", "behind", "beside"),
    *("against", "inside", "outside", "next", "to", "during", "among", "between", "without", "is", "are", "was", "as"),
)
PHOTO_OF = re.compile(r"\bphoto of\s+", re.IGNORECASE)

DREAMBENCH = {kind: read_json(Path(__file__).with_name("dreambench.json"))[kind] for kind in ("object", "live")}


class Prompt(NamedTuple):
    """A prompt and its part in the evaluation: of the subject, its places, its class, or of other things."""

    text: str
    role: str

    @property
    def folder(self) -> str:
        """Its images' folder below images/<model>/: the same for a text, whichever other prompts there are."""
        name = slug(self.text)
        says_all = name.replace("-", " ") == self.text
        return name if says_all else f"{name}-{hashlib.sha256(self.text.encode()).hexdigest()[:8]}"


class Subject(NamedTuple):
    """What the subject is one of, such as cat, and its own name in prompts, such as sks; None if it was not told."""

    class_name: str | None
    identifier: str | None


def read_subject(prompts: list[str], class_name: str | None = None) -> Subject:
    """The class, if it is not known, and the identifier by the prompts of the subject's photos; most decide."""
    found = Counter(_subject_in(prompt, class_name) for prompt in prompts)
    if not found:
        return Subject(class_name, None)
    return max(found, key=lambda subject: (found[subject], sum(part is not None for part in subject)))


def _subject_in(prompt: str, class_name: str | None) -> Subject:
    """Of one prompt: its name is the word before the class; else it and its class are the words after 'photo of'."""
    named = re.search(rf"(?:^|(\S+)\s+){re.escape(class_name)}(?!\w)", prompt, re.IGNORECASE) if class_name else None
    if named:
        is_name = named[1] and named[1].lower() not in ARTICLES + PREPOSITIONS
        return Subject(class_name, named[1] if is_name else None)
    _, *after = PHOTO_OF.split(prompt, maxsplit=1)
    phrase = noun_phrase(after[0]) if after else []
    words = without_article(phrase)
    if len(words) > 1:
        return Subject(class_name or " ".join(words[1:]), words[0])
    if words == phrase:  # 'a photo of sks': a word without an article is no class
        return Subject(class_name, words[0] if words and class_name else None)
    return Subject(class_name or " ".join(words) or None, None)


def class_in(class_prompt: str) -> str | None:
    """The class that its prompt names; none in 'a photo of sks cat', which preserves another subject."""
    phrase = noun_phrase(PHOTO_OF.split(class_prompt, maxsplit=1)[-1])
    words = without_article(phrase)
    return " ".join(words) if len(words) == 1 or words != phrase else None


def noun_phrase(text: str) -> list[str]:
    """The words up to a preposition or a mark: 'my cat on a rug' gives ['my', 'cat']."""
    words = re.split(r"[,;:.!?](?:\s|$)", text.strip())[0].split()
    return list(takewhile(lambda word: word.lower() not in PREPOSITIONS, words))


def without_article(words: list[str]) -> list[str]:
    return words[1:] if words and words[0].lower() in ARTICLES else words


def dreambench_prompts(kind: str, identifier: str, class_name: str) -> list[str]:
    """The paper's 25 prompts of `kind` (live or object) with the identifier and the class filled in."""
    return [template.format(identifier, class_name) for template in DREAMBENCH[kind]]


def all_prompts(
    subject: list[str], class_name: str | None, other: list[str], places: Sequence[str] = ()
) -> list[Prompt]:
    """All prompts of an evaluation, in order, each text once; the class prompt comes if the class is known."""
    roles = [(text, SUBJECT) for text in subject]
    if len(subject) <= MOST_PROMPTS:
        roles += [(in_place(subject[0], class_name, place), PLACE) for place in places]
    if class_name:
        roles.append((class_prompt(class_name), CLASS))
    roles += [(text, OTHER) for text in other]
    first: dict[str, str] = {}
    for text, role in roles:
        first.setdefault(text, role)
    return [Prompt(text, role) for text, role in first.items()]


def in_place(prompt: str, class_name: str | None, place: str) -> str:
    """The prompt up to its class, somewhere else: 'a photo of my cat.' becomes 'a photo of my cat on the beach'."""
    named = re.match(rf".*?(?<!\w){re.escape(class_name)}(?!\w)", prompt, re.IGNORECASE) if class_name else None
    return f"{named[0] if named else prompt.rstrip(' .,;!')} {place}"


def places_for(baseline: Path) -> tuple[str, ...]:
    """Where the subject is drawn, in words that the baseline knows."""
    return EMBEDDED_PLACES if is_embedded(baseline) else PLACES


def is_embedded(folder: Path) -> bool:
    return EMBEDDED_MODEL in (folder.name, folder.resolve().name)


def class_prompt(class_name: str) -> str:
    return f"a photo of {article(class_name)} {class_name}"


def other_prompts(class_name: str) -> list[str]:
    """Eight prompts of things that the subject is not."""
    return [class_prompt(thing) for thing in _things(class_name, OTHER_THINGS)[:NUM_OTHERS]]


def dozen_words(class_name: str) -> list[str]:
    """The class, and eleven other things."""
    return [class_name, *_things(class_name, tuple(dict.fromkeys(WORDS)))][:NUM_WORDS]


def _things(class_name: str, things: Sequence[str]) -> list[str]:
    return [thing for thing in things if thing not in class_name.lower().split()]


def slug(text: str) -> str:
    """Lower-case ASCII letters, digits and hyphens, 40 at most: a folder name on every file system."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text).strip("-")[:40].rstrip("-") or "prompt"


def without_identifier(text: str, identifier: str | None) -> str:
    """The prompt as of any such thing: 'a photo of sks cat' and 'a photo of my cat' become 'a photo of a cat'."""
    pattern = re.compile(rf"(?<!\w)(?:{re.escape(identifier or '')}(?!\w)\s*)+", re.IGNORECASE)
    match = pattern.search(text) if identifier else None
    if match is None:
        return text
    before, after = text[: match.start()].split(), text[match.end() :]
    has_article = False
    for word in reversed(before):  # the words of the same noun phrase
        has_article = word.lower() in ARTICLES
        if has_article or word.lower() in PREPOSITIONS:
            break
    if has_article and before[-1].lower() in ("a", "an"):
        before[-1] = before[-1][0] + article(after)[1:]
    elif not has_article and after[:1].isalpha():
        before.append(article(after))
    return " ".join([*before, without_identifier(after, identifier)]).strip()


def article(noun: str) -> str:
    return "an" if noun[:1].lower() in ("a", "e", "i", "o", "u") else "a"
