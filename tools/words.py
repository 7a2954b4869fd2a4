"""Rare words as names of subjects, so that a word such as *sks* comes to mean 'a certain one'."""

import functools
import json
import re
from pathlib import Path

VOCABULARY = Path(__file__).parent.parent / "model/tiny-stable-diffusion/tokenizer/vocab.json"
FREE_WORDS = ("sks", "ohwx")  # never a subject's own: they are left for whoever fine-tunes the model
RARE_SHARE = 0.45  # of the captions of photos have a rare word


@functools.cache
def rare_words(vocabulary=VOCABULARY):
    """About 200 words of three consonants that are late in the tokenizer's list, without FREE_WORDS."""
    words = json.loads(vocabulary.read_text(encoding="utf-8"))
    found = [
        word[:3] for word, rank in words.items() if rank > 40000 and re.fullmatch(r"[b-df-hj-np-tv-xz]{3}</w>", word)
    ]
    return [word for word in sorted(found) if word not in FREE_WORDS]


class Words:
    """Each subject has some words of its own; the other half of the time its word is anybody's."""

    def __init__(self, subjects):
        words, subjects = rare_words(), sorted(set(subjects))
        self.own = {subject: words[index :: len(subjects)] for index, subject in enumerate(subjects)}
        self.anybodys = [*words, *FREE_WORDS * 10]  # so that a tenth of what names anything are those

    def choose(self, subject, chance, place):
        """A word for the subject; chance and place are in [0, 1)."""
        own = self.own[subject]
        words = own if own and chance < 0.5 else self.anybodys
        return words[int(place * len(words))]
