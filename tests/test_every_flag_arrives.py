"""Every flag of both scripts changes something that can be seen from outside.

A row a flag: a run with the flag beside one without it, and what must differ between the two; or words, where the
test is that shows it. Nothing in here knows where the code is; it looks at metrics, weights, pictures, files, words,
and calls of torch's and diffusers' modules.
A flag without a row fails, and so does a row without a flag.
"""

import argparse
import contextlib
import io
import itertools
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image, ImageOps

import evaluate
import train_dreambooth_colossalai
from tests.helpers.encoders import write_clip, write_dino, write_safety_checker
from tests.helpers.pipelines import write_photos, write_pipeline
from tests.helpers.script import SHORT, as_argv, bits, rows
from tests.helpers.tolerances import ANOTHER_ORDER
from utils.arguments import training_parser
from utils.data import class_images
from utils.evaluation.arguments import build_parser

SCRIPTS = {"train": train_dreambooth_colossalai, "evaluate": evaluate}
DEFAULTS = {  # True: a flag without value; None leaves one out
    "train": SHORT
    | dict(
        pretrained_model_name_or_path="{inputs}/base",
        instance_data_dir="{inputs}/photos",
        instance_prompt="a photo of sks cat",
        output_dir="{output}",
    ),
    "evaluate": dict(
        pretrained_model_name_or_path="{inputs}/base",
        finetuned_model_name_or_path="{trained}",
        instance_data_dir="{inputs}/photos",
        output_dir="{output}",
        prompt="a photo of sks cat",
        num_images=2,
        num_drift_images=0,
        num_inference_steps=2,
    ),
}
TRAINED = dict(learning_rate=1e-2, checkpointing_steps=2)  # the run that is evaluated


class Seen:
    """What a run shows: its folder, its words, how it ended, and the modules that it called."""

    def __init__(self, output: Path):
        self.output = output
        self.printed = ""
        self.error: Exception | None = None
        self.batches = defaultdict(list)  # sizes of the batches that each class of modules was called with
        self.saved_bytes = 0  # that autograd kept for the backward pass
        self.is_deterministic = False

    @property
    def rows(self) -> list[dict]:
        """Of metrics.jsonl."""
        return rows(self.output)

    @contextlib.contextmanager
    def watching(self):
        """While a script runs."""

        def called(module, inputs):
            if inputs and isinstance(inputs[0], torch.Tensor):
                self.batches[type(module).__name__].append(len(inputs[0]))
            self.is_deterministic |= torch.are_deterministic_algorithms_enabled()

        def keep(tensor):
            self.saved_bytes += tensor.nbytes
            return tensor.detach()

        words = io.StringIO()
        hook = torch.nn.modules.module.register_module_forward_pre_hook(called)
        try:
            with contextlib.redirect_stdout(words), contextlib.redirect_stderr(words):
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    yield
        except (ValueError, RuntimeError) as error:  # what both scripts say in one line
            self.error = error
        finally:
            hook.remove()
            self.printed = words.getvalue().replace(str(self.output), "OUTPUT")


class Runs:
    """Runs of both scripts in this process; the same flags are run once."""

    def __init__(self, folder: Path):
        self.folder, self.known, self.numbers = folder, {}, itertools.count()
        write_inputs(folder / "inputs")

    def __call__(self, script: str, **flags) -> Seen:
        """A run with DEFAULTS and `flags`; {inputs}, {output} and {trained} in them are folders."""
        key = (script, *sorted(flags.items()))
        if key not in self.known:
            self.known[key] = self._run(script, DEFAULTS[script] | flags, self.folder / f"run-{next(self.numbers)}")
        return self.known[key]

    def _run(self, script: str, flags: dict, output: Path) -> Seen:
        trained = self("train", **TRAINED).output if script == "evaluate" else None
        places = dict(inputs=self.folder / "inputs", output=output, trained=trained)
        argv = [word.format(**places) for word in as_argv(flags)]
        seen = Seen(Path(flags["output_dir"].format(output=output)))
        with seen.watching():
            SCRIPTS[script].main(argv)
        return seen


