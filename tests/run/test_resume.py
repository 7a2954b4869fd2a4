"""A run that is killed and resumed is the run that was not: the same bits, the same losses, the same files."""

import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.pipelines import listing, write_photos, write_pipeline
from tests.helpers.processes import Process, after_step, die_after, finish, start_ranks
from tests.helpers.script import LATEST, as_argv, bits, rows, run, run_json, without_times
from train_dreambooth_colossalai import main
from utils.arguments import LR_SCHEDULERS
from utils.command_line import run_main
from utils.dataset import Photo
from utils.errors import UserError
from utils.models.check import check_base_model
from utils.run.lineage import find_checkpoint, list_checkpoints
from utils.run.resume import base_files, compared_arguments, photo_hashes, resume_command
from utils.runtime import environment
from utils.training.build import learning_rate_table
from utils.training.optimizer import MasterWeightsOptimizer


def change_scale_often() -> None:
    """fp16's loss scale doubles after every second applied update, so it overflows again and again."""
    MasterWeightsOptimizer.__init__.__kwdefaults__.update(growth_interval=1, initial_scale=2.0**17)


def die_at(rank: int, step: int, seconds: float) -> Callable[[], None]:
    """A `prepare` with which a rank kills itself `seconds` after its step `step`, or after its start if that is 0."""

    def prepare() -> None:
        change_scale_often()
        if int(os.environ.get("RANK", "0")) != rank:
            return
        death = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        death.daemon = True
        after_step(step, death.start)() if step else death.start()

    return prepare


VALIDATED = dict(validation_prompt="x", validation_steps=2, num_validation_images=1, validation_inference_steps=2)
KINDS = dict(
    fp32=(1, dict(max_train_steps=12)),
    fp16=(1, dict(max_train_steps=12, mixed_precision="fp16", gradient_accumulation_steps=2)),
    ranks=(2, dict(max_train_steps=12, mixed_precision="fp16", save_dtype="fp16")),
)


