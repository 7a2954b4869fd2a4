"""Several processes: the same run however it is spread, one decision for all, and an end for all when one dies."""

import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tests.helpers.pipelines import write_photos
from tests.helpers.processes import finish, free_port, start_ranks
from tests.helpers.script import (
    ROOT,
    SPREAD,
    TRAIN,
    UNET_FILE,
    as_argv,
    losses,
    rows,
    run,
    run_json,
    start,
    weight_change,
)
from tests.helpers.tolerances import ANOTHER_ORDER
from utils.data import class_images
from utils.data.class_generation import image_seed
from utils.data.class_images import file_name, read_metadata
from utils.diffusion import Loss
from utils.kernels import operations
from utils.models import fused_unet
from utils.training import build, train_step
from utils.training.flat_parameters import FlatParameters
from utils.training.optimizer import MasterWeightsOptimizer


@pytest.fixture
def spread_flags(flags, tmp_path) -> dict:
    """Five photos, one with a caption, and seven class images: neither is divisible by a step's six samples."""
    photos = write_photos(tmp_path / "five", 5)
    (photos / "photo-3.txt").write_text("my cat asleep")
    return (
        flags
        | SPREAD
        | dict(
            instance_data_dir=photos,
            with_prior_preservation=True,
            class_data_dir=write_photos(tmp_path / "class", 7, size=(40, 40)),
            class_prompt="a photo of a cat.",
            num_class_images=7,
            snr_gamma=5,
            lr_scheduler="linear",
            lr_warmup_steps=2,
            scale_lr=True,
            learning_rate=2e-4,
            max_train_steps=4,
            save_dtype="fp32",
        )
    )


@pytest.fixture
def one_process(spread_flags, tmp_path):
    """The rows and the weights' change of the run on one rank."""
    found = run(spread_flags, train_batch_size=6)
    return found, weight_change(spread_flags["pretrained_model_name_or_path"], tmp_path / "output")


class GatheredGradients:
    """What kernels.adamw.GradientTable does on a GPU with gradients that have no buffer: in plain torch, in one."""

    def __init__(self, flat: FlatParameters):
        self.flat, self.grad = flat, torch.zeros_like(flat.weight)

    def set_addresses(self, gradients: list[torch.Tensor]) -> None:
        for part, gradient in zip(self.flat.views(self.grad), gradients, strict=True):
            part.copy_(gradient)

    def grad_norm_(self, out: torch.Tensor) -> None:
        operations.grad_norm_(self.grad, out)

    def adamw_(self, weight: torch.Tensor, remainder: torch.Tensor | None, *state: torch.Tensor) -> None:
        operations.adamw_(weight, remainder, self.grad, *state)


def as_on_a_gpu() -> None:
    """A `prepare`: the UNet is fused, and gradients have no buffer of their own but DDP's buckets."""

    def without_buffer(unet, weight_dtype, device, memory_format, **options):
        flat = FlatParameters(unet, weight_dtype, device, torch.channels_last)
        flat.grad, flat.grad_table = None, GatheredGradients(flat)
        flat.clear_grads()
        fused_unet.install(unet)
        return flat

    build.FlatParameters = without_buffer
    torch.cuda.is_current_stream_capturing = lambda: False


SPREADS = [
    pytest.param(2, 3, 1, None, id="2x3"),
    pytest.param(2, 1, 3, as_on_a_gpu, id="2x1x3-as-on-a-gpu"),
    pytest.param(3, 1, 2, None, marks=pytest.mark.slow, id="3x1x2"),
]


@pytest.mark.parametrize(("num_ranks", "batch", "micro", "prepare"), SPREADS)
def test_a_run_does_not_depend_on_how_it_is_spread(
    spread_flags, one_process, tmp_path, num_ranks, batch, micro, prepare
):
    expected, expected_change = one_process
    spread = dict(train_batch_size=batch, gradient_accumulation_steps=micro, output_dir=tmp_path / "ranks")
    ranks = start_ranks(num_ranks, as_argv(spread_flags | spread), tmp_path / "said", prepare)
    assert finish(ranks) == [0] * num_ranks, ranks[0].text()
    assert ranks[0].text().count("0/4 [") == 1 and ranks[0].text().count("photos at 32 px") == 1
    found = rows(tmp_path / "ranks")
    assert len(found) == 4 and run_json(tmp_path / "ranks")["num_ranks"] == num_ranks
    for name in ("loss", "instance_loss", "class_loss", "grad_norm"):
        tolerance = ANOTHER_ORDER["grad_norm" if name == "grad_norm" else "loss"]
        assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], rel=tolerance)
    assert [row["lr"] for row in found] == pytest.approx([0, 0.6e-3, 1.2e-3, 0.6e-3]) and found[-1]["skipped"] is False
    assert [row["lr"] for row in expected] == [row["lr"] for row in found]
    change = weight_change(spread_flags["pretrained_model_name_or_path"], tmp_path / "ranks")
    assert change.abs().max() > 1e-4
    torch.testing.assert_close(change, expected_change, rtol=0, atol=1e-6)


