"""The class and the identifier by the prompts: the DreamBooth data set's subjects, two words, captions."""

import pytest

from utils.evaluation.subject import guess_subject, kind_of, same_kind, subject_line

# Names and classes of the DreamBooth data set's 30 subjects (Google, github.com/google/dreambooth, CC BY 4.0).
DREAMBENCH = {
    **{"backpack": "backpack", "backpack dog": "backpack", "bear plushie": "stuffed animal", "berry bowl": "bowl"},
    **{"can": "can", "candle": "candle", "cat": "cat", "cat2": "cat", "clock": "clock", "colorful sneaker": "sneaker"},
    **{"dog": "dog", "dog2": "dog", "dog3": "dog", "dog5": "dog", "dog6": "dog", "dog7": "dog", "dog8": "dog"},
    **{"duck toy": "toy", "fancy boot": "boot", "grey sloth plushie": "stuffed animal", "monster toy": "toy"},
    **{
        "pink sunglasses": "glasses",
        "poop emoji": "toy",
        "rc car": "toy",
        "red cartoon": "cartoon",
        "robot toy": "toy",
    },
    **{"shiny sneaker": "sneaker", "teapot": "teapot", "vase": "vase", "wolf plushie": "stuffed animal"},
}


def test_there_are_30_subjects():
    assert len(DREAMBENCH) == 30


@pytest.mark.parametrize("class_name", sorted(set(DREAMBENCH.values())))
@pytest.mark.parametrize("prompt", ["a photo of sks {}", "a sks {} on the beach", "sks {}", "a photo of a sks {}."])
def test_the_data_sets_classes(prompt, class_name):
    assert guess_subject([prompt.format(class_name)]) == (class_name, "sks")


@pytest.mark.parametrize(("name", "class_name"), DREAMBENCH.items())
def test_the_data_sets_names(name, class_name):
    """With the class's own prompt the class is that one; without it the identifier is still sks alone."""
    prompt = f"a photo of sks {name}"
    assert guess_subject([prompt], f"a photo of a {class_name}").class_name == class_name
    if not name[-1].isdigit():
        found = guess_subject([prompt])
        assert found.identifier == "sks" and name.endswith(found.class_name)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a photo of my cat.", ("cat", "my")),
        ("a photo of sks dog", ("dog", "sks")),
        ("a photo of sks teddy bear", ("teddy bear", "sks")),
        ("a photo of my golden retriever", ("golden retriever", "my")),
        ("my golden retriever", ("golden retriever", "my")),
        ("a sks dog on the beach", ("dog", "sks")),
        ("a photo of a dog", ("dog", None)),
        ("a photo of a golden retriever", ("golden retriever", None)),
        ("a red car", ("car", None)),
        ("a photo of sks", (None, None)),
        ("cat", ("cat", None)),
        ("a photo of my cat 2", ("cat", "my")),
        ("photo of ohwx man wearing a hat", ("man", "ohwx")),
        ("photo of John Smith man", ("man", "John Smith")),
        ("a close-up photo of the zwx backpack", ("backpack", "zwx")),
        ("a photo of the [V] dog", ("dog", "[V]")),
        ("a photo of sks gizmo", ("gizmo", "sks")),
        ("a painting of sks vase in the style of Monet", ("vase", "sks")),
        ("sks dog, sitting on a rug, best quality", ("dog", "sks")),
        ("a photo of sks dog sitting on a rug", ("dog", "sks")),
        ("A photo of SKS Dog", ("Dog", "SKS")),
        ("a photo of my old teddy bear", ("teddy bear", "my")),
        ("", (None, None)),
    ],
)
def test_one_prompt(prompt, expected):
    assert guess_subject([prompt]) == expected


@pytest.mark.parametrize(
    ("prompt", "class_prompt", "expected"),
    [
        ("a photo of my golden retriever", "a photo of a dog", ("dog", "my")),
        ("a photo of sks golden retriever", "a photo of a dog", ("dog", "sks")),
        ("a photo of sks teddy bear", "a photo of a teddy bear", ("teddy bear", "sks")),
        ("a photo of sks thingamajig", "a photo of a thingamajig", ("thingamajig", "sks")),
        ("a photo of sks", "a photo of a dog", ("dog", "sks")),
        ("a sks dog on the beach", "a dog", ("dog", "sks")),
        ("a photo of my cat.", "a photo of a cat.", ("cat", "my")),
        ("a photo of zwx stuffed animal", "a stuffed animal on a white background", ("stuffed animal", "zwx")),
        ("", "a photo of a dog", ("dog", None)),
    ],
)
def test_the_class_prompt_says_the_class(prompt, class_prompt, expected):
    assert guess_subject([prompt], class_prompt) == expected


def test_captions_are_judged_together():
    captions = ["young sks dog lying on grass", "a happy sks dog with a red ball", "sks dog in the snow, side view"]
    assert guess_subject(captions) == ("dog", "sks")
    captions = ["a photo of blorp gizmo at night", "wonderful blorp gizmo on a table", "blorp gizmo"]
    assert guess_subject(captions) == ("gizmo", "blorp")
    assert guess_subject([]) == (None, None)


def test_things_of_one_kind():
    assert same_kind("golden retriever", "dog") and same_kind("Dog", "puppy") and same_kind("sports car", "truck")
    assert not same_kind("cat", "dog") and not same_kind("teddy bear", "dog")
    assert kind_of("thingamajig") == "thingamajig"


def test_the_page_says_what_was_taken_and_how_to_correct_it():
    samples = dict(class_name="cat", identifier="my", guessed=["class_name", "identifier"])
    line = subject_line(samples)
    assert "“cat”" in line and "“my”" in line and "--class_name and --identifier" in line
    assert "--class_name" not in subject_line(samples | dict(guessed=[]))
    assert "not known" in subject_line(dict(class_name=None, identifier=None))
