"""What is said of a prompt."""

import pytest

from tests.helpers.script import EMBEDDED
from utils.preflight.prompt import describe_prompt, load_quick_tokenizer, readable_pieces

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


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("café", ["café|"]),
        ("naïve кот", ["na", "ï", "ve|", "к", "о", "т|"]),
        ("a 🐈", ["a|", "🐈|"]),
        ("sksdog", ["sk", "s", "dog|"]),
    ],
)
def test_pieces_are_text_and_not_the_names_of_bytes(prompt, pieces):
    tokens = load_quick_tokenizer(EMBEDDED / "tokenizer").encode(prompt, add_special_tokens=False).tokens
    assert readable_pieces(tokens) == pieces


def test_a_character_in_several_tokens_is_one_piece():
    tokens = load_quick_tokenizer(EMBEDDED / "tokenizer").encode("𓃠", add_special_tokens=False).tokens
    assert len(tokens) > 1 and readable_pieces(tokens) == ["𓃠|"]


def test_the_tail_of_a_long_prompt_is_named():
    words = "a photo of " + "cat " * 72
    assert describe_prompt(words, EMBEDDED / "tokenizer")[1] == "ok"
    finding, verdict = describe_prompt(words + "in the rain", EMBEDDED / "tokenizer")
    assert finding == "80 tokens, but 77 are read; cut off: 'in the rain'" and verdict == "note"
