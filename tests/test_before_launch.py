"""What run.sh checks before torchrun: silent if all is well, else one line."""

import json
import os
import subprocess

import pytest

from tests.helpers.script import as_argv, run_python
from utils import before_launch
from utils.command_line import run_main
from utils.evaluation.samples import drawn_from
from utils.files.hashing import sha256_of


def check(flags: dict, evaluated: object = None, *more: str) -> int:
    evaluation = ["--num_images=1", *more, f"--finetuned_model_name_or_path={evaluated or flags['output_dir']}"]
    return run_main(before_launch.check, [*as_argv(flags), "--", *evaluation])


def test_silent_if_all_is_well(flags, capsys, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert check(flags) == 0
    assert tuple(capsys.readouterr()) == ("", "") and sorted(tmp_path.rglob("*")) == before


def test_what_is_trained_is_what_is_evaluated(flags, capsys, tmp_path):
    assert check(flags, evaluated=tmp_path / "earlier") == 2
    assert f"{tmp_path / 'earlier'} is evaluated: set OUTPUT_DIR instead" in capsys.readouterr().err


def test_torch_is_not_imported(flags):
    code = "import sys; from utils.before_launch import main; code = main()"
    code += "; assert code == 0 and 'torch' not in sys.modules"
    result = run_python(code, *as_argv(flags))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("name", "is_left"), [("2", True), ("checkpoint-4", True), ("all", True), ("3", False)])
def test_a_checkpoint_to_evaluate_is_one_that_there_will_be(flags, capsys, name, is_left):
    assert check(flags | dict(max_train_steps=5, checkpointing_steps=2), None, f"--checkpoint={name}") == 2 * (
        not is_left
    )
    assert (
        "CHECKPOINT=3: of checkpoints there will be checkpoint-2, checkpoint-4" in capsys.readouterr().err
    ) != is_left
    assert check(flags | dict(max_train_steps=5, checkpointing_steps=9), None, f"--checkpoint={name}") == 2


def test_where_the_evaluation_goes_can_be_written(flags, capsys, tmp_path):
    (tmp_path / "file").touch()
    assert check(flags, None, f"--output_dir={tmp_path / 'file/result'}") == 2
    assert "RESULT_DIR" in capsys.readouterr().err


def test_a_page_of_another_subject_is_refused_before_the_training(flags, capsys, tmp_path):
    (page := tmp_path / "result").mkdir()
    theirs = drawn_from(flags["output_dir"], {"0" * 64: "a photo of sks dog"})
    (page / "samples.json").write_text(json.dumps(dict(written_by="evaluate.py", files=[], drawn_from=theirs)))
    assert check(flags, None, f"--output_dir={page}") == 2
    assert f"--output_dir {page} holds the page of another model" in capsys.readouterr().err
    assert check(flags, None, f"--output_dir={page}", "--overwrite_output_dir") == 0
    photos = {sha256_of(path): flags["instance_prompt"] for path in flags["instance_data_dir"].iterdir()}
    ours = drawn_from(flags["output_dir"], photos)
    (page / "samples.json").write_text(json.dumps(dict(written_by="evaluate.py", files=[], drawn_from=ours)))
    assert check(flags, None, f"--output_dir={page}") == 0


def said(capsys, monkeypatch, **variables) -> tuple[str, str]:
    for name in set(os.environ) - {"HOME", "PATH"}:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before_launch.variables()
    return capsys.readouterr()


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("MAX_TRAIN_STEP", "is MAX_TRAIN_STEPS meant?"),
        ("INSTANCE_PROPMT", "is INSTANCE_PROMPT meant?"),
        ("NPORC", "is NPROC meant?"),
        ("learning_rate", "is LEARNING_RATE meant?"),
        ("\ufeffMODEL_NAME", "is MODEL_NAME meant?"),
        ("CLASS_PROMPT", "a flag says that: bash run.sh --class_prompt"),
    ],
)
def test_a_variable_that_looks_like_one_of_run_shs(capsys, monkeypatch, name, advice):
    assert said(capsys, monkeypatch, **{name: "1"}) == ("", f"note: run.sh does not read {name}: {advice}\n")


OF_OTHERS = (
    "OUTPUT_DIRECTORY INSTANCE_ID ENV VIRTUAL_ENV CONFIG DEBUG MODEL_PATH CHECKPOINT_DIR NPROC_PER_NODE PYTHONPATH "
    "LOCAL_RANK SLURM_NPROCS PROMPT_COMMAND RESULTS LR CUDA_VISIBLE_DEVICES LD_LIBRARY_PATH HF_HOME TMPDIR LOG_DIR "
    "MODEL_ID OUTPUT NUM_GPUS BATCH_SIZE WANDB_NAME KUBERNETES_SERVICE_PORT INSTANCE_TYPE VERSION"
)


def test_variables_of_others_are_not_meant(capsys, monkeypatch):
    assert said(capsys, monkeypatch, **dict.fromkeys(OF_OTHERS.split(), "1")) == ("", "")


def test_variables_as_an_environment_file_leaves_them(capsys, monkeypatch):
    out, _ = said(capsys, monkeypatch, NPROC="2\r", INSTANCE_PROMPT='"dan\'s cat"', MODEL_NAME="")
    command = f'{out}\necho "$NPROC, $INSTANCE_PROMPT, $MODEL_NAME."'
    shell = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert shell.stdout == "2, dan's cat, .\n"
