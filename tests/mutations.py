"""The tests are tested: does one notice if a line of the program is wrong?

python -m tests.mutations [--only NAME...] [--jobs 2]

Each of MUTATIONS changes one line in a copy of the tree and runs the tests that should notice. What survives is
printed, with 1 as the exit code. A line that is no longer there is a failure of the list, which has to follow the
program. The libraries are imported once: a process forked from this one tests each copy.
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


# A file, then its wrong lines: the name and the tests that should notice; what is there, once; what is put there. Of
# lines that one test notices by the same comparison the likeliest mistake.
WRONG_LINES = """
=== run.sh
an earlier result is evaluated after a training that failed -> tests/end_to_end/test_setup.py -k earlier_run
-[ "$code" = 0 ] || exit "$code"
+true
a signal to run.sh is for bash alone -> tests/end_to_end/test_signals.py -k stage
-kill -s "$1" -- "-$job" 2>/dev/null || true; }
+true; }
=== utils/arguments.py
class flags without prior preservation are accepted -> tests/test_arguments.py
-if not args.with_prior_preservation and len(missing) < 2:
+if False:
=== utils/data/class_images.py
a class image that was cut short is used -> tests/data/test_class_images.py
-whole = file.read() == PNG_END
+whole = True
=== utils/concepts.py
a subject's photos are another one's class images -> tests/test_concepts.py -k malformed
-for other in (output_dir, *(each.instance_data_dir for each in concepts)):
+for other in (output_dir, concept.instance_data_dir):
=== utils/data/randomness.py
photos and class images share a stream of noise -> tests/data/test_randomness.py
-latent_noise=8, noise=9
+latent_noise=8, noise=4
all ranks draw the same samples -> tests/data/test_randomness.py
-* num_ranks + rank) * batch_size
+* num_ranks) * batch_size
=== utils/dataset.py
captions are not read -> tests/test_concepts.py -k caption
-captions.get(path, prompt)
+prompt
=== utils/diffusion.py
the loss is computed in half precision -> tests/test_diffusion.py
-F.mse_loss(model_pred.float(), target.float(), reduction=reduction)
+F.mse_loss(model_pred, target.to(model_pred.dtype), reduction=reduction)
min-SNR weights of the noise for the velocity -> tests/test_diffusion.py
-/ (snr + 1)).float()
+/ snr).float()
the class images' loss counts once, whatever the weight -> tests/test_diffusion.py
-instance_loss + self.prior_loss_weight * class_loss
+instance_loss + class_loss
=== utils/errors.py
a user's mistake is exit code 1 -> tests/test_command_line.py tests/test_arguments.py tests/preflight
-EXIT_USER_ERROR = 2
+EXIT_USER_ERROR = 1
=== utils/evaluation/choice.py
the choice takes what copies photos -> tests/evaluation/test_choice.py
-sound = [each for each in gaining if not each.num_copies]
+sound = gaining
the choice takes the farthest of those that are equal -> tests/evaluation/test_choice.py
-key=lambda each: each.distance)
+key=lambda each: -each.distance)
=== utils/evaluation/generate.py
images that are there are drawn again -> tests/evaluation/test_score.py -k equal_settings
-if recorded_settings(folder / s.file) != digests[s.file]]
+]
=== utils/evaluation/image_table.py
the rare token counts in CLIP-T -> tests/evaluation/test_score.py
-plain = {text: without_identifier(text, self.samples["identifier"]) for text in texts}
+plain = {text: text for text in texts}
=== utils/evaluation/metrics.py
photos are compared with themselves -> tests/evaluation/test_metrics.py
-return (cosines.sum(axis=1) - np.diag(cosines)) / (len(photos) - 1)
+return cosines.mean(axis=1)
CLIP-T is clamped at zero -> tests/evaluation/test_metrics.py
-return (generated * texts).sum(axis=1)
+return (generated * texts).sum(axis=1).clip(0)
an image is compared with itself in DIV -> tests/evaluation/test_metrics.py
-first, second = np.triu_indices(num_images, 1)
+first, second = np.triu_indices(num_images, 0)
=== utils/evaluation/report/page.py
the report escapes nothing -> tests/evaluation/report/test_report.py -k 'not chromium'
-autoescape=True
+autoescape=False
=== utils/evaluation/score.py
changes are the baseline's less ours -> tests/evaluation/test_score.py
-found[key] = intervals.describe_change(ours - theirs)
+found[key] = intervals.describe_change(theirs - ours)
scores without their photos replace good ones -> tests/evaluation/test_score.py
-if folder is not None and not folder.is_dir():
+if False:
=== utils/evaluation/scorer.py
a scorer that takes the photos for something else is believed -> tests/evaluation/test_scorer.py
-if False in (is_apart, is_first):
+if is_apart is False:
=== utils/files/atomic.py
a file is renamed before it is synced -> tests/files/test_atomic.py tests/test_promises.py -k 'synced or atomic'
-        sync(part)
-        move(part, path)
+        move(part, path)
=== utils/files/lock.py
a second run enters the folder -> tests/files/test_lock.py
-    with _alone_in(output_dir, SECONDS_FOR_A_LOOK) as problem:
+    with contextlib.nullcontext() as problem:
=== utils/kernels/operations.py
a second pass writes over the first's gradients -> tests/kernels tests/training/test_several_ranks.py
- and all(weight.grad is None for weight in weights)
a Triton that finds no compiler is used -> tests/kernels/test_targets.py -k cannot_build
-_is_new and (not torch.cuda.is_available() or missing_for_triton() is None)
+_is_new
AdamW's epsilon is left out -> tests/training/test_optimizer.py tests/kernels/test_updates.py
-exp_avg_sq_.sqrt().div_(correction2_sqrt).add_(eps)
+exp_avg_sq_.sqrt().div_(correction2_sqrt)
=== utils/kernels/rounding.py
what fp16 leaves over is counted in half as many steps -> tests/kernels/test_rounding.py
-UNIT_BELOW = 25 << 23
+UNIT_BELOW = 24 << 23
=== utils/models/base.py
a single file overwritten by another of its size is not converted again -> tests/models/test_base.py -k overwritten
-mtime_ns=found.st_mtime_ns
+mtime_ns=0
all ranks convert a single file at once -> tests/models/test_base.py -k several_processes
-with locked(cache / ".lock"):
+if True:
=== utils/models/captured_unet.py
a decoder that cannot be fused is tried for every image -> tests/models/test_captured_unet.py
-self._fuses_decoder, self._decoders = False, {}
+self._decoders = {}
=== utils/models/drawing.py
images of a batch share a generator -> tests/models/test_drawing.py
-for generator in generators])
+for generator in [generators[0]] * len(generators)])
=== utils/models/fused_unet.py
the time embedding's projections get it without SiLU -> tests/models/test_fused_unet.py
-F.linear(F.silu(plain_forward(*args, **kwargs)), weight, bias)
+F.linear(plain_forward(*args, **kwargs), weight, bias)
=== utils/models/weight_files.py
a pickle is opened by a torch that can be made to run code from it -> tests/models/test_hostile_folders.py -k pickle
-if torch_version() < FIRST_SAFE_TORCH:
+if False:
=== utils/models/loading.py
files of equal size and time are the same -> tests/models/test_loading.py -k changed_byte
-filecmp.cmp(ours, theirs, shallow=False)
+filecmp.cmp(ours, theirs, shallow=True)
=== utils/models/saving.py
safetensors' header is not aligned -> tests/models/test_saving.py -k multiple_of_eight
-    encoded += b" " * (-len(encoded) % 8)
the result is moved before it is synced -> tests/test_promises.py -k synced
-        sync_tree(staging)
a failed move is not undone -> tests/models/test_saving.py
-            move(target, source)
+            pass
=== utils/photos/decoding.py
EXIF orientation is ignored -> tests/photos tests/test_dataset.py
-_split_alpha(ImageOps.exif_transpose(image))
+_split_alpha(image)
=== utils/preflight/checks.py
an output folder in the other VAE's is accepted -> tests/preflight/test_checks.py -k vae
-"pretrained_vae_name_or_path", "instance_data_dir", "tokenizer_name")
+"instance_data_dir", "tokenizer_name")
=== utils/preflight/resources.py
too little disk space is only noted -> tests/preflight/test_resources.py
-    if needs.total > free:
+    if needs.total > 2 * free:
=== utils/run/checkpoint.py
the newest checkpoints are removed, not the oldest -> tests/run/test_checkpoint.py -k newest
-others[: max(0, len(others) + 1 - self.total_limit)]
+others[-max(0, len(others) + 1 - self.total_limit) :]
another run's checkpoints are removed -> tests/run/test_lineage.py -k left_behind_stays
-list_checkpoints(self.output_dir, self.lineage) if found.step != step
+list_checkpoints(self.output_dir) if found.step != step
the moments are not restored -> tests/run/test_checkpoint.py
-                tensor.copy_(value)
+                tensor.copy_(value) if not prefix.startswith('exp_avg') else None
=== utils/run/lineage.py
latest is the oldest -> tests/run/test_resume.py tests/run/test_checkpoint.py -k 'finished_run or earlier or damaged'
-for checkpoint in reversed(found):
+for checkpoint in found:
=== utils/run/loop.py
steps without a finite gradient never end a run -> tests/run/test_faults.py -k not_finite
-return NONFINITE if self.log.nonfinite_streak >= self.plan.max_nonfinite_steps else 0
+return 0
=== utils/run/plan.py
warm-up steps do not reach the schedule -> tests/test_every_flag_arrives.py -k lr_warmup_steps
-num_warmup_steps=args.lr_warmup_steps,
+num_warmup_steps=0,
AdamW's betas are exchanged -> tests/run/test_plan.py
-betas=(args.adam_beta1, args.adam_beta2)
+betas=(args.adam_beta2, args.adam_beta1)
validation uses another seed -> tests/training/test_validation.py
-num_images=args.num_validation_images, seed=args.seed)
+num_images=args.num_validation_images, seed=0)
bf16 is taken on a GPU that has none -> tests/run/test_plan.py
-() if has_bf16 else ("mixed_precision", "prior_generation_precision")
+()
=== utils/run/lineage.py
unfinished runs are started over -> tests/run/test_resume.py -k unfinished
-if own and run.get("status") != "complete" and not may_start_over:
+if False:
=== utils/run/resume.py
a schedule's end is not compared on a resume -> tests/run/test_resume.py -k other_inputs
-if arguments["lr_scheduler"] not in SCHEDULES_WITHOUT_END:
+if False:
a polynomial schedule goes on with another end -> tests/run/test_resume.py -k number_of_steps
-SCHEDULES_WITHOUT_END = ("constant", "constant_with_warmup")
+SCHEDULES_WITHOUT_END = ("constant", "constant_with_warmup", "polynomial")
a base file replaced by one of its size passes unnoticed -> tests/run/test_resume.py -k same_size
-(path.stat().st_size, path.stat().st_mtime_ns)
+(path.stat().st_size, 0)
=== utils/runtime/colossal.py
the ranks' vectors are not added up -> tests/end_to_end/test_ranks.py
-    dist.all_reduce(together)
a run that ends early tears NCCL down while it starts -> tests/runtime/test_colossal.py
-    _wait_until_connected()
-    dist.destroy_process_group()
+    dist.destroy_process_group()
=== utils/runtime/gpu.py
an older GPU than the kernels' is accepted -> tests/runtime/test_gpu.py
-if built <= of and
+if
=== utils/runtime/process.py
a lost log ends the run -> tests/test_command_line.py -k lost
-stream = _lasting(stream)
+pass
=== utils/runtime/ranks.py
a rank alone goes on after a mistake -> tests/data tests/end_to_end/test_prior_preservation.py
-    for complaint, _ in said:
+    for complaint, _ in []:
a signal's exit code is 1 -> tests/runtime/test_ranks.py
-self._code = 128 + received[0]
+self._code = 128 + signal.SIGINT
=== utils/training/flat_parameters.py
masters are the rounded weights -> tests/training/test_flat_parameters.py
-self._shaped(values, parameter).copy_(parameter.detach())
+self._shaped(values, parameter).copy_(parameter.detach().to(weight_dtype))
=== utils/training/memory.py
gigabytes are gibibytes -> tests/training/test_memory.py tests/preflight
-GB = 1e9
+GB = 2.0**30
=== utils/training/optimizer.py
gradients lie in buckets in the wrong layout -> tests/training/test_several_ranks.py
-values.as_strided(parameter.shape, parameter.stride())
+values
gradients are clipped before they are unscaled -> tests/training/test_optimizer.py
-grad_norm = self._scaled_grad_norm[0] / loss_scale
+grad_norm = self._scaled_grad_norm[0]
a skipped step advances the learning rate -> tests/training/test_optimizer.py
-self.num_applied += finite
+self.num_applied += 1
the loss scale grows after any number of good steps -> tests/training/test_optimizer.py
-self.num_good.add_(1).mul_(finite)
+self.num_good.add_(1)
=== utils/training/packed.py
a true zero is all that 8 bits make zero -> tests/training/test_packed.py -k 'near or zero'
-levels = torch.where((sizes > 0) & (scales > 0), levels.clamp(min=1), levels)
+levels = levels.clamp(min=0)
=== utils/training/snapshot.py
a resumed bf16 run joins masters by another number of updates -> tests/run/test_checkpoint.py -k 'bf16 or layout'
-    for name, value in counters.items():  # first: masters are split by the number of updates
-        getattr(optimizer, name).fill_(value)
a resumed fp16 run doubles its loss scale at another step -> tests/run/test_checkpoint.py -k layout
-COUNTERS = (*COUNTERS_OF_UPDATES, "loss_scale", "num_good")
+COUNTERS = (*COUNTERS_OF_UPDATES, "loss_scale")
=== utils/training/train_step.py
a rank's loss is its own mean, not its share -> tests/end_to_end/test_ranks.py
-len(micro_batches) * self.num_ranks
+len(micro_batches)
the loss is not divided among micro-batches -> tests/end_to_end/test_ranks.py -k 2x1x3
-self.booster.backward(losses[0] / num_shares, self.optimizer)
+self.booster.backward(losses[0], self.optimizer)
"""


def read_mutations(text: str) -> list[Mutation]:
    """Of a text like WRONG_LINES."""
    file, found = "", []
    for line in text.strip().splitlines():
        if line.startswith("=== "):
            file = line.removeprefix("=== ")
        elif line[0] in "-+":
            found[-1][line[0]].append(line[1:])
        else:
            name, tests = line.split(" -> ")
            found.append({"name": name, "file": file, "tests": tests, "-": [], "+": []})
    return [Mutation(m["name"], m["file"], "\n".join(m["-"]), "\n".join(m["+"]), m["tests"]) for m in found]


MUTATIONS = read_mutations(WRONG_LINES)


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
    """Prints a line for each mutation; 1 for a survivor and for a list that is out of date."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.partition("\n")[0])
    names = [mutation.name for mutation in MUTATIONS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1, help="copies tested at a time (1)")
    args = parser.parse_args(argv)
    import_libraries()
    chosen = [mutation for mutation in MUTATIONS if mutation.name in args.only]
    counts = Counter()
    with ThreadPoolExecutor(args.jobs) as executor:
        for mutation, found in zip(chosen, executor.map(outcome, chosen), strict=True):
            counts[found] += 1
            print(f"{found}: {mutation.name}", flush=True)
    print(", ".join(f"{count} {found}" for found, count in counts.items()))
    return int(counts.keys() != {CAUGHT})


if __name__ == "__main__":
    sys.exit(main())
