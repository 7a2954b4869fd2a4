"""The parser that both scripts share: --config, flags that are mistyped, how a mistake ends."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.script import REQUIRED, ROOT, TRAIN, as_argv, complaint, losses, rows, run_json, run_python
from train_dreambooth_colossalai import main
from utils.arguments import parse_args, training_parser
from utils.command_line import Parser, run_main
from utils.errors import UserError
from utils.evaluation.arguments import build_parser

CONFIG = dict(
    pretrained_model_name_or_path="base",
    instance_data_dir="my photos",
    instance_prompt="a photo of sks cat: sitting",
    mixed_precision="no",
    learning_rate=1e-6,
    center_crop=True,
    scale_lr=False,
    max_train_steps=None,
    tokenizer_name=None,
)


def write(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "run.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_keys_are_the_flags_and_values_are_theirs(tmp_path):
    args = parse_args(["--config", str(write(tmp_path, CONFIG))])
    flags = ["--pretrained_model_name_or_path=base", "--instance_data_dir=my photos", "--mixed_precision=no"]
    flags += ["--instance_prompt=a photo of sks cat: sitting", "--learning_rate=1e-6", "--center_crop"]
    assert args == parse_args(flags)
    assert (args.mixed_precision, args.learning_rate, args.center_crop, args.scale_lr) == ("no", 1e-6, True, False)


def test_the_command_line_wins_wherever_it_stands(tmp_path):
    config = f"--config={write(tmp_path, CONFIG)}"
    for argv in ([config, "--learning_rate=3"], ["--learning_rate", "3", config]):
        assert parse_args(argv).learning_rate == 3 and parse_args(argv).mixed_precision == "no"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (dict(leraning_rate=1), "there is no flag 'leraning_rate'; did you mean learning_rate?"),
        ({"max-train-steps": 1}, "did you mean max_train_steps?"),
        (dict(plug="gemini"), "there is no flag 'plug'; keys are the flags that --help lists, without dashes"),
        (dict(config="other.json"), "there is no flag 'config'"),
        (dict(resolution="big"), "argument --resolution: 'big' is not a whole number"),
        (dict(resolution=[1, 2]), "resolution holds a list"),
        (dict(resolution=dict(side=1)), "resolution holds a list or a table"),
        (dict(center_crop="maybe"), "center_crop is 'maybe', but it can only be true or false"),
        ('["resolution"]', 'does not hold an object of flags; write it like {"learning_rate": 1e-6,'),
        ("", "is not valid JSON"),
        (
            "learning_rate: 1e-6\nseed: 7",
            'is not valid JSON: Expecting value: line 1 column 1 (char 0); write it like {"',
        ),
        (dict(instance_prompt=" "), "--instance_prompt: is empty"),
    ],
)
def test_mistakes(tmp_path, content, said):
    argv = REQUIRED[:4] if "instance_prompt" in content else REQUIRED
    with pytest.raises(UserError) as error:
        parse_args(["--config", str(write(tmp_path, content)), *argv])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.json").write_bytes(b'{"instance_prompt": "\xe4"}')
    for path in (tmp_path / "none.json", tmp_path, tmp_path / "latin.json"):
        with pytest.raises(UserError, match="--config .* cannot be read"):
            parse_args(["--config", str(path), *REQUIRED])
    with pytest.raises(UserError, match="argument --config: expected one argument"):
        parse_args([*REQUIRED, "--config"])


def test_a_run_from_a_config_and_again_from_its_run_json(flags, tmp_path):
    config = write(tmp_path, json.dumps(flags | dict(max_train_steps=1), default=str))
    assert main([f"--config={config}", f"--output_dir={tmp_path / 'one'}", "--debug"]) == 0
    assert main([f"--config={tmp_path / 'one/run.json'}", f"--output_dir={tmp_path / 'two'}"]) == 0
    records = [run_json(tmp_path / name) for name in ("one", "two")]
    command = shlex.split(records[0]["command"])
    assert "--resolution=32" in command and not any("--config" in part for part in command)
    assert losses(rows(tmp_path / "one")) == losses(rows(tmp_path / "two"))
    differing = {key for key, value in records[0]["arguments"].items() if records[1]["arguments"][key] != value}
    assert differing == {"output_dir", "debug"}


@pytest.mark.parametrize(
    ("unknown", "near"),
    [
        ("--leraning_rate", "--learning_rate"),
        ("--max_train_step", "--max_train_steps"),
        ("--centre_crop", "--center_crop"),
        ("--batch_size", "--train_batch_size"),
        ("--output-dir", "--output_dir"),
        ("--learning_rates=3", "--learning_rate"),
    ],
)
def test_the_nearest_flag_is_suggested(unknown, near):
    assert complaint(unknown) == f"unrecognized arguments: {unknown}; did you mean {near}?"


def test_flags_like_no_other_abbreviations_and_one_without_its_value():
    for unknown in ("--push_it", "stray", " ", "--socket=gemini"):
        assert complaint(unknown).endswith("; --help lists the flags")
    for short in ("--res=64", "--max_train=3", "--learning=1e-6", "--output=x"):
        assert complaint(short).startswith(f"unrecognized arguments: {short}")
    assert complaint("--resolution") == "argument --resolution: expected one argument"


def test_a_user_error_is_one_line_from_rank_0(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert run_main(parse_args, ["--resolution", "x"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: argument --res")
    for name, value in dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="head").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("utils.command_line.SECONDS_FOR_RANK_0", 0)
    assert run_main(parse_args, ["--resolution", "x"]) == 2
    assert capsys.readouterr() == ("", "")


def test_debug_raises(monkeypatch):
    with pytest.raises(UserError):
        run_main(parse_args, ["--resolution", "x", "--debug"])


@pytest.mark.parametrize("parser", [training_parser, build_parser])
@pytest.mark.parametrize("columns", [80, 120])
def test_help_fits_the_terminal(parser, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = parser().format_help().splitlines()
    too_long = [line for line in lines if len(line) >= columns]
    assert [line for line in too_long if not re.fullmatch(r" +--\w+ \{\S+\}", line)] == []  # choices are one word
    assert [line for line in lines if re.search(r"--(\w+) \1", line, re.IGNORECASE)] == []  # as in --seed SEED
    assert lines[0].startswith("usage: ") and len(lines) > 40


@pytest.mark.parametrize(
    "variables",
    [
        dict(PYTHONIOENCODING="ascii"),
        dict(PYTHONIOENCODING="cp1252"),
        dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"),
    ],
)
def test_nothing_that_is_printed_can_fail(variables, flags, tmp_path, photos_dir):
    photos = shutil.copytree(photos_dir, tmp_path / "photos")
    photo = next(photos.iterdir())
    photo.rename(photo.with_name(os.fsdecode(b"\xff caf\xc3\xa9.png")))
    (photos / "Notizen 🐈").touch()
    flags |= dict(instance_data_dir=photos, instance_prompt="a photo of café 猫", output_dir=tmp_path / "ausgabe 猫")
    command, options = [sys.executable, TRAIN, *as_argv(flags), "--dry_run"], dict(capture_output=True, timeout=120)
    ends = [
        subprocess.run([*command, *more], env=os.environ | variables, **options)
        for more in ([], ["--class_prompt=猫"])
    ]
    assert [(end.returncode, b"Traceback" in end.stderr) for end in ends] == [(0, False), (2, False)], ends
    assert b"ready to train" in ends[0].stdout and b"prompt" in ends[0].stdout


def test_a_flag_that_may_be_repeated_is_a_list_in_a_file(tmp_path):
    config = f"--config={write(tmp_path, dict(validation_prompt=['a cat', 'a dog: sitting']))}"
    assert parse_args([*REQUIRED, config]).validation_prompt == ["a cat", "a dog: sitting"]
    assert parse_args([*REQUIRED, config, "--validation_prompt=a fox"]).validation_prompt == ["a fox"]


@pytest.mark.parametrize("parser", [training_parser, build_parser])
def test_the_version_is_the_changelogs_newest(parser, capsys, tmp_path):
    with pytest.raises(SystemExit, match="0"):
        parser().parse_args(["--version"])
    (newest, *_) = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert capsys.readouterr().out == f"{parser().prog} {newest}\n"
    with pytest.raises(UserError, match="there is no flag 'version'"):
        parse_args([f"--config={write(tmp_path, dict(version=True))}"])


def test_a_home_folders_sign_is_understood_in_every_flag(tmp_path, monkeypatch):
    """Of both scripts, be it written by the shell or not."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for parser in (training_parser(), build_parser()):
        flags = [action for action in parser.flags.values() if action.type is Path]
        assert len(flags) >= 7
        for action in flags:
            parser_of_one = Parser()
            parser_of_one.add_argument(action.option_strings[0], type=action.type)
            for words in ([f"{action.option_strings[0]}=~/x"], [action.option_strings[0], "~/x"]):
                assert getattr(parser_of_one.parse_args(words), action.dest) == tmp_path / "x"


