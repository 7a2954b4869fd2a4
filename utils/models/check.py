"""Whether a folder is a whole Stable Diffusion v1 pipeline, by its configurations and its weights' headers."""

import shlex
from pathlib import Path

from utils.errors import UserError
from utils.files.atomic import STAGING_PREFIX
from utils.files.json_files import read_json
from utils.files.ownership import CHECKPOINT_NAME, METRICS_FILE, RUN_FILE
from utils.files.safetensors_files import safetensors_header
from utils.models.folder import (
    MODEL_INDEX,
    BaseModel,
    check_file,
    refuse_unsafe_pickles,
    vae_scale_factor,
    weight_files,
)
from utils.models.layout import SHAPES, today_name, with_defaults
from utils.runtime.programs import typed_module

PART_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)  # the third: old names of the safety checker
PREDICTION_TYPES = ("epsilon", "v_prediction")
PIPELINE_CLASSES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")  # of the same parts
NUMBERS = {  # that have to be positive
    "unet": ("in_channels", "out_channels", "cross_attention_dim", "layers_per_block", "attention_head_dim"),
    "vae": ("in_channels", "out_channels", "latent_channels", "layers_per_block"),
    "text_encoder": ("hidden_size", "vocab_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
}
MOST_LAYERS = 100
SDXL_SCALING_FACTOR = 0.13025
ONLY_V1 = "this program trains Stable Diffusion v1 (1.1 to 1.5 and what was made from them)"
# Of each part: a key, the values it may have (leaving it out is v1's, too), and whose any other value is.
SD2, SDXL, OTHER = "is Stable Diffusion 2's", "is Stable Diffusion XL's", "is another architecture's"
OF_V1: dict[str, list[tuple[str, tuple, str]]] = {
    "unet": [
        ("time_cond_proj_dim", (), "is a latent consistency model's (LCM)"),
        ("addition_embed_type", (), SDXL),
        ("addition_time_embed_dim", (), SDXL),
        ("projection_class_embeddings_input_dim", (), SDXL),
        ("transformer_layers_per_block", (1, [1, 1, 1, 1]), SDXL),
        ("use_linear_projection", (False,), "is Stable Diffusion 2's or XL's"),
        ("upcast_attention", (False,), "is Stable Diffusion 2.1's"),
        ("class_embed_type", (), "is an upscaler's or an unCLIP model's"),
        ("num_class_embeds", (), "is an upscaler's"),
        ("encoder_hid_dim", (), OTHER),
        ("encoder_hid_dim_type", (), OTHER),
        ("reverse_transformer_layers_per_block", (), OTHER),
        ("time_embedding_type", ("positional",), OTHER),
        ("time_embedding_dim", (), OTHER),
        ("time_embedding_act_fn", (), OTHER),
        ("timestep_post_act", (), OTHER),
        ("resnet_time_scale_shift", ("default",), OTHER),
        ("resnet_skip_time_act", (False,), OTHER),
        ("resnet_out_scale_factor", (1.0,), OTHER),
        ("attention_type", ("default",), "is GLIGEN's"),
        ("mid_block_type", ("UNetMidBlock2DCrossAttn",), OTHER),
        ("mid_block_only_cross_attention", (False,), OTHER),
        ("only_cross_attention", (False, [False] * 4), "is the x4 upscaler's"),
        ("dual_cross_attention", (False,), "is Versatile Diffusion's"),
        ("cross_attention_norm", (), OTHER),
        ("num_attention_heads", (), OTHER),
        ("class_embeddings_concat", (False,), OTHER),
        ("conv_in_kernel", (3,), OTHER),
        ("conv_out_kernel", (3,), OTHER),
        ("act_fn", ("silu", "swish"), OTHER),
        ("center_input_sample", (False,), OTHER),
        ("flip_sin_to_cos", (True,), OTHER),
        ("freq_shift", (0,), OTHER),
        ("downsample_padding", (1,), OTHER),
        ("out_channels", (4,), OTHER),
    ],
    "vae": [
        ("shift_factor", (0.0,), "is Stable Diffusion 3's or Flux's"),
        ("latents_mean", (), OTHER),
        ("latents_std", (), OTHER),
        ("use_quant_conv", (True,), "is Stable Diffusion 3's or Flux's"),
        ("use_post_quant_conv", (True,), "is Stable Diffusion 3's or Flux's"),
        ("mid_block_add_attention", (True,), OTHER),
        ("latent_channels", (4,), "is Stable Diffusion 3's or Flux's"),
        ("in_channels", (3,), OTHER),
        ("out_channels", (3,), OTHER),
        ("act_fn", ("silu", "swish"), OTHER),
    ],
    "text_encoder": [("hidden_act", ("quick_gelu",), SD2), ("model_type", ("clip_text_model",), OTHER)],
}
BLOCKS: dict[str, dict[str, tuple[str, ...]]] = {
    "unet": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "vae": {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)},
}