def write_inputs(folder: Path) -> None:
    """Models, photos and files that flags name."""
    write_pipeline(folder / "base")
    write_pipeline(folder / "other", seed=1)
    write_photos(folder / "photos")
    write_photos(folder / "other photos", 3, size=(64, 64))
    for path in list(write_photos(folder / "screenshots", 3).iterdir()):
        ImageOps.expand(Image.open(path), (0, 20)).save(path.with_suffix(".png"))
        path.unlink()
    write_photos(folder / "wide", 3, size=(96, 48))
    write_other_tokenizer(folder)
    write_encoders(folder)
    (folder / "prompts.txt").write_text("a sks cat in the snow\na sks cat on a beach\n")
    concepts = [
        dict(instance_prompt=f"a photo of sks {name}", instance_data_dir=str(folder / photos))
        for name, photos in (("cat", "photos"), ("dog", "other photos"))
    ]
    (folder / "concepts.json").write_text(json.dumps(concepts))


def write_other_tokenizer(folder: Path) -> None:
    """The base's tokenizer with all but its special tokens numbered the other way round."""
    shutil.copytree(folder / "base/tokenizer", folder / "tokenizer")
    path = folder / "tokenizer/vocab.json"
    vocabulary = json.loads(path.read_text())
    path.write_text(json.dumps({t: n if t.startswith("<|") else 511 - n for t, n in vocabulary.items()}))


def write_encoders(folder: Path) -> None:
    """clip/ and dino/, and guarded/: the base with a safety checker that objects to every image."""
    write_clip(folder / "clip")
    write_dino(folder / "dino")
    guarded = write_safety_checker(shutil.copytree(folder / "base", folder / "guarded"))
    checker = StableDiffusionSafetyChecker.from_pretrained(guarded / "safety_checker").requires_grad_(False)
    checker.concept_embeds_weights.fill_(-2)  # any cosine is above that
    checker.save_pretrained(guarded / "safety_checker")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[Runs]:
    """Class images are made in 2 denoising steps: the only constant of the code that is known here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(class_images, "NUM_INFERENCE_STEPS", 2)
        yield Runs(tmp_path_factory.mktemp("flags"))


def losses(run: Seen) -> list:
    return [row["loss"] for row in run.rows]


def rates(run: Seen) -> list:
    return [row["lr"] for row in run.rows]


def num_steps(run: Seen) -> int:
    return len(run.rows)


def weights(run: Seen) -> dict[str, bytes]:
    return bits(run.output)


def files(run: Seen) -> set[str]:
    return {str(path.relative_to(run.output)) for path in run.output.rglob("*")}


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def pictures(run: Seen) -> dict[str, bytes]:
    """Pixels of the images that an evaluation drew; the sheet names its settings, so it is not among them."""
    return {str(path.relative_to(run.output)): pixels(path) for path in run.output.rglob("*[0-9].png")}


def class_pictures(run: Seen) -> list[bytes]:
    """Pixels of the class images that were made beside the run's output."""
    return [pixels(path) for path in sorted(run.output.with_name(f"{run.output.name}-class").glob("*.png"))]


def scores(run: Seen) -> str:
    return json.dumps(json.loads((run.output / "metrics.json").read_text())["models"])


def most_at_once(module: str) -> Callable[[Seen], int]:
    """The largest batch that a class of modules was called with."""
    return lambda run: max(run.batches[module])


class Row(NamedTuple):
    """`holds(run, other)` of a run with `flags` and one with `without`."""

    flags: dict
    holds: Callable[[Seen, Seen], bool]
    without: dict


def changes(*what: Callable[[Seen], object], without: dict | None = None, **flags) -> Row:
    """Each of `what` differs between a run with `without` and one with `flags` besides."""
    without = without or {}
    return Row(without | flags, lambda run, other: all(each(run) != each(other) for each in what), without)


def shows(holds: Callable[[Seen], bool], without: dict | None = None, **flags) -> Row:
    """`holds` of a run with `flags`, and not of one without them."""
    without = without or {}
    return Row(without | flags, lambda run, other: holds(run) and not holds(other), without)


def gradient_checkpointing(runs: Runs) -> None:
    run, other = runs("train", gradient_checkpointing=True), runs("train")
    assert run.saved_bytes < 0.7 * other.saved_bytes
    assert losses(run) == pytest.approx(losses(other), rel=ANOTHER_ORDER["loss"])


