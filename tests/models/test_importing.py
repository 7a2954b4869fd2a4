"""A single file as a pipeline folder: the tensors of the folder it was exported from, to the bit and in its dtype."""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from tests.helpers.pipelines import PARTS, edit_json
from tests.helpers.script import EMBEDDED, dry_run
from utils.errors import UserError
from utils.models.check import check_base_model
from utils.models.folder import read_base
from utils.models.importing import SIZES, V1, import_single_file
from utils.models.loading import load_noise_scheduler, load_pipeline
from utils.models.single_file import (
    export_single_file,
    original_text_name,
    original_unet_name,
    original_vae_name,
    read_weights,
)

UNET = "model.diffusion_model."


def today_name(part: str, name: str) -> str:
    """A tensor's name as here, whichever version of the libraries wrote it."""
    if part == "text_encoder":
        return name.removeprefix("text_model.")
    for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items():
        name = name.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
    return name


def weights(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    return {(part, today_name(part, k)): v for part in PARTS for k, v in read_weights(folder, part).items()}


def assert_same(folder: Path, expected: Path) -> None:
    found, wanted = weights(folder), weights(expected)
    assert found.keys() == wanted.keys()
    assert [k for k, v in wanted.items() if v.dtype != found[k].dtype or not torch.equal(found[k], v)] == []
    check_base_model(folder)


def original_name(part: str, name: str, config: dict) -> str:
    if part == "unet":
        return original_unet_name(name, config["layers_per_block"], {1, 2, 3})
    return original_vae_name(name, 4) if part == "vae" else original_text_name(name)


def config(folder: Path, part: str) -> dict:
    return json.loads((folder / part / "config.json").read_text())


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The embedded model as a file without a word about its configuration."""
    folder = tmp_path_factory.mktemp("exported")
    export_single_file(read_base(EMBEDDED), folder / "whole.safetensors")
    save_file(load_file(folder / "whole.safetensors"), folder / "plain.safetensors")
    return folder / "plain.safetensors"


def with_ema(tensors: dict) -> dict:
    """EMA's names, as the original training code made them: no dots, and no `model.` before."""
    return tensors | {f"model_ema.{''.join(k.split('.')[1:])}": 2 * v for k, v in tensors.items() if UNET in k}


def without_text_model(tensors: dict) -> dict:
    return {name.replace("transformer.text_model.", "transformer."): value for name, value in tensors.items()}


KINDS = {
    "plain": (lambda t: t, []),
    "EMA beside": (with_ema, ["324 tensors"]),
    "unknown keys": (lambda t: t | {"betas": torch.ones(3), "alphas": torch.ones(3)}, ["2 tensors"]),
    "position ids": (
        lambda t: t | {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)},
        [],
    ),
    "old names of the text encoder": (without_text_model, []),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("kind", KINDS)
def test_files_as_people_have_them(tmp_path, exported, kind, suffix):
    change, said = KINDS[kind]
    tensors, path = change(load_file(exported)), tmp_path / f"one{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": tensors, "global_step": 470000}, path)
    else:
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    notes = import_single_file(path, tmp_path / "new")
    assert len(notes) == len(said) and all(note.startswith(start) for note, start in zip(notes, said, strict=True))
    assert_same(tmp_path / "new", EMBEDDED)
    found = config(tmp_path / "new", "unet")
    wanted = ("block_out_channels", "layers_per_block", "down_block_types", "up_block_types", "cross_attention_dim")
    assert {key: found[key] for key in wanted} == {key: config(EMBEDDED, "unet")[key] for key in wanted}
    assert config(tmp_path / "new", "vae")["scaling_factor"] == 0.18215


