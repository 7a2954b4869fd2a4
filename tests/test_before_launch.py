"""What run.sh checks before torchrun, and what it launches: silent if all is well, else one line."""

import json
import os
import subprocess
from types import SimpleNamespace

import pytest

from tests.helpers.script import as_argv, run, run_python
from utils import before_launch
from utils.command_line import run_main
from utils.evaluation.arguments import parse_args
from utils.evaluation.plan import make_plan
from utils.evaluation.samples import drawn_from, plan_samples
from utils.files.hashing import sha256_of
from utils.models.folder import FROZEN_PARTS, read_base


def check(flags: dict, evaluated: object = None, *more: str) -> int:
    evaluation = ["--num_images=1", *more, f"--finetuned_model_name_or_path={evaluated or flags['output_dir']}"]
    argv = [*as_argv(flags), "--", *evaluation]
    return run_main(lambda words: before_launch.check(words) and None, argv)


def test_silent_if_all_is_well(flags, capsys, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert check(flags) == 0
    assert tuple(capsys.readouterr()) == ("", "") and sorted(tmp_path.rglob("*")) == before


def test_what_is_trained_is_what_is_evaluated(flags, capsys, tmp_path):
    assert check(flags, evaluated=tmp_path / "earlier") == 2
    assert f"{tmp_path / 'earlier'} is evaluated: set OUTPUT_DIR instead" in capsys.readouterr().err


def test_torch_is_not_imported(flags):
    code = "import sys; from utils.before_launch import check; check(sys.argv[1:]); assert 'torch' not in sys.modules"
    result = run_python(code, *as_argv(flags), "--", f"--finetuned_model_name_or_path={flags['output_dir']}")
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


def ready(flags: dict, *more: str, **changes) -> before_launch.Ready:
    evaluation = [f"--finetuned_model_name_or_path={flags['output_dir']}", *more]
    return before_launch.check([*as_argv(flags | changes), "--", *evaluation])


@pytest.mark.parametrize(("steps", "every"), [(20, 500), (99, 500), (100, 50), (400, 200), (401, 201), (600, 500)])
def test_a_run_without_one_gets_a_checkpoint_in_its_middle(flags, steps, every):
    assert ready(flags, max_train_steps=steps).training[-1] == f"--checkpointing_steps={every}"


def test_an_own_value_wins_and_so_does_a_small_disk(flags, tmp_path, monkeypatch):
    flags |= dict(max_train_steps=400)
    assert [word for word in ready(flags, checkpointing_steps=500).training if "check" in word][1:] == []
    (tmp_path / "own.json").write_text('{"checkpointing_steps": 450}')
    assert not any("check" in word for word in ready(flags, config=tmp_path / "own.json").training)
    base = read_base(flags["pretrained_model_name_or_path"])
    copied = [file.stat().st_size for part in FROZEN_PARTS for file in base.files(part).values()]
    result = 4 * base.num_parameters + sum(copied)
    for checkpoints, every in ((2, 200), (1.9, 500)):
        free = result + checkpoints * 12 * base.num_parameters
        monkeypatch.setattr("shutil.disk_usage", lambda place, free=free: SimpleNamespace(total=1, free=free))
        assert ready(flags, save_dtype="fp32").training[-1] == f"--checkpointing_steps={every}"


def test_it_knows_what_will_be_drawn(flags, output):
    """As many denoising steps as the plan of the evaluation has once the run is over."""
    flags |= dict(max_train_steps=4, checkpointing_steps=2)
    more = ["--choose", "--num_images=3", "--num_inference_steps=20", "--checkpoint=2"]
    expected = ready(flags, *more).num_draws
    run(flags)
    plan = make_plan(parse_args([f"--finetuned_model_name_or_path={output}", *more]))
    assert expected == sum(len(plan_samples(p)) * p.num_inference_steps for p in (plan, plan.candidates)) > 1000


def test_the_recipes_own_trial_is_called_that(flags, capsys):
    ready(flags, max_train_steps=20, learning_rate=1e-6)
    assert "the recipe's trial" in (err := capsys.readouterr().err) and "MAX_TRAIN_STEPS=400 LEARNING_RATE=2e-6" in err
    ready(flags, max_train_steps=20, learning_rate=2e-6)
    assert capsys.readouterr().err == ""


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