def test_windows_is_told_what_is_supported():
    result = run_python("import sys; sys.platform = 'win32'; import utils.arguments")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: this program runs on Linux; on Windows use WSL 2")


@pytest.mark.parametrize("script", ["train_dreambooth_colossalai.py", "evaluate.py", "utils/__init__.py"])
def test_a_python_that_is_too_old_says_so(script):
    ast.parse((ROOT / script).read_text(), feature_version=(3, 6))  # it gets as far as the line
    code = "import runpy, sys; sys.hexversion = 0x03090000; runpy.run_path(sys.argv[1], run_name='__main__')"
    result = run_python(code, ROOT / script)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "3.10 or newer is needed: PYTHON=python3.11 bash setup.sh makes .venv" in result.stderr


@pytest.mark.parametrize("command", ["train_dreambooth_colossalai.py", "evaluate.py", "-m utils.export"])
def test_a_python_without_the_packages_says_so(command):
    """Not that of .venv, say: -S leaves out where packages are."""
    result = subprocess.run([sys.executable, "-S", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode and result.stderr.startswith("error: No module named ") and result.stderr.count("\n") == 1
    assert "'bash setup.sh' installs what is needed into .venv" in result.stderr


@pytest.mark.parametrize("home", [None, ""])
def test_neither_a_home_nor_an_account(home, monkeypatch, tmp_path):
    monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code = "import pwd; pwd.getpwuid = {}.__getitem__; import utils.values as values; print(values.as_path('~/x'))"
    assert run_python(code).stdout == f"{tmp_path}/train_dreambooth_colossalai-{os.getuid()}/x\n"


def test_ctrl_c_says_what_was_interrupted(capsys):
    def main(argv):
        raise KeyboardInterrupt

    assert run_main(main, [], interrupted="before the training began") == 130
    assert "before the training began" in capsys.readouterr().err


def test_leaving_loses_nothing(tmp_path):
    code = f"""
import atexit, concurrent.futures, pathlib, sys, threading
from utils.command_line import leave
idle_pool = concurrent.futures.ThreadPoolExecutor(1)
idle_pool.submit(print, end="").result()
folder, may_go_on = pathlib.Path({str(tmp_path)!r}), threading.Event()
def write():
    may_go_on.wait()
    (folder / "thread").write_text("written")
threading.Thread(target=write).start()
threading.Thread(target=threading.Event().wait, daemon=True).start()
atexit.register(lambda: (folder / "exit").write_text("written"))
sys.stdout.write("no newline, not flushed")
threading.Timer(0.05, may_go_on.set).start()
leave(7)
"""
    result = run_python(code)
    assert (result.returncode, result.stdout, result.stderr) == (7, "no newline, not flushed", "")
    assert {path.name for path in tmp_path.iterdir()} == {"thread", "exit"}


def test_a_kernel_that_runs_the_script_ends_as_its_own(tmp_path):
    """IPython's %run is runpy: whatever was registered at exit before, such as saving the history, is called."""
    (tmp_path / "script.py").write_text("from utils.command_line import leave\nleave(7)\n")
    code = "import atexit, runpy, sys\natexit.register(print, 'history')\n"
    code += "try: runpy.run_path(sys.argv[1])\nexcept SystemExit as exit: print(exit.code)\n"
    assert run_python(code, tmp_path / "script.py").stdout == "7\nhistory\n"


PRINTS = """
import resource, sys, threading
from utils.command_line import leave, run_main
from utils.runtime.process import progress_bar
def main(argv):
    print("x" * 100_000)
    print("flushed", flush=True)
    with progress_bar("steps", 3, "step") as bar:
        bar.update(3)
    threading.Thread(target=print, args=("of a thread",)).start()
    sys.stdout.write("at the end")
end = leave if sys.argv[1] == "leave" else sys.exit
end(run_main(main))
"""


@pytest.mark.parametrize(("end", "unbuffered"), [("leave", ""), ("sys.exit", ""), ("leave", "1")])
@pytest.mark.parametrize("place", ["> /dev/full 2>&1", "2>&1 | exec sleep 0", ">&- 2>&-"])
def test_what_is_printed_may_get_lost(place, end, unbuffered, tmp_path):
    """On a full disk, in a pipe that nobody reads, without stdout: the program ends as it would have."""
    run = f"PYTHONUNBUFFERED={unbuffered} {sys.executable} -c '{PRINTS}' {end}"
    command = f"({'sleep 0.1; ' if '|' in place else ''}{run}; echo $? > {tmp_path}/code) {place}"
    subprocess.run(["bash", "-c", command], cwd=ROOT, check=True, timeout=60)
    assert (tmp_path / "code").read_text() == "0\n"


@pytest.mark.parametrize("script", ["train_dreambooth_colossalai.py", "evaluate.py"])
def test_help_that_nobody_reads_to_its_end(script):
    command = f"(PYTHONUNBUFFERED= {sys.executable} {script} --help; echo $? >&2) | true"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stderr == "0\n"


def test_a_log_goes_on_when_its_disk_has_space_again(tmp_path):
    code = """
import resource
from utils.runtime.process import make_printable
make_printable()
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (6, most))
print("first\\nlost", flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
print("last", flush=True)
"""
    with (tmp_path / "log").open("w") as log:
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=log).returncode == 0
    assert (tmp_path / "log").read_text() == "first\nlast\n"


def test_a_terminal_that_does_not_wait_is_waited_for():
    """O_NONBLOCK is of the terminal, not of the process: another program can have set it."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = subprocess.Popen([sys.executable, "-c", PRINTS, "leave"], cwd=ROOT, stdout=writer, stderr=writer)
    os.close(writer)
    time.sleep(0.5)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    assert process.wait() == 0
    assert text.count("x") >= 100_000 and "at the end" in text