def kill_and_resume(flags: dict, tmp_path: Path, kind: str, num_moments: int) -> None:
    """An uninterrupted run, then the same run killed and resumed at each of `num_moments` random moments."""
    num_ranks, changes = KINDS[kind]
    argv = as_argv(flags | changes | dict(checkpointing_steps=3, checkpoints_total_limit=2))
    assert finish(start_ranks(num_ranks, argv, tmp_path / "whole.txt", change_scale_often)) == [0] * num_ranks
    output = flags["output_dir"]
    whole, expected = bits(output), without_times(output)
    if changes.get("mixed_precision") == "fp16":
        assert len({row["loss_scale"] for row in expected}) > 2 and any(row["skipped"] for row in expected)
    resumed = [*argv, "--resume_from_checkpoint=latest"]
    chance = random.Random(kind)
    kills, steps = 0, set()
    shutil.rmtree(output)
    while kills < num_moments:
        # Every third is killed while it starts, the others somewhere in the run's first, second, ... last part.
        early = kills % 3 == 1
        first, last = (len(expected) * part // num_moments for part in (kills, kills + 1))
        step = 0 if early else chance.randint(first + 1, max(first + 1, last))
        number, seconds = chance.randrange(num_ranks), chance.uniform(0, 0.5 if early else 0.03)
        ranks = start_ranks(num_ranks, resumed, tmp_path / "killed.txt", die_at(number, step, seconds))
        victim = ranks[number]
        codes = [victim.wait()]
        steps.add(len(rows(output)))
        for other in ranks:
            if other is not victim:  # which may wait for a connection to the victim: torchrun would end it like this
                time.sleep(0.3)
                other.kill(signal.SIGTERM)
                codes.append(other.wait())
        kills += -signal.SIGKILL in codes
        if set(codes) == {0}:  # it was over before
            assert bits(output) == whole
            shutil.rmtree(output)
    assert finish(start_ranks(num_ranks, resumed, tmp_path / "last.txt", change_scale_often)) == [0] * num_ranks
    assert bits(output) == whole
    assert without_times(output) == expected
    assert not list(output.glob(".*")) and len(steps) > 1
    assert [found.step for found in list_checkpoints(output)] == [len(expected) - 3, len(expected)]


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_three_moments(flags, tmp_path, kind):
    kill_and_resume(flags, tmp_path, kind, 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_twenty_moments(flags, tmp_path, kind):
    kill_and_resume(flags, tmp_path, kind, 20)


def test_a_finished_run_goes_on_with_more_steps(flags, output, tmp_path, capsys):
    run(flags, max_train_steps=6, output_dir=tmp_path / "whole")
    run(flags, max_train_steps=4, checkpointing_steps=2)
    (output / "checkpoint-2/notes.txt").write_text("mine")
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.0, "skipped": false}\n{"step": 6, "lo')
    assert "\n4 steps in " in capsys.readouterr().out
    assert main(as_argv(flags | LATEST | dict(max_train_steps=6))) == 0
    assert "\n6 steps, 2 of them now, in " in capsys.readouterr().out
    whole, resumed = (run_json(folder)["result"] for folder in (tmp_path / "whole", output))
    assert (whole["num_steps_now"], resumed["num_steps_now"]) == (6, 2)
    assert bits(output) == bits(tmp_path / "whole")
    assert without_times(output) == without_times(tmp_path / "whole")
    assert resumed["final_loss"] == whole["final_loss"]
    assert run_json(output)["resumed_from"].endswith("checkpoint-4")
    with pytest.raises(UserError, match="checkpoint-4 is beyond --max_train_steps 3"):
        main(as_argv(flags | LATEST | dict(max_train_steps=3)))


def test_an_earlier_checkpoint_by_name_or_path(flags, output, tmp_path):
    run(flags, max_train_steps=6, checkpointing_steps=2)
    expected, path = bits(output), output / "checkpoint-2"
    for wanted, place in ((path, tmp_path / "elsewhere"), ("checkpoint-2", output), (path, output)):
        found = run(flags, max_train_steps=6, checkpointing_steps=2, resume_from_checkpoint=wanted, output_dir=place)
        assert bits(place) == expected and [row["step"] for row in found][-4:] == [3, 4, 5, 6]


def test_latest_without_any_starts_anew_and_a_checkpoint_that_is_none_is_refused(flags, capsys):
    run(flags, **LATEST, checkpointing_steps=2)
    assert "yet: starting anew" in capsys.readouterr().out
    for name in ("checkpoint-9", "nowhere", "photos"):
        with pytest.raises(UserError, match=f"--resume_from_checkpoint {name}: .* there are: checkpoint-2$"):
            main(as_argv(flags | dict(resume_from_checkpoint=name)))


CHANGES = [
    (dict(seed=1), "--seed: 0 -> 1"),
    (dict(train_batch_size=2), "--train_batch_size: 1 -> 2"),
    (dict(gradient_accumulation_steps=2), "--gradient_accumulation_steps: 1 -> 2"),
    (dict(mixed_precision="bf16"), "--mixed_precision: 'no' -> 'bf16'"),
    (dict(learning_rate=2e-3), "--learning_rate: 0.001 -> 0.002"),
    (dict(instance_prompt="a dog"), "--instance_prompt: 'a photo of my cat.' -> 'a dog'"),
    (dict(resolution=36), "--resolution: 32 -> 36"),
    (dict(center_crop=True), "--center_crop: False -> True"),
    (dict(lr_scheduler="linear"), "--lr_scheduler: 'constant' -> 'linear'; --max_train_steps: None -> 3"),
    (dict(adam_beta1=0.5), "--adam_beta1: 0.9 -> 0.5"),
    (dict(use_8bit_adam=True), "--use_8bit_adam: False -> True"),
]


def test_other_inputs_are_refused_with_the_difference(flags, tmp_path, base):
    run(flags, checkpointing_steps=2)
    for changes, message in CHANGES:
        with pytest.raises(UserError) as error:
            main(as_argv(flags | LATEST | changes))
        assert f"other inputs: {message}. Give" in str(error.value)
    harmless = dict(save_dtype="fp16", checkpointing_steps=5, max_nonfinite_steps=5, report_to="tensorboard")
    assert main(as_argv(flags | LATEST | harmless | dict(max_train_steps=4))) == 0
    photos = write_photos(tmp_path / "photos", 5)
    (photos / "photo-0.jpg").write_bytes((photos / "photo-1.jpg").read_bytes())
    with pytest.raises(UserError, match="photos: 'photo-4.jpg' is new; photos: 'photo-0.jpg' has changed"):
        main(as_argv(flags | LATEST | dict(instance_data_dir=photos)))
    assert main(as_argv(flags | LATEST | dict(pretrained_model_name_or_path=base))) == 0  # the same files
    config = base / "scheduler/scheduler_config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(UserError, match="base_model: 'scheduler/scheduler_config.json' has changed"):
        main(as_argv(flags | LATEST | dict(pretrained_model_name_or_path=base)))
    assert main(as_argv(flags | LATEST | dict(seed=1, allow_changes=True))) == 0


class TestClassImages:
    """Those that a run uses are compared, not their folder."""

    @pytest.fixture(autouse=True)
    def trained(self, prior, tmp_path, monkeypatch):
        """Five of six images of the user's own."""
        write_photos(tmp_path / "class", 6)
        run(prior, checkpointing_steps=2)
        monkeypatch.chdir(tmp_path)

    def test_the_folder_may_be_moved_and_what_is_not_used_may_come_and_go(self, prior, tmp_path):
        (tmp_path / "class/Thumbs.db").write_text("of Windows")
        write_photos(tmp_path / "class", 8)
        assert main(as_argv(prior | LATEST | dict(class_data_dir="class"))) == 0
        (tmp_path / "class/photo-5.jpg").unlink()
        (tmp_path / "class").rename(tmp_path / "moved")
        assert main(as_argv(prior | LATEST | dict(class_data_dir=tmp_path / "moved"))) == 0

    def test_what_is_used_has_to_be_the_same(self, prior, tmp_path):
        used, first = tmp_path / "class/photo-4.jpg", tmp_path / "class/a.jpg"
        content = used.read_bytes()
        used.unlink()
        self.refused(prior, "class_images: 'photo-4.jpg' has gone; class_images: 'photo-5.jpg' is new")
        used.write_bytes((tmp_path / "class/photo-1.jpg").read_bytes())
        self.refused(prior, "class_images: 'photo-4.jpg' has changed")
        used.write_bytes(content)
        first.write_bytes(content)
        self.refused(prior, "class_images: 'photo-4.jpg' has gone; class_images: 'a.jpg' is new")
        write_photos(tmp_path / "other", 5, size=(40, 40))
        said = "; ".join(f"class_images: 'photo-{number}.jpg' has changed" for number in range(3))
        self.refused(prior | dict(class_data_dir=tmp_path / "other"), f"{said}; and 2 more")

    def refused(self, prior: dict, message: str) -> None:
        with pytest.raises(UserError) as error:
            main(as_argv(prior | LATEST))
        assert f"other inputs: {message}. Give" in str(error.value)


def test_subjects_may_be_named_otherwise_but_not_in_another_order(flags, tmp_path, monkeypatch):
    folders = [write_photos(tmp_path / name, 1, size=(side, side)) for name, side in (("a", 40), ("b", 48))]
    monkeypatch.chdir(tmp_path)

    def listed(*folders) -> dict:
        entries = [dict(instance_prompt="a cat", instance_data_dir=str(folder)) for folder in folders]
        (tmp_path / "concepts.json").write_text(json.dumps(entries))
        return flags | dict(concepts_list="concepts.json", instance_data_dir=None, instance_prompt=None)

    run(listed(*folders), checkpointing_steps=2)
    assert main(as_argv(listed("a", "b") | LATEST)) == 0
    with pytest.raises(UserError, match="photos: '1/photo-0.jpg' has changed"):
        main(as_argv(listed("b", "a") | LATEST))


def test_flags_that_are_newer_than_the_checkpoint_or_have_gone(flags, tmp_path):
    """One counts as left out, the other is not compared."""
    run(flags, checkpointing_steps=2)
    path = tmp_path / "output/checkpoint-2/state.json"
    state = json.loads(path.read_text())
    del state["determines"]["arguments"]["deterministic"]
    state["determines"]["arguments"]["compile"] = False
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match="other inputs: --deterministic: False -> True. Give"):
        main(as_argv(flags | LATEST | dict(deterministic=True)))
    assert main(as_argv(flags | LATEST)) == 0


def test_the_resume_command(monkeypatch):
    for name, value in dict(RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="head").items():
        monkeypatch.setenv(name, value)
    argv = ["--seed=1", "--resume_from_checkpoint", "checkpoint-1", "--instance_prompt", "my cat", "--allow_changes"]
    command = resume_command([*argv, "--overwrite_output_dir"])
    expected = "--seed=1 --instance_prompt 'my cat' --resume_from_checkpoint latest"
    assert command.endswith(f"torchrun --nproc_per_node 2 train_dreambooth_colossalai.py {expected}")
    assert resume_command(["--resume_from_checkpoint=x", "--seed=1"]).endswith(
        ".py --seed=1 --resume_from_checkpoint latest"
    )


def test_an_unfinished_run_is_not_left_behind_and_started_over_leaves_nothing(flags, tmp_path):
    run(flags, checkpointing_steps=2, **VALIDATED)
    assert len(logs(tmp_path / "output")) == 3
    path = tmp_path / "output/run.json"
    path.write_text(path.read_text().replace('"complete"', '"running"'))
    with pytest.raises(UserError, match="unfinished run with checkpoint-2: .* latest, or start over with --overwrite"):
        main(as_argv(flags))
    run(flags, overwrite_output_dir=True, seed=3)
    assert not list((tmp_path / "output").glob("checkpoint-*")) and len(rows(tmp_path / "output")) == 3
    assert logs(tmp_path / "output").keys() == {"metrics.jsonl"}


def test_a_fresh_start_keeps_the_finished_run_until_its_own_result(flags, output, tmp_path):
    run(flags, checkpointing_steps=2, **VALIDATED)
    old = logs(output)
    (output / "validation/mine.txt").write_text("keep")  # of that folder only pictures are moved and removed
    assert len(old) == 3 and len(rows(output)) == 3
    kill_after_3_steps(flags, tmp_path)
    assert logs(output, ".previous") == old
    assert json.loads((output / "run.json.previous").read_text())["status"] == "complete"
    assert (output / "checkpoint-2").is_dir() and (output / "model_index.json").is_file()
    assert logs(output).keys() == {"metrics.jsonl", "validation"} and logs(output)["validation"] == ["mine.txt"]
    run(flags, seed=2, overwrite_output_dir=True)
    assert not list(output.glob("*.previous")) and not list(output.glob("checkpoint-*"))
    assert run_json(output)["seed"] == 2 and len(rows(output)) == 3
    assert logs(output).keys() == {"metrics.jsonl", "validation"} and logs(output)["validation"] == ["mine.txt"]


ANOTHER = [
    (dict(instance_prompt="a dog"), "--instance_prompt: 'a photo of my cat.' -> 'a dog'"),
    (dict(seed=1), "--seed: 0 -> 1"),
    (dict(max_train_steps=2), "--max_train_steps: 3 -> 2"),
    (dict(instance_data_dir="fewer"), "photos: 'photo-3.jpg' has gone"),
    (dict(pretrained_model_name_or_path="base"), "base_model: 'text_encoder/model.safetensors' has changed"),
]


def test_a_result_is_replaced_by_the_same_run_alone(flags, output, tmp_path, monkeypatch, photos_dir):
    """By another one only if --overwrite_output_dir says so: a second subject costs nobody the first."""
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "fewer", 3)
    write_pipeline(tmp_path / "base", seed=3)
    run(flags)
    before = listing(output)
    for changes, said in ANOTHER:
        for start in ({}, LATEST, dict(dry_run=True)):
            if start:
                assert run_main(main, as_argv(flags | changes | start)) == 2
                continue
            with pytest.raises(UserError, match="holds the result of another run") as error:
                main(as_argv(flags | changes))
            assert f"({said}" in str(error.value)
    assert listing(output) == before
    run(flags), run(flags, max_train_steps=4)
    kill_after_3_steps(flags, tmp_path)
    with pytest.raises(UserError, match="another run .--seed: 0 -> 2"):  # the result is still the first one's
        main(as_argv(flags | dict(seed=2)))
    run(flags, seed=2, overwrite_output_dir=True)