def center_crop(runs: Runs) -> None:
    wide = dict(instance_data_dir="{inputs}/wide")
    assert losses(runs("train", **wide, center_crop=True)) != losses(runs("train", **wide))
    class_images = PRIOR | dict(class_data_dir="{inputs}/wide", num_class_images=3)
    random, centred = (runs("train", **class_images, **more).rows[0] for more in ({}, dict(center_crop=True)))
    assert random["instance_loss"] == centred["instance_loss"]
    assert random["class_loss"] != centred["class_loss"]


PRIOR = dict(
    with_prior_preservation=True,
    class_prompt="a photo of a cat",
    class_data_dir="{output}-class",
    num_class_images=2,
)
# One run for all flags that only write something more.
WRITES = dict(
    save_format="bin",
    export_single_file="{output}-one.safetensors",
    report_to="tensorboard",
    logging_dir="boards",
    checkpointing_steps=1,
    checkpoints_total_limit=2,
    validation_prompt="a photo of sks cat",
    validation_steps=2,
    validation_inference_steps=2,
    num_validation_images=3,
)


def has(pattern: str, number: int | None = None) -> Callable[[Seen], bool]:
    """Whether the output has files of a pattern; as many as `number`."""

    def check(run: Seen) -> bool:
        found = len(list(run.output.glob(pattern)))
        return found == number if number else found > 0

    return check


DRAWS = dict(validation_prompt="a photo of sks cat", num_validation_images=1, validation_inference_steps=2)


def validation_pictures(run: Seen) -> list[bytes]:
    return [pixels(path) for path in sorted(run.output.glob("validation/*.png"))]


def checkpoints(run: Seen) -> list[str]:
    return sorted(path.name for path in run.output.glob("checkpoint-*"))


def validated(run: Seen) -> list[dict]:
    """The rows of validation.jsonl."""
    path = run.output / "validation.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


