"""What is said of a prompt."""

import json
from pathlib import Path

import pytest

from tests.helpers.pipelines import edit_json
from tests.helpers.script import EMBEDDED, as_argv
from train_dreambooth_colossalai import main
from utils.errors import UserError
from utils.models.loading import load_tokenizer, tokenize
from utils.preflight.prompt import (
    check_tokens,
    describe_prompt,
    learned_tokens,
    load_quick_tokenizer,
    readable_pieces,
)

PROMPTS = ["a photo of my cat.", "A  sks's DOG\n42!", "кот 🐈 naïve", "", "x" * 30, "<|endoftext|> don't", "a_b-c/d"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_quick_tokenizer_is_that_of_transformers(prompt, tiny_pipeline_dir):
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


def learn(folder: Path, **tokens: int) -> None:
    (folder / "added_tokens.json").write_text(json.dumps({f"<{name}>": number for name, number in tokens.items()}))


def test_learned_tokens_are_whole_in_the_row_and_all_their_vectors(base):
    folder = base / "tokenizer"
    learn(folder, rex=514)
    assert describe_prompt("my <rex>", folder) == ("5 tokens: m y| <rex>|", "ok")
    (folder / "added_tokens.json").write_text(json.dumps({"<rex>": 514, "<rex>_1": 515, "<rex>_2": 516}))
    said = describe_prompt("my <rex>", folder)[0]
    assert said == "7 tokens: m y| <rex>| <rex>_1| <rex>_2|"
    tokens = load_tokenizer(base)
    assert tokenize(tokens, "my <rex>")[0, 1:6].tolist()[2:] == [514, 515, 516]


@pytest.mark.parametrize("place", ["added_tokens.json", "tokenizer_config.json"])
def test_learned_tokens_are_found_where_versions_keep_them(base, place):
    folder = base / "tokenizer"
    if place == "added_tokens.json":
        learn(folder, rex=514)
    else:
        edit_json(folder / place, added_tokens_decoder={"514": dict(content="<rex>", special=False)})
    assert learned_tokens(folder) == {"<rex>": 514}


def test_a_token_without_an_embedding_is_one_line(base):
    folder = base / "tokenizer"
    learn(folder, rex=514)
    check_tokens("a <rex>", folder, 515)
    check_tokens("a cat", folder, 514)
    with pytest.raises(UserError, match="'a <rex>': .* has '<rex>' as token number 514, but .* has 514 rows"):
        check_tokens("a <rex>", folder, 514)
    learn(folder, rex=600)
    with pytest.raises(UserError, match="'<rex>' is number 600, but the next free number is 514"):
        check_tokens("a <rex>", folder, 700)


@pytest.mark.parametrize("where", ["instance_prompt", "class_prompt", "validation_prompt"])
def test_every_prompt_is_looked_through(prior, base, capsys, where):
    learn(base / "tokenizer", rex=514)
    flags = prior | dict(pretrained_model_name_or_path=base, validation_prompt="a dog", dry_run=True)
    assert main(as_argv(flags)) == 0
    assert main(as_argv(flags | {where: "a <rex>"})) == 2
    assert "has '<rex>' as token number 514" in capsys.readouterr().out
