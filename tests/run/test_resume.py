"""A run that is killed and resumed is the run that was not: the same bits, the same losses, the same files."""

import fcntl
import json
import os
import random
import shutil
import signal
import termios
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.pipelines import write_photos
from tests.helpers.processes import Process, finish, start_ranks, wait_for
from tests.helpers.script import LATEST, UNET_FILE, as_argv, bits, rows, run, run_json, without_times
from train_dreambooth_colossalai import main
from utils import hashing
from utils.checkpoint_files import list_checkpoints
from utils.errors import UserError
from utils.resume import differences, resume_command


def change_scale_often() -> None:
    """fp16's loss scale doubles after every second applied update, so it overflows again and again."""
    from utils.optimizer import MasterWeightsOptimizer

    MasterWeightsOptimizer.__init__.__kwdefaults__.update(growth_interval=1, initial_scale=2.0**17)


KINDS = dict(
    fp32=(1, dict(max_train_steps=24)),
    fp16=(1, dict(max_train_steps=24, mixed_precision="fp16", gradient_accumulation_steps=2)),
    ranks=(2, dict(max_train_steps=12, mixed_precision="fp16", save_dtype="fp16")),
)


def kill_and_resume(flags: dict, tmp_path: Path, kind: str, num_moments: int) -> None:
    """An uninterrupted run, then the same run killed and resumed at each of `num_moments` random moments."""
    num_ranks, changes = KINDS[kind]
    argv = as_argv(flags | changes | dict(checkpointing_steps=3, checkpoints_total_limit=2))
    started = time.monotonic()
    assert finish(start_ranks(num_ranks, argv, tmp_path / "whole.txt", change_scale_often)) == [0] * num_ranks
    seconds = time.monotonic() - started
    output = flags["output_dir"]
    whole, expected = bits(output), without_times(output)
    if changes.get("mixed_precision") == "fp16":
        assert len({row["loss_scale"] for row in expected}) > 2 and any(row["skipped"] for row in expected)
    resumed = [*argv, "--resume_from_checkpoint=latest"]
    chance = random.Random(kind)
    kills, steps = 0, set()
    shutil.rmtree(output)
    while kills < num_moments:
        started = time.monotonic()
        ranks = start_ranks(num_ranks, resumed, tmp_path / "killed.txt", change_scale_often)
        time.sleep(seconds * chance.uniform(0.1, 0.9))
        victim = ranks[chance.randrange(num_ranks)]
        victim.kill()
        steps.add(len(rows(output)))
        codes = [victim.wait()]
        for other in ranks:
            if other is not victim:  # which may wait for a connection to the victim: torchrun would end it like this
                time.sleep(0.3)
                other.kill(signal.SIGTERM)
                codes.append(other.wait())
        kills += -signal.SIGKILL in codes
        if set(codes) == {0}:  # it was over before
            seconds = min(seconds, time.monotonic() - started)
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


def test_diffusers_loads_a_checkpoint(flags, tmp_path):
    from diffusers import UNet2DConditionModel

    run(flags, max_train_steps=4, checkpointing_steps=2)
    output = tmp_path / "output"
    unet, info = UNet2DConditionModel.from_pretrained(
        output, subfolder="checkpoint-4/unet", output_loading_info=True, local_files_only=True
    )
    assert not any(info.values()) and unet.dtype == torch.float32
    final = load_file(output / UNET_FILE)
    assert all(torch.equal(value, final[name]) for name, value in unet.state_dict().items())
    stored = load_file(output / "checkpoint-4/training_state.safetensors")
    assert stored.keys() == {f"{kind}.{name}" for name in final for kind in ("exp_avg", "exp_avg_sq")}


def test_what_a_checkpoint_of_half_precision_holds(flags, tmp_path):
    run(flags, max_train_steps=2, checkpointing_steps=2, mixed_precision="fp16", save_dtype="fp16")
    folder = tmp_path / "output/checkpoint-2"
    unet, stored = load_file(folder / UNET_FILE), load_file(folder / "training_state.safetensors")
    for name, value in unet.items():
        assert value.dtype == torch.float16 and torch.equal(value, stored[f"master.{name}"].half())
    state = json.loads((folder / "state.json").read_text())
    assert (state["step"], state["optimizer"]["loss_scale"], state["optimizer"]["num_applied"]) == (2, 65536.0, 2)
    assert state["determines"]["photos"].keys() == {f"photo-{number}.jpg" for number in range(4)}
    assert "unet/config.json" in state["determines"]["base_model"] and state["arguments"]["seed"] == 0


