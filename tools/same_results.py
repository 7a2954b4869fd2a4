#!/usr/bin/env python3
"""Did a change of code change any result? Runs two checkouts on the same inputs and compares all that they write.

    python -m tools.same_results run TREE INPUTS RESULTS      TREE: a checkout; INPUTS: made by the first call
    python -m tools.same_results compare RESULTS_A RESULTS_B  exit code 1 if anything differs
    --only single,lora       after either: these steps alone; `run` runs those that they need first

Run both with one virtual environment on one idle machine: about three minutes a tree on two cores. Weights,
checkpoints, pictures, metrics and every word on the terminal are compared byte for byte. Left out are run ids, times
of day, durations, free space, where tree, results and python are, TensorBoard's files, and the cache of converted
files (the runs that read them copy most of it). It uses the two scripts, the commands `python -m utils.NAME`, and
the folder builders of tests/helpers/: of utils/ it knows nothing else. A command that a tree lacks is a difference
in its log.
"""

import argparse
import difflib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

PYTHON = sys.executable
SCRIPT = [PYTHON, "train_dreambooth_colossalai.py"]
TWO_RANKS = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT[1]]
SUBJECT = ["--instance_data_dir={inputs}/photos", "--instance_prompt=a photo of sks cat"]
BASE = "--pretrained_model_name_or_path="
COMMON = [
    BASE + "{inputs}/base",
    "--resolution=32",
    "--learning_rate=1e-3",
    "--lr_warmup_steps=0",
    "--max_train_steps=6",
    "--train_batch_size=2",
]
CUT_OUTS = "--instance_data_dir={inputs}/cut-outs"
WIDE = "--instance_data_dir={inputs}/wide"
FP32 = "--mixed_precision=no"
ADAMW = ["--adam_beta1=0.8", "--adam_beta2=0.99", "--adam_weight_decay=0.1", "--adam_epsilon=1e-4"]
RESTARTS = ["--lr_scheduler=cosine_with_restarts", "--lr_num_cycles=2", "--lr_warmup_steps=2"]
PRIOR = ["--with_prior_preservation", "--num_class_images=3"]
CLASS = ["--class_prompt=a photo of a cat", "--class_data_dir={results}/prior-class"]
VALIDATION = ["--validation_steps=3", "--validation_prompt=a photo of sks cat", "--report_to=tensorboard"]
RUNS = {  # name: flags besides COMMON and, unless --concepts_list is among them, SUBJECT
    "fp32": [FP32, "--checkpointing_steps=3"],
    "fp16": ["--mixed_precision=fp16", "--gradient_accumulation_steps=2", "--train_batch_size=1"],
    "bf16": ["--mixed_precision=bf16", "--save_dtype=fp16", "--save_format=bin"],
    "adamw": [FP32, *ADAMW, "--max_grad_norm=0.1"],
    "schedule": [FP32, *RESTARTS, "--scale_lr"],
    "polynomial": [FP32, "--lr_scheduler=polynomial", "--lr_power=2"],
    "eight_bit": ["--mixed_precision=fp16", "--use_8bit_adam", "--checkpointing_steps=3"],
    "wide": [FP32, WIDE],
    "centre": [FP32, WIDE, "--center_crop"],
    "captions": [FP32, CUT_OUTS],
    "snr": [FP32, "--snr_gamma=5"],
    "noise_offset": [FP32, "--noise_offset=0.1"],
    "deterministic": [FP32, "--deterministic"],
    "prior": [FP32, "--snr_gamma=5", "--noise_offset=0.1", *PRIOR, *CLASS],
    "concepts": [FP32, "--concepts_list={results}/concepts.json", *PRIOR],
    "validation": [FP32, "--gradient_checkpointing", *VALIDATION],
    "export": [FP32, "--export_single_file={results}/export.safetensors"],
    "single": [FP32, BASE + "{results}/single_file.safetensors"],
    "velocity": [FP32, "--snr_gamma=5", BASE + "{inputs}/velocity-base"],
    "velocity_single": [FP32, BASE + "{results}/velocity_file.safetensors"],
    "low_memory": ["--mixed_precision=fp16", "--low_memory"],
    "resumed": [FP32, "--checkpointing_steps=3", "--max_train_steps=9", "--resume_from_checkpoint=checkpoint-3"],
    "dry_run": ["--dry_run"],
}
MISTAKES = [
    "--resolution=33",
    "--lr=1",
    "--instance_data_dir=nowhere",
    "--pretrained_model_name_or_path=a/b",
    "--class_prompt=x",
    "--logging_dir=unet",
    "--help",
]
EVALUATE = [PYTHON, "evaluate.py", "--num_inference_steps=3", "--num_images=2", "--num_drift_images=1"]
TUNED = "--finetuned_model_name_or_path={results}/"
CHECKPOINTS = [TUNED + "resumed", "--checkpoint=all"]
CHOOSE = ["--choose", "--clip_model={inputs}/clip"]
OTHER_SETTINGS = ["--negative_prompt=blurry", "--guidance_scale=3", "--mixed_precision=bf16", "--batch_size=1"]
EXPORT = [PYTHON, "-m", "utils.export", "{results}/fp32"]
COMMANDS = {  # name: command; what it writes is called after it
    "evaluation": [*EVALUATE, *CHECKPOINTS, "--output_dir={results}/evaluation"],
    "evaluation-2": [*EVALUATE, *CHECKPOINTS, *OTHER_SETTINGS, "--output_dir={results}/evaluation-2"],
    "choose": [*EVALUATE, *CHECKPOINTS, *CHOOSE, "--output_dir={results}/choose"],
    "choose_strength": [*EVALUATE, TUNED + "deterministic", *CHOOSE, "--output_dir={results}/choose_strength"],
    "evaluate-help": [*EVALUATE, "--help"],
    "doctor": [PYTHON, "-m", "utils.doctor"],
    "single_file": [PYTHON, "-m", "utils.export", "{inputs}/embedded", "{results}/single_file.safetensors"],
    "velocity_file": [PYTHON, "-m", "utils.export", "{results}/velocity", "{results}/velocity_file.safetensors"],
    "half_precision": [*EXPORT, "{results}/half_precision.safetensors", "--dtype=fp16"],
    "lora": [*EXPORT, "{results}/lora.safetensors", "--lora_rank=4"],
    "strength": [*EXPORT, "{results}/strength", "--strength=0.5"],
    "share": [PYTHON, "-m", "utils.share", "{results}/eight_bit", "{results}/share"],
}
MAKE_INPUTS = """
import shutil
import sys
from pathlib import Path
from PIL import Image
from tests.helpers.pipelines import edit_json, write_photos, write_pipeline

inputs = Path(sys.argv[1])
write_pipeline(inputs / "base")
write_photos(inputs / "photos")
write_photos(inputs / "wide", 3, size=(96, 48))
(inputs / "photos" / "photo-1.txt").write_text("a sks cat asleep")
shutil.copytree("model/tiny-stable-diffusion", inputs / "embedded")
shutil.copytree("model/tiny-clip", inputs / "clip")
shutil.copytree("model/tiny-stable-diffusion", inputs / "velocity-base")
edit_json(inputs / "velocity-base/scheduler/scheduler_config.json", prediction_type="v_prediction")
cut_outs = write_photos(inputs / "cut-outs", 3)
for path in sorted(cut_outs.glob("*.jpg")):
    image = Image.open(path).convert("RGBA")
    image.putalpha(Image.radial_gradient("L").resize(image.size).point(lambda value: 255 - value))
    image.save(path.with_suffix(".png"))
    path.unlink()
(cut_outs / "metadata.jsonl").write_text('{"file_name": "photo-0.png", "text": "a sks cat in the sun"}')
(cut_outs / "photo-1.caption").write_text("a sks cat asleep")
"""
RESUMED, COPIED = "resumed", "fp32"  # a run that goes on in a copy of another's folder
CACHE = "cache"
SHOWN = 6  # lines of a file that differs
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# What differs from one run to the next of the same code.
VOLATILE_KEYS = {
    "ancestors",
    "modelspec.date",
    "peak_memory_bytes",
    "run_id",
    "seconds",
    "seconds_after_start",
    "ss_session_id",
    "ss_training_started_at",
    "started_at",
    "step_time",
    "working_directory",
    "written_at",
}
VOLATILE_TEXT = [  # in this order
    r"<td>[^<]*(\d{4}-\d\d-\d\dT|seconds)[^<]*</td>|<th[^>]*>seconds[^<]*</th><td>[^<]*</td>",
    r"\d+(\.\d+)?(s|s/step|step/s|ms| s| images per second)\b|\d\d:\d\d(:\d\d)?|\d{2}:\d{2}<"
    r"|[0-9.?]+(step/s|s/step|image/s|s/image)|\x1b\[A",
    r"(training|class images|the base|the result|step \d+)( at strength [\d.]+)?: .*\|.*\n?",  # progress bars
    r"[0-9.]+ GB free",
    r"[^\s\"<>]*bin/python[\d.]*",
    r"-(model|vae)-[0-9a-f]{16}",  # a converted file's folder: its hash depends on the order in the file's header
    r"[WEI]\d{4} .*|process \d+|\[rank\d\].*",  # torchrun's own lines
]