SCHEDULERS = {
    "DDIM": dict(_class_name="DDIMScheduler", timestep_spacing="trailing", clip_sample=False),
    "Euler": dict(_class_name="EulerDiscreteScheduler", interpolation_type="linear"),
    "v-prediction": dict(prediction_type="v_prediction"),
    "zero SNR": dict(_class_name="DDIMScheduler", prediction_type="v_prediction", clip_sample=False)
    | dict(rescale_betas_zero_snr=True),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_folder_to_file_to_folder(tmp_path, base, kind):
    """Also if the index and the scheduler's own file name different classes: diffusers loads the index's."""
    said = SCHEDULERS[kind]
    edit_json(base / "scheduler/scheduler_config.json", **said | dict(_class_name="HeunDiscreteScheduler"))
    edit_json(base / "model_index.json", scheduler=["diffusers", said.get("_class_name", "PNDMScheduler")])
    export_single_file(read_base(base), tmp_path / "one.safetensors")
    import_single_file(tmp_path / "one.safetensors", tmp_path / "new")
    assert_same(tmp_path / "new", base)
    assert str(tmp_path) not in (tmp_path / "new/unet/config.json").read_text()
    found, wanted = read_base(tmp_path / "new"), read_base(base)
    for part in ("scheduler", *PARTS):
        assert found.configs[part] == {k: v for k, v in wanted.configs[part].items() if k != "_name_or_path"}
    drawing = load_pipeline(found, torch.float32, torch.device("cpu")).scheduler
    assert type(drawing).__name__ == found.index["scheduler"][1] == wanted.index["scheduler"][1]
    assert json.loads((tmp_path / "new/scheduler/scheduler_config.json").read_text()) == found.configs["scheduler"]


def test_layers_that_the_configuration_does_not_use_are_not_written(tmp_path, base, capsys, photos_dir):
    """Clip skip: 1 of 2 layers is trained with, so the file has it alone."""
    edit_json(base / "text_encoder/config.json", num_hidden_layers=1)
    code, out, _ = dry_run(base, photos_dir, tmp_path, capsys)
    assert code == 0 and "1 of the 2 layers of its text encoder are used (clip skip 2)" in out
    export_single_file(read_base(base), tmp_path / "one.safetensors")
    import_single_file(tmp_path / "one.safetensors", tmp_path / "new")
    assert read_base(tmp_path / "new").text_layers == (1, 1)
    export_single_file(read_base(base.with_name("base")), tmp_path / "one.safetensors")
    both, configs = load_file(tmp_path / "one.safetensors"), {p: config(base, p) for p in PARTS}
    both |= {k.replace("layers.0", "layers.1"): v.clone() for k, v in both.items() if "text_model.encoder" in k}
    save_file(both, tmp_path / "both.safetensors", {"diffusers_config": json.dumps(configs)})
    (note,) = import_single_file(tmp_path / "both.safetensors", tmp_path / "from both")
    assert "clip skip" in note and read_base(tmp_path / "from both").text_layers == (1, 1)


NESTED = {
    "in two": lambda t: {"epoch": 3, "model": {"state_dict": t, "optimizer": {"lr": torch.zeros(1)}}},
    "with parameters": lambda t: {"state_dict": {name: torch.nn.Parameter(value) for name, value in t.items()}},
    "behind a word": lambda t: {f"module.{name}": value for name, value in t.items()},
}


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("kind", NESTED)
def test_weights_lie_where_a_training_saved_them(tmp_path, exported, kind, old_format):
    path = tmp_path / "one.safetensors"  # whatever it is called
    torch.save(NESTED[kind](load_file(exported)), path, _use_new_zipfile_serialization=not old_format)
    assert import_single_file(path, tmp_path / "new") == []
    assert_same(tmp_path / "new", EMBEDDED)


def test_what_a_header_says_that_is_no_text_is_passed_over(tmp_path, exported):
    content = exported.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = {"epoch": 3, "format": "pt", "modelspec.prediction_type": "v", "more": [1]}
    encoded = json.dumps(header).encode()
    (tmp_path / "one.ckpt").write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])
    assert import_single_file(tmp_path / "one.ckpt", tmp_path / "new") == ["it predicts velocity (v_prediction)"]
    assert_same(tmp_path / "new", EMBEDDED)


