"""Whether a folder is a whole Stable Diffusion v1 pipeline, by its configurations and its weights' headers."""

import importlib.util
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files.atomic import STAGING_PREFIX
from utils.files.json_files import read_json
from utils.files.ownership import CHECKPOINT_NAME, METRICS_FILE, RUN_FILE
from utils.models.folder import CONFIG_FILES, MODEL_INDEX, BaseModel, find_weights, read_base
from utils.models.weight_files import check_file
from utils.runtime.process import typed_module

PART_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)  # the third: old names of the safety checker
PREDICTION_TYPES = ("epsilon", "v_prediction")
PIPELINE_CLASSES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")  # of the same parts
V1 = {part: read_json(Path(__file__).parent / "v1" / part / "config.json") for part in PART_CLASSES}
V1["vae"]["mid_block_add_attention"] = True  # of newer versions of diffusers alone
# What has to be as in v1: not a size, and it changes which tensors there are or what is done with them.
COMPARED = {
    "unet": V1["unet"].keys()
    - {"sample_size", "in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim"}
    - {"attention_head_dim", "norm_num_groups", "norm_eps", "dropout", "mid_block_scale_factor"}
    - {"addition_embed_type_num_heads"},
    "vae": V1["vae"].keys()
    - {"sample_size", "block_out_channels", "layers_per_block", "norm_num_groups", "scaling_factor", "force_upcast"},
    "text_encoder": {"hidden_act", "model_type"},
}
# Whose another value is; of all other keys it is "another architecture's".
WHOSE = {
    "time_cond_proj_dim": "a latent consistency model's (LCM)",
    "addition_embed_type": "Stable Diffusion XL's",
    "use_linear_projection": "Stable Diffusion 2's or XL's",
    "hidden_act": "Stable Diffusion 2's",
    "latent_channels": "Stable Diffusion 3's or Flux's",
    "shift_factor": "Stable Diffusion 3's or Flux's",
}
SDXL_SCALING_FACTOR = 0.13025
NUMBERS = {  # that have to be positive
    "unet": ("in_channels", "out_channels", "layers_per_block", "cross_attention_dim", "attention_head_dim"),
    "vae": ("in_channels", "out_channels", "latent_channels", "layers_per_block"),
    "text_encoder": ("hidden_size", "vocab_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
}
# Diffusers' schedulers that draw from a Stable Diffusion v1, less the word "Scheduler": the package that one needs.
DRAWING: dict[str, str | None] = dict.fromkeys(
    "PNDM DDIM DDIMParallel DDPM DDPMParallel EulerDiscrete EulerAncestralDiscrete HeunDiscrete KDPM2Discrete "
    "KDPM2AncestralDiscrete DPMSolverMultistep DPMSolverSinglestep DEISMultistep UniPCMultistep SASolver IPNDM "
    "EDMEuler EDMDPMSolverMultistep LCM TCD".split()
) | dict(LMSDiscrete="scipy", DPMSolverSDE="torchsde")
MOST_BLOCKS, MOST_LAYERS = 8, 100
FETCH = "hf download {} --local-dir model/{}"  # a model on the Hub
RECIPES = Path("CompVis/stable-diffusion-v1-4")
# Of the recipe's one copy of the weights, 5.5 GB of 23.3; other models may have .bin alone.
ONE_COPY = ' --exclude "*.bin" --exclude "*.fp16.*" --exclude "*.non_ema.*"'
ONLY_V1 = "this program trains Stable Diffusion v1 (1.1 to 1.5 and what was made from them)"


def check_base_model(folder: Path, flag: str = "--pretrained_model_name_or_path") -> BaseModel:
    """The folder is a whole pipeline of Stable Diffusion v1's architecture; UserError names what is unfit."""
    _check_index(folder, flag)
    base = read_base(folder)
    tokenizer = folder / "tokenizer"
    for name in ["tokenizer.json"] if (tokenizer / "tokenizer.json").is_file() else ["vocab.json", "merges.txt"]:
        check_file(tokenizer / name)
    if base.prediction_type not in PREDICTION_TYPES:
        path, trained = folder / CONFIG_FILES["scheduler"], " or ".join(PREDICTION_TYPES)
        raise UserError(f"{path}: prediction_type is {base.prediction_type!r}, not {trained}")
    for part in PART_CLASSES:
        check_config(folder / CONFIG_FILES[part], part, base.configs[part])
    check_fit(folder / CONFIG_FILES["unet"], **{part: base.configs[part] for part in PART_CLASSES})
    return base


def check_scheduler(base: BaseModel) -> None:
    """The base's scheduler can draw, here and now; no library is imported. Raises UserError if it cannot."""
    config = base.configs["scheduler"]
    name = str(config.get("_class_name"))
    package = "scipy" if config.get("use_beta_sigmas") else DRAWING.get(name.removesuffix("Scheduler"), "")
    if package == "" or config.get("use_flow_sigmas") or "shift" in config:  # of flow matching
        what = "which does not draw with Stable Diffusion v1: name"
    elif package and importlib.util.find_spec(package) is None:
        what = f"which needs {package}: install it ('pip install {package}'), or name"
    else:
        return
    place = base.folder / CONFIG_FILES["scheduler"]
    raise UserError(f"{place}: the scheduler is {name}, {what} v1's own, PNDMScheduler, there and in {MODEL_INDEX}")


def check_pipeline(folder: Path, flag: str, *, safety_checker: bool = False) -> BaseModel:
    """The folder can be sampled, with its safety checker if that is asked for; UserError as check_base_model."""
    base = check_base_model(folder, flag)
    check_scheduler(base)
    if safety_checker and "safety_checker" not in base.weights:
        raise UserError(f"--safety_checker: {folder} has no safety_checker ({base.no_checker}): leave the flag out")
    return base


def check_same_unet(base: Path, tuned: Path) -> None:
    """Raises UserError unless the UNets in two folders have the same tensors, by their names and shapes."""
    ours, theirs = (find_weights(folder, "unet").tensors for folder in (base, tuned))
    if {name: entry.shape for name, entry in ours.items()} != {name: entry.shape for name, entry in theirs.items()}:
        raise UserError(f"{base}: its UNet and that in {tuned} are not of one architecture; is it the base?")


def replaced_file(base: Path, digests: Mapping[Path, str], run: Mapping[str, Any]) -> Path | None:
    """The first of a base's files, {path: SHA-256}, that is not what a run.json says was trained from; else None."""
    recorded = run.get("base_model", {}).get("sha256")
    if not isinstance(recorded, Mapping):
        return None
    paths = digests if recorded else ()
    return next((path for path in paths if recorded.get(path.relative_to(base).as_posix()) != digests[path]), None)


def _check_index(folder: Path, flag: str) -> None:
    """model_index.json names v1's classes, all of libraries that we know. Raises UserError otherwise."""
    check_is_folder(folder, flag, "name a pipeline folder")
    path = folder / MODEL_INDEX
    if not path.is_file():
        raise UserError(f"{flag} {folder} has no {MODEL_INDEX}: {_what_it_looks_like(folder)}")
    index = read_json(path)
    for part, entry in index.items():
        if isinstance(entry, list) and (len(entry) != 2 or entry[0] not in LIBRARIES):
            raise UserError(f"{path}: {part} is {entry!r}: only classes of diffusers and transformers are imported")
    scheduler = index.get("scheduler")
    if not (isinstance(scheduler, list) and isinstance(scheduler[1], str)):
        raise UserError(f"{path}: scheduler is {scheduler!r}, not a class of diffusers; copy or download it again")
    class_name = index.get("_class_name") or PIPELINE_CLASSES[0]
    if re.search("flax|onnx", str([class_name, index.get("unet")]), re.IGNORECASE):
        raise UserError(f"{path}: its weights are Flax's or ONNX's ({class_name}); take the model's main branch")
    if class_name not in PIPELINE_CLASSES:
        raise UserError(f"{path}: this is a {class_name}, but only {' and '.join(PIPELINE_CLASSES)} are read")
    for part, expected in PART_CLASSES.items():
        entry = index.get(part)
        found = entry[1] if isinstance(entry, list) else entry
        if found != expected:
            raise UserError(f"{path}: {part} is {found!r}, but Stable Diffusion v1's is {expected}")


def check_is_folder(folder: Path, flag: str, advice: str) -> None:
    """Raises UserError if `folder` is not a folder; `advice` says what to give instead."""
    if folder.is_dir():
        return
    if folder.exists():
        raise UserError(f"{flag} {folder} is a file, not a folder: {advice}")
    name, is_recipes = str(folder), folder.name == RECIPES.name
    is_hub_name = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not folder.parent.is_dir()
    if (is_hub_name or is_recipes) and flag != "--instance_data_dir":
        how = FETCH.format(RECIPES if is_recipes else name, folder.name) + (ONE_COPY if is_recipes else "")
        raise UserError(f"{flag}: there is no folder {name}, and nothing is downloaded at run time; get it: '{how}'")
    raise UserError(f"{flag} {folder} does not exist: {advice}")


def _what_it_looks_like(folder: Path) -> str:
    names = {path.name for path in folder.iterdir()}
    if not names:
        return "it is empty: let training finish, or name another folder"
    if (found := CHECKPOINT_NAME.fullmatch(folder.name)) and "unet" in names and "vae" not in names:
        words = shlex.join([*typed_module("utils.export"), str(folder.parent), "NEW_FOLDER", "--checkpoint", found[1]])
        return (
            f"it is a checkpoint of a run: name {folder.parent} and --checkpoint {found[1]}, or what '{words}' writes"
        )
    if {RUN_FILE, METRICS_FILE} & names or any(name.startswith((STAGING_PREFIX, "checkpoint-")) for name in names):
        return "it looks like an unfinished training output: let train_dreambooth_colossalai.py finish first"
    if "snapshots" in names:
        snapshots = folder / "snapshots"
        return f"it is a model in the Hub's cache: name it as on the Hub, or one of the folders in {snapshots}"
    singles = sorted(name for name in names if name.lower().endswith((".safetensors", ".ckpt")))
    if singles and "config.json" not in names:
        return f"it holds a single file: name that one, {folder / singles[0]}"
    if "config.json" in names:
        return "it looks like one model (a UNet, say), not a pipeline: name the folder above it"
    if "unet" in names:
        return "it looks like a pipeline copied in part: copy model_index.json and the rest too"
    return "it is no pipeline folder: name one that holds model_index.json, unet/, vae/, text_encoder/ and so on"


def check_config(path: Path, part: str, config: dict) -> None:
    """A part's configuration is Stable Diffusion v1's, whatever its sizes. Raises UserError naming what else it is."""
    for key in sorted(COMPARED[part], key=lambda key: (key not in WHOSE, key)):
        value = config.get(key)
        if value is not None and not key.startswith("_") and not _is_as(value, V1[part][key]):
            model = WHOSE.get(key, "another architecture's")
            raise UserError(f"{path}: {key} is {value!r}, which is {model}; {ONLY_V1}")
    if config.get("scaling_factor") == SDXL_SCALING_FACTOR:
        raise UserError(f"{path}: scaling_factor is {SDXL_SCALING_FACTOR}, which is Stable Diffusion XL's; {ONLY_V1}")
    widths = config.get("block_out_channels", [1])
    if not isinstance(widths, list) or not 0 < len(widths) <= MOST_BLOCKS:
        raise UserError(f"{path}: block_out_channels is {widths!r}, not a number a block; copy or download it again")
    numbers = [(key, config.get(key, 1)) for key in NUMBERS[part]] + [("block_out_channels", each) for each in widths]
    for key, value in numbers:
        most = MOST_LAYERS if "layers" in key else 1_000_000
        if type(value) is not int or not 0 < value <= most:
            raise UserError(f"{path}: {key} is {value!r}, not a sensible number; copy or download the file again")


def _is_as(value: Any, v1s: Any) -> bool:
    """Whether a value means what v1's does: as it is, once a block, or as blocks of v1's kinds; unset is unset."""
    kinds = v1s if isinstance(v1s, list) else [v1s, "swish" if v1s == "silu" else v1s]
    return all(each in kinds or not (each or v1s) for each in (value if isinstance(value, list) else [value]))


def check_fit(path: Path, unet: dict, vae: dict, text_encoder: dict) -> None:
    """The configurations of the parts are of one model. Raises UserError naming `path`, where the UNet's is from."""
    latent_channels, in_channels = vae.get("latent_channels", 4), unet.get("in_channels", 4)
    if in_channels != latent_channels:
        raise UserError(f"{path}: in_channels is {in_channels}: neither an inpainting nor a depth model is trained")
    width, wanted = text_encoder.get("hidden_size"), unet.get("cross_attention_dim")
    if width != wanted:
        raise UserError(
            f"{path}: the text encoder's hidden_size is {width}, but the UNet's cross_attention_dim is {wanted}"
        )
