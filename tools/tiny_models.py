"""Stable Diffusion v1.4's parts in miniature: their configurations, and how they are written to disk.

The configuration files are written by hand, with no key and no class name that diffusers 0.29 or transformers
4.51 would not know, so that the folders load there as well as in the newest releases.
"""

import gzip
import json

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

SIZE = 64  # pixels
DIFFUSERS_VERSION = "0.29.0"  # the oldest release these folders are meant for
NUM_MERGES = 49152 - 256 - 2  # what CLIP uses of the published list

TOWER = dict(
    projection_dim=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
    attention_dropout=0.0,
    initializer_factor=1.0,
    initializer_range=0.02,
)
TEXT_CONFIG = TOWER | dict(
    vocab_size=49408,
    hidden_size=64,
    intermediate_size=256,
    max_position_embeddings=77,
    # These three are Stable Diffusion v1.4's own: 2 makes CLIP pool at the largest token id, which is the end token.
    bos_token_id=0,
    pad_token_id=1,
    eos_token_id=2,
)
VISION_CONFIG = TOWER | dict(image_size=SIZE, patch_size=8, num_channels=3, hidden_size=128, intermediate_size=384)
VAE_CONFIG = dict(
    act_fn="silu",
    block_out_channels=[64, 128, 160],
    down_block_types=["DownEncoderBlock2D"] * 3,
    in_channels=3,
    latent_channels=4,
    layers_per_block=1,
    norm_num_groups=32,
    out_channels=3,
    sample_size=SIZE,
    up_block_types=["UpDecoderBlock2D"] * 3,
)
UNET_CONFIG = dict(
    act_fn="silu",
    attention_head_dim=4,  # the number of heads, as in Stable Diffusion v1.4's own configuration
    block_out_channels=[128, 128, 160],
    center_input_sample=False,
    cross_attention_dim=TEXT_CONFIG["hidden_size"],
    down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    downsample_padding=1,
    flip_sin_to_cos=True,
    freq_shift=0,
    in_channels=4,
    layers_per_block=1,
    mid_block_scale_factor=1,
    norm_eps=1e-5,
    norm_num_groups=32,
    out_channels=4,
    sample_size=SIZE // 4,
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
)
SCHEDULER_CONFIG = dict(  # Stable Diffusion v1.4's
    beta_end=0.012,
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    clip_sample=False,
    num_train_timesteps=1000,
    prediction_type="epsilon",
    set_alpha_to_one=False,
    skip_prk_steps=True,
    steps_offset=1,
    trained_betas=None,
)
IMAGE_MEAN, IMAGE_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
PREPROCESSOR_CONFIG = dict(
    crop_size=dict(height=SIZE, width=SIZE),
    do_center_crop=True,
    do_convert_rgb=True,
    do_normalize=True,
    do_rescale=True,
    do_resize=True,
    image_mean=IMAGE_MEAN,
    image_processor_type="CLIPImageProcessor",
    image_std=IMAGE_STD,
    resample=3,
    rescale_factor=1 / 255,
    size=dict(shortest_edge=SIZE),
)
MODEL_INDEX = dict(
    _class_name="StableDiffusionPipeline",
    _diffusers_version=DIFFUSERS_VERSION,
    feature_extractor=["transformers", "CLIPImageProcessor"],
    requires_safety_checker=True,
    safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
    scheduler=["diffusers", "PNDMScheduler"],
    text_encoder=["transformers", "CLIPTextModel"],
    tokenizer=["transformers", "CLIPTokenizer"],
    unet=["diffusers", "UNet2DConditionModel"],
    vae=["diffusers", "AutoencoderKL"],
)
START, END = "<|startoftext|>", "<|endoftext|>"


def new_clip():
    return CLIPModel(CLIPConfig(text_config=TEXT_CONFIG, vision_config=VISION_CONFIG, projection_dim=64))


def new_vae():
    return AutoencoderKL(**VAE_CONFIG)


def new_unet():
    return UNet2DConditionModel(**UNET_CONFIG)


def round_to_fp16(module):
    """Rounds the weights to what the saved file will hold; computing stays in float32."""
    return module.half().float()


def write_json(path, value, **style):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, **(style or dict(indent=2, sort_keys=True))) + "\n", encoding="utf-8")


