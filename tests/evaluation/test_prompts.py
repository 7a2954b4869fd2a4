"""The paper's prompts, what prompts call the subject, its name left out."""

import pytest

from utils.evaluation.prompts import (
    DREAMBENCH,
    EMBEDDED_PLACES,
    PLACES,
    Prompt,
    all_prompts,
    class_in,
    class_prompt,
    dozen_words,
    dreambench_prompts,
    in_place,
    other_prompts,
    places_for,
    read_subject,
    slug,
    without_identifier,
)
from utils.evaluation.samples import OWN_FILE_NAME


def test_the_papers_lists_have_25_prompts_each():
    assert [len(set(prompts)) for prompts in DREAMBENCH.values()] == [25, 25]
    live, thing = (dreambench_prompts(kind, "sks", "dog") for kind in ("live", "object"))
    assert live[0] == thing[0] == "a sks dog in the jungle"
    assert live[13] == "a sks dog wearing a black top hat and a monocle"
    assert thing[12] == "a sks dog with the Eiffel Tower in the background"
    assert live[20:] == thing[20:] and live[-1] == "a cube shaped sks dog"
    assert len(set(live) & set(thing)) == 15


@pytest.mark.parametrize(
    ("text", "identifier", "expected"),
    [
        ("a photo of my cat.", "my", "a photo of a cat."),
        ("a photo of sks cat", "sks", "a photo of a cat"),
        ("a sks dog in the jungle", "sks", "a dog in the jungle"),
        ("a sks apple on the beach", "sks", "an apple on the beach"),
        ("a cube shaped sks dog", "sks", "a cube shaped dog"),
        ("The sks dog", "sks", "The dog"),
        ("a SKS dog and a sks dog", "sks", "a dog and a dog"),
        ("a sksy dog", "sks", "a sksy dog"),
        ("a photo of sks", "sks", "a photo of"),
        ("a photo of sks teddy bear", "sks", "a photo of a teddy bear"),
        ("a photo of John Smith man", "John Smith", "a photo of a man"),
        ("a photo of the [V] dog", "[V]", "a photo of the dog"),
        ("my my cat", "my", "a cat"),
        ("a photo of a dog", "a", "a photo of a dog"),  # an article is no name, and is put back
        ("an apple and a dog", "a", "an apple and a dog"),
        ("a (.*) dog", "(.*)", "a dog"),
        ("a photo of a dog", None, "a photo of a dog"),
        ("a photo of a dog", "", "a photo of a dog"),
    ],
)
def test_the_subjects_name_is_left_out(text, identifier, expected):
    assert without_identifier(text, identifier) == expected


@pytest.mark.parametrize(
    ("prompt", "class_name", "expected"),
    [
        ("a photo of my cat.", "cat", "a photo of my cat on the beach"),
        ("A sks Dog asleep, side view", "dog", "A sks Dog on the beach"),
        ("a photo of a catalogue of my cat", "cat", "a photo of a catalogue of my cat on the beach"),
        ("a photo of sks, ", None, "a photo of sks on the beach"),
        ("a photo of sks.", "cat", "a photo of sks on the beach"),
    ],
)
def test_the_subject_is_put_somewhere_else(prompt, class_name, expected):
    assert in_place(prompt, class_name, "on the beach") == expected


def test_the_embedded_model_is_asked_for_places_that_it_knows(tmp_path):
    assert places_for(tmp_path) == PLACES
    (tmp_path / "link").symlink_to(tmp_path / "tiny-stable-diffusion")
    assert places_for(tmp_path / "tiny-stable-diffusion") == places_for(tmp_path / "link") == EMBEDDED_PLACES