COMMAND_LINE, RESUMING = "tests/test_command_line.py", "tests/run/test_resume.py"
TRAINING = {
    "help": COMMAND_LINE,
    "version": COMMAND_LINE,
    "config": COMMAND_LINE,
    "pretrained_model_name_or_path": changes(losses, pretrained_model_name_or_path="{inputs}/other"),
    "pretrained_vae_name_or_path": changes(losses, pretrained_vae_name_or_path="{inputs}/other/vae"),
    "tokenizer_name": changes(losses, tokenizer_name="{inputs}/tokenizer"),
    "instance_data_dir": changes(losses, instance_data_dir="{inputs}/other photos"),
    "output_dir": shows(
        lambda run: run.output.name == "elsewhere" and (run.output / "model_index.json").is_file(),
        output_dir="{output}/elsewhere",
    ),
    "instance_prompt": changes(losses, instance_prompt="x"),
    "concepts_list": changes(
        losses, concepts_list="{inputs}/concepts.json", instance_data_dir=None, instance_prompt=None
    ),
    "with_prior_preservation": shows(lambda run: "class_loss" in run.rows[0], **PRIOR),
    "class_data_dir": shows(lambda run: len(class_pictures(run)) == 2, **PRIOR),
    "class_prompt": changes(losses, class_pictures, without=PRIOR, class_prompt="y"),
    "prior_loss_weight": changes(losses, without=PRIOR, prior_loss_weight=0.5),
    "num_class_images": changes(lambda run: len(class_pictures(run)), without=PRIOR, num_class_images=3),
    "sample_batch_size": changes(most_at_once("UNet2DConditionModel"), without=PRIOR, sample_batch_size=1),
    "prior_generation_precision": changes(class_pictures, without=PRIOR, prior_generation_precision="bf16"),
    "seed": changes(losses, seed=7),
    "resolution": changes(losses, resolution=48),
    "center_crop": center_crop,
    "crop_bars": changes(losses, without=dict(instance_data_dir="{inputs}/screenshots"), crop_bars=True),
    "train_batch_size": changes(losses, most_at_once("UNet2DConditionModel"), train_batch_size=2),
    "num_train_epochs": changes(num_steps, without=dict(max_train_steps=None), num_train_epochs=2),
    "max_train_steps": changes(num_steps, max_train_steps=2),
    "gradient_accumulation_steps": changes(
        losses, lambda run: len(run.batches["UNet2DConditionModel"]), gradient_accumulation_steps=2
    ),
    "gradient_checkpointing": gradient_checkpointing,
    "offload_optimizer": "on a CPU everything is in the host's memory; tests/training/test_host_memory.py on a GPU",
    "use_8bit_adam": changes(losses, weights, use_8bit_adam=True),
    "low_memory": Row(dict(low_memory=True), lambda run, other: run.saved_bytes < 0.7 * other.saved_bytes, {}),
    "mixed_precision": changes(losses, mixed_precision="bf16"),
    "dry_run": shows(lambda run: run.printed.startswith("preflight") and not run.output.exists(), dry_run=True),
    "json": shows(lambda run: run.printed.startswith('{"exit_code": 0'), dry_run=True, json=True),
    "max_nonfinite_steps": "tests/run/test_faults.py",
    "no_cuda_graph": "there are no CUDA graphs on a CPU; tests/training/test_train_step.py on a GPU",
    "deterministic": shows(lambda run: run.is_deterministic, deterministic=True),
    "debug": COMMAND_LINE,
    "learning_rate": changes(rates, weights, learning_rate=2e-3),
    "scale_lr": changes(rates, weights, without=dict(train_batch_size=2), scale_lr=True),
    "lr_scheduler": changes(rates, weights, lr_scheduler="linear"),
    "lr_warmup_steps": changes(rates, weights, without=dict(lr_scheduler="constant_with_warmup"), lr_warmup_steps=2),
    "lr_num_cycles": changes(rates, weights, without=dict(lr_scheduler="cosine_with_restarts"), lr_num_cycles=2),
    "lr_power": changes(rates, weights, without=dict(lr_scheduler="polynomial"), lr_power=2),
    "adam_beta1": changes(losses, weights, adam_beta1=0.5),
    "adam_beta2": changes(losses, weights, adam_beta2=0.9),
    "adam_weight_decay": changes(losses, weights, adam_weight_decay=0.5),
    "adam_epsilon": changes(losses, weights, adam_epsilon=1e-3),
    "max_grad_norm": changes(losses, weights, max_grad_norm=0.1),
    "snr_gamma": changes(losses, snr_gamma=0.01),
    "noise_offset": changes(losses, noise_offset=0.1),
    "save_dtype": changes(weights, save_dtype="fp16"),
    "save_format": shows(has("unet/*.bin"), **WRITES),
    "export_single_file": shows(lambda run: Path(f"{run.output}-one.safetensors").is_file(), **WRITES),
    "report_to": shows(has("**/events.out.tfevents.*"), **WRITES),
    "logging_dir": shows(has("boards/events.out.tfevents.*"), **WRITES),
    "checkpointing_steps": shows(has("checkpoint-2"), **WRITES),
    "checkpoints_total_limit": changes(checkpoints, without=dict(checkpointing_steps=1), checkpoints_total_limit=2),
    "resume_from_checkpoint": RESUMING,
    "allow_changes": RESUMING,
    "overwrite_output_dir": RESUMING,
    "validation_prompt": shows(has("validation/*.png"), **WRITES),
    "validation_negative_prompt": changes(validation_pictures, without=DRAWS, validation_negative_prompt="blurry"),
    "validation_inference_steps": changes(validation_pictures, without=DRAWS, validation_inference_steps=3),
    "validation_guidance_scale": changes(validation_pictures, without=DRAWS, validation_guidance_scale=3),
    "validation_steps": shows(lambda run: [row["step"] for row in validated(run)] == [0, 2], **WRITES),
    "num_validation_images": shows(has("validation/step-*2-*.png", 3), **WRITES),
}
CLIP, DRIFT = dict(clip_model="{inputs}/clip"), dict(num_drift_images=1)
GUARDED = dict.fromkeys(("pretrained_model_name_or_path", "finetuned_model_name_or_path"), "{inputs}/guarded")
EVALUATION = {
    "help": COMMAND_LINE,
    "version": COMMAND_LINE,
    "pretrained_model_name_or_path": changes(pictures, pretrained_model_name_or_path="{inputs}/other"),
    "pretrained_vae_name_or_path": changes(pictures, pretrained_vae_name_or_path="{inputs}/other/vae"),
    "finetuned_model_name_or_path": changes(pictures, finetuned_model_name_or_path="{inputs}/other"),
    "output_dir": shows(
        lambda run: run.output.name == "elsewhere" and (run.output / "report.html").is_file(),
        output_dir="{output}/elsewhere",
    ),
    "overwrite_output_dir": "tests/evaluation/test_generate.py",
    "instance_data_dir": changes(
        lambda run: pixels(run.output / "comparison.png"), instance_data_dir="{inputs}/other photos"
    ),
    "prompt": changes(pictures, prompt="x"),
    "prompts_file": changes(lambda run: len(pictures(run)), prompts_file="{inputs}/prompts.txt", prompt=None),
    "dreambench": shows(
        lambda run: len(list(run.output.glob("images/finetuned/*"))) == 24,  # the first is output-1.png
        without=dict(identifier="sks", class_name="cat", num_images=1, num_inference_steps=1, prompt=None),
        dreambench="live",
    ),
    "identifier": changes(scores, without=CLIP, identifier="photo"),
    "class_name": changes(files, without=DRIFT, class_name="boat"),
    "drift_prompt": changes(files, without=DRIFT, drift_prompt="a red boat"),
    "checkpoint": shows(has("images/checkpoint-2/*/*.png"), checkpoint="all"),
    "concepts_list": shows(
        has("02-*/report.html"), prompt=None, instance_data_dir=None, concepts_list="{inputs}/concepts.json"
    ),
    "choose": shows(has("candidates/finetuned@0.5/*/*.png"), choose=True),
    "strength": shows(has("images/finetuned@0.5/*/*.png"), strength=0.5),
    "negative_prompt": changes(pictures, negative_prompt="blurry"),
    "num_images": changes(files, num_images=3),
    "num_drift_images": changes(files, without=DRIFT, num_drift_images=2),
    "seed": changes(lambda run: pixels(run.output / "output-1.png"), seed=7),
    "num_inference_steps": changes(pictures, num_inference_steps=3),
    "guidance_scale": changes(pictures, guidance_scale=3),
    "batch_size": changes(most_at_once("UNet2DConditionModel"), batch_size=1),
    "height": changes(lambda run: len(pixels(run.output / "output-1.png")), height=64),
    "width": changes(lambda run: len(pixels(run.output / "output-1.png")), width=64),
    "mixed_precision": changes(pictures, mixed_precision="bf16"),
    "safety_checker": shows(
        lambda run: not any(map(any, pictures(run).values())), without=GUARDED, safety_checker=True
    ),
    "only": shows(lambda run: "metrics.json" not in files(run), only="generate"),
    "clip_model": changes(scores, **CLIP),
    "dino_model": changes(scores, dino_model="{inputs}/dino"),
    "debug": COMMAND_LINE,
}


