"""What a weights file says of itself in its header: modelspec.* (Stability AI's ModelSpec 1.0.1) and kohya's ss_*.

Both are read from a run.json alone. No local path, no name of a photo and no command line gets into a file.
"""

import base64
import io
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from utils import PROGRAM
from utils.files.ownership import EXPORT_METADATA, VALIDATION_FOLDER, VALIDATION_PICTURES

ARCHITECTURE = "stable-diffusion-v1"
ORIGINAL_LAYOUT = "https://github.com/Stability-AI/generative-models"  # ModelSpec's name for single checkpoint files
THUMBNAIL_SIDE = 256  # pixels at most
LORA_LAYOUT = "https://github.com/kohya-ss/sd-scripts"
CHECKPOINT_STEP, STRENGTH = "checkpoint_step", "strength"  # in the run.json of an export
# ss_ key: the argument of run.json that it says.
SS_ARGUMENTS = {
    "ss_learning_rate": "learning_rate",
    "ss_unet_lr": "learning_rate",
    "ss_lr_scheduler": "lr_scheduler",
    "ss_lr_warmup_steps": "lr_warmup_steps",
    "ss_max_train_steps": "max_train_steps",
    "ss_seed": "seed",
    "ss_batch_size_per_device": "train_batch_size",
    "ss_gradient_accumulation_steps": "gradient_accumulation_steps",
    "ss_gradient_checkpointing": "gradient_checkpointing",
    "ss_max_grad_norm": "max_grad_norm",
    "ss_mixed_precision": "mixed_precision",
    "ss_noise_offset": "noise_offset",
    "ss_min_snr_gamma": "snr_gamma",
    "ss_prior_loss_weight": "prior_loss_weight",
}


def step_and_strength(run: Mapping[str, Any]) -> tuple[int | None, float | None]:
    """Of which checkpoint and how strong the weights are that a run.json stands beside; None: as the run made them."""
    step, strength = run.get(CHECKPOINT_STEP), run.get(STRENGTH)
    is_plain = not isinstance(strength, int | float) or strength == 1
    return step if isinstance(step, int) else None, None if is_plain else strength


def thumbnail_of(folder: Path) -> str | None:
    """The last picture that a run drew of --validation_prompt, as ModelSpec wants it: a small JPEG in a data URL."""
    pictures = sorted((folder / VALIDATION_FOLDER).glob(VALIDATION_PICTURES))
    last = [path for path in pictures if path.name[:11] == pictures[-1].name[:11]]  # of one step, a seed each
    try:
        with Image.open(last[0]) as image:
            small = image.convert("RGB")
            small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    except (IndexError, OSError, ValueError):
        return None
    content = io.BytesIO()
    small.save(content, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def prompts_of(run: Mapping[str, Any]) -> dict[str, int]:
    """{prompt: number of photos} of a run, in the photos' order."""
    said = _arguments(run).get("instance_prompt")
    photos = [photo for photo in _list(run.get("photos")) if isinstance(photo, dict)]
    prompts = [photo.get("prompt") or said for photo in photos] or [said]
    return dict(Counter(prompt for prompt in prompts if isinstance(prompt, str) and prompt))


def file_metadata(
    run: Mapping[str, Any],
    *,
    title: str,
    image_size: tuple[int, int],
    prediction_type: str = "epsilon",
    architecture: str = ARCHITECTURE,
    implementation: str = ORIGINAL_LAYOUT,
    thumbnail: str | None = None,
) -> dict[str, str]:
    """The header's metadata for a file of weights, every value a string; save_with_hash adds the tensors' hash.

    Args:
        run: a run.json, whole or of a run that has not ended; empty: the file is of a base, which has no ss_ keys.
        title: what UIs show as the model's name.
        image_size: (height, width) in pixels that the model was made for.
        prediction_type: the scheduler's: epsilon or v_prediction.
        thumbnail: thumbnail_of's.
        architecture: ModelSpec's; "stable-diffusion-v1/lora" for a LoRA.
    """
    height, width = image_size
    prompts = prompts_of(run)
    step, strength = step_and_strength(run)
    said = f", {step} steps" if step is not None else ""
    said += f", at strength {strength:g}" if strength is not None else ""
    found = {
        "sai_model_spec": "1.0.1",
        "architecture": architecture,
        "implementation": implementation,
        "title": title,
        "resolution": f"{width}x{height}",
        "prediction_type": "v" if prediction_type == "v_prediction" else "epsilon",
        "date": run.get("started_at"),
        "trigger_phrase": ", ".join(prompts),
        "thumbnail": thumbnail,
        "description": f"DreamBooth fine-tuning of Stable Diffusion v1 with {PROGRAM}{said}" if run else None,
    }
    modelspec = {f"modelspec.{key}": str(value) for key, value in found.items() if value}
    return {**EXPORT_METADATA, **modelspec, **(_ss_keys(run, title, prompts, prediction_type) if run else {})}


def _ss_keys(run: Mapping[str, Any], title: str, prompts: dict[str, int], prediction_type: str) -> dict[str, str]:
    """What kohya's trainer writes and A1111 and the managers of model folders show; None is "None" there."""
    arguments = _arguments(run)
    said = {key: arguments[name] for key, name in SS_ARGUMENTS.items() if name in arguments}
    step, _ = step_and_strength(run)
    said |= {"ss_steps": step} if step is not None else {}
    resolution = arguments.get("resolution")
    base = arguments.get("pretrained_model_name_or_path")
    said |= {
        "ss_output_name": title,
        "ss_base_model_version": "sd_v1",
        "ss_sd_model_name": PurePath(str(base)).name if base else None,
        "ss_v2": False,
        "ss_v_parameterization": prediction_type == "v_prediction",
        "ss_resolution": f"({resolution}, {resolution})" if resolution else None,
        "ss_optimizer": "AdamW",
        "ss_num_train_images": sum(prompts.values()),
        "ss_num_reg_images": sum(_count(each) for each in _list(run.get("class_images"))),
        "ss_tag_frequency": json.dumps({"photos": prompts}, ensure_ascii=False),
        "ss_training_started_at": run.get("started_at"),
        "ss_session_id": run.get("run_id"),
        "ss_training_comment": f"written by {PROGRAM}",
    }
    return {key: str(value) for key, value in said.items()}


def _arguments(run: Mapping[str, Any]) -> Mapping[str, Any]:
    arguments = run.get("arguments")
    return arguments if isinstance(arguments, Mapping) else {}


def _list(value: Any) -> list:
    return value if isinstance(value, list) else []


def _count(images: Any) -> int:
    return images.get("num_used", 0) if isinstance(images, dict) else 0