class Tree:
    """A checkout, and the folder that takes what its programs write and say."""

    def __init__(self, tree: Path, inputs: Path, results: Path):
        self.tree, self.inputs, self.results = tree, inputs, results

    def call(self, name: str, command: list[str]) -> None:
        """Runs a command in the checkout; its exit code and its words go to RESULTS/name.log."""
        environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
        done = subprocess.run(
            [part.format(inputs=self.inputs, results=self.results) for part in command],
            cwd=self.tree,
            env=environment | {"OMP_NUM_THREADS": "1", "DREAMBOOTH_CACHE": str(self.results / CACHE)},
            capture_output=True,
            text=True,
        )
        (self.results / f"{name}.log").write_text(f"exit {done.returncode}\n{done.stdout}\n---\n{done.stderr}")

    def write_concepts(self) -> None:
        """RESULTS/concepts.json: two subjects, each with class images of its own."""
        concepts = [
            dict(
                instance_prompt=f"a photo of sks {animal}",
                instance_data_dir=f"{self.inputs}/{photos}",
                class_prompt=f"a photo of a {animal}",
                class_data_dir=f"{self.results}/{animal}-class",
            )
            for animal, photos in (("cat", "photos"), ("dog", "wide"))
        ]
        (self.results / "concepts.json").write_text(json.dumps(concepts))