@pytest.mark.parametrize(("parser", "table"), [(training_parser(), TRAINING), (build_parser(), EVALUATION)])
def test_every_flag_has_a_row(parser, table):
    shown = [action for action in parser.flags.values() if action.help != argparse.SUPPRESS]
    flags = {name.removeprefix("--") for action in shown for name in action.option_strings if name.startswith("--")}
    assert flags - {"compile"} == table.keys()


def check(runs: Runs, script: str, row: Row | Callable[[Runs], None]) -> None:
    if callable(row):
        row(runs)
        return
    run, other = runs(script, **row.flags), runs(script, **row.without)
    assert (run.error, other.error) == (None, None)
    assert row.holds(run, other), f"{row.flags} changes nothing beside {row.without}"


@pytest.mark.parametrize("flag", [flag for flag, row in TRAINING.items() if not isinstance(row, str)])
def test_training(runs, flag):
    check(runs, "train", TRAINING[flag])


@pytest.mark.parametrize("flag", [flag for flag, row in EVALUATION.items() if not isinstance(row, str)])
def test_evaluation(runs, flag):
    check(runs, "evaluate", EVALUATION[flag])


def test_the_vae_decodes_one_image_at_a_time(runs):
    for run, at_once in ((runs("train", **PRIOR), 2), (runs("evaluate"), 2)):
        assert most_at_once("UNet2DConditionModel")(run) == 2 * at_once  # with guidance
        assert most_at_once("Decoder")(run) == 1


def test_without_a_flag_nothing_changes(runs, tmp_path):
    again = runs("train", output_dir=str(tmp_path / "again"))
    assert (losses(again), weights(again)) == (losses(runs("train")), weights(runs("train")))
    assert files(again) == files(runs("train"))
