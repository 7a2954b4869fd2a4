"""Whether a folder is a whole Stable Diffusion v1 pipeline, by its configurations and its weights' headers."""

from pathlib import Path

from utils.errors import UserError
from utils.files.json_files import read_json
from utils.files.ownership import RUN_FILE
from utils.files.safetensors_files import safetensors_header
from utils.models.folder import (
    MODEL_INDEX,
    BaseModel,
    check_file,
    loaded_weights,
    refuse_unsafe_pickles,
    vae_scale_factor,
    weight_files,
)

PART_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)  # the third: old names of the safety checker
PREDICTION_TYPES = ("epsilon", "v_prediction")


def check_base_model(folder: Path, flag: str = "--pretrained_model_name_or_path") -> BaseModel:
    """The folder is a whole pipeline, and one that can be trained: of Stable Diffusion v1's architecture.

    Raises UserError naming the missing or unfit file.
    """
    index = _read_index(folder, flag)
    for part, expected in PART_CLASSES.items():
        _check_class(folder, index, part, expected)
    _check_parts(folder)
    _check_prediction_type(folder)
    unet, vae, text_encoder = (read_json(folder / part / "config.json") for part in ("unet", "vae", "text_encoder"))
    _check_configs(folder, unet, vae, text_encoder)
    _check_shapes(folder, unet, vae, text_encoder)
    weights = {part: weight_files(folder, part) for part in PART_CLASSES}
    for paths in weights.values():
        refuse_unsafe_pickles(paths)
    _check_weight_shapes(weights, unet, vae, text_encoder)
    return BaseModel(folder, vae_scale_factor(folder), weights["unet"])


def check_pipeline(folder: Path, flag: str, *, safety_checker: bool = False) -> None:
    """The folder is a whole pipeline that can be sampled; with its safety checker if that is asked for.

    Raises UserError naming the missing or unfit file.
    """
    index = _read_index(folder, flag)
    class_name = index.get("_class_name", "StableDiffusionPipeline")
    if class_name != "StableDiffusionPipeline":
        raise UserError(
            f"{flag} {folder} is a {class_name}: only StableDiffusionPipeline (Stable Diffusion v1) is sampled"
        )
    _check_parts(folder)
    if not safety_checker:
        return
    for part in ("safety_checker", "feature_extractor"):
        if not (folder / part).is_dir() or not (index.get(part) or [None])[0]:
            raise UserError(f"--safety_checker: {folder} has no {part}: leave the flag out, or use a folder with one")
    read_json(folder / "feature_extractor" / "preprocessor_config.json")
    read_json(folder / "safety_checker" / "config.json")
    weight_files(folder, "safety_checker")


def check_same_unet(base: Path, tuned: Path) -> None:
    """Raises UserError unless the UNets in two folders have the same tensors, as far as their headers tell."""
    shapes = [_unet_shapes(folder) for folder in (base, tuned)]
    if None not in shapes and shapes[0] != shapes[1]:
        raise UserError(
            f"--strength: the UNets in {base} and {tuned} are not of one architecture: name the base that "
            f"{tuned.name} was trained from"
        )


def _unet_shapes(folder: Path) -> dict[str, list[int]] | None:
    """By tensor name; None if a file is a pickle, whose names cannot be read without loading it."""
    paths = loaded_weights(weight_files(folder, "unet"))
    if any(path.suffix != ".safetensors" for path in paths):
        return None
    return {name: entry["shape"] for path in paths for name, entry in safetensors_header(path).items()}


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
    if {RUN_FILE, "metrics.jsonl"} & names or any(name.startswith((".assembling-", "checkpoint-")) for name in names):
        return "it looks like an unfinished training output: let train_dreambooth_colossalai.py finish first"
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


def _check_configs(folder: Path, unet: dict, vae: dict, text_encoder: dict) -> None:
    """Raises UserError if a number in a config.json is no number, or far from any Stable Diffusion v1's."""
    wanted = [("unet", unet, "in_channels"), ("unet", unet, "out_channels"), ("unet", unet, "cross_attention_dim")]
    wanted += [("vae", vae, "latent_channels"), ("text_encoder", text_encoder, "hidden_size")]
    wanted += [("unet", unet, "layers_per_block"), ("text_encoder", text_encoder, "vocab_size")]
    values = [(part, key, config[key]) for part, config, key in wanted if key in config]
    for part, config in (("unet", unet), ("vae", vae)):
        channels = config.get("block_out_channels", [])
        values += [
            (part, "block_out_channels", value) for value in (channels if isinstance(channels, list) else [None])
        ]
    for part, key, value in values:
        if type(value) is not int or not 0 < value <= 1_000_000:
            raise UserError(
                f"{folder / part / 'config.json'}: {key} is {value!r}, not a sensible number; "
                f"copy or download the file again"
            )
    if len(vae.get("block_out_channels", [0])) not in range(1, 9):
        raise UserError(f"{folder / 'vae' / 'config.json'}: block_out_channels has no or too many numbers")


def _check_shapes(folder: Path, unet: dict, vae: dict, text_encoder: dict) -> None:
    latent_channels, in_channels = vae.get("latent_channels", 4), unet.get("in_channels", 4)
    if in_channels != latent_channels:
        raise UserError(
            f"{folder / 'unet' / 'config.json'}: in_channels is {in_channels}, but the VAE's latents have "
            f"{latent_channels}; inpainting and depth models cannot be trained by this program"
        )
    width, wanted = text_encoder.get("hidden_size"), unet.get("cross_attention_dim")
    if width != wanted:
        raise UserError(
            f"{folder}: the text encoder's hidden_size is {width}, but the UNet's cross_attention_dim is {wanted}; "
            f"the two are not of one model"
        )


def _check_weight_shapes(weights: dict[str, list[Path]], unet: dict, vae: dict, text_encoder: dict) -> None:
    """The first tensors in the safetensors headers have the shapes that the configurations ask for."""
    first = {part: (config.get("block_out_channels") or [None])[0] for part, config in (("unet", unet), ("vae", vae))}
    hidden, vocab = text_encoder.get("hidden_size"), text_encoder.get("vocab_size")
    expected = [
        ("unet", "conv_in.weight", [first["unet"], unet.get("in_channels", 4), 3, 3]),
        ("unet", "conv_out.weight", [unet.get("out_channels", 4), first["unet"], 3, 3]),
        ("vae", "encoder.conv_in.weight", [first["vae"], vae.get("in_channels", 3), 3, 3]),
        ("text_encoder", "text_model.embeddings.token_embedding.weight", [vocab, hidden]),
    ]
    for part, name, shape in expected:
        for path in (path for path in weights[part] if path.suffix == ".safetensors"):
            header = safetensors_header(path)
            if name in header and None not in shape and header[name]["shape"] != shape:
                raise UserError(
                    f"{path}: {name} has shape {header[name]['shape']}, but {part}/config.json asks for {shape}; "
                    f"the two are not of one model"
                )