def test_prompts_are_there_once_each_and_by_role():
    prompts = all_prompts(["a sks dog", "a sks dog on the beach"], "dog", ["a photo of a cat", "a photo of a dog"])
    assert [(prompt.text, prompt.role) for prompt in prompts] == [
        ("a sks dog", "subject"),
        ("a sks dog on the beach", "subject"),
        ("a photo of a dog", "class"),
        ("a photo of a cat", "other"),
    ]
    assert [each.role for each in all_prompts(["a", "b"], None, [], ["x", "y"])] == [
        "subject",
        "subject",
        "place",
        "place",
    ]
    assert {each.role for each in all_prompts([*"abcde"], None, [], ["x", "y"])} == {"subject"}  # places themselves
    assert [prompt.folder for prompt in prompts][:2] == ["a-sks-dog", "a-sks-dog-on-the-beach"]


def test_every_prompt_has_a_folder_of_its_own_that_stays_the_same():
    texts = ["sks cat", "sks cat!", "Sks cat", "sks-cat", "sks  cat", "猫", "犬", "x" * 50, "x" * 51]
    folders = [Prompt(text, "subject").folder for text in texts]
    assert folders[0] == "sks-cat" and folders[1].startswith("sks-cat-") and len(set(folders)) == len(texts)
    assert all(OWN_FILE_NAME.fullmatch(f"images/baseline/{folder}/seed-0.png") for folder in folders)


def test_other_things_are_not_the_subjects_class():
    for class_name in ("Dog", "sports car", "teapot"):
        things = [prompt.split()[-1] for prompt in other_prompts(class_name)]
        assert len(set(things)) == 8 and not {*class_name.lower().split()} & {*things}
        words = dozen_words(class_name)
        assert words[0] == class_name and len(set(words)) == 12
    assert class_prompt("apple") == "a photo of an apple"


@pytest.mark.parametrize("text", ["../../etc/passwd", "Übergröße: 10 km/h", "日本", "", "x" * 99, "-"])
def test_a_slug_is_a_plain_folder_name(text):
    assert 1 <= len(slug(text)) <= 40
    assert set(slug(text)) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a photo of my cat.", ("cat", "my")),
        ("a photo of sks cat", ("cat", "sks")),
        ("a photo of sks teddy bear", ("teddy bear", "sks")),
        ("a photo of a dog", ("dog", None)),
        ("a photo of a sks dog", ("dog", "sks")),
        ("A close-up photo of the zwx backpack on a table", ("backpack", "zwx")),
        ("photo of [V] dog, best quality", ("dog", "[V]")),
        ("a photo of sks", (None, None)),
        ("a sks dog on the beach", (None, None)),
        ("", (None, None)),
    ],
)
def test_the_words_after_photo_of_are_the_subject(prompt, expected):
    assert read_subject([prompt]) == expected


@pytest.mark.parametrize(
    ("prompt", "class_prompt", "expected"),
    [
        ("a photo of my cat.", "a photo of a cat.", ("cat", "my")),
        ("a photo of sks teddy bear", "a photo of a teddy bear", ("teddy bear", "sks")),
        ("a painting of zwx stuffed animal", "a stuffed animal on a white background", ("stuffed animal", "zwx")),
        ("sks dog asleep", "photo of dog", ("dog", "sks")),
        ("a dog", "a dog", ("dog", None)),
        ("a photo of sks golden retriever", "a photo of a dog", ("dog", "sks")),
        ("a photo of sks", "a photo of a dog", ("dog", "sks")),
        ("", "a photo of a dog", ("dog", None)),
        ("a photo of zwx vase", "a photo of sks cat", ("vase", "zwx")),  # which preserves another subject
        ("a photo of zwx vase", "", ("vase", "zwx")),
    ],
)
def test_the_class_prompt_names_the_class_and_the_word_before_it_is_the_name(prompt, class_prompt, expected):
    assert read_subject([prompt], class_in(class_prompt)) == expected


def test_captions_are_judged_together():
    captions = ["young sks dog lying on grass", "a happy sks dog with a red ball", "a dog in the snow, side view"]
    assert read_subject(captions, "dog") == ("dog", "sks")
    captions = ["a photo of blorp gizmo at night", "blorp gizmo on a table", "a photo of blorp gizmo", "a photo of it"]
    assert read_subject(captions) == ("gizmo", "blorp")
    assert read_subject([]) == (None, None)