def check_base_model(folder: Path, flag: str = "--pretrained_model_name_or_path") -> BaseModel:
    """The folder is a whole pipeline, and one that can be trained: of Stable Diffusion v1's architecture.

    Raises UserError naming the missing or unfit file.
    """
    index = _read_index(folder, flag)
    _check_pipeline_class(folder, index)
    for part, expected in PART_CLASSES.items():
        _check_class(folder, index, part, expected)
    _check_parts(folder)
    _check_prediction_type(folder)
    configs = {part: read_json(folder / part / "config.json") for part in PART_CLASSES}
    for part, config in configs.items():
        check_config(folder / part / "config.json", part, config)
    check_fit(folder / "unet" / "config.json", **configs)
    for part, config in configs.items():
        paths = weight_files(folder, part)
        refuse_unsafe_pickles(paths)
        check_tensors(part, config, paths)
    return BaseModel(folder, vae_scale_factor(folder), weight_files(folder, "unet"))


def check_pipeline(folder: Path, flag: str, *, safety_checker: bool = False) -> None:
    """The folder is a whole pipeline that can be sampled; with its safety checker if that is asked for.

    Raises UserError naming the missing or unfit file.
    """
    check_base_model(folder, flag)
    index = read_json(folder / MODEL_INDEX)
    if not safety_checker:
        return
    for part in ("safety_checker", "feature_extractor"):
        if not (folder / part).is_dir() or not (index.get(part) or [None])[0]:
            raise UserError(f"--safety_checker: {folder} has no {part}: leave the flag out, or use a folder with one")
    read_json(folder / "feature_extractor" / "preprocessor_config.json")
    read_json(folder / "safety_checker" / "config.json")
    weight_files(folder, "safety_checker")


def check_same_unet(base: Path, tuned: Path) -> None:
    """Raises UserError unless the UNets in two folders have the same tensors, as their configurations tell."""
    shapes = [SHAPES["unet"](read_json(folder / "unet" / "config.json")) for folder in (base, tuned)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"--pretrained_model_name_or_path {base}: its UNet and that in {tuned} are not of one architecture: "
            f"name the base that {tuned} was trained from"
        )


def _read_index(folder: Path, flag: str) -> dict:
    """model_index.json, whose classes are all of libraries that we know. Raises UserError otherwise."""
    check_is_folder(folder, flag, "name a pipeline folder")
    if not (folder / MODEL_INDEX).is_file():
        raise UserError(f"{flag} {folder} has no {MODEL_INDEX}: {_what_it_looks_like(folder)}")
    index = read_json(folder / MODEL_INDEX)
    for part, entry in index.items():
        if isinstance(entry, list) and (len(entry) != 2 or entry[0] not in LIBRARIES):
            raise UserError(
                f"{folder / MODEL_INDEX}: {part} is {entry!r}, which is not a class of diffusers or transformers; "
                f"nothing is ever imported from a model's folder"
            )
    return index