@pytest.mark.parametrize("how", ["export", "modelspec", "kohya", "tensor"])
def test_v_prediction_is_known_from_the_tensor_or_the_metadata(tmp_path, base, how):
    edit_json(base / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    file = tmp_path / "one.safetensors"
    export_single_file(read_base(base), file)
    if how != "export":
        tensors = load_file(file)
        mark = tensors.pop("v_pred")
        spec = dict(modelspec={"modelspec.prediction_type": "v"}, kohya={"ss_v_parameterization": "True"}).get(how, {})
        keep = json.dumps({part: config(base, part) for part in PARTS})
        save_file(tensors | ({"v_pred": mark} if how == "tensor" else {}), file, {"diffusers_config": keep} | spec)
    assert import_single_file(file, tmp_path / "new") == ["it predicts velocity (v_prediction)"]
    assert read_base(tmp_path / "new").prediction_type == "v_prediction"
    assert_same(tmp_path / "new", base)


def test_a_zero_terminal_snr_is_known_from_the_tensor(tmp_path, exported):
    """diffusers' PNDMScheduler knows nothing of it, so another scheduler draws."""
    marks = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    save_file(load_file(exported) | marks, tmp_path / "one.safetensors")
    assert import_single_file(tmp_path / "one.safetensors", tmp_path / "new") == [
        "it predicts velocity (v_prediction)"
    ]
    drawing, noise = (
        load_pipeline(read_base(tmp_path / "new"), torch.float32, torch.device("cpu")).scheduler,
        load_noise_scheduler(read_base(tmp_path / "new")),
    )
    assert type(drawing).__name__ == "DDIMScheduler" and drawing.config.timestep_spacing == "trailing"
    assert drawing.alphas_cumprod[-1] == noise.alphas_cumprod[-1] == 0


def test_a_yaml_beside_the_file_is_not_read_and_that_is_said(tmp_path, exported):
    shutil.copy(exported, tmp_path / "one.safetensors")
    (tmp_path / "one.yaml").write_text("model: {params: {parameterization: v}}")
    (note,) = import_single_file(tmp_path / "one.safetensors", tmp_path / "new")
    assert note.startswith("one.yaml beside it is not read")
    assert read_base(tmp_path / "new").prediction_type == "epsilon"


@pytest.mark.parametrize("claim", ["[]", "no JSON", '{"scheduler": {"_class_name": "os.system"}, "unet": 3}'])
def test_a_header_that_says_nonsense_is_passed_over(tmp_path, exported, claim):
    save_file(load_file(exported), tmp_path / "one.safetensors", {"diffusers_config": claim})
    assert import_single_file(tmp_path / "one.safetensors", tmp_path / "new") == []
    assert_same(tmp_path / "new", EMBEDDED)


def test_a_file_in_mixed_dtypes_has_the_widest_of_each_part(tmp_path, exported):
    """As merges leave them: the UNet in half precision, some of it not, and the VAE in another."""
    tensors = {
        name: value.bfloat16() if "first" in name else value.half() for name, value in load_file(exported).items()
    }
    tensors[f"{UNET}out.0.bias"] = tensors[f"{UNET}out.0.bias"].float()
    save_file(tensors, tmp_path / "one.safetensors")
    import_single_file(tmp_path / "one.safetensors", tmp_path / "new")
    found, original = weights(tmp_path / "new"), weights(EMBEDDED)
    dtypes = {
        "unet": (torch.float16, torch.float32),
        "vae": (torch.bfloat16,) * 2,
        "text_encoder": (torch.float16,) * 2,
    }
    for (part, name), value in found.items():
        narrow, wide = dtypes[part]
        expected = original[part, name].to(wide if name == "conv_norm_out.bias" else narrow).to(wide)
        assert torch.equal(value, expected) and value.dtype == wide, (part, name)


def test_the_first_checkpoints_name_a_class_of_their_framework(tmp_path, exported, monkeypatch):
    """CompVis's own sd-v1-4.ckpt has pytorch_lightning's ModelCheckpoint as a key beside the weights."""
    module = types.ModuleType("pytorch_lightning.callbacks")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks"})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
        patch.setitem(sys.modules, "pytorch_lightning.callbacks", module)
        extra = {"callbacks": {module.ModelCheckpoint: {"monitor": "val/loss_simple_ema"}}}
        torch.save({"state_dict": load_file(exported), **extra}, tmp_path / "one.ckpt")
    import_single_file(tmp_path / "one.ckpt", tmp_path / "new")
    assert_same(tmp_path / "new", EMBEDDED)


def without(start: str):
    return lambda t: {name: value for name, value in t.items() if not name.startswith(start)}


REFUSED = {
    "SDXL": (lambda t: t | {"conditioner.embedders.0.x": torch.zeros(1)}, "is a Stable Diffusion XL checkpoint"),
    "SD 2": (lambda t: t | {"cond_stage_model.model.x": torch.zeros(1)}, "is a Stable Diffusion 2 checkpoint"),
    "a LoRA": (lambda t: {"lora_unet_x.lora_down.weight": torch.zeros(1)}, "is a LoRA"),
    "half a VAE": (without("first_stage_model.decoder."), "holds no whole VAE of Stable Diffusion v1"),
    "no text encoder": (without("cond_stage_model."), "holds no whole text encoder of Stable Diffusion v1"),
    "no UNet": (without("model."), "holds no whole UNet of Stable Diffusion v1"),
    "one tensor missing": (
        without(f"{UNET}out.0.bias"),
        "holds no whole UNet of Stable Diffusion v1 .some of its tensors are missing",
    ),
    "inpainting": (
        lambda t: t | {f"{UNET}input_blocks.0.0.weight": torch.zeros(96, 9, 3, 3)},
        "in_channels is 9.*inpainting",
    ),
    "linear projections": (
        lambda t: {k: v.flatten(1) if "proj_in.weight" in k or ".1.proj_out.weight" in k else v for k, v in t.items()},
        "holds no whole UNet of Stable Diffusion v1 .*proj_in.weight expected shape",
    ),
    "integers": (lambda t: t | {f"{UNET}out.0.bias": torch.zeros(96, dtype=torch.int8)}, "is torch.int8"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_stable_diffusion_v1_is_refused_by_name(tmp_path, exported, kind, capsys):
    change, message = REFUSED[kind]
    save_file({k: v.contiguous() for k, v in change(load_file(exported)).items()}, tmp_path / "one.safetensors")
    with pytest.raises(UserError, match=message) as error:
        import_single_file(tmp_path / "one.safetensors", tmp_path / "new")
        check_base_model(tmp_path / "new")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x02]."])
def test_a_damaged_pickle_is_one_line(tmp_path, content):
    (tmp_path / "one.ckpt").write_bytes(content)
    with pytest.raises(UserError, match=r"one\.ckpt (is not a file of weights|holds no weights|is empty)") as error:
        import_single_file(tmp_path / "one.ckpt", tmp_path / "new")
    assert "\n" not in str(error.value)


def test_the_configurations_are_stable_diffusion_v1s():
    """Those of CompVis's folders, and what its tensors' shapes say is the same."""
    unet = dict(in_channels=4, out_channels=4, layers_per_block=2, cross_attention_dim=768, attention_head_dim=8)
    unet |= dict(block_out_channels=[320, 640, 1280, 1280], sample_size=64)
    unet |= dict(down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"])
    unet |= dict(up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3)
    vae = dict(block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=4, scaling_factor=0.18215)
    vae |= dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    text = dict(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, eos_token_id=2)
    text |= dict(num_attention_heads=12, max_position_embeddings=77, projection_dim=768, hidden_act="quick_gelu")

    def own(part: str) -> dict:
        return {name: value for name, value in config(V1, part).items() if not name.startswith("_")}

    with torch.device("meta"):
        modules = dict(unet=UNet2DConditionModel(**own("unet")), vae=AutoencoderKL(**own("vae")))
        modules["text_encoder"] = CLIPTextModel(CLIPTextConfig(**own("text_encoder")))
    for part, wanted, count in (("unet", unet, 686), ("vae", vae, 248), ("text_encoder", text, 196)):
        shipped = config(V1, part)
        assert shipped.items() >= wanted.items()
        tensors = {today_name(part, name): value for name, value in modules[part].state_dict().items()}
        assert len(tensors) == count
        shapes = {original_name(part, name, shipped): tuple(value.shape) for name, value in tensors.items()}
        assert shipped.items() >= SIZES[part](shapes).items()
