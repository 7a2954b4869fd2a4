#!/usr/bin/env bash
# Fine-tunes on the photos in INSTANCE_DIR, then samples the result beside the baseline, scores it, writes report.html.
# Every value can be overridden from the environment; extra arguments go to the training script:
#   MAX_TRAIN_STEPS=400 LEARNING_RATE=5e-6 INSTANCE_PROMPT="a photo of sks cat" bash run.sh --train_batch_size=2
# VENV=DIR runs in a virtual environment of yours, as it is; without it setup.sh makes .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
[ -n "${VENV:-}" ] || bash setup.sh
venv="${VENV:-.venv}"

export INSTANCE_DIR="${INSTANCE_DIR:-./instance}"
export OUTPUT_DIR="${OUTPUT_DIR:-./output}"
export RESULT_DIR="${RESULT_DIR:-./result}"
recipe_model="./model/stable-diffusion-v1-4"
embedded_model="./model/tiny-stable-diffusion"
if [ -z "${MODEL_NAME:-}" ] && [ ! -d "$recipe_model" ]; then
  echo "$recipe_model is not there (README.md says how to get it): running the embedded 64-pixel model $embedded_model"
  export MODEL_NAME="$embedded_model"
fi
export MODEL_NAME="${MODEL_NAME:-$recipe_model}"

# The recipe's values; the embedded model wants its own size, a larger learning rate, and fp32 on a CPU.
resolution=512 batch_size=1 precision=fp16 learning_rate=1e-6 steps=20
if [ "$(realpath -m "$MODEL_NAME")" = "$(realpath -m "$embedded_model")" ]; then
  resolution=64 batch_size=4 precision=no learning_rate=1e-4 steps=300
fi

"$venv/bin/torchrun" --nproc_per_node "${NPROC:-1}" train_dreambooth_colossalai.py \
  --pretrained_model_name_or_path="$MODEL_NAME" \
  --instance_data_dir="$INSTANCE_DIR" \
  --output_dir="$OUTPUT_DIR" \
  --instance_prompt="${INSTANCE_PROMPT:-a photo of my cat.}" \
  --resolution="${RESOLUTION:-$resolution}" \
  --train_batch_size="${TRAIN_BATCH_SIZE:-$batch_size}" \
  --mixed_precision="${MIXED_PRECISION:-$precision}" \
  --learning_rate="${LEARNING_RATE:-$learning_rate}" \
  --lr_scheduler="${LR_SCHEDULER:-constant}" \
  --lr_warmup_steps="${LR_WARMUP_STEPS:-0}" \
  --max_train_steps="${MAX_TRAIN_STEPS:-$steps}" \
  "$@"

"$venv/bin/python" evaluate.py \
  --pretrained_model_name_or_path="$MODEL_NAME" \
  --finetuned_model_name_or_path="$OUTPUT_DIR" \
  --instance_data_dir="$INSTANCE_DIR" \
  --output_dir="$RESULT_DIR" \
  --prompt="${INSTANCE_PROMPT:-a photo of my cat.}" \
  --num_images="${NUM_IMAGES:-4}" \
  --num_drift_images="${NUM_DRIFT_IMAGES:-4}" \
  ${CHECKPOINT:+--checkpoint="$CHECKPOINT"} \
  --num_inference_steps="${NUM_INFERENCE_STEPS:-50}"