def test_a_finished_run_goes_on_with_more_steps(flags, tmp_path, tiny_pipeline_dir):
    run(flags, max_train_steps=6, output_dir=tmp_path / "whole")
    run(flags, max_train_steps=4, checkpointing_steps=2)
    (tmp_path / "output/checkpoint-2/notes.txt").write_text("mine")
    with (tmp_path / "output/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.0, "skipped": false}\n{"step": 6, "lo')
    assert main(as_argv(flags | LATEST | dict(max_train_steps=6))) == 0
    assert bits(tmp_path / "output") == bits(tmp_path / "whole")
    assert without_times(tmp_path / "output") == without_times(tmp_path / "whole")
    assert (
        run_json(tmp_path / "output")["result"]["final_loss"] == run_json(tmp_path / "whole")["result"]["final_loss"]
    )
    assert run_json(tmp_path / "output")["resumed_from"].endswith("checkpoint-4")
    with pytest.raises(UserError, match="checkpoint-4 is beyond --max_train_steps 3"):
        main(as_argv(flags | LATEST | dict(max_train_steps=3)))


@pytest.mark.parametrize("how", ["name", "path", "other output"])
def test_an_earlier_checkpoint_by_name_or_path(flags, tmp_path, how):
    run(flags, max_train_steps=6, checkpointing_steps=2)
    output, expected = tmp_path / "output", bits(tmp_path / "output")
    wanted = "checkpoint-2" if how == "name" else output / "checkpoint-2"
    flags["output_dir"] = tmp_path / "elsewhere" if how == "other output" else output
    changes = dict(max_train_steps=6, checkpointing_steps=2, resume_from_checkpoint=wanted)
    assert main(as_argv(flags | changes)) == 0
    assert bits(flags["output_dir"]) == expected
    assert [row["step"] for row in rows(flags["output_dir"])][-4:] == [3, 4, 5, 6]


def test_latest_without_any_starts_anew(flags, capsys):
    assert main(as_argv(flags | LATEST)) == 0
    assert "yet: starting anew" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["checkpoint-9", "nowhere", "photos"])
def test_a_checkpoint_that_is_none(flags, name):
    run(flags, checkpointing_steps=2)
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
]


def test_other_inputs_are_refused_with_the_difference(flags, tmp_path, tiny_pipeline_dir):
    run(flags, checkpointing_steps=2)
    for changes, message in CHANGES:
        with pytest.raises(UserError) as error:
            main(as_argv(flags | LATEST | changes))
        assert f"other inputs: {message}. Give" in str(error.value)
    photos = write_photos(tmp_path / "photos", 5)
    (photos / "photo-0.jpg").write_bytes((photos / "photo-1.jpg").read_bytes())
    with pytest.raises(UserError, match="photos: 'photo-4.jpg' is new; photos: 'photo-0.jpg' has changed"):
        main(as_argv(flags | LATEST | dict(instance_data_dir=photos)))
    base = shutil.copytree(tiny_pipeline_dir, tmp_path / "base")
    assert main(as_argv(flags | LATEST | dict(pretrained_model_name_or_path=base))) == 0  # the same files
    config = base / "scheduler/scheduler_config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(UserError, match="base_model: 'scheduler/scheduler_config.json' has changed"):
        main(as_argv(flags | LATEST | dict(pretrained_model_name_or_path=base)))
    assert main(as_argv(flags | LATEST | dict(seed=1, allow_changes=True))) == 0


def test_what_does_not_change_the_result_may_change(flags, tmp_path):
    run(flags, checkpointing_steps=2)
    changes = dict(save_dtype="fp16", checkpointing_steps=1, max_nonfinite_steps=5, report_to="tensorboard")
    assert main(as_argv(flags | LATEST | changes | dict(max_train_steps=4))) == 0


def test_a_flag_newer_than_the_checkpoint_counts_as_left_out(flags, tmp_path):
    run(flags, checkpointing_steps=2)
    path = tmp_path / "output/checkpoint-2/state.json"
    state = json.loads(path.read_text())
    del state["determines"]["arguments"]["deterministic"]
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match="--deterministic: False -> True"):
        main(as_argv(flags | LATEST | dict(deterministic=True)))
    assert main(as_argv(flags | LATEST)) == 0


