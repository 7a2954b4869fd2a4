"""Is a folder a whole Stable Diffusion v1 pipeline? Every complaint, and that complaining touches nothing."""

import contextlib
import importlib.util
import inspect
import json
import shutil
from pathlib import Path

import pytest
from diffusers import AutoencoderKL, UNet2DConditionModel

from tests.helpers.pipelines import edit_json, edited, listing, write_index, write_photos, write_shards
from tests.helpers.script import UNET_FILE, dry_run
from train_dreambooth_colossalai import main
from utils.errors import UserError
from utils.models.check import COMPARED, V1, check_base_model, check_scheduler
from utils.run.lineage import STATE_FILE, TENSORS_FILE


def edit_index(folder: Path, part: str, value) -> None:
    edit_json(folder / "model_index.json", **{part: value})


def test_a_complete_pipeline_passes(tiny_pipeline_dir):
    model = check_base_model(tiny_pipeline_dir)
    assert model.folder == tiny_pipeline_dir and list(model.weights["unet"].files) == [tiny_pipeline_dir / UNET_FILE]
    assert (model.vae_scale_factor, model.image_size, model.prediction_type) == (4, (32, 32), "epsilon")


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


SPOILT = {
    "no index": (
        lambda b: (b / "model_index.json").unlink(),
        r"has no model_index\.json: it looks like a pipeline copied in part",
    ),
    "index no JSON": (lambda b: (b / "model_index.json").write_text("{"), r"model_index\.json cannot be read as JSON"),
    "index not UTF-8": (lambda b: (b / "model_index.json").write_bytes(b"\xff\xfe{"), r"cannot be read as JSON"),
    "index a list": (lambda b: (b / "model_index.json").write_text("[]"), r"does not hold a JSON object"),
    "unet class": (
        edited("", unet=["diffusers", "SD3Transformer2DModel"]),
        r"model_index\.json: unet is 'SD3Transformer2DModel', but .* is UNet2DConditionModel",
    ),
    "vae class": (edited("", vae=["diffusers", "VQModel"]), "vae is 'VQModel'.*AutoencoderKL"),
    "another architecture": (
        lambda b: (edit_index(b, "unet", None), shutil.rmtree(b / "unet"), shutil.rmtree(b / "text_encoder")),
        "unet is None, but Stable Diffusion v1's is UNet2DConditionModel",
    ),
    "part null": (edited("", vae=[None, None]), "vae is None, but"),
    "no unet folder": (lambda b: shutil.rmtree(b / "unet"), r"unet/config\.json is missing"),
    "unet config no JSON": (lambda b: (b / "unet/config.json").write_text("no"), r"unet/config\.json cannot be read"),
    "no tokenizer": (lambda b: shutil.rmtree(b / "tokenizer"), r"tokenizer/vocab\.json is missing"),
    "no scheduler": (lambda b: shutil.rmtree(b / "scheduler"), r"scheduler/scheduler_config\.json is missing"),
    "prediction type": (
        lambda b: edit_json(b / "scheduler/scheduler_config.json", prediction_type="sample"),
        r"scheduler_config\.json: prediction_type is 'sample', not epsilon or v_prediction",
    ),
    "inpainting": (
        edited("unet", in_channels=9),
        "in_channels is 9: neither an inpainting nor a depth model is trained",
    ),
    "latent consistency model": (
        edited("", _class_name="LatentConsistencyModelPipeline"),
        r"model_index\.json: this is a LatentConsistencyModelPipeline, but only StableDiffusionPipeline and",
    ),
    "time conditioning": (
        edited("unet", time_cond_proj_dim=256),
        r"unet/config\.json: time_cond_proj_dim is 256, which is a latent consistency model's \(LCM\)",
    ),
    "linear projections": (
        edited("unet", use_linear_projection=True),
        "use_linear_projection is True, which is Stable Diffusion 2's",
    ),
    "list of heads": (
        edited("unet", attention_head_dim=[5, 10]),
        r"attention_head_dim is \[5, 10\], not a sensible number",
    ),
    "upcast": (edited("unet", upcast_attention=True), "upcast_attention is True, which is another architecture's"),
    "SDXL": (
        edited("unet", addition_embed_type="text_time"),
        "addition_embed_type is 'text_time', which is Stable Diffusion XL's",
    ),
    "OpenCLIP": (
        edited("text_encoder", hidden_act="gelu"),
        r"text_encoder/config\.json: hidden_act is 'gelu', which is Stable Diffusion 2's",
    ),
    "VAE of SDXL": (
        edited("vae", scaling_factor=0.13025),
        "scaling_factor is 0.13025, which is Stable Diffusion XL's",
    ),
    "VAE of Flux": (edited("vae", shift_factor=0.1159), "shift_factor .* or Flux's"),
    "VAE of SD 3": (edited("vae", latent_channels=16), "channels is 16, .* 3's or"),
    "foreign block": (
        edited("unet", down_block_types=["CrossAttnDownBlock2D", "SkipDownBlock2D"]),
        "'SkipDownBlock2D'], which is another architecture's",
    ),
    "a shard missing": (
        lambda b: write_shards(b, keep=(1,)),
        r"unet/diffusion_pytorch_model-00002-of-00002\.safetensors is missing",
    ),
    "shards that diffusers does not load": (
        lambda b: write_shards(b, suffix=".bin"),
        r"00001-of-00002\.bin is one of 2 shards, which diffusers loads as safetensors alone; convert them",
    ),
    "an index alone": (
        lambda b: (write_index(b), (b / UNET_FILE).unlink()),
        r"unet holds no weights \(diffusion_pytorch_model\.safetensors\)",
    ),
    "cross attention": (
        edited("unet", cross_attention_dim=1024),
        "hidden_size is 16, but the UNet's cross_attention_dim is 1024",
    ),
    "no unet weights": (lambda b: (b / UNET_FILE).unlink(), r"unet holds no weights \(diffusion_pytorch_model\.safe"),
    "lfs pointer": (
        lambda b: (b / UNET_FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "pointer, not the file; run 'git lfs install && git lfs pull --include \"\\*model.safetensors\"' in .*unet$",
    ),
    "dead link": (
        lambda b: ((b / UNET_FILE).unlink(), (b / UNET_FILE).symlink_to(b / "blob")),
        r"unet/diffusion_pytorch_model\.safetensors cannot be read \(No such file",
    ),
    "empty weights": (lambda b: cut(b / UNET_FILE, 0), "is empty; copy or download it again"),
    "vae cut by a byte": (
        lambda b: cut(b / "vae/diffusion_pytorch_model.safetensors", -1),
        r"vae/diffusion_pytorch_model\.safetensors is not a whole safetensors file \(.*file not fully covered\)",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_an_unfit_base_is_refused_by_name_and_left_as_it_was(tmp_path, base, case):
    spoil, message = SPOILT[case]
    spoil(base)
    write_photos(tmp_path / "photos", 1)
    before = listing(tmp_path)
    argv = ["--pretrained_model_name_or_path", base, "--instance_data_dir", tmp_path / "photos"]
    argv += ["--instance_prompt", "a photo", "--output_dir", tmp_path / "new" / "output"]
    with pytest.raises(UserError, match=message) as error:
        main([str(value) for value in argv])
    assert str(base) in str(error.value) and "\n" not in str(error.value)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", ["CompVis/stable-diffusion-v1-4", "model/stable-diffusion-v1-4", "another/model"])
def test_a_name_on_the_hub_is_not_downloaded(monkeypatch, tmp_path, name):
    """Of the recipe's base one copy of the weights is fetched; another model may have its weights as .bin alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    fetched = "CompVis/stable-diffusion-v1-4" if name.endswith("v1-4") else name
    with pytest.raises(UserError, match="nothing is downloaded at run time") as error:
        check_base_model(Path(name))
    assert f"'hf download {fetched} --local-dir model/{Path(name).name}" in str(error.value)
    assert ('--exclude "*.bin"' in str(error.value)) == name.endswith("v1-4")


@pytest.mark.parametrize("name", ["missing", "/no/where", "./model/sd", "../a/b", "a/b/c"])
def test_a_missing_folder_is_not_taken_for_a_name_on_the_hub(monkeypatch, tmp_path, name):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match="--pretrained_model_name_or_path .* does not exist: name a pipeline folder"
    ) as error:
        check_base_model(Path(name))
    assert "huggingface" not in str(error.value)


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(UserError, match="model.safetensors is a file, not a folder: name a pipeline folder"):
        check_base_model(tmp_path / "model.safetensors")


def test_configurations_may_leave_out_defaults(base):
    config = json.loads((base / "vae/config.json").read_text())
    del config["in_channels"], config["out_channels"], config["latent_channels"], config["layers_per_block"]
    (base / "vae/config.json").write_text(json.dumps(config))
    assert check_base_model(base).vae_scale_factor == 4


def test_stable_diffusion_1_5_as_it_is_published(base):
    """Its configurations have every key of newer versions, most of them null."""
    unet = dict(addition_embed_type=None, time_cond_proj_dim=None, class_embed_type=None, only_cross_attention=False)
    unet |= dict(use_linear_projection=False, upcast_attention=False, dual_cross_attention=False, conv_in_kernel=3)
    unet |= dict(mid_block_type="UNetMidBlock2DCrossAttn", num_attention_heads=None, transformer_layers_per_block=1)
    edit_json(base / "unet/config.json", **unet)
    edit_json(base / "vae/config.json", shift_factor=None, force_upcast=True, latents_mean=None)
    check_base_model(base)


def test_a_folder_with_a_single_file_names_it(tmp_path):
    (tmp_path / "v1-4.ckpt").touch()
    (tmp_path / "README.md").touch()
    with pytest.raises(
        UserError, match=r"has no model_index\.json: it holds a single file: name that one, .*v1-4\.ckpt"
    ):
        check_base_model(tmp_path)


@pytest.mark.parametrize("flag", ["--finetuned_model_name_or_path", "PIPELINE_DIR"])
def test_a_checkpoint_of_a_run_is_named_as_one(base, tmp_path, flag):
    folder = tmp_path / "output" / "checkpoint-40"
    shutil.copytree(base / "unet", folder / "unet")
    for name in (STATE_FILE, TENSORS_FILE):
        (folder / name).touch()
    with pytest.raises(UserError) as error:
        check_base_model(folder, flag)
    assert f"it is a checkpoint of a run: name {folder.parent} and --checkpoint 40, or" in str(error.value)
    assert f"utils.export {folder.parent} NEW_FOLDER --checkpoint 40' writes" in str(error.value)
    (folder / "vae").mkdir()
    with pytest.raises(UserError, match="holds a single file"):
        check_base_model(folder, flag)


WITHOUT = {
    "LMSDiscreteScheduler": "needs scipy: install it",
    "DPMSolverSDEScheduler": "needs torchsde: install it",
    "FlowMatchEulerDiscreteScheduler": "does not draw with Stable Diffusion v1",
    "FlowMatchHeunDiscreteScheduler": "does not draw",
    "ScoreSdeVeScheduler": "does not draw",
    "FancyScheduler": "does not draw",
    "UNet2DConditionModel": "does not draw",
}


@pytest.mark.parametrize("name", WITHOUT)
def test_a_scheduler_that_cannot_draw_ends_before_training(base, tmp_path, photos_dir, capsys, monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", hiding(importlib.util.find_spec, "scipy", "torchsde"))
    edit_json(base / "model_index.json", scheduler=["diffusers", name])
    code, out, _ = dry_run(base, photos_dir, tmp_path, capsys)
    (line,) = [line for line in out.splitlines() if line.startswith("STOP")]
    assert code == 2 and f"the scheduler is {name}, which" in line and WITHOUT[name] in line


def hiding(find, *packages: str):
    return lambda name, *more: None if name in packages else find(name, *more)


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        (dict(use_flow_sigmas=True), True),
        (dict(shift=3.0), True),
        (dict(use_beta_sigmas=True), True),
        (dict(use_karras_sigmas=True), False),
    ],
)
def test_what_the_schedulers_settings_need(base, monkeypatch, said, refused):
    monkeypatch.setattr("importlib.util.find_spec", hiding(importlib.util.find_spec, "scipy"))
    edit_json(base / "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    edit_json(base / "scheduler/scheduler_config.json", **said)
    with pytest.raises(UserError) if refused else contextlib.nullcontext():
        check_scheduler(check_base_model(base))


@pytest.mark.parametrize(("part", "cls"), [("unet", UNet2DConditionModel), ("vae", AutoencoderKL)])
def test_what_is_compared_with_v1_is_the_libraries_default(part, cls):
    """So a configuration that leaves a key out means v1's value."""
    signature = inspect.signature(cls.__init__).parameters
    newer = {"mid_block_add_attention"}
    assert V1[part].keys() - signature.keys() - newer == {"_class_name", "_diffusers_version"}
    for key in COMPARED[part] & signature.keys():
        default = signature[key].default
        assert V1[part][key] == (list(default) if isinstance(default, tuple) else default) or "block" in key, key
