"""What training leaves for an evaluation, and evaluate.py in this process."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

import evaluate
from tests.helpers.script import UNET_FILE
from utils import PROGRAM
from utils.command_line import run_main
from utils.run.lineage import FORMAT, STATE_FILE


def scale_unet(source: Path, target: Path, factor: float) -> None:
    weights = load_file(source / UNET_FILE)
    save_file({name: factor * value for name, value in weights.items()}, target / UNET_FILE, {"format": "pt"})


def write_state(folder: Path, step: int, run_id: str = "own") -> None:
    """Makes a checkpoint whole: its state.json, of the run `run_id`."""
    (folder / f"checkpoint-{step}").mkdir(exist_ok=True)
    state = dict(program=PROGRAM, format=FORMAT, step=step, run_id=run_id, ancestors=[])
    (folder / f"checkpoint-{step}" / STATE_FILE).write_text(json.dumps(state))


def write_trained(folder: Path, base: Path, photos: Path, prompt: str, steps: tuple[int, ...] = ()) -> Path:
    """The output of 15 steps: UNets of its own, in checkpoints too; the rest is the base's."""
    shutil.copytree(base, folder)
    scale_unet(base, folder, 2.5)
    for step in steps:
        shutil.copytree(base / "unet", folder / f"checkpoint-{step}" / "unet")
        scale_unet(base, folder / f"checkpoint-{step}", 1 + step / 10)
        write_state(folder, step)
    arguments = dict(pretrained_model_name_or_path=str(base), instance_data_dir=str(photos), instance_prompt=prompt)
    run = dict(program=PROGRAM, run_id="own", arguments=arguments | dict(max_train_steps=15))
    run |= dict(command=f"torchrun train_dreambooth_colossalai.py --instance_prompt='{prompt}'")
    (folder / "run.json").write_text(json.dumps(run | dict(result=dict(num_steps=15))))
    return folder


def run(trained: Path, result: Path, *more: str) -> int:
    """The exit code of a quick evaluation."""
    quick = ["--num_images=2", "--num_inference_steps=1", f"--output_dir={result}"]
    return run_main(evaluate.main, [f"--finetuned_model_name_or_path={trained}", *quick, *more])


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())
