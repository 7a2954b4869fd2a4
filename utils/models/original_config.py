"""The `.yaml` beside a single file, which A1111 reads if a model predicts velocity; and what such a file says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError, first_line
from utils.files.atomic import replace_file
from utils.files.json_files import read_json
from utils.files.ownership import CONFIG_LINE, export_config, is_own_config
from utils.models.layout import WITH_ATTENTION, with_defaults


def original_config(folder: Path) -> dict:
    """The original training code's configuration of a pipeline folder, less what only its training needs."""
    unet, vae = (with_defaults(part, read_json(folder / part / "config.json")) for part in ("unet", "vae"))
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    widths = unet["block_out_channels"]
    attention = [2**block for block, kind in enumerate(unet["down_block_types"]) if WITH_ATTENTION in kind]
    network = dict(
        image_size=32,  # unused by those who read it
        in_channels=unet["in_channels"],
        out_channels=unet["out_channels"],
        model_channels=widths[0],
        attention_resolutions=attention[::-1],
        num_res_blocks=unet["layers_per_block"],
        channel_mult=[width // widths[0] if width % widths[0] == 0 else width / widths[0] for width in widths],
        num_heads=unet["attention_head_dim"],
        use_spatial_transformer=True,
        transformer_depth=1,
        context_dim=unet["cross_attention_dim"],
        use_checkpoint=True,
        legacy=False,
    )
    params = dict(
        linear_start=scheduler.get("beta_start", 0.00085),
        linear_end=scheduler.get("beta_end", 0.012),
        timesteps=scheduler.get("num_train_timesteps", 1000),
        first_stage_key="jpg",
        cond_stage_key="txt",
        image_size=unet.get("sample_size") or 64,
        channels=vae["latent_channels"],
        conditioning_key="crossattn",
        scale_factor=vae.get("scaling_factor", 0.18215),
        use_ema=False,
        unet_config=dict(target="ldm.modules.diffusionmodules.openaimodel.UNetModel", params=network),
        first_stage_config=_first_stage(vae),
        cond_stage_config=dict(target="ldm.modules.encoders.modules.FrozenCLIPEmbedder"),
    )
    if scheduler.get("prediction_type") == "v_prediction":
        params["parameterization"] = "v"
    return dict(model=dict(target="ldm.models.diffusion.ddpm.LatentDiffusion", params=params))


def _first_stage(vae: Mapping[str, Any]) -> dict:
    widths = vae["block_out_channels"]
    network = dict(
        double_z=True,
        z_channels=vae["latent_channels"],
        resolution=256,
        in_channels=vae["in_channels"],
        out_ch=vae["out_channels"],
        ch=widths[0],
        ch_mult=[width // widths[0] if width % widths[0] == 0 else width / widths[0] for width in widths],
        num_res_blocks=vae["layers_per_block"],
        attn_resolutions=[],
        dropout=0.0,
    )
    params = dict(embed_dim=vae["latent_channels"], ddconfig=network, lossconfig=dict(target="torch.nn.Identity"))
    return dict(target="ldm.models.autoencoder.AutoencoderKL", params=params)


def write_config(folder: Path, file: Path) -> Path | None:
    """Writes the configuration beside a single file if its UNet predicts velocity; returns its path.

    Otherwise none is needed, and one that this program wrote for an earlier file of that name is removed.
    """
    path, config = export_config(file), original_config(folder)
    if "parameterization" in config["model"]["params"]:
        text = CONFIG_LINE + yaml.safe_dump(config, sort_keys=False)
        replace_file(path, lambda opened: opened.write(text.encode()))
        return path
    if is_own_config(path):
        path.unlink()
    return None


def read_config(path: Path) -> dict:
    """The params of the model in such a configuration; {} if there is no file. Raises UserError if it is no YAML."""
    if not path.is_file():
        return {}
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); take it away, or copy it again") from None
    model = value.get("model") if isinstance(value, dict) else None
    params = model.get("params") if isinstance(model, dict) else None
    return params if isinstance(params, dict) else {}
