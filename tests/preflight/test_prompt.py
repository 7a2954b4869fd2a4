"""What is said of a prompt."""

import json

import pytest

from tests.helpers.script import EMBEDDED, as_argv
from train_dreambooth_colossalai import main
from utils.command_line import run_main
from utils.models.loading import load_tokenizer
from utils.preflight.prompt import describe_prompt, load_quick_tokenizer

PROMPTS = ["a photo of my cat.", "A  sks's DOG\n42!", "кот 🐈 naïve", "", "x" * 30, "<|endoftext|> don't", "a_b-c/d"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_quick_tokenizer_is_that_of_transformers(prompt, tiny_pipeline_dir):
    for folder in (EMBEDDED, tiny_pipeline_dir):
        expected = load_tokenizer(folder)(prompt, add_special_tokens=False).input_ids
        assert load_quick_tokenizer(folder / "tokenizer").encode(prompt, add_special_tokens=False).ids == expected


def test_a_prompts_tokens_and_the_tail_of_a_long_one():
    tokenizer = load_quick_tokenizer(EMBEDDED / "tokenizer")
    assert describe_prompt("a photo of sks cat", tokenizer) == ("'a photo of sks cat': 7 of 77 tokens", "ok")
    words = "a photo of " + "cat " * 72
    assert describe_prompt(words, tokenizer)[1] == "ok"
    finding, verdict = describe_prompt(words + "in the rain", tokenizer)
    assert finding == "80 tokens, but 77 are read; cut off: 'in the rain'" and verdict == "note"


@pytest.mark.parametrize("where", ["instance_prompt", "class_prompt", "validation_prompt"])
def test_a_token_without_an_embedding_is_one_line_wherever_it_stands(prior, base, capsys, where):
    """A tokenizer of textual inversion beside the text encoder of before."""
    (base / "tokenizer/added_tokens.json").write_text(json.dumps({"<rex>": 514}))
    flags = prior | dict(pretrained_model_name_or_path=base, max_train_steps=1, num_class_images=1)
    assert run_main(main, as_argv(flags | {where: "a <rex>"})) == 2
    err = capsys.readouterr().err.splitlines()
    said = [line for line in err if line.startswith("error: ")]
    assert said == [line for line in err if "'a <rex>' has token number 514, but the text encoder knows 514" in line]
    assert len(said) == 1 and "Traceback" not in "".join(err)