def write_weights(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    halves = {name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in tensors.items()}
    save_file(halves, path, metadata={"format": "pt"})


def byte_symbols():
    """The 256 characters that stand for the 256 bytes in CLIP's vocabulary: printable ones first, as themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(code) for code in printable] + [chr(0x100 + index) for index in range(256 - len(printable))]


def write_tokenizer(folder, vocabulary):
    """Writes CLIP's tokenizer from its gzipped list of merges (`bpe_simple_vocab_16e6.txt.gz`)."""
    lines = gzip.open(vocabulary).read().decode("utf-8").split("\n")
    merges = lines[1 : NUM_MERGES + 1]
    symbols = byte_symbols()
    tokens = symbols + [symbol + "</w>" for symbol in symbols] + [merge.replace(" ", "") for merge in merges]
    tokens += [START, END]
    assert len(tokens) == len(set(tokens)) == TEXT_CONFIG["vocab_size"]
    special = dict(bos_token=START, eos_token=END, pad_token=END, unk_token=END)
    settings = dict(tokenizer_class="CLIPTokenizer", model_max_length=77, do_lower_case=True, errors="replace")
    compact = dict(ensure_ascii=False, separators=(",", ":"))
    write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)}, **compact)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", {**settings, **special, "add_prefix_space": False})


def clip_config(architecture):
    """The configuration of the whole CLIP; transformers 5 would otherwise read float16 weights as float16."""
    return dict(
        architectures=[architecture],
        initializer_factor=1.0,
        logit_scale_init_value=2.6592,
        model_type="clip",
        projection_dim=64,
        text_config=dict(model_type="clip_text_model", **TEXT_CONFIG),
        torch_dtype="float32",
        vision_config=dict(model_type="clip_vision_model", **VISION_CONFIG),
    )


def write_clip(folder, clip, vocabulary):
    """Writes tiny-clip: CLIPModel, tokenizer and image processor, beside tiny-stable-diffusion.

    The text tower is the pipeline's own (6.7 MB), so the index names that file instead of holding it twice.
    """
    shared = "../tiny-stable-diffusion/text_encoder/model.safetensors"
    own = "model-of-images.safetensors"
    tensors = clip.state_dict()
    files = {name: shared if name.startswith("text_model.") else own for name in tensors}
    write_weights(folder / own, {name: value for name, value in tensors.items() if files[name] == own})
    size = sum(2 * value.numel() for value in tensors.values())
    index = dict(metadata=dict(total_size=size), weight_map=files)
    write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", clip_config("CLIPModel"))
    write_json(folder / "preprocessor_config.json", PREPROCESSOR_CONFIG)
    write_tokenizer(folder, vocabulary)


def safety_checker_weights(clip):
    """The trained image tower under the safety checker's names, with thresholds that no picture can reach.

    A picture is flagged where its cosine to a concept exceeds the concept's weight (by 0.01 less at most). A cosine is
    at most 1 and the weights here are 2: this checker has the real one's shape and never flags anything. It knows
    nothing of unsafe pictures.
    """
    weights = {f"vision_model.{name}": value for name, value in clip.state_dict().items() if "vision_model." in name}
    weights["visual_projection.weight"] = clip.visual_projection.weight
    for name, count in (("concept_embeds", 17), ("special_care_embeds", 3)):
        weights[name] = torch.ones(count, 64)
        weights[f"{name}_weights"] = torch.full((count,), 2.0)
    return weights


def write_pipeline(folder, clip, vae, unet, vocabulary):
    """Writes tiny-stable-diffusion, a folder of Stable Diffusion v1.4's layout."""
    text = {name: value for name, value in clip.state_dict().items() if name.startswith("text_model.")}
    text_config = dict(architectures=["CLIPTextModel"], model_type="clip_text_model", torch_dtype="float32")
    write_weights(folder / "text_encoder" / "model.safetensors", text)
    write_json(folder / "text_encoder" / "config.json", {**text_config, **TEXT_CONFIG})
    write_weights(folder / "safety_checker" / "model.safetensors", safety_checker_weights(clip))
    write_json(folder / "safety_checker" / "config.json", clip_config("StableDiffusionSafetyChecker"))
    vae_config = {**VAE_CONFIG, "scaling_factor": vae.config.scaling_factor}
    for part, module, config in (("vae", vae, vae_config), ("unet", unet, UNET_CONFIG)):
        header = dict(_class_name=type(module).__name__, _diffusers_version=DIFFUSERS_VERSION)
        write_weights(folder / part / "diffusion_pytorch_model.safetensors", module.state_dict())
        write_json(folder / part / "config.json", {**header, **config})
    header = dict(_class_name="PNDMScheduler", _diffusers_version=DIFFUSERS_VERSION)
    write_json(folder / "scheduler" / "scheduler_config.json", {**header, **SCHEDULER_CONFIG})
    write_json(folder / "feature_extractor" / "preprocessor_config.json", PREPROCESSOR_CONFIG)
    write_tokenizer(folder / "tokenizer", vocabulary)
    write_json(folder / "model_index.json", MODEL_INDEX)