def training(name: str, flags: list[str], script: list[str] = SCRIPT) -> list[str]:
    """The command of one run into RESULTS/name."""
    subject = [] if any(flag.startswith("--concepts_list") for flag in flags) else SUBJECT
    return [*script, *subject, *COMMON, f"--output_dir={{results}}/{name.partition('.')[0]}", *flags]


def all_steps() -> dict[str, list[str]]:
    """Every command by its name."""
    steps = {name: training(name, flags) for name, flags in RUNS.items()} | COMMANDS
    steps["ranks"] = training("ranks", ["--mixed_precision=fp16"], TWO_RANKS)
    return steps | {f"mistake.{number}": training("mistake.", [flag]) for number, flag in enumerate(MISTAKES)}


def in_order(names: list[str], steps: dict[str, list[str]]) -> list[str]:
    """The steps `names`, each after those whose results its command names."""
    ordered: dict[str, None] = {}
    for name in names:
        needed = re.findall(r"\{results\}/([\w-]+)", " ".join(steps[name])) + [COPIED] * (name == RESUMED)
        ordered |= dict.fromkeys(in_order([need for need in needed if need != name and need in steps], steps))
        ordered[name] = None
    return list(ordered)


def run(tree: Path, inputs: Path, results: Path, only: str | None = None) -> int:
    """Runs everything in one checkout, or the steps `only`; RESULTS must not exist yet."""
    steps = all_steps()
    names = in_order(only.split(",") if only else list(steps), steps)
    results.mkdir(parents=True)
    if not inputs.exists():
        command = [sys.executable, "-c", MAKE_INPUTS, inputs]
        subprocess.run(command, cwd=tree, check=True, capture_output=True)
    programs = Tree(tree, inputs, results)
    programs.write_concepts()
    for name in names:
        if name == RESUMED and (results / COPIED).is_dir():
            shutil.copytree(results / COPIED, results / RESUMED)
        programs.call(name, steps[name])
    return 0


