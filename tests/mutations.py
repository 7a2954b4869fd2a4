"""The tests are tested: does one notice if a line of the program is wrong?

python -m tests.mutations [--only NAME...] [--jobs 2]

Each of MUTATIONS changes one line in a copy of the tree and runs the tests that should notice. What survives is
printed, with 1 as the exit code if it is not in SURVIVORS. A line that is no longer there is a failure of the list,
which has to follow the program. The libraries are imported once: a process forked from this one tests each copy.
"""

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
OWN = ("utils", "tests", "bench", "tools", "evaluate", "train_dreambooth_colossalai")  # modules that a copy has itself
CAUGHT, SURVIVED, OUTDATED, BROKEN = "caught", "SURVIVED", "NOT THERE", "NO TEST RAN"
TIME_LIMIT = 600  # seconds for the tests of one mutation: a loop that never ends is noticed, too


class Mutation(NamedTuple):
    """`old`, which is once in `file`, becomes `new`; `tests` are pytest's arguments."""

    name: str
    file: str
    old: str
    new: str
    tests: str


# name -> why no test can notice it, or need not.
SURVIVORS: dict[str, str] = {}

CLI, FLAGS, METRICS = "tests/end_to_end/test_cli.py", "tests/test_every_flag_arrives.py", "utils/evaluation/metrics.py"
OPTIMIZER, TEST_OPTIMIZER = "utils/training/optimizer.py", "tests/training/test_optimizer.py"
MUTATIONS = [
    # The method
    Mutation(
        "the ranks' vectors are not added up",
        "utils/runtime/colossal.py",
        "    dist.all_reduce(together)\n",
        "",
        "tests/end_to_end/test_ranks.py",
    ),
    Mutation(
        "a rank alone goes on after a mistake",
        "utils/runtime/ranks.py",
        "    if dist.get_world_size() == 1:\n        complaints = [complaint]\n",
        "    if dist.get_world_size() == 1:\n        complaints = [None]\n",
        "tests/data tests/end_to_end/test_prior_preservation.py",
    ),
    Mutation(
        "a run that ends early tears NCCL down while it starts",
        "utils/runtime/colossal.py",
        "    _NCCL.end()\n    dist.destroy_process_group()\n",
        "    dist.destroy_process_group()\n",
        "tests/runtime/test_colossal.py",
    ),
    Mutation(
        "nobody waits for NCCL's start",
        "utils/runtime/colossal.py",
        "            self._thread.join()\n",
        "            pass\n",
        "tests/runtime/test_colossal.py",
    ),
    Mutation(
        "a rank's loss is its own mean, not its share",
        "utils/training/train_step.py",
        "len(micro_batches) * self.num_ranks",
        "len(micro_batches)",
        "tests/end_to_end/test_ranks.py",
    ),
    Mutation(
        "a second backward pass writes over the first one's gradients",
        "utils/kernels/linear.py",
        " and all(weight.grad is None for weight in weights)",
        "",
        "tests/kernels/test_linear.py tests/training/test_several_ranks.py",
    ),
    Mutation(
        "gradients lie in buckets in the wrong layout",
        "utils/training/optimizer.py",
        "values.as_strided(parameter.shape, parameter.stride())",
        "values",
        "tests/training/test_several_ranks.py",
    ),
    Mutation(
        "the time embedding's projections get it without SiLU",
        "utils/models/fused_unet.py",
        "F.linear(F.silu(plain_forward(*args, **kwargs)), weight, bias)",
        "F.linear(plain_forward(*args, **kwargs), weight, bias)",
        "tests/models/test_fused_unet.py",
    ),
    Mutation(
        "a decoder that cannot be fused is tried for every image",
        "utils/models/captured_unet.py",
        "self._fuses_decoder, self._decoders = False, {}",
        "self._decoders = {}",
        "tests/models/test_captured_unet.py",
    ),
    Mutation(
        "latents are not scaled",
        "utils/diffusion.py",
        "return (mean + std * latent_noise) * scaling_factor",
        "return mean + std * latent_noise",
        "tests/test_diffusion.py",
    ),
    Mutation(
        "the loss is computed in half precision",
        "utils/diffusion.py",
        'F.mse_loss(model_pred.float(), target.float(), reduction="mean")',
        'F.mse_loss(model_pred, target.to(model_pred.dtype), reduction="mean")',
        "tests/test_diffusion.py",
    ),
    Mutation(
        "the target is the noise for a velocity model",
        "utils/diffusion.py",
        "return noise_scheduler.get_velocity(latents, noise, timesteps)",
        "return noise",
        "tests/test_diffusion.py",
    ),
    Mutation(
        "min-SNR weights of the noise for the velocity",
        "utils/diffusion.py",
        "/ (snr + 1)).float()",
        "/ snr).float()",
        "tests/training/test_train_step.py",
    ),
    Mutation(
        "min-SNR weights are not capped",
        "utils/diffusion.py",
        "(snr_gamma / snr).clamp(max=1).float()",
        "(snr_gamma / snr).float()",
        "tests/training/test_train_step.py",
    ),
    Mutation(
        "weights of the loss are left out",
        "utils/diffusion.py",
        "return (errors if sample_weights is None else errors * sample_weights).mean()",
        "return errors.mean()",
        "tests/training/test_train_step.py tests/test_diffusion.py",
    ),
    Mutation(
        "a mask's loss is that of a sum",
        "utils/diffusion.py",
        "position_weights.flatten(1).sum(1).clamp(min=SMALLEST_WEIGHT)",
        "position_weights.flatten(1).sum(1).clamp(min=1e9)",
        "tests/test_diffusion.py",
    ),
    Mutation(
        "the class images' loss counts once, whatever the weight",
        "utils/training/train_step.py",
        "instance_loss + self.prior_loss_weight * class_loss",
        "instance_loss + class_loss",
        "tests/end_to_end/test_prior_preservation.py",
    ),
    Mutation(
        "the loss is not divided among micro-batches",
        "utils/training/train_step.py",
        "self.booster.backward(loss / num_shares, self.optimizer)",
        "self.booster.backward(loss, self.optimizer)",
        f"{CLI} -k micro_batches",
    ),
    Mutation(
        "the halves of a batch are exchanged",
        "utils/training/train_step.py",
        "(instance_pred, class_pred), (instance_target, class_target) = model_pred.chunk(2), target.chunk(2)",
        "(class_pred, instance_pred), (class_target, instance_target) = model_pred.chunk(2), target.chunk(2)",
        "tests/end_to_end/test_prior_preservation.py",
    ),
    # Randomness
    Mutation(
        "photos and class images share a stream of noise",
        "utils/data/randomness.py",
        "    CLASS_NOISE = 9\n",
        "    CLASS_NOISE = 4\n",
        "tests/data/test_randomness.py",
    ),
    Mutation(
        "the seed does not reach the draws",
        "utils/data/randomness.py",
        "key = np.array([seed, purpose], dtype=np.uint64)",
        "key = np.array([0, purpose], dtype=np.uint64)",
        "tests/data/test_randomness.py",
    ),
    Mutation(
        "every epoch has the same order",
        "utils/data/randomness.py",
        "generator(seed, epoch, purpose).permutation(num_photos)",
        "generator(seed, 0, purpose).permutation(num_photos)",
        "tests/data/test_randomness.py",
    ),
    Mutation(
        "all ranks draw the same samples",
        "utils/data/randomness.py",
        "* num_ranks + rank) * batch_size",
        "* num_ranks) * batch_size",
        "tests/data/test_randomness.py",
    ),
    Mutation(
        "the noise offset is drawn for every value",
        "utils/data/randomness.py",
        "standard_normal((latent_shape[0], 1, 1), dtype=np.float32)",
        "standard_normal(latent_shape, dtype=np.float32)",
        "tests/data/test_randomness.py",
    ),
    Mutation(
        "images of a batch share a generator",
        "utils/models/drawing.py",
        "for generator in generators])",
        "for generator in [generators[0]] * len(generators)])",
        "tests/models/test_drawing.py",
    ),
    # Optimizer, precision
    Mutation(
        "bf16 is scaled as fp16",
        OPTIMIZER,
        "self.scales_loss = parameters.weight.dtype == torch.float16",
        "self.scales_loss = parameters.weight.dtype != torch.float32",
        TEST_OPTIMIZER,
    ),
    Mutation(
        "gradients are clipped before they are unscaled",
        OPTIMIZER,
        "grad_norm = self._scaled_grad_norm[0] / loss_scale\n",
        "grad_norm = self._scaled_grad_norm[0]\n",
        TEST_OPTIMIZER,
    ),
    Mutation(
        "a skipped step advances the learning rate",
        OPTIMIZER,
        "self.num_applied += finite",
        "self.num_applied += 1",
        TEST_OPTIMIZER,
    ),
    Mutation(
        "the loss scale grows after any number of good steps",
        OPTIMIZER,
        "self.num_good.add_(1).mul_(finite)",
        "self.num_good.add_(1)",
        TEST_OPTIMIZER,
    ),
    Mutation(
        "an overflow leaves the loss scale",
        OPTIMIZER,
        "torch.where(finite, 1.0, 0.5)",
        "torch.where(finite, 1.0, 1.0)",
        TEST_OPTIMIZER,
    ),
    Mutation(
        "bias corrections are one step late",
        OPTIMIZER,
        "corrections = 1 - self._betas ** (self.num_applied + 1)",
        "corrections = 1 - self._betas ** (self.num_applied + 2)",
        TEST_OPTIMIZER,
    ),
    Mutation(
        "weight decay is added to the gradient's step",
        "utils/kernels/updates.py",
        "step_size, decay = lr / correction1, 1 - lr * weight_decay",
        "step_size, decay = lr / correction1, 1 - weight_decay",
        TEST_OPTIMIZER,
    ),
    Mutation(
        "AdamW's epsilon is left out",
        "utils/kernels/updates.py",
        "exp_avg_sq_.sqrt().div_(correction2_sqrt).add_(eps)",
        "exp_avg_sq_.sqrt().div_(correction2_sqrt)",
        f"{TEST_OPTIMIZER} tests/kernels/test_updates.py",
    ),
    Mutation(
        "masters are the rounded weights",
        "utils/training/flat_parameters.py",
        "self._shaped(values, parameter).copy_(parameter.detach())",
        "self._shaped(values, parameter).copy_(parameter.detach().to(weight_dtype))",
        "tests/training/test_flat_parameters.py",
    ),
    Mutation(
        "what fp16 leaves over is counted in half as many steps",
        "utils/kernels/rounding.py",
        "UNIT_BELOW = 25 << 23",
        "UNIT_BELOW = 24 << 23",
        "tests/kernels/test_rounding.py",
    ),
    Mutation(
        "the halves of a small master do not fit together",
        "utils/kernels/rounding.py",
        "values = (values / GRID).round_() * GRID + 0.0",
        "values = values + 0.0",
        "tests/kernels/test_rounding.py",
    ),
    Mutation(
        "a resumed bf16 run joins masters by another number of updates",
        "utils/training/snapshot.py",
        "    for name in COUNTERS:  # first: masters are split by the number of updates\n"
        "        getattr(optimizer, name).fill_(counters[name])\n",
        "",
        "tests/run/test_checkpoint.py -k 'bf16 or layout'",
    ),
    Mutation(
        "a piece of the masters is joined as if it were the first",
        "utils/training/masters.py",
        "self.first + piece.start",
        "self.first",
        "tests/training/test_masters.py",
    ),
    Mutation(
        "a true zero is all that 8 bits make zero",
        "utils/training/eight_bit.py",
        "levels = torch.where((sizes > 0) & (scales > 0), levels.clamp(min=1), levels)",
        "levels = levels.clamp(min=0)",
        "tests/training/test_eight_bit.py -k 'near or zero'",
    ),
    Mutation(
        "warm-up steps do not reach the schedule",
        "utils/run/plan.py",
        "num_warmup_steps=args.lr_warmup_steps,",
        "num_warmup_steps=0,",
        f"{FLAGS} -k lr_warmup_steps",
    ),
    Mutation(
        "the learning rate is scaled without --scale_lr",
        "utils/run/plan.py",
        "(samples_per_step if args.scale_lr else 1)",
        "samples_per_step",
        f"{FLAGS} {CLI} -k scale_lr",
    ),
    Mutation(
        "AdamW's betas are exchanged",
        "utils/run/plan.py",
        "betas=(args.adam_beta1, args.adam_beta2)",
        "betas=(args.adam_beta2, args.adam_beta1)",
        "tests/run/test_plan.py",
    ),
    Mutation(
        "validation uses another seed",
        "utils/run/plan.py",
        "            num_images=args.num_validation_images,\n            seed=args.seed,",
        "            num_images=args.num_validation_images,\n            seed=0,",
        "tests/training/test_validation.py",
    ),
    # Files
    Mutation(
        "a tree is renamed before it is synced",
        "utils/run/checkpoint.py",
        "            sync_tree(staging)\n",
        "",
        "tests/test_promises.py -k synced",
    ),
    Mutation(
        "the result is moved before it is synced",
        "utils/models/saving.py",
        "        sync_tree(staging)\n",
        "",
        "tests/test_promises.py -k synced",
    ),
    Mutation(
        "the rename itself is not synced",
        "utils/models/saving.py",
        "        sync(output_dir)\n",
        "",
        "tests/test_promises.py -k synced",
    ),
    Mutation(
        "a file is renamed before it is synced",
        "utils/files/atomic.py",
        "        sync(part)\n        move(part, path)",
        "        move(part, path)",
        "tests/files/test_atomic.py tests/test_promises.py -k 'synced or atomic'",
    ),
    Mutation(
        "a file is written in its place",
        "utils/files/atomic.py",
        "        write(part)\n",
        "        write(path)\n",
        "tests/files/test_atomic.py",
    ),
    Mutation(
        "model_index.json is moved first",
        "utils/models/saving.py",
        "for name in (*parts, MODEL_INDEX)]",
        "for name in (MODEL_INDEX, *parts)]",
        "tests/models/test_saving.py",
    ),
    Mutation(
        "a failed move is not undone",
        "utils/models/saving.py",
        "            move(target, source)\n",
        "            pass\n",
        "tests/models/test_saving.py",
    ),
    Mutation(
        "safetensors' header is not aligned",
        "utils/files/safetensors_writer.py",
        '    encoded += b" " * (-len(encoded) % 8)\n',
        "",
        "tests/files/test_safetensors_writer.py",
    ),
    Mutation(
        "a second run enters the folder",
        "utils/files/lock.py",
        "_lock(descriptor, fcntl.LOCK_EX, path, SECONDS_FOR_A_LOOK)",
        "_lock(descriptor, fcntl.LOCK_SH, path, SECONDS_FOR_A_LOOK)",
        "tests/files/test_lock.py",
    ),
    # Checkpoints, resuming
    Mutation(
        "the newest checkpoints are removed, not the oldest",
        "utils/run/checkpoint.py",
        "others[: max(0, len(others) + 1 - self.total_limit)]",
        "others[-max(0, len(others) + 1 - self.total_limit) :]",
        "tests/run/test_checkpoint.py -k newest",
    ),
    Mutation(
        "another run's checkpoints are removed",
        "utils/run/checkpoint.py",
        "list_checkpoints(self.output_dir, self.lineage) if found.step != keep",
        "list_checkpoints(self.output_dir) if found.step != keep",
        "tests/run/test_lineage.py -k left_behind_stays",
    ),
    Mutation(
        "latest is the oldest",
        "utils/run/resume.py",
        "checkpoint = own[-1] if own else None",
        "checkpoint = own[0] if own else None",
        "tests/run/test_resume.py -k 'finished_run or earlier or differences or latest'",
    ),
    Mutation(
        "the seed is not compared on a resume",
        "utils/run/fingerprint.py",
        '    "max_nonfinite_steps",\n}',
        '    "max_nonfinite_steps",\n    "seed",\n}',
        "tests/run/test_resume.py -k other_inputs",
    ),
    Mutation(
        "a schedule's end is not compared on a resume",
        "utils/run/fingerprint.py",
        'if arguments["lr_scheduler"] not in SCHEDULES_WITHOUT_END:',
        "if False:",
        "tests/run/test_resume.py -k other_inputs",
    ),
    Mutation(
        "a later checkpoint of a run that was left counts",
        "utils/run/lineage.py",
        "return checkpoint.step <= last_steps.get(checkpoint.run_id, -1)",
        "return checkpoint.run_id in last_steps",
        "tests/run/test_lineage.py",
    ),
    Mutation(
        "the moments are not restored",
        "utils/run/checkpoint.py",
        "                tensor.copy_(value)\n",
        "                tensor.copy_(value) if not prefix.startswith('exp_avg') else None\n",
        "tests/run/test_checkpoint.py",
    ),
    Mutation(
        "unfinished runs are started over",
        "utils/run/resume.py",
        'if own and run.get("status") != "complete" and not may_start_over:',
        "if False:",
        "tests/run/test_resume.py -k unfinished",
    ),
    Mutation(
        "a signal's exit code is 1",
        "utils/runtime/signals.py",
        "self._code, self._first_at = 128 + received[0], time.monotonic()",
        "self._code, self._first_at = 128 + signal.SIGINT, time.monotonic()",
        "tests/runtime/test_signals.py",
    ),
    Mutation(
        "steps without a finite gradient never end a run",
        "utils/run/loop.py",
        "return NONFINITE if self.log.nonfinite_streak >= self.plan.max_nonfinite_steps else 0",
        "return 0",
        "tests/run/test_faults.py -k not_finite",
    ),
    # Photos, class images
    Mutation(
        "pixels are in [0,1]",
        "utils/dataset.py",
        "self._crop(self.photos[photo].pixels, top, left)).float() / 127.5 - 1.0",
        "self._crop(self.photos[photo].pixels, top, left)).float() / 255.0",
        "tests/test_dataset.py",
    ),
    Mutation(
        "EXIF orientation is ignored",
        "utils/photos/decoding.py",
        "_split_alpha(ImageOps.exif_transpose(image))",
        "_split_alpha(image)",
        "tests/photos tests/test_dataset.py",
    ),
    Mutation(
        "transparency is laid on black",
        "utils/photos/decoding.py",
        "(255, 255, 255, 255)",
        "(0, 0, 0, 255)",
        "tests/photos tests/test_dataset.py",
    ),
    Mutation(
        "captions are not read",
        "utils/dataset.py",
        "captions.texts.get(path, prompt)",
        "prompt",
        "tests/data/test_concepts.py -k caption",
    ),
    Mutation(
        "class images of another prompt are mixed in",
        "utils/data/class_images.py",
        "        if theirs.get(name) != value:",
        "        if theirs.get(name) != value and name != 'prompt':",
        "tests/data",
    ),
    Mutation(
        "a class image that was cut short is used",
        "utils/data/class_images.py",
        "whole = file.read() == PNG_END",
        "whole = True",
        "tests/data/test_class_images.py",
    ),
    # Refusals, messages, units
    Mutation(
        "class flags without prior preservation are accepted",
        "utils/arguments.py",
        "if not args.with_prior_preservation and len(missing) < 2:",
        "if False:",
        "tests/test_arguments.py",
    ),
    Mutation(
        "a user's mistake is exit code 1",
        "utils/errors.py",
        "EXIT_USER_ERROR = 2",
        "EXIT_USER_ERROR = 1",
        "tests/test_command_line.py tests/test_arguments.py tests/preflight",
    ),
    Mutation(
        "too little disk space is only noted",
        "utils/preflight/resources.py",
        "    if needed > free:\n        raise UserError(",
        "    if needed > 2 * free:\n        raise UserError(",
        "tests/preflight/test_resources.py",
    ),
    Mutation(
        "gigabytes are gibibytes",
        "utils/training/memory.py",
        "GB = 1e9\n",
        "GB = 2.0**30\n",
        "tests/training/test_memory.py tests/preflight",
    ),
    Mutation(
        "moments count half in the estimate",
        "utils/training/memory.py",
        '"moments": 2 * moment * count',
        '"moments": moment * count',
        "tests/training/test_memory.py",
    ),
    Mutation(
        "an older GPU than the kernels' is accepted",
        "utils/runtime/gpu.py",
        "if built <= capability and",
        "if",
        "tests/runtime/test_gpu.py",
    ),
    Mutation(
        "bf16 is taken on a GPU that has none",
        "utils/run/plan.py",
        '() if has_bf16 else ("mixed_precision", "prior_generation_precision")',
        "()",
        "tests/run/test_plan.py",
    ),
    Mutation(
        "an effect in the wrong direction is found",
        "utils/evaluation/visible.py",
        "low, high = sorted(direction * bound for bound in interval)",
        "low, high = sorted(bound for bound in interval)",
        "tests/evaluation/test_verdict.py",
    ),
    Mutation(
        "a lost log ends the run",
        "utils/command_line.py",
        "stream = _lasting(stream)",
        "pass",
        "tests/test_command_line.py -k lost",
    ),
    Mutation(
        "a class image that is not used stops a resume",
        "utils/run/resume.py",
        'class_images = used_class_images(concepts, plan.arguments["num_class_images"])',
        'class_images = [p for c in concepts if c.class_data_dir for p in sorted(c.class_data_dir.glob("*"))]',
        "tests/run/test_resume.py",
    ),
    Mutation(
        "a Triton that finds no compiler is used",
        "utils/kernels/operations.py",
        "_is_new and (not torch.cuda.is_available() or missing_for_triton() is None)",
        "_is_new",
        "tests/kernels/test_targets.py -k cannot_build",
    ),
    # Metrics, the report
    Mutation(
        "photos are compared with themselves",
        METRICS,
        "(cosines.sum() - np.trace(cosines)) / (num_photos * (num_photos - 1))",
        "cosines.sum() / num_photos**2",
        "tests/evaluation/test_metrics.py",
    ),
    Mutation(
        "CLIP-T is clamped at zero",
        METRICS,
        "return (generated * texts).sum(axis=1)",
        "return (generated * texts).sum(axis=1).clip(0)",
        "tests/evaluation/test_metrics.py",
    ),
    Mutation(
        "COPY is the mean likeness",
        METRICS,
        "return (generated @ photos.T).max(axis=1)",
        "return (generated @ photos.T).mean(axis=1)",
        "tests/evaluation/test_metrics.py",
    ),
    Mutation(
        "an image is compared with itself in DIV",
        METRICS,
        "first, second = np.triu_indices(num_images, 1)",
        "first, second = np.triu_indices(num_images, 0)",
        "tests/evaluation/test_metrics.py",
    ),
    Mutation(
        "DIV's interval counts an image with itself",
        "utils/evaluation/metrics.py",
        "without = (total - 2 * to_others)",
        "without = (total - to_others)",
        "tests/evaluation/test_metrics.py",
    ),
    Mutation(
        "intervals of few images are those of many",
        "utils/evaluation/metrics.py",
        "half = t_quantile(degrees) * math.sqrt(variance / values.size)",
        "half = 1.96 * math.sqrt(variance / values.size)",
        "tests/evaluation/test_metrics.py",
    ),
    Mutation(
        "changes are the baseline's less ours",
        "utils/evaluation/score.py",
        "result[name] = _mean_value(values[ours] - values[theirs], role)",
        "result[name] = _mean_value(values[theirs] - values[ours], role)",
        "tests/evaluation/test_score.py",
    ),
    Mutation(
        "the rare token counts in CLIP-T",
        "utils/evaluation/image_table.py",
        "[without_identifier(text, identifier) for text in texts]",
        "texts",
        "tests/evaluation/test_score.py",
    ),
    Mutation(
        "an effect is found whose interval holds zero",
        "utils/evaluation/visible.py",
        "direction * change >= visible and low > 0:",
        "direction * change >= visible:",
        "tests/evaluation/test_verdict.py",
    ),
    Mutation(
        "memorised photos are not warned of",
        "utils/evaluation/checks.py",
        'copies < max(1, COPIED_SHARE * copy["num_images"])',
        'copies < copy["num_images"]',
        "tests/evaluation/test_verdict.py",
    ),
    Mutation(
        "a prompt that the photos follow no better counts as lost",
        "utils/evaluation/checks.py",
        "if state == FOUND and not is_like_photos(comparison):",
        "if state == FOUND:",
        "tests/evaluation/test_verdict.py",
    ),
    Mutation(
        "images that have another name are drawn again",
        "utils/evaluation/generate.py",
        "there = reuse_images(plan.output_dir, digests)",
        "there = {file: recorded_settings(plan.output_dir / file) for file in digests}",
        "tests/evaluation/test_score.py",
    ),
    Mutation(
        "scores without their photos replace good ones",
        "utils/evaluation/score.py",
        "if folder is not None and not folder.is_dir():",
        "if False:",
        "tests/evaluation/test_score.py",
    ),
    Mutation(
        "the report escapes nothing",
        "utils/evaluation/report/page.py",
        "autoescape=True",
        "autoescape=False",
        "tests/evaluation/report/test_report.py -k 'not chromium'",
    ),
]