def _check_parts(folder: Path) -> None:
    """Every file that sampling needs is there and whole. Raises UserError otherwise."""
    for part in PART_CLASSES:
        read_json(folder / part / "config.json")
        weight_files(folder, part)
    read_json(folder / "scheduler" / "scheduler_config.json")
    tokenizer = folder / "tokenizer"
    only = "tokenizer.json"
    for name in [only] if (tokenizer / only).is_file() else ["vocab.json", "merges.txt"]:
        check_file(tokenizer / name)


def check_is_folder(folder: Path, flag: str, advice: str) -> None:
    """Raises UserError if `folder` is not a folder; `advice` says what to give instead."""
    if folder.is_dir():
        return
    if folder.exists():
        raise UserError(f"{flag} {folder} is a file, not a folder: {advice}")
    name = str(folder)
    is_hub_name = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not folder.parent.is_dir()
    if is_hub_name and flag != "--instance_data_dir":
        raise UserError(
            f"{flag}: there is no folder {name}, and nothing is downloaded at run time; "
            f"if you mean the model of that name on the Hugging Face Hub, fetch it first, for example with "
            f"'git lfs install && git clone https://huggingface.co/{name} model/{folder.name}'"
        )
    raise UserError(f"{flag} {folder} does not exist: {advice}")


def _what_it_looks_like(folder: Path) -> str:
    names = {path.name for path in folder.iterdir()}
    if not names:
        return "it is empty: let training finish, or name another folder"
    if (found := CHECKPOINT_NAME.fullmatch(folder.name)) and "unet" in names and "vae" not in names:
        words = [*typed_module("utils.export"), str(folder.parent), "NEW_FOLDER", "--checkpoint", found[1]]
        return (
            f"it is a checkpoint of a run: name {folder.parent} and --checkpoint {found[1]}, or the folder that "
            f"'{shlex.join(words)}' writes"
        )
    if {RUN_FILE, METRICS_FILE} & names or any(name.startswith((STAGING_PREFIX, "checkpoint-")) for name in names):
        return "it looks like an unfinished training output: let train_dreambooth_colossalai.py finish first"
    singles = sorted(name for name in names if name.endswith((".safetensors", ".ckpt")))
    if singles and "config.json" not in names:
        return f"it holds a single file: name that one, {folder / singles[0]}"
    if "config.json" in names:
        return "it looks like one model (a UNet, say), not a pipeline: name the folder above it"
    if "unet" in names:
        return "it looks like a pipeline copied in part: copy model_index.json and the rest too"
    return "it is no pipeline folder: name one that holds model_index.json, unet/, vae/, text_encoder/ and so on"


def _check_class(folder: Path, index: dict, part: str, expected: str) -> None:
    entry = index.get(part)
    found = entry[1] if isinstance(entry, list) else entry
    if found != expected:
        raise UserError(
            f"{folder / MODEL_INDEX}: {part} is {found!r}, but this program trains Stable Diffusion v1 pipelines, "
            f"whose {part} is {expected}"
        )


def _check_prediction_type(folder: Path) -> None:
    config = folder / "scheduler" / "scheduler_config.json"
    prediction_type = read_json(config).get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(
            f"{config}: prediction_type is {prediction_type!r}; this program trains {' and '.join(PREDICTION_TYPES)}"
        )


def _check_pipeline_class(folder: Path, index: dict) -> None:
    class_name = index.get("_class_name") or PIPELINE_CLASSES[0]
    if class_name not in PIPELINE_CLASSES:
        raise UserError(
            f"{folder / MODEL_INDEX}: this is a {class_name}, but this program is for Stable Diffusion v1 pipelines: "
            f"{' and '.join(PIPELINE_CLASSES)}"
        )


