"""What a value means that no shell has seen."""

import json
from pathlib import Path

import pytest

from tests.helpers.script import REQUIRED, complaint
from utils.arguments import parse_args
from utils.concepts import read_list
from utils.errors import UserError
from utils.photos.captions import read_captions
from utils.values import as_path, as_text, read_prompts

OTHERS = "is another program's, and would be read as words"


@pytest.fixture(autouse=True)
def variables(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch\r")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("written", "is_meant"),
    [
        ("out\r", "out"),
        ("\ufeff 'my out'\u00a0\r\n", "my out"),
        ('" out "', "out"),
        ("$SCRATCH/out", "/scratch/out"),
        ("${SCRATCH}-1/out", "/scratch-1/out"),
        ("run$1", "run$1"),
        ("'~/out'", "HOME/out"),
        ("dan's", "dan's"),
        ("~nobody-of-that-name/x", "~nobody-of-that-name/x"),
    ],
)
def test_a_path(written, is_meant, tmp_path):
    path = Path(is_meant.replace("HOME", str(tmp_path)))
    assert as_path(written) == path
    assert parse_args([*REQUIRED, f"--output_dir={written}"]).output_dir == path
    assert parse_args([*REQUIRED, "--output_dir", written]).output_dir == path


@pytest.mark.parametrize("written", ["", " \r", '""', "$EMPTY/out", "${NOT_SET}/out", "$(pwd)/out", "a\nb", "a\0b"])
def test_a_path_that_cannot_be_meant(written):
    assert complaint(f"--output_dir={written}").startswith("argument --output_dir: ")


def test_a_dollar_in_the_name_of_a_folder_that_is_there(tmp_path):
    (tmp_path / "A$AP").mkdir()
    assert as_path("A$AP") == Path("A$AP")


@pytest.mark.parametrize(
    ("written", "is_meant"),
    [
        ('"a photo of sks cat"\r', "a photo of sks cat"),
        ("\ufeffa  photo\u00a0of\nsks\u200b cat ", "a photo of sks cat"),
        ('"Hi" and "bye"', '"Hi" and "bye"'),
        ("a $100 bill, A$AP, (John 3:16), a (big) <cat-toy>, C++ -- fun", None),
        ("a cat of $SCRATCH", "a cat of /scratch"),
        ("👩\u200d🚀", None),
    ],
)
def test_a_prompt(written, is_meant):
    assert as_text(written) == (is_meant or written)
    args = parse_args([*REQUIRED, f"--validation_prompt={written}", f"--instance_prompt={written}"])
    assert (args.instance_prompt, args.validation_prompt) == (is_meant or written, [is_meant or written])


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("a cat --n dog --w 64", f"'--n' {OTHERS}: size, seed and negative prompt are flags"),
        ('--prompt "a cat" --steps 20', f"'--prompt' {OTHERS}"),
        ("a cat —ar 16:9", f"'—ar' {OTHERS}"),
        ("Negative prompt: blurry", f"'Negative prompt:' {OTHERS}"),
        ("Steps: 20, Sampler: Euler", f"'Steps: 20' {OTHERS}"),
        ("a cat <lora:mine:0.8>", f"'<lora:mine:0.8>' {OTHERS}"),
        ("embedding:hands, a cat", f"'embedding:hands,' {OTHERS}"),
        ("a cat::2 dog::1", OTHERS),
        ("((fluffy)) cat", OTHERS),
        ("a [red|blue] cat", OTHERS),
        ("a (sks cat:1.3)", f"'(sks cat:1.3)' {OTHERS}"),
        ("a [cat:dog:0.5]", OTHERS),
        ("a (cat)1.2", OTHERS),
        ("a {red|blue} __animal__", f"'{{red|blue}}' {OTHERS}"),
        ("a $SUBJECT cat", "the variable SUBJECT is not set"),
        ("a\x1b[31m cat", "holds '\\x1b'"),
        ('""', "is empty"),
    ],
)
def test_a_prompt_that_cannot_be_meant(written, said, tmp_path):
    for flag in ("instance_prompt", "class_prompt", "validation_prompt", "validation_negative_prompt"):
        if said != "is empty" or "negative" not in flag:
            assert f"argument --{flag}: " in (line := complaint(f"--{flag}={written}")) and said in line
    concepts, prompts, photo = (tmp_path / name for name in ("concepts.json", "prompts.txt", "cat.jpg"))
    concepts.write_text(json.dumps([dict(instance_prompt=written, instance_data_dir="cats")]))
    prompts.write_text(f"# --n\na dog\n{written}\n")
    with pytest.raises(UserError, match="concept 1: .*instance_prompt"):
        read_list(concepts)
    if said != "is empty":
        with pytest.raises(UserError, match=r"prompts.txt, line 3: "):
            read_prompts(prompts, str(prompts))
        (tmp_path / "cat.txt").write_text(written)
        with pytest.raises(UserError, match="the caption of cat.jpg, "):
            read_captions([photo], [tmp_path / "cat.txt"])


def test_a_list_of_subjects(tmp_path):
    entry = dict(instance_prompt='"a cat"\r', instance_data_dir="~/$SCRATCH\r", class_prompt=" ", class_data_dir="")
    (tmp_path / "concepts.json").write_text(json.dumps([entry]), encoding="utf-16")
    (concept,) = read_list(tmp_path / "concepts.json")
    assert concept == ("a cat", tmp_path / "scratch", None, None)


def test_a_prompts_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text('\ufeffa cat\n\n # not this one\n - a dog  \r\n2. "a fox"\n', encoding="utf-8")
    assert read_prompts(path, "prompts") == ["a cat", "a dog", "a fox"]
    for content, said in ((b"# nothing\n", "holds no prompt"), (b'[{"prompt": "a cat"}]', "one prompt a line")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=said):
            read_prompts(path, "prompts")
    path.write_bytes(b"\xe4")
    with pytest.raises(UserError, match="prompts cannot be read"):
        read_prompts(path, "prompts")


def test_lines_from_windows():
    assert "Windows line ends" in complaint("\r")
    assert parse_args([*REQUIRED, "--center_crop\r", "--mixed_precision=fp16\r", "--seed='7'"]).seed == 7


def test_captions_of_a_list(tmp_path):
    line = json.dumps(dict(file_name="./cat.jpg\r", text='"a cat\u2028asleep"'), ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(f"\ufeff{line}\r\n", encoding="utf-8")
    texts, _ = read_captions([tmp_path / "cat.jpg"], [tmp_path / "metadata.jsonl"])
    assert texts == {tmp_path / "cat.jpg": "a cat asleep"}