def overflow_on_rank_1_at_step_2(reports: Path) -> None:
    """A `prepare`: an infinite loss there, and what each rank does in {reports}/{rank}.json."""
    own_rank, num_calls = int(os.environ["RANK"]), 0
    report: dict = dict(synchronised=[], applied=[])
    call, forward_backward = train_step.TrainStep.__call__, train_step.TrainStep._forward_backward
    loss, step = Loss.mean, MasterWeightsOptimizer.step

    def counted_call(self, micro_batches):
        nonlocal num_calls
        num_calls += 1
        return call(self, micro_batches)

    def watched_forward_backward(self, batch, num_shares):
        report["synchronised"].append(bool(self.unet.module.require_backward_grad_sync))
        return forward_backward(self, batch, num_shares)

    def infinite_loss(*arguments):
        return loss(*arguments) * (torch.inf if (own_rank, num_calls) == (1, 2) else 1)

    def watched_step(self):
        metrics = step(self)
        report["applied"].append(int(self.num_applied))
        report["master"] = hashlib.sha256(self.flat.masters.unpack().numpy().tobytes()).hexdigest()
        (reports / f"{own_rank}.json").write_text(json.dumps(report))
        return metrics

    train_step.TrainStep.__call__, train_step.TrainStep._forward_backward = counted_call, watched_forward_backward
    Loss.mean, MasterWeightsOptimizer.step = infinite_loss, watched_step


def test_an_overflow_on_one_rank_skips_the_step_on_all(flags, tmp_path):
    flags |= dict(mixed_precision="fp16", max_train_steps=4, lr_scheduler="linear", gradient_accumulation_steps=2)
    prepare = functools.partial(overflow_on_rank_1_at_step_2, tmp_path)
    ranks = start_ranks(2, as_argv(flags), tmp_path / "said", prepare)
    assert finish(ranks) == [0, 0], ranks[0].text()
    found = rows(tmp_path / "output")
    assert [row["skipped"] for row in found] == [False, True, False, False]
    assert [row["loss_scale"] for row in found] == [65536, 65536, 32768, 32768]
    assert found[1]["lr"] == found[2]["lr"] > found[3]["lr"], "a skipped step does not advance the schedule"
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["applied"] == second["applied"] == [1, 1, 2, 3]
    assert first["master"] == second["master"]
    # Two micro-batches a step: gradients travel with the second alone.
    assert first["synchronised"] == second["synchronised"] == [False, True] * 4


def another_base(flags: dict, tmp_path: Path) -> dict:
    base = shutil.copytree(flags["pretrained_model_name_or_path"], tmp_path / "node-1/base")
    weights = load_file(base / UNET_FILE)
    save_file({name: value * 1.3 for name, value in weights.items()}, base / UNET_FILE, {"format": "pt"})
    return dict(pretrained_model_name_or_path=base)


def another_caption(flags: dict, tmp_path: Path) -> dict:
    photos = shutil.copytree(flags["instance_data_dir"], tmp_path / "node-1/photos")
    for photo in list(photos.glob("*.jpg"))[:1]:
        photo.with_suffix(".txt").write_text("asleep")
    return dict(instance_data_dir=photos)


def another_class_image(flags: dict, tmp_path: Path) -> dict:
    folder = shutil.copytree(flags["class_data_dir"], tmp_path / "node-1/class")
    shutil.copyfile(folder / "photo-0.jpg", folder / "photo-2.jpg")
    return dict(class_data_dir=folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (another_base, f"rank 1 has not what rank 0 has (base_model: '{UNET_FILE}' has changed)"),
        (another_caption, "rank 1 has not what rank 0 has (photos: 'photo-0.jpg' has changed)"),
        (another_class_image, "rank 1 has not what rank 0 has (class_images: 'photo-2.jpg' has changed)"),
        (dict(seed=3, max_train_steps=9), "(--max_train_steps: 3 -> 9; --seed: 0 -> 3)"),
        (dict(resume_from_checkpoint="checkpoint-2"), "rank 1: --resume_from_checkpoint checkpoint-2: "),
        (dict(instance_data_dir="no-photos"), "rank 1: --instance_data_dir: there is no folder no-photos"),
        (dict(sede=3), "rank 1: unrecognized arguments: --sede=3; did you mean --seed?"),
    ],
)
def test_ranks_that_are_not_made_from_the_same_end_in_one_line(flags, output, tmp_path, changes, said):
    (tmp_path / "node-1").mkdir()
    if changes is another_class_image:
        flags |= class_flags(flags, write_photos(tmp_path / "class", 3, size=(40, 40)).parent, 3)
    other = flags | (changes(flags, tmp_path) if callable(changes) else changes)
    ranks = start_ranks(2, [as_argv(flags), as_argv(other)], tmp_path / "said")
    assert finish(ranks) == [2, 2], ranks[0].text()
    text = ranks[0].text()
    assert text.count("error: ") == 1 and said in text and "Traceback" not in text, text
    assert not (output / "run.json").exists()


