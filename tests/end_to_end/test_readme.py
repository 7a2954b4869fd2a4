"""What the README and docs/ say can be done, done: commands are run, flags are the parser's, what is named exists."""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.pipelines import write_512_pixel_pipeline, write_photos
from tests.helpers.script import LAUNCHER_VARIABLES, ROOT
from utils.arguments import training_parser

README = (ROOT / "README.md").read_text(encoding="utf-8")
WALKTHROUGH = (ROOT / "docs/walkthrough.md").read_text(encoding="utf-8")
WISHES = (ROOT / "docs/more_than_one_wish.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
MAP = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
MAX_COLUMNS = 120
PICTURES = {".jpg", ".png", ".svg"}
DEPENDS_ON_THE_MACHINE = ("/", "GB", "GPU", "step 0 of")  # what a line of a shown table may hold that differs here

# `hf download NAME --local-dir FOLDER` brings a pipeline of the test's.
HF = """#!/bin/sh
if [ "$1 $3" = "download --local-dir" ]; then cp -R "$PIPELINE" "$4"; fi
"""


def parser_flags() -> set[str]:
    """The training script's flags that --help shows, but --help and --version."""
    shown = [action for action in training_parser().flags.values() if action.help != argparse.SUPPRESS]
    strings = {string for action in shown for string in action.option_strings}
    return {string for string in strings if string.startswith("--")} - {"--help", "--version"}


def table_flags(page: str) -> dict[str, str]:
    """The flags in the first column of a page's tables, and what the second says of each one's default."""
    found = {}
    for line in page.splitlines():
        if line.startswith("| `--"):
            names, defaults = line.replace("\\|", "").split("|")[1:3]
            flags, words = re.findall(r"`(--\w+)", names), [word.strip("` ") for word in defaults.split(", ")]
            if len(words) != len(flags):
                words = [defaults.strip()] * len(flags)
            assert not found.keys() & flags
            found |= zip(flags, words, strict=True)
    return found


def says(words: str, default: object) -> bool:
    """Whether a table's words are of that default; None may be any words but numbers and "off"."""
    if default is None:
        return not re.fullmatch(r"off|[\d.e-]+", words)
    if default is False:
        return words == "off"
    return float(words) == default if isinstance(default, int | float) else words == str(default)


def test_the_table_of_flags_is_the_parsers():
    """Flags and their defaults are a promise to users: a new flag is added to the table; none is taken away."""
    named, flags = table_flags((ROOT / "docs/flags.md").read_text(encoding="utf-8")), training_parser().flags
    assert named.keys() == parser_flags()
    assert [name for name, words in named.items() if not says(words, flags[name].default)] == []


def test_what_differs_from_diffusers_is_marked_in_both_places():
    marked = {a.option_strings[0] for a in training_parser().flags.values() if "(!)" in (a.help or "")}
    page = (ROOT / "docs/flags.md").read_text(encoding="utf-8")
    part = page[page.index("## What differs from diffusers") :]
    assert {f"--{name}" for name in re.findall(r"^\| `(\w+)`", part, re.M)} == marked and len(marked) > 9


def test_the_flags_that_matter_are_flags():
    named = table_flags(README)
    assert len(named) == 8 and named.keys() < parser_flags()


def test_what_the_pages_name_exists():
    """Links, parts of pages that links lead to, tests, and paths of the source."""
    all_tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named, missing = 0, []
    for page in PAGES:
        text, found = page.read_text(encoding="utf-8"), {}
        for target, part in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
            path = page.parent / target if target else page
            found[f"{target}#{part}"] = path.exists() and (not part or part in anchors(path))
        for file, name in re.findall(r"`((?:\w+/)+test_\w+\.py)(?:::(\w+))?", text):
            path = ROOT / "tests" / file.removeprefix("tests/")
            found[f"{file} {name}"] = path.is_file() and name in path.read_text(encoding="utf-8")
        for name in re.findall(r"`(test_\w+)`", text):
            found[name] = f"def {name}(" in all_tests
        for path in re.findall(r"`((?:utils|bench|tools|tests|docs)/[\w/.-]*|(?:\w+/)+\w+\.py)`", text):
            found[path] = any((folder / path).exists() for folder in (ROOT, ROOT / "utils", ROOT / "tests"))
        named += len(found)
        missing += [f"{page.name}: {name}" for name, exists in found.items() if not exists]
    assert missing == [] and named > 100


def test_what_comments_and_docstrings_name_exists():
    """Paths of the source, and modules of packages. A "run." is run.json as a rule."""
    modules = {
        ".".join(path.relative_to(ROOT / "utils").with_suffix("").parts) for path in ROOT.glob("utils/*/**/*.py")
    }
    packages = "|".join({name.partition(".")[0] for name in modules} - {"run"})
    source = [path for folder in ("utils", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
    source.remove(ROOT / "tests/mutations.py")  # which holds lines of code as text
    missing = []
    for path in (*ROOT.glob("requirements*.txt"), *source):
        prose = "\n".join(re.findall(r'"""[\s\S]*?"""|#.*', path.read_text(encoding="utf-8")))
        paths = re.findall(r"(?<![\w/.])(?:utils|bench|tools|tests|docs)/[\w/.]*\w\.(?:py|md)\b", prose)
        named = re.findall(rf"(?<![\w/.])(?:{packages})\.\w+", prose)
        missing += [f"{path.name}: {name}" for name in paths if not (ROOT / name).exists()]
        missing += [f"{path.name}: {name}" for name in named if name not in modules]
    assert missing == []


def test_the_variables_of_run_sh_are_in_the_readme():
    read = set(re.findall(r"\$\{([A-Z_]+):", (ROOT / "run.sh").read_text(encoding="utf-8")))
    assert read == {"VENV", *re.search(r"`run.sh` takes `([A-Z_\s]+)`", README)[1].split()}


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_is_too_long(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [f"{page.name}:{number}" for number, line in enumerate(lines, 1) if len(line) > MAX_COLUMNS] == []


def test_pictures_are_small():
    sizes = {path.name: path.stat().st_size for path in (ROOT / "docs").iterdir() if path.suffix in PICTURES}
    assert max(sizes.values()) <= 200_000 and sum(sizes.values()) <= 900_000, sizes
    named = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in sizes if f"{name})" not in named] == []


def test_the_map_is_of_this_tree():
    """Every module under utils/ is in the tree of docs/architecture.md, and nothing else is."""
    tree = MAP[MAP.index("\nutils/\n") + 1 :]
    folders, named = [], set()
    for line in tree[: tree.index("```")].splitlines():
        name = re.match(r" *([\w./]+)", line)[1]
        folders = [*folders[: (len(line) - len(line.lstrip())) // 2], name]
        if not name.endswith("/"):
            named.add("".join(folders))
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "utils").rglob("*.*") if "__pycache__" not in path.parts}
    assert {path for path in files if not path.endswith("__init__.py")} == named


@pytest.fixture
def newcomer(tmp_path) -> tuple[Path, dict[str, str]]:
    """A copy of the repository as it was downloaded, and an environment with this Python's programs first."""
    tree, programs = tmp_path / "repository", tmp_path / "bin"
    ignored = shutil.ignore_patterns(".git", ".venv", ".legs", ".*_cache", "__pycache__", "stable-diffusion-v1-4")
    shutil.copytree(ROOT, tree, ignore=ignored)
    for name in ("output", "result", "logs"):
        shutil.rmtree(tree / name, ignore_errors=True)
    (tree / "test.sh").write_text("exit 0\n")  # it is what runs this test
    write_photos(tree / "my-photos", 3)
    (tree / ".venv").symlink_to(sys.prefix)
    programs.mkdir()
    (programs / "hf").write_text(HF)
    (programs / "hf").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    environment |= dict(
        PATH=f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        PROGRAMS=str(programs),
        PIPELINE=str(write_512_pixel_pipeline(tmp_path / "pipeline")),
        VENV=sys.prefix,
        NUM_INFERENCE_STEPS="2",
        OMP_NUM_THREADS="1",
    )
    return tree, environment


def blocks_of(page: str) -> list[tuple[str, str]]:
    """(language, text) of a page's fenced blocks in a language."""
    return re.findall(r"^```(bash|python|text)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def run_page(page: str, tree: Path, environment: dict[str, str], **replaced: str) -> str:
    """Runs a page's commands from top to bottom in one shell, with `replaced` patterns; returns what they print."""
    script = ""
    for language, text in blocks_of(page):
        if language != "text":
            script += text if language == "bash" else f"python - <<'END_OF_PYTHON'\n{text}END_OF_PYTHON\n"
    script = script.replace("/activate\n", '/activate; PATH="$PROGRAMS:$PATH"\n')  # nothing is downloaded all the same
    for old, new in replaced.items():
        assert old in script, old
        script = script.replace(old, new)
    command = ["bash", "-euo", "pipefail", "-c", script]
    result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=3000)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.mark.slow
def test_every_command_of_the_readme_runs(newcomer):
    tree, environment = newcomer
    few = {"MAX_TRAIN_STEPS=400": "MAX_TRAIN_STEPS=30", "--class_data_dir": "--num_class_images 4 --class_data_dir"}
    run_page(README, tree, environment | dict(MAX_TRAIN_STEPS="20"), **few)
    assert (tree / "result/comparison.png").stat().st_size > 1000
    assert (tree / "my-cat.safetensors").is_file() and (tree / "output-2/run.json").is_file()
    assert len(list((tree / "class_images").glob("*.png"))) == 4
    assert (tree / "my-cat.png").stat().st_size > 1000 and (tree / "to-share/model_index.json").is_file()
    assert sum(language != "text" for language, _ in blocks_of(README)) >= 7


@pytest.mark.slow
def test_every_command_of_the_walkthrough_runs(newcomer):
    tree, environment = newcomer
    few = dict(MAX_TRAIN_STEPS="20", CHECKPOINTING_STEPS="10")
    said = run_page(WALKTHROUGH, tree, environment | few, **{"checkpoint-50": "checkpoint-10"})
    (table,) = [text for language, text in blocks_of(WALKTHROUGH) if language == "text"]
    same = [line for line in table.splitlines() if not any(part in line for part in DEPENDS_ON_THE_MACHINE)]
    assert [line for line in same if line not in said.splitlines()] == [] and len(same) > 10
    assert "1 of 2: train" in said and "one of your photos again (95%: " in said
    assert (tree / "lora-4.png").stat().st_size > 1000
    shared = {path.name for path in (tree / "whiskers-to-share").iterdir()}
    assert {"README.md", "run.json", "model_index.json", "unet"} <= shared
    assert str(tree) not in (tree / "whiskers-to-share/run.json").read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_command_of_more_than_one_wish_runs(newcomer):
    tree, environment = newcomer
    (tree / "my-photos").rename(tree / "vase_photos")
    few = {"_STEPS=300": "_STEPS=20", "_steps 300": "_steps 10", "images 100": "images 4", "nt 200": "nt 10"}
    few |= {f"evaluate.py --{flag}": f"evaluate.py --num_inference_steps 2 --{flag}" for flag in ("pre", "strength")}
    run_page(WISHES, tree, environment | dict(CHECKPOINTING_STEPS="10"), **few)
    assert (tree / "earlier.safetensors").is_file() and (tree / "weaker/model_index.json").is_file()
    assert [len(list(tree.glob(made))) for made in ("cat_images/*.png", "both/*/report.html")] == [4, 2]


def test_what_a_queue_is_shown_can_be_read():
    """Neither a cluster is here nor Kubernetes: the shell's and YAML's parsers are."""
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    scripts = [text for language, text in blocks_of(page) if language == "bash"]
    codes = [subprocess.run(["bash", "-n"], input=text, text=True).returncode for text in scripts]
    job = yaml.safe_load(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    (container,) = job["spec"]["template"]["spec"]["containers"]
    variables = set(re.findall(r"\$\{([A-Z_]+):", (ROOT / "run.sh").read_text(encoding="utf-8")))
    assert codes == [0, 0] and {each["name"] for each in container["env"]} <= variables
    assert parser_flags() >= {word for word in container["args"] if word.startswith("--") and "=" not in word}


def test_the_recipes_command_is_in_it():
    assert any("--learning_rate=1e-6" in text and "--max_train_steps=20" in text for _, text in blocks_of(README))
