#!/usr/bin/env bash
# Fine-tunes on the photos in INSTANCE_DIR, then samples the result beside the baseline, scores it, writes report.html.
# Every value can be overridden from the environment; extra arguments go to the training script:
#   MAX_TRAIN_STEPS=400 LEARNING_RATE=2e-6 INSTANCE_PROMPT="a photo of sks cat" bash run.sh --train_batch_size=2
# Relative paths are those of the folder it is called from; what is not given lies in the project's own folder.
# VENV=DIR runs in a virtual environment of yours, as it is; without it setup.sh makes .venv.
# --dry_run only checks everything. All flags: python train_dreambooth_colossalai.py --help
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,8s/^# //p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
project="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
root="$project/"
[ "$PWD" -ef "$project" ] && root="./"

# A signal to this script, which may be a container's process 1, is passed on to what runs just now: a job in a process
# group of its own, so that it gets each signal once, from here, and what it has started (setup.sh's pip) gets it too.
asked=0 job=""
pass_on() { [ -z "$job" ] || kill -s "$1" -- "-$job" 2>/dev/null || true; }
for name in INT TERM HUP USR1 USR2 XCPU; do
  trap "interrupted=$name; asked=$((128 + $(kill -l "$name"))); pass_on $name" "$name"
done
run() {  # a command, to its end; this script ends with its exit code if that is not 0, and after a signal
  local code
  set -m; "$@" & job=$!; set +m
  [ "$asked" = 0 ] || pass_on "$interrupted"  # it came before there was a job
  interrupted=again
  while [ -n "$interrupted" ]; do interrupted=""; wait "$job" 2>/dev/null && code=0 || code=$?; done
  job=""
  [ "$code" != 0 ] || code="$asked"
  [ "$code" = 0 ] || exit "$code"
}

[ -n "${VENV:-}" ] || run bash "$project/setup.sh" >&2  # stdout is the run's, and JSON with --json
python="${VENV:-$project/.venv}/bin/python"
[ -x "$python" ] || {
  printf 'run.sh: there is no %q: VENV=DIR names a virtual environment, or leave it out for .venv\n' "$python" >&2
  exit 2
}
# For python -c: where the project is, and that Ctrl-C needs no traceback.
from_here='import signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); sys.path[0] = sys.argv.pop(1); '

# What an environment file leaves around a value (quotes, its line's end) is taken away; a variable that only looks like
# one of those below is named.
own="${from_here}from utils.before_launch import variables; sys.exit(variables())"
own="$("$python" -c "$own" "$project")"
eval "$own"
case " $* " in *" --dry_run"[[:space:]]* | *" --version"[[:space:]]*) only_checks=1 ;; *) only_checks="" ;; esac
case "${NPROC:-1}" in auto | cpu | gpu) ;; 0* | *[!0-9]*) echo "run.sh: NPROC=$NPROC is no number of processes" >&2; exit 2 ;; esac

export INSTANCE_DIR="${INSTANCE_DIR:-${root}instance}"
[ -n "${OUTPUT_DIR:-}" ] && result="${OUTPUT_DIR%/}-result" || result="${root}result"
export OUTPUT_DIR="${OUTPUT_DIR:-${root}output}"
export RESULT_DIR="${RESULT_DIR:-$result}"
recipe_model="${root}model/stable-diffusion-v1-4"
embedded_model="${root}model/tiny-stable-diffusion"
if [ -z "${MODEL_NAME:-}" ] && [ ! -d "$recipe_model" ]; then
  [ -d "$embedded_model" ] || {
    echo "run.sh: there is no base in ${root}model, not even its own (is another folder mounted there?):" \
      "MODEL_NAME=PATH names one" >&2
    exit 2
  }
  [ -n "$only_checks" ] || echo "no $recipe_model (README.md says how to get it): the embedded 64-pixel model runs"
  export MODEL_NAME="$embedded_model"
fi
export MODEL_NAME="${MODEL_NAME:-$recipe_model}"

# The recipe's values; the embedded model wants its own size, a larger learning rate, fp32 on a CPU, and fewer steps.
resolution=512 batch_size=1 precision=fp16 learning_rate=1e-6 steps=20 checkpointing_steps="" inference_steps=50
if [ "$(realpath -m "$MODEL_NAME")" = "$(realpath -m "$embedded_model")" ]; then
  resolution=64 batch_size=4 precision=no learning_rate=1.5e-4 steps=150 checkpointing_steps=50 inference_steps=25
fi
checkpointing_steps="${CHECKPOINTING_STEPS:-$checkpointing_steps}"  # without any utils/before_launch.py sets them

training=(
  --pretrained_model_name_or_path="$MODEL_NAME"
  --instance_data_dir="$INSTANCE_DIR"
  --output_dir="$OUTPUT_DIR"
  --instance_prompt="${INSTANCE_PROMPT:-a photo of my cat.}"
  --resolution="${RESOLUTION:-$resolution}"
  --train_batch_size="${TRAIN_BATCH_SIZE:-$batch_size}"
  --mixed_precision="${MIXED_PRECISION:-$precision}"
  --learning_rate="${LEARNING_RATE:-$learning_rate}"
  --lr_scheduler="${LR_SCHEDULER:-constant}"
  --lr_warmup_steps="${LR_WARMUP_STEPS:-0}"
  --max_train_steps="${MAX_TRAIN_STEPS:-$steps}"
  ${checkpointing_steps:+--checkpointing_steps="$checkpointing_steps"}
  "$@"
)
# The base, the photos and the prompt are those that run.json says were trained with.
evaluation=(
  --finetuned_model_name_or_path="$OUTPUT_DIR"
  --output_dir="$RESULT_DIR"
  --num_images="${NUM_IMAGES:-4}"
  --num_drift_images="${NUM_DRIFT_IMAGES:-1}"
  --choose
  ${CHECKPOINT:+--checkpoint="$CHECKPOINT"}
  --num_inference_steps="${NUM_INFERENCE_STEPS:-$inference_steps}"
)
# What is asked for the result of another run holds for its page too.
case " $* " in *" --overwrite_output_dir"[[:space:]]*) evaluation+=(--overwrite_output_dir) ;; esac

# Mistakes are said before torchrun starts; then the training, with its own exit code.
launch="${from_here}from utils.before_launch import main; command = main(); "
launch+="from utils.runtime.ranks import torchrun; sys.exit(torchrun(command))"
run "$python" -c "$launch" "$project" "${root}train_dreambooth_colossalai.py" "${training[@]}" -- "${evaluation[@]}"
[ -z "$only_checks" ] || exit 0
echo "2 of 2: draw and compare"
run "$python" "${root}evaluate.py" "${evaluation[@]}"