def check_config(path: Path, part: str, config: dict) -> None:
    """A part's configuration is Stable Diffusion v1's, whatever its sizes. Raises UserError naming what else it is."""
    _check_numbers(path, part, config)
    for key, allowed, model in OF_V1[part]:
        value = config.get(key)
        if value is not None and value not in allowed:
            raise UserError(f"{path}: {key} is {value!r}, which {model}; {ONLY_V1}")
    if config.get("scaling_factor") == SDXL_SCALING_FACTOR:
        raise UserError(f"{path}: scaling_factor is {SDXL_SCALING_FACTOR}, which {SDXL}; {ONLY_V1}")
    filled = with_defaults(part, config)
    for key, kinds in BLOCKS.get(part, {}).items():
        found = filled[key]
        if not isinstance(found, list) or len(found) != len(filled["block_out_channels"]):
            raise UserError(f"{path}: {key} is {found!r}, not a name for each of block_out_channels; {ONLY_V1}")
        if others := [kind for kind in found if kind not in kinds]:
            raise UserError(f"{path}: {others[0]!r} in {key} is another architecture's; {ONLY_V1}")


def _check_numbers(path: Path, part: str, config: dict) -> None:
    """Raises UserError if a number in a config.json is no number, or far from any Stable Diffusion v1's."""
    filled = with_defaults(part, config)
    values = [(key, filled[key]) for key in NUMBERS[part]]
    if part != "text_encoder":
        channels = filled["block_out_channels"]
        values += [("block_out_channels", each) for each in (channels if isinstance(channels, list) else [None])]
        if isinstance(channels, list) and len(channels) not in range(1, 9):
            raise UserError(f"{path}: block_out_channels has no or too many numbers")
    for key, value in values:
        most = MOST_LAYERS if "layers" in key else 1_000_000
        if key == "attention_head_dim" and isinstance(value, list):
            raise UserError(
                f"{path}: {key} is {value!r}, one a block, which is Stable Diffusion 2's or XL's; {ONLY_V1}"
            )
        if type(value) is not int or not 0 < value <= most:
            raise UserError(f"{path}: {key} is {value!r}, not a sensible number; copy or download the file again")


def check_fit(path: Path, unet: dict, vae: dict, text_encoder: dict) -> None:
    """The configurations of the parts are of one model. Raises UserError naming `path`, where the UNet's is from."""
    latent_channels, in_channels = vae.get("latent_channels", 4), unet.get("in_channels", 4)
    if in_channels != latent_channels:
        raise UserError(
            f"{path}: in_channels is {in_channels}, but the VAE's latents have {latent_channels}; inpainting and "
            f"depth models cannot be trained by this program"
        )
    width, wanted = text_encoder.get("hidden_size"), unet.get("cross_attention_dim")
    if width != wanted:
        raise UserError(
            f"{path}: the text encoder's hidden_size is {width}, but the UNet's cross_attention_dim is {wanted}; "
            f"the two are not of one model"
        )


def check_tensors(part: str, config: dict, paths: list[Path]) -> None:
    """The safetensors headers name every tensor that the configuration asks for, in its shape. UserError if not."""
    if paths[0].suffix != ".safetensors":
        return  # what a pickle holds is known when it is loaded
    there = {name: entry["shape"] for path in paths for name, entry in safetensors_header(path).items()}
    there = {today_name(part, name): shape for name, shape in there.items()}
    wanted = SHAPES[part](config)
    missing = [name for name in wanted if name not in there]
    if missing:
        raise UserError(
            f"{paths[0]} lacks {len(missing)} of the {len(wanted)} tensors that {part}/config.json asks for, "
            f"{missing[0]} first; copy or download the whole pipeline again"
        )
    for name, shape in wanted.items():
        if there[name] != list(shape) and not _is_old_attention(part, there[name], shape):
            raise UserError(
                f"{paths[0]}: {name} has shape {there[name]}, but {part}/config.json asks for {list(shape)}; "
                f"the two are not of one model"
            )


def _is_old_attention(part: str, found: list[int], wanted: tuple[int, ...]) -> bool:
    """The VAE's attention as 1x1 convolutions, which diffusers loads as linear layers."""
    return part == "vae" and found == [*wanted, 1, 1]