def without_volatile(value):
    """A JSON value without what differs from run to run."""
    if isinstance(value, dict):
        return {key: without_volatile(part) for key, part in value.items() if key not in VOLATILE_KEYS}
    return [without_volatile(part) for part in value] if isinstance(value, list) else value


def comparable_text(path: Path, root: Path) -> str:
    """A text file without what differs from run to run."""
    text = path.read_bytes().decode(errors="replace").replace(str(root), "RESULTS")
    if path.suffix in (".json", ".jsonl"):
        values = [text] if path.suffix == ".json" else text.splitlines()
        style = dict(indent=0) if path.suffix == ".json" else {}
        text = "\n".join(json.dumps(without_volatile(json.loads(value)), sort_keys=True, **style) for value in values)
    text = re.sub(r".*\r", "", text) if path.suffix == ".log" else text
    for pattern in VOLATILE_TEXT:
        text = re.sub(pattern, "", text)
    return re.sub(r"\n\s*\n+", "\n", text)


def comparable_picture(path: Path, root: Path) -> bytes:
    """A PNG's pixels and its text."""
    from PIL import Image

    with Image.open(path) as image:
        text = {key: value.replace(str(root), "RESULTS") for key, value in getattr(image, "text", {}).items()}
        return image.tobytes() + json.dumps(text, sort_keys=True).encode()


def comparable_tensors(path: Path) -> tuple[str, bytes]:
    """A safetensors file's header, a line an entry, and its tensors, by name: their own order is another each time."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, content = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = without_volatile(header.pop("__metadata__", {}))
    shapes = {name: f"{entry['dtype']} {entry['shape']}" for name, entry in header.items()}
    tensors = [content[slice(*header[name]["data_offsets"])] for name in sorted(header)]
    return json.dumps(metadata | shapes, sort_keys=True, indent=0), b"".join(tensors)


def digest(path: Path, root: Path) -> tuple[str, str]:
    """A hash of what is compared, and the text that can be shown."""
    text = ""
    if path.suffix in (".json", ".jsonl", ".log", ".html", ".csv", ".md"):
        text = comparable_text(path, root)
        content = text.encode()
    elif path.suffix == ".png":
        content = comparable_picture(path, root)
    elif path.suffix == ".safetensors":
        text, tensors = comparable_tensors(path)
        content = text.encode() + tensors
    else:
        content = path.read_bytes()
    return hashlib.sha256(content).hexdigest(), text


def compare(one: Path, other: Path, only: str | None = None) -> int:
    """Prints every file that differs, of the steps `only` or of all, and its first lines that do; 1 if there is one.

    An evaluation changes the card of the run that it is about: 'resumed' or 'deterministic'.
    """
    files = {path.relative_to(root) for root in (one, other) for path in root.rglob("*") if path.is_file()}
    files = {name for name in files if "tfevents" not in name.name and name.parts[0] != CACHE}
    steps = only.split(",") if only else [Path(name.parts[0]).stem for name in files]
    names = sorted(str(name) for name in files if Path(name.parts[0]).stem in steps)
    num_differ = 0
    for name in names:
        missing = [root for root in (one, other) if not (root / name).exists()]
        if missing:
            print(f"missing: {missing[0] / name}")
            num_differ += 1
            continue
        (hash_a, text_a), (hash_b, text_b) = digest(one / name, one), digest(other / name, other)
        if hash_a != hash_b:
            num_differ += 1
            print(f"differs: {name}")
            lines = difflib.unified_diff(text_a.splitlines(), text_b.splitlines(), n=0, lineterm="")
            for line in [line for line in lines if not line.startswith(("@@", "--- ", "+++ "))][:SHOWN]:
                print(f"   {line[:200]}")
    print(f"{len(names)} files compared, {num_differ} differ")
    return 1 if num_differ else 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command, folders in ((run, ("tree", "inputs", "results")), (compare, ("one", "other"))):
        added = commands.add_parser(command.__name__, help=command.__doc__.partition("\n")[0])
        for folder in folders:
            added.add_argument(folder, type=Path)
        added.add_argument("--only", metavar="NAME[,NAME...]", help=f"of {', '.join(all_steps())}")
        added.set_defaults(call=command, folders=folders)
    args = parser.parse_args(argv)
    return args.call(*(getattr(args, folder).resolve() for folder in args.folders), args.only)


if __name__ == "__main__":
    sys.exit(main())