def copy_tree(target: Path) -> None:
    """The tracked and new files of the tree."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        source, copy = ROOT / name, target / name
        if source.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)


def apply(mutation: Mutation, tree: Path) -> bool:
    """Changes the line in `tree`; False if it is not there exactly once."""
    path = tree / mutation.file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text.count(mutation.old) != 1:
        return False
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    return True


def run_tests(tree: Path, tests: str) -> int:
    """pytest's exit code in a process forked from this one, which knows the libraries but no module of ours."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.chdir(tree)
            sys.path[:] = [str(tree), *(entry for entry in sys.path if entry not in ("", str(ROOT)))]
            for name in [name for name in sys.modules if name.partition(".")[0] in OWN]:
                del sys.modules[name]
            import shlex

            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={tree / '.pytest'}"]
                code = pytest.main([*options, *shlex.split(tests)])
        finally:
            os._exit(int(code))
    end = time.monotonic() + TIME_LIMIT
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return 1


def outcome(mutation: Mutation) -> str:
    """CAUGHT, SURVIVED, or what is wrong with the list."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        if not apply(mutation, tree):
            return OUTDATED
        code = run_tests(tree, mutation.tests)
    if code == pytest.ExitCode.OK:
        return SURVIVED
    return CAUGHT if code == pytest.ExitCode.TESTS_FAILED else f"{BROKEN} (pytest's exit code {code})"


def import_libraries() -> None:
    """What takes long to import, for all forks: utils.runtime.libraries knows the order."""
    import utils.runtime.colossal  # noqa: F401


def main(argv: list[str] | None = None) -> int:
    """Prints a line for each mutation; 1 for an unexpected survivor and for a list that is out of date."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.partition("\n")[0])
    names = [mutation.name for mutation in MUTATIONS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1, help="copies tested at a time (1)")
    args = parser.parse_args(argv)
    import_libraries()
    chosen = [mutation for mutation in MUTATIONS if mutation.name in args.only]
    failed, counts = 0, Counter()
    with ThreadPoolExecutor(args.jobs) as executor:
        for mutation, found in zip(chosen, executor.map(outcome, chosen), strict=True):
            excuse = SURVIVORS.get(mutation.name)
            is_well = found == CAUGHT if excuse is None else found == SURVIVED
            failed += not is_well
            counts[found] += 1
            print(f"{found}: {mutation.name}{f' ({excuse})' if excuse else ''}", flush=True)
    print(", ".join(f"{count} {found}" for found, count in counts.items()))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