def test_a_resume_reads_each_file_of_the_base_once(flags, tmp_path, tiny_pipeline_dir, monkeypatch):
    base = shutil.copytree(tiny_pipeline_dir, tmp_path / "base")
    for path in base.rglob("*"):
        os.utime(path, (1e9, 1e9))  # files that are years old, as a downloaded model's soon are
    flags["pretrained_model_name_or_path"] = base
    run(flags, checkpointing_steps=2)
    hashing._known.clear()
    hashed = []
    read = hashing._read
    monkeypatch.setattr(hashing, "_read", lambda path: hashed.append(path) or read(path))
    assert main(as_argv(flags | LATEST)) == 0
    hashed = [path for path in hashed if base in path.parents]
    assert base / UNET_FILE in hashed and len(hashed) == len(set(hashed)) > 8


def test_a_file_that_may_still_change_is_hashed_anew(tmp_path):
    path = tmp_path / "file"
    path.write_text("one")
    before = hashing.sha256_of(path)
    stamp = path.stat().st_mtime_ns
    path.write_text("two")
    os.utime(path, ns=(stamp, stamp))
    assert hashing.sha256_of(path) != before


def test_what_fails_in_the_background_fails_where_it_is_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError):
        hashing.in_background(hashing.sha256_of, tmp_path / "gone").result(5)


def test_differences_of_groups():
    old = dict(num_ranks=1, arguments=dict(a=1), photos=dict(x="1", y="2"))
    new = dict(num_ranks=2, arguments=dict(a=1, b=2), photos=dict(y="3"))
    assert differences(old, old) == []
    expected = ["--b: None -> 2", "num_ranks: 1 -> 2", "photos: 'x' has gone", "photos: 'y' has changed"]
    assert differences(old, new) == expected