MEETS = """
import sys
from utils.runtime import ranks
ranks.SECONDS_TO_MEET = float(sys.argv[2])
try:
    ranks.meet(lambda: dict(start=sys.argv[1]), lambda one, other: [] if one == other else ["start"])
    print("met")
except ranks.UserError as error:
    print(error)
"""


def meeting(starts: dict[int, str], port: int, seconds: float = 60, **environment: str) -> list[str]:
    """What ranks of three say that meet at a port of this machine; `starts` are what those that come begin with."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEETS, start, str(seconds)],
            env=os.environ | environment | dict(RANK=str(rank), WORLD_SIZE="3", MASTER_PORT=str(port)),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, start in starts.items()
    ]
    return [each.communicate(timeout=60)[0].strip().splitlines()[-1] for each in processes]


def test_a_store_that_outlives_its_ranks_does_not_mix_them():
    """torchrun's does, when it starts the ranks again: the inputs of those that died are not the new ones'."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torchruns = dict(MASTER_ADDR="127.0.0.1", TORCHELASTIC_USE_AGENT_STORE="True")
    assert meeting(dict.fromkeys(range(3), "0"), server.port, **torchruns) == ["met"] * 3
    found = meeting({0: "5", 1: "5", 2: "0"}, server.port, **torchruns)
    assert found == ["rank 2 has not what rank 0 has (start): give all ranks the same"] * 3


def test_who_has_not_come_is_named():
    others = meeting({0: "0", 2: "0"}, free_port(), 3, MASTER_ADDR="127.0.0.1")
    assert others == ["of 3 ranks these have not come within 10 minutes: 1"] * 2
    port = free_port()
    (alone,) = meeting({1: "0"}, port, 1, MASTER_ADDR="127.0.0.1")
    assert alone == f"error: rank 1: rank 0 has not come within 10 minutes to 127.0.0.1, port {port}"


def test_a_job_operators_ranks(flags, output, tmp_path):
    """They have no LOCAL_RANK; one process a machine."""
    ranks = start_ranks(2, as_argv(flags), tmp_path / "said", functools.partial(os.environ.pop, "LOCAL_RANK"))
    assert finish(ranks) == [0, 0], ranks[0].text()
    assert run_json(output)["num_ranks"] == 2


def class_flags(flags: dict, tmp_path: Path, count: int) -> dict:
    made = dict(class_data_dir=tmp_path / "class", num_class_images=count, sample_batch_size=1)
    return flags | dict(with_prior_preservation=True, class_prompt="a photo of a cat.", max_train_steps=1) | made


def die_before_the_third_image_has_its_name() -> None:
    replace, images = os.replace, []

    def replace_or_die(source, target):
        images.append(target) if str(target).endswith(".png") else None
        if len(images) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = replace_or_die


def test_class_images_killed_half_way_go_on_without_duplicates(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(class_images, "NUM_INFERENCE_STEPS", 2)  # of the forked ranks, too
    count = 10
    argv = as_argv(class_flags(flags, tmp_path, count))
    folder = tmp_path / "class"
    killed = start_ranks(2, argv, tmp_path / "killed", die_before_the_third_image_has_its_name)
    assert finish(killed) == [-signal.SIGKILL] * 2
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("class-*.png")}
    assert len(before) == 4, "each rank has made two images"
    for name in before:
        assert read_metadata(folder / name) is not None, "an image that is there is whole"

    again = start_ranks(2, argv, tmp_path / "again")
    assert finish(again) == [0, 0], again[0].text()
    text = again[0].text()
    assert f"have 4, need {count}, will make 6 (2 ranks" in text
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("class-*.png")}
    assert sorted(after) == [file_name(number) for number in range(count)]
    assert {name: after[name] for name in before} == before, "what was there is not made again"
    seeds = {name: read_metadata(folder / name)["seed"] for name in after}
    expected = {file_name(number): image_seed(0, number, 0) for number in range(count)}
    assert seeds == expected, "as one rank would have made them"
    assert text.count("will make 6 (2 ranks") == 1, "one plan is said"
    assert text.count("0/3 [") == 1, "one progress bar is shown"


@pytest.mark.slow
def test_two_nodes(spread_flags, one_process, tmp_path):
    """Two agents that meet at a rendezvous, as two machines would, with one rank each."""
    expected, expected_change = one_process
    argv = as_argv(spread_flags | dict(train_batch_size=3, output_dir=tmp_path / "ranks"))
    node = ["--nnodes", 2, "--nproc_per_node", 1, "--rdzv_id", "test", "--rdzv_backend", "c10d"]
    node += ["--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--local_addr", "127.0.0.1"]
    agents = [start(node, TRAIN, argv) for _ in range(2)]
    said = [agent.communicate(timeout=600) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert sum("photos at 32 px" in stdout for stdout, _ in said) == 1
    found = rows(tmp_path / "ranks")
    assert losses(found) == pytest.approx(losses(expected), rel=ANOTHER_ORDER["loss"])
    change = weight_change(spread_flags["pretrained_model_name_or_path"], tmp_path / "ranks")
    torch.testing.assert_close(change, expected_change, rtol=0, atol=1e-6)
