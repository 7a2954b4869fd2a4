"""What is said of a prompt."""

import pytest

from tests.helpers.script import EMBEDDED
from utils.preflight.prompt import describe_prompt, load_quick_tokenizer

PROMPTS = ["a photo of my cat.", "A  sks's DOG\n42!", "кот 🐈 naïve", "", "x" * 30, "<|endoftext|> don't", "a_b-c/d"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_quick_tokenizer_is_that_of_transformers(prompt, tiny_pipeline_dir):
    from utils.models.loading import load_tokenizer

    for folder in (EMBEDDED, tiny_pipeline_dir):
        expected = load_tokenizer(folder)(prompt, add_special_tokens=False).input_ids
        assert load_quick_tokenizer(folder / "tokenizer").encode(prompt, add_special_tokens=False).ids == expected


def test_how_a_prompt_is_split():
    finding, verdict = describe_prompt("a photo of sks cat", EMBEDDED / "tokenizer")
    assert finding == "7 tokens: a| photo| of| sks| cat|" and verdict == "ok"


def test_the_tail_of_a_long_prompt_is_named():
    words = "a photo of " + "cat " * 72
    assert describe_prompt(words, EMBEDDED / "tokenizer")[1] == "ok"
    finding, verdict = describe_prompt(words + "in the rain", EMBEDDED / "tokenizer")
    assert finding == "80 tokens, but 77 are read; cut off: 'in the rain'" and verdict == "note"