def test_the_resume_command(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    argv = ["--seed=1", "--resume_from_checkpoint", "checkpoint-1", "--instance_prompt", "my cat", "--allow_changes"]
    command = resume_command([*argv, "--overwrite_output_dir"], 2)
    expected = "--seed=1 --instance_prompt 'my cat' --resume_from_checkpoint latest"
    assert command.endswith(f"torchrun --nproc_per_node 2 train_dreambooth_colossalai.py {expected}")
    assert resume_command(["--resume_from_checkpoint=x", "--seed=1"], 1).endswith(
        ".py --seed=1 --resume_from_checkpoint latest"
    )


def test_an_unfinished_runs_checkpoints_are_not_left_behind(flags, tmp_path):
    output = tmp_path / "output"
    run(flags, checkpointing_steps=2)
    path = output / "run.json"
    path.write_text(path.read_text().replace('"complete"', '"running"'))
    with pytest.raises(UserError, match="unfinished run with checkpoint-2: .* latest, or start over with --overwrite"):
        main(as_argv(flags))
    run(flags, overwrite_output_dir=True, seed=3)
    assert not list(output.glob("checkpoint-*")) and len(rows(output)) == 3


def test_a_fresh_start_keeps_the_finished_run_until_its_own_result(flags, tmp_path):
    output = tmp_path / "output"
    run(flags, checkpointing_steps=2)
    old = rows(output)
    process = Process(as_argv(flags | dict(max_train_steps=10_000, seed=1)), tmp_path / "text")
    wait_for(lambda: (output / "metrics.jsonl.previous").exists() and len(rows(output)) > 2)
    process.kill()
    process.wait()
    previous = [json.loads(line) for line in (output / "metrics.jsonl.previous").read_text().splitlines()]
    assert previous == old and json.loads((output / "run.json.previous").read_text())["status"] == "complete"
    assert (output / "checkpoint-2").is_dir() and (output / "model_index.json").is_file()
    run(flags, seed=2)
    assert not list(output.glob("*.previous")) and not list(output.glob("checkpoint-*"))
    assert run_json(output)["seed"] == 2 and len(rows(output)) == 3


def test_a_foreign_folder_named_like_a_checkpoint_survives(flags, tmp_path, capsys):
    output = tmp_path / "output"
    run(flags, checkpointing_steps=1, checkpoints_total_limit=1)
    for name in ("checkpoint-1", "checkpoint-5"):
        (output / name).mkdir()
        (output / name / "thesis.txt").write_text("mine")
    changes = dict(checkpointing_steps=1, checkpoints_total_limit=1, max_train_steps=6)
    assert main(as_argv(flags | LATEST | changes)) == 0
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-5", "checkpoint-6"}
    assert (output / "checkpoint-5/thesis.txt").read_text() == "mine"
    assert "checkpoint-5 exists and is not this program's" in capsys.readouterr().err


@pytest.mark.parametrize("file", [UNET_FILE, "training_state.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_not_resumed_from(flags, tmp_path, file):
    run(flags, checkpointing_steps=2)
    path = tmp_path / "output/checkpoint-2" / file
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole (safetensors file|checkpoint)"):
        main(as_argv(flags | dict(resume_from_checkpoint="checkpoint-2")))


@pytest.mark.parametrize(("precision", "scale"), [("no", 1.0), ("fp16", 2.0**-9)])
def test_another_memory_layout_gives_the_same_state(flags, tmp_path, tiny_pipeline_dir, precision, scale):
    from utils import models
    from utils.checkpoint import Checkpointer, read_checkpoint, restore
    from utils.optimizer import FlatParameters, MasterWeightsOptimizer

    def optimizer(memory_format) -> MasterWeightsOptimizer:
        flat = FlatParameters(
            models.load_unet(tiny_pipeline_dir), models.WEIGHT_DTYPES[precision], "cpu", memory_format
        )
        return MasterWeightsOptimizer(flat, learning_rates=[1e-3])

    one, other = optimizer(torch.channels_last), optimizer(torch.contiguous_format)
    one.flat.grad.copy_(torch.randn(one.flat.grad.shape, generator=torch.Generator().manual_seed(0)))
    one.step()
    one.loss_scale.fill_(scale)
    options = dict(unet_config=b"{}", describe=dict, save_dtype="fp32", run_id="x", total_limit=None, say=print)
    Checkpointer(tmp_path, one, **options).save_or_fail(7)
    places = {name: getattr(other, name).data_ptr() for name in ("exp_avg", "loss_scale", "num_good")}
    restore(read_checkpoint(tmp_path / "checkpoint-7"), other)
    assert places == {name: getattr(other, name).data_ptr() for name in places}
    for name in ("exp_avg", "exp_avg_sq"):
        ours, theirs = (each.flat.state_dict(getattr(each, name)) for each in (one, other))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours) and any(value.any() for value in ours.values())
    for name in ("master", "weight"):
        ours, theirs = (each.flat.state_dict(getattr(each.flat, name)) for each in (one, other))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert other.loss_scale == scale and other.num_applied == 1


def test_torchrun_restarts_resume_by_themselves(flags, tmp_path, monkeypatch):
    argv = as_argv(flags | dict(max_train_steps=8, checkpointing_steps=2))
    assert finish(start_ranks(1, argv, tmp_path / "whole.txt")) == [0]
    output = tmp_path / "output"
    expected = bits(output)
    shutil.rmtree(output)

    def die_at_step_5() -> None:
        from utils.logs import TrainingLog

        step = TrainingLog.step

        def dying(self, global_step, metrics):
            if global_step == 5:
                wait_for(lambda: (output / "checkpoint-4").is_dir())
                os.kill(os.getpid(), signal.SIGKILL)
            step(self, global_step, metrics)

        TrainingLog.step = dying

    assert finish(start_ranks(1, argv, tmp_path / "a", die_at_step_5)) == [-signal.SIGKILL]
    restarted = start_ranks(1, argv, tmp_path / "b", TORCHELASTIC_RESTART_COUNT="1")
    assert finish(restarted) == [0] and "going on from" in restarted[0].text()
    assert bits(output) == expected and len(rows(output)) == 8


class TestSignals:
    """A signal on any rank ends the run after the step, with the state kept."""

    @pytest.mark.parametrize(
        ("num_ranks", "rank", "number"),
        [(1, 0, signal.SIGINT), (1, 0, signal.SIGTERM), (1, 0, signal.SIGHUP), (2, 1, signal.SIGTERM)],
    )
    def test_the_state_is_kept(self, flags, tmp_path, num_ranks, rank, number):
        output = tmp_path / "output"
        argv = as_argv(flags | dict(max_train_steps=5000))
        ranks = start_ranks(num_ranks, argv, tmp_path / "text")
        wait_for(lambda: len(rows(output)) > 3)
        ranks[rank].kill(number)
        assert finish(ranks) == [128 + number] * num_ranks
        (checkpoint,) = list_checkpoints(output)
        assert checkpoint.step == len(rows(output)) and run_json(output)["status"] == "stopped"
        text = ranks[0].text()
        assert (
            f"stopped after step {checkpoint.step} of 5000 ({number.name}). The state" in text
            and "Traceback" not in text
        )
        command = text.strip().splitlines()[-1]
        assert f"--nproc_per_node {num_ranks} " in command and "--resume_from_checkpoint latest" in command
        assert not list(output.glob(".*"))

    def test_nohup(self, flags, tmp_path):
        argv = as_argv(flags | dict(max_train_steps=40))
        process = Process(argv, tmp_path / "text", lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
        wait_for(lambda: len(rows(tmp_path / "output")) > 3)
        process.kill(signal.SIGHUP)
        assert process.wait() == 0

    def test_the_terminal_is_closed(self, flags, tmp_path):
        """A connection that breaks: the run gets SIGHUP, and whatever it prints from then on is an error."""
        output = tmp_path / "output"
        ours, terminal = os.openpty()

        def use_the_terminal() -> None:
            os.close(ours)
            os.setsid()
            fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
            os.dup2(terminal, 1), os.dup2(terminal, 2)
            os.close(terminal)

        process = Process(as_argv(flags | dict(max_train_steps=5000)), tmp_path / "text", use_the_terminal)
        os.close(terminal)
        wait_for(lambda: len(rows(output)) > 3)
        os.close(ours)
        assert process.wait() == 128 + signal.SIGHUP
        (checkpoint,) = list_checkpoints(output)
        assert checkpoint.step == len(rows(output)) and run_json(output)["status"] == "stopped"

    def test_a_second_signal_ends_at_once(self, flags, tmp_path):
        output = tmp_path / "output"

        def never_finish_writing() -> None:
            from utils.checkpoint import Checkpointer

            fill = Checkpointer._fill

            def slow(self, folder, step):
                fill(self, folder, step)
                if step != 2:
                    time.sleep(1000)

            Checkpointer._fill = slow

        argv = as_argv(flags | dict(max_train_steps=5000, checkpointing_steps=2))
        process = Process(argv, tmp_path / "text", never_finish_writing)
        wait_for(lambda: (output / "checkpoint-2").is_dir())
        process.kill(signal.SIGINT)
        time.sleep(1.2)
        process.kill(signal.SIGINT)
        assert process.wait(5) == 130
        assert [found.step for found in list_checkpoints(output)] == [2]
        resumed = Process(as_argv(flags | LATEST | dict(max_train_steps=4)), tmp_path / "resumed")
        assert resumed.wait() == 0 and not list(output.glob(".*"))

    @pytest.mark.parametrize(
        ("seconds", "run_id", "warns"), [(25.0, "x", True), (25.0, None, False), (5.0, "x", False)]
    )
    def test_a_slow_checkpoint_under_torchrun_is_warned_of(self, flags, tmp_path, seconds, run_id, warns):
        def slow_disk() -> None:
            from utils.checkpoint import Checkpointer

            write = Checkpointer._write

            def slow(self, step, arrived):
                write(self, step, arrived)
                self.seconds = seconds

            Checkpointer._write = slow

        environment = dict(TORCHELASTIC_RUN_ID=run_id) if run_id else {}
        argv = as_argv(flags | dict(max_train_steps=5000, checkpointing_steps=2))
        process = Process(argv, tmp_path / "text", slow_disk, **environment)
        wait_for(lambda: "checkpoint-4: " in process.text())
        process.kill(signal.SIGTERM)
        assert process.wait() == 143
        assert ("took 25 s: if the signal was sent to torchrun, it kills" in process.text()) == warns

    def test_ctrl_c_twice_from_terminal_and_torchrun_is_one(self, flags, tmp_path):
        output = tmp_path / "output"
        process = Process(as_argv(flags | dict(max_train_steps=5000)), tmp_path / "text")
        wait_for(lambda: len(rows(output)) > 3)
        process.kill(signal.SIGINT)
        time.sleep(0.05)
        process.kill(signal.SIGINT)
        assert process.wait() == 130 and len(list_checkpoints(output)) == 1
