"""The training script in this process or under torchrun, and what it left in its output folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train_dreambooth_colossalai import main
from utils.arguments import parse_args
from utils.command_line import run_main
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "train_dreambooth_colossalai.py"
RANK_PROGRAM = ROOT / "tests/helpers/rank_program.py"
EMBEDDED = ROOT / "model/tiny-stable-diffusion"
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NOT_A_USERS = (*LAUNCHER_VARIABLES, "DREAMBOOTH_DEPRECATIONS")  # variables
LATEST = dict(resume_from_checkpoint="latest")
SHORT = dict(
    instance_prompt="a photo of my cat.",
    resolution=32,
    train_batch_size=1,
    mixed_precision="no",
    learning_rate=1e-3,
    lr_warmup_steps=0,
    max_train_steps=3,
)
# A large epsilon, so that rounding in tiny gradients does not become a whole step of Adam's.
SPREAD = dict(learning_rate=1e-3, adam_epsilon=1e-3)
REQUIRED = ["--pretrained_model_name_or_path", "base", "--instance_data_dir", "photos", "--instance_prompt", "a photo"]


def as_argv(flags: dict) -> list[str]:
    given = ((name, value) for name, value in flags.items() if value is not None)
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given]


def run(flags: dict, **changes) -> list[dict]:
    """The rows of metrics.jsonl of a run in this process."""
    flags = flags | changes
    assert main(as_argv(flags)) == 0
    return rows(Path(flags["output_dir"]))


def dry_run(base: Path, photos: Path, tmp_path: Path, capsys, *more: str) -> tuple[int, str, str]:
    argv = ["--pretrained_model_name_or_path", base, "--instance_data_dir", photos, "--resolution=32", "--dry_run"]
    argv += ["--instance_prompt=a cat", "--output_dir", tmp_path / "output", *more]
    code = run_main(main, [str(value) for value in argv])
    return code, *capsys.readouterr()


def make_args(tmp_path: Path, **values):
    """Parsed arguments whose folders are all below tmp_path."""
    flags = dict(
        pretrained_model_name_or_path=tmp_path / "base",
        instance_data_dir=tmp_path / "photos",
        output_dir=tmp_path / "output",
        instance_prompt="a photo",
    )
    flags |= values
    return parse_args([text for name, value in flags.items() for text in (f"--{name}", str(value))])


def complaint(*argv: str) -> str:
    """The one line that refuses these arguments."""
    with pytest.raises(UserError) as error:
        parse_args([*REQUIRED, *argv])
    assert "\n" not in str(error.value)
    return str(error.value)


def run_python(code: str, *argv) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *(str(value) for value in argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def rows_of(table: str) -> dict[str, str]:
    """{finding: verdict} of the preflight's table."""
    return {line[6:].split("  ", 1)[1].strip(): line[:4].strip() for line in table.splitlines()[1:-1]}


def start(launcher: list, script: Path, argv: list, cwd: Path = ROOT) -> subprocess.Popen:
    """torchrun with the launcher's own arguments, not waited for."""
    environment = {name: value for name, value in os.environ.items() if name not in NOT_A_USERS}
    command = [Path(sys.executable).with_name("torchrun"), *launcher, script, *argv]
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env={"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def launch(num_ranks: int, argv: list, script: Path = TRAIN, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """The script on num_ranks processes of this machine, to its end."""
    process = start(["--standalone", "--nproc_per_node", num_ranks], script, argv, cwd)
    stdout, stderr = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def rows(output: Path) -> list[dict]:
    """The rows of metrics.jsonl, none if it is not there yet."""
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(found: list[dict]) -> list[float]:
    return [row["loss"] for row in found]


def without_times(output: Path) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "step_time"} for row in rows(output)]


def run_json(output: Path) -> dict:
    return json.loads((output / "run.json").read_text(encoding="utf-8"))


def bits(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / "unet").iterdir()}


def weight_change(base: Path, output: Path) -> torch.Tensor:
    before, after = load_file(base / UNET_FILE), load_file(output / UNET_FILE)
    return torch.cat([(after[name].double() - before[name].double()).flatten() for name in before])