def test_a_checkpoint_of_elsewhere_does_not_replace_a_result_either(flags, tmp_path):
    run(flags, checkpointing_steps=2)
    run(flags, seed=1, output_dir=tmp_path / "other")
    argv = flags | dict(resume_from_checkpoint=tmp_path / "output/checkpoint-2", output_dir=tmp_path / "other")
    with pytest.raises(UserError, match="holds the result of another run .--seed: 1 -> 0"):
        main(as_argv(argv))


def kill_after_3_steps(flags: dict, tmp_path: Path, **changes) -> None:
    """Another run in the same folder, killed."""
    argv = as_argv(flags | dict(max_train_steps=10_000, seed=1, overwrite_output_dir=True) | changes)
    process = Process(argv, tmp_path / "text", after_step(3, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert process.wait() == -signal.SIGKILL


def logs(output: Path, suffix: str = "") -> dict[str, bytes | list[str]]:
    """What a run left of its way to the result."""
    files = {name: output / f"{name}{suffix}" for name in ("metrics.jsonl", "validation.jsonl", "validation")}
    return {
        name: sorted(picture.name for picture in path.iterdir()) if path.is_dir() else path.read_bytes()
        for name, path in files.items()
        if path.exists()
    }


def test_torchrun_restarts_resume_by_themselves(flags, output, tmp_path, monkeypatch):
    argv = as_argv(flags | dict(max_train_steps=8, checkpointing_steps=2))
    assert finish(start_ranks(1, argv, tmp_path / "whole.txt")) == [0]
    expected = bits(output)
    shutil.rmtree(output)

    torchrun = dict(RANK="0", WORLD_SIZE="1", TORCHELASTIC_RUN_ID="none")
    assert finish(start_ranks(1, argv, tmp_path / "a", die_after(4), **torchrun)) == [-signal.SIGKILL]
    restarted = start_ranks(1, argv, tmp_path / "b", TORCHELASTIC_RESTART_COUNT="1", **torchrun)
    assert finish(restarted) == [0] and "resuming from" in restarted[0].text()
    assert bits(output) == expected and len(rows(output)) == 8


@pytest.mark.parametrize(
    ("run_id", "agent", "num_restarts", "status", "goes_on"),
    [
        ("none", "this", "1", "running", True),
        ("none", "another", "1", "running", False),  # died before its run.json: what lies there is an earlier run's
        ("job-0", "this", "1", "running", False),
        ("job-1", "this", "0", "stopped", True),  # a node has joined: that is no restart
        ("job-1", "another", "0", "stopped", False),  # the same name, given to a new run that may start over
        ("job-1", "another", "1", "stopped", True),  # rank 0 was on a machine that has left
        ("job-1", "this", "0", "complete", False),
    ],
)
def test_a_restarted_run_goes_on_with_what_this_start_of_torchrun_began(
    flags, output, monkeypatch, run_id, agent, num_restarts, status, goes_on
):
    run(flags, checkpointing_steps=2)
    variables = dict(RANK="0", WORLD_SIZE="1", TORCHELASTIC_RESTART_COUNT=num_restarts)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none" if run_id == "none" else "job-1")
    launch = [run_id, environment.launch()[1] if agent == "this" else agent]
    (output / "run.json").write_text(json.dumps(run_json(output) | dict(launch=launch, status=status)))
    found = find_checkpoint(output, None, may_start_over=True)
    assert (found is not None) == goes_on


@pytest.mark.parametrize("lr_scheduler", LR_SCHEDULERS)
def test_the_number_of_steps_is_compared_if_the_learning_rates_depend_on_it(lr_scheduler):
    options = dict(num_warmup_steps=2, num_cycles=2, power=2.0)
    short, long = (learning_rate_table(1e-3, lr_scheduler, num_training_steps=n, **options)[:10] for n in (10, 20))
    compared = compared_arguments(dict(lr_scheduler=lr_scheduler, max_train_steps=10))
    assert ("max_train_steps" in compared) == (short != long)


def test_a_base_file_replaced_by_one_of_the_same_size_is_noticed(base):
    model = check_base_model(base)
    before, config = base_files(model), base / "vae/config.json"
    config.write_text(config.read_text().swapcase())
    assert {path for path, found in base_files(model).items() if found != before[path]} == {config}


def test_captions_and_folders_are_part_of_what_a_resumed_run_compares(tmp_path):
    one = Photo(Path("a/1.jpg"), "abc", (1, 1), None, prompt="my cat")
    other = one._replace(path=Path("b/1.jpg"), prompt="my dog")
    assert photo_hashes([one], "my cat") == {"1.jpg": "abc"}
    assert photo_hashes([one], "a cat") == {"1.jpg": "abc 'my cat'"}
    two = photo_hashes([one, other], None)
    assert two == {"1/1.jpg": "abc 'my cat'", "2/1.jpg": "abc 'my dog'"}
