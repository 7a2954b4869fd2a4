"""A single file as a pipeline folder: the tensors of the folder it was exported from, to the bit and in its dtype."""

import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.pipelines import PARTS, edit_json, rename_vae_attention, write_pipeline
from tests.helpers.script import EMBEDDED
from utils.command_line import run_main
from utils.errors import UserError
from utils.import_file import main
from utils.models.check import check_base_model
from utils.models.folder import prediction_type
from utils.models.importing import _original_name, import_single_file
from utils.models.layout import SHAPES, today_name
from utils.models.single_file import export_single_file, read_weights
from utils.models.v1_config import CONFIGS

UNET, EMA = "model.diffusion_model.", "model_ema."


def weights(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    return {(part, today_name(part, k)): v for part in PARTS for k, v in read_weights(folder, part).items()}


def assert_same(folder: Path, expected: Path) -> None:
    found, wanted = weights(folder), weights(expected)
    assert found.keys() == wanted.keys()
    assert [k for k, v in wanted.items() if v.dtype != found[k].dtype or not torch.equal(found[k], v)] == []
    check_base_model(folder)


def config(folder: Path, part: str) -> dict:
    return json.loads((folder / part / "config.json").read_text())


@pytest.mark.parametrize("kind", ["fp32", "fp16", "old attention names", "embedded"])
def test_export_and_import_give_the_same_tensors_and_configurations(tmp_path, kind):
    base = EMBEDDED
    if kind != "embedded":
        base = write_pipeline(tmp_path / "base", dtype=torch.float16 if kind == "fp16" else torch.float32)
    if kind == "old attention names":
        rename_vae_attention(base)
    export_single_file(base, tmp_path / "one.safetensors")
    assert import_single_file(tmp_path / "one.safetensors", tmp_path / "new") == []
    assert_same(tmp_path / "new", base)
    for part in PARTS:
        assert (
            config(tmp_path / "new", part).items()
            >= {key: value for key, value in config(base, part).items() if key != "_name_or_path"}.items()
        )
    assert str(tmp_path) not in (tmp_path / "new/unet/config.json").read_text()


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The embedded model as a file without a word about its configuration."""
    folder = tmp_path_factory.mktemp("exported")
    export_single_file(EMBEDDED, folder / "whole.safetensors")
    save_file(load_file(folder / "whole.safetensors"), folder / "plain.safetensors")
    return folder / "plain.safetensors"


def flat_names(tensors: dict) -> dict:
    """EMA's names, as the original training code made them: no dots, and no `model.` before."""
    return {EMA + "".join(k.split(".")[1:]) if k.startswith(UNET) else k: v for k, v in tensors.items()}


def without_text_model(tensors: dict) -> dict:
    return {name.replace("transformer.text_model.", "transformer."): value for name, value in tensors.items()}


KINDS = {
    "plain": (lambda t: t, []),
    "EMA beside": (lambda t: t | {k: 2 * v for k, v in flat_names(t).items() if k.startswith(EMA)}, ["324 tensors"]),
    "EMA alone": (flat_names, ["its UNet's weights are EMA's"]),
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


@pytest.mark.parametrize("how", ["export", "yaml", "modelspec"])
def test_v_prediction_is_known_from_the_yaml_or_the_metadata(tmp_path, base, how):
    edit_json(base / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    file = tmp_path / "one.safetensors"
    export_single_file(base, file)
    spec = {"modelspec.prediction_type": "v"} if how == "modelspec" else {}
    if how != "export":
        keep = json.dumps({part: config(base, part) for part in PARTS})
        save_file(load_file(file), file, {"format": "pt", "diffusers_config": keep} | spec)
    if how == "modelspec":
        file.with_suffix(".yaml").unlink()
    assert import_single_file(file, tmp_path / "new") == ["it predicts velocity (v_prediction)"]
    assert prediction_type(tmp_path / "new") == "v_prediction"
    assert_same(tmp_path / "new", base)


def test_a_yaml_of_epsilon_wins_over_the_metadata(tmp_path, base):
    edit_json(base / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    export_single_file(base, tmp_path / "one.safetensors")
    (tmp_path / "one.yaml").write_text("model: {params: {linear_start: 0.00085}}")
    import_single_file(tmp_path / "one.safetensors", tmp_path / "new")
    assert prediction_type(tmp_path / "new") == "epsilon"


class Evil:
    """Unpickled, it makes a folder."""

    place = "unset"

    def __reduce__(self):
        return os.mkdir, (self.place,)


def test_a_checkpoint_that_runs_code_runs_none(tmp_path, exported):
    evil = Evil()
    evil.place = str(tmp_path / "harmed")
    torch.save({"state_dict": load_file(exported), "more": evil}, tmp_path / "one.ckpt")
    with pytest.raises(UserError, match=r"one\.ckpt holds more than weights: .* posix\.mkdir, which is not done"):
        import_single_file(tmp_path / "one.ckpt", tmp_path / "new")
    assert not (tmp_path / "harmed").exists()


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
    "no VAE": (without("first_stage_model."), "holds no whole VAE of Stable Diffusion v1"),
    "no text encoder": (without("cond_stage_model."), "holds no whole text encoder of Stable Diffusion v1"),
    "no UNet": (without("model."), "holds no whole UNet of Stable Diffusion v1"),
    "one tensor missing": (without(f"{UNET}out.0.bias"), r"lacks 1 of its unet's 324 tensors, .*out\.0\.bias first"),
    "inpainting": (
        lambda t: t | {f"{UNET}input_blocks.0.0.weight": torch.zeros(96, 9, 3, 3)},
        "in_channels is 9.*inpainting",
    ),
    "linear projections": (
        lambda t: {k: v.flatten(1) if "proj_in.weight" in k or ".1.proj_out.weight" in k else v for k, v in t.items()},
        "use_linear_projection is True, which is Stable Diffusion 2's",
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
    with pytest.raises(UserError, match=r"one\.ckpt (is not a file of weights|holds no weights)") as error:
        import_single_file(tmp_path / "one.ckpt", tmp_path / "new")
    assert "\n" not in str(error.value)


def test_the_command_line(tmp_path, exported, capsys):
    assert run_main(main, [str(exported), str(tmp_path / "new/folder")]) == 0
    assert "new/folder: a pipeline folder for --pretrained_model_name_or_path" in capsys.readouterr().out
    assert_same(tmp_path / "new/folder", EMBEDDED)
    assert run_main(main, [str(exported), str(tmp_path / "new/folder")]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert run_main(main, [str(tmp_path / "no.safetensors"), str(tmp_path / "other")]) == 2
    assert "no.safetensors is missing" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_the_configurations_of_stable_diffusion_v1_follow_from_its_tensors():
    unet = dict(in_channels=4, out_channels=4, layers_per_block=2, cross_attention_dim=768, attention_head_dim=8)
    unet |= dict(block_out_channels=[320, 640, 1280, 1280], sample_size=64)
    unet |= dict(down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"])
    unet |= dict(up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3)
    vae = dict(block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=4, scaling_factor=0.18215)
    vae |= dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    text = dict(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, eos_token_id=2)
    text |= dict(num_attention_heads=12, max_position_embeddings=77, projection_dim=768, hidden_act="quick_gelu")
    for part, config, count in (("unet", unet, 686), ("vae", vae, 248), ("text_encoder", text, 196)):
        shapes = {_original_name(part, name, config): shape for name, shape in SHAPES[part](config).items()}
        assert len(shapes) == count
        assert CONFIGS[part](shapes).items() >= config.items()
