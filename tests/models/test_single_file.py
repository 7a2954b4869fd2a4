"""One file in the original checkpoint's layout: what diffusers reads back from it is the pipeline, to the bit."""

from pathlib import Path

from utils.runtime.libraries import quiet_libraries

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from tests.helpers.pipelines import PARTS, edit_json, header, rename_vae_attention, write_pipeline
from tests.helpers.script import as_argv, run
from train_dreambooth_colossalai import main as train
from utils.command_line import run_main
from utils.export import main
from utils.models.folder import read_base
from utils.models.loading import load_pipeline
from utils.models.single_file import export_single_file, original_unet_name, original_vae_name


def read_back(file: Path, config: Path):
    """The pipeline as diffusers' from_single_file makes it, with the configurations of a local folder."""
    with quiet_libraries():
        pipeline = StableDiffusionPipeline.from_single_file(
            str(file), config=str(config), local_files_only=True, torch_dtype=torch.float32
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_folder(folder: Path):
    return load_pipeline(read_base(folder), torch.float32, torch.device("cpu"))


def weights(pipeline) -> dict[str, torch.Tensor]:
    found = {(part, name): value for part in PARTS for name, value in getattr(pipeline, part).state_dict().items()}
    return {key: value for key, value in found.items() if not key[1].endswith("position_ids")}


def assert_same_weights(pipeline, expected) -> None:
    found, wanted = weights(pipeline), weights(expected)
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []


def test_training_writes_it_too(flags, tmp_path, tiny_pipeline_dir):
    flags |= dict(max_train_steps=1, export_single_file=tmp_path / "one.safetensors")
    run(flags)
    pipeline = read_back(tmp_path / "one.safetensors", tmp_path / "output")
    assert_same_weights(pipeline, load_folder(tmp_path / "output"))
    base = load_folder(tiny_pipeline_dir)
    assert not torch.equal(pipeline.unet.conv_in.weight, base.unet.conv_in.weight)
    (tmp_path / "one.safetensors").write_text("mine")
    assert run_main(train, as_argv(flags)) == 2


def test_names_of_stable_diffusion_v1():
    attention = {1, 2, 3}

    def unet(name: str) -> str:
        return original_unet_name(name, 2, attention)

    assert unet("down_blocks.0.downsamplers.0.conv.weight") == "input_blocks.3.0.op.weight"
    assert unet("down_blocks.1.resnets.0.conv_shortcut.bias") == "input_blocks.4.0.skip_connection.bias"
    assert unet("down_blocks.3.resnets.1.norm1.weight") == "input_blocks.11.0.in_layers.0.weight"
    assert unet("up_blocks.0.upsamplers.0.conv.weight") == "output_blocks.2.1.conv.weight"
    assert unet("up_blocks.1.upsamplers.0.conv.weight") == "output_blocks.5.2.conv.weight"
    assert unet("up_blocks.3.attentions.2.proj_out.bias") == "output_blocks.11.1.proj_out.bias"
    assert unet("mid_block.resnets.1.time_emb_proj.weight") == "middle_block.2.emb_layers.1.weight"
    assert original_vae_name("decoder.up_blocks.0.resnets.2.conv2.bias", 4) == "decoder.up.3.block.2.conv2.bias"
    assert original_vae_name("encoder.mid_block.attentions.0.query.bias", 4) == "encoder.mid.attn_1.q.bias"
    with pytest.raises(ValueError, match="class_embedding.weight has no place"):
        unet("class_embedding.weight")


@pytest.mark.parametrize("kind", ["old attention names", "bin", "fp16", "fp16 variant", "no text_model prefix"])
def test_every_kind_of_folder(tmp_path, kind):
    base = write_pipeline(tmp_path / "base", dtype=torch.float16 if kind == "fp16" else torch.float32)
    expected = load_folder(base)
    if kind == "old attention names":
        rename_vae_attention(base)
    if kind == "no text_model prefix":
        file = base / "text_encoder/model.safetensors"
        plain = {name.removeprefix("text_model."): value for name, value in load_file(file).items()}
        save_file(plain, file, {"format": "pt"})
    for part in PARTS:
        (file,) = (base / part).glob("*.safetensors")
        if kind == "bin":
            name = "pytorch_model.bin" if part == "text_encoder" else f"{file.stem}.bin"
            torch.save(load_file(file), file.with_name(name))
            file.unlink()
        if kind == "fp16 variant":
            half = {name: value.half() for name, value in load_file(file).items()}
            save_file(half, file.with_name(f"{file.stem}.fp16.safetensors"), {"format": "pt"})
    export_single_file(read_base(base), tmp_path / "one.safetensors")
    assert_same_weights(read_back(tmp_path / "one.safetensors", base), expected)


def test_the_command_line(tmp_path, tiny_pipeline_dir, capsys):
    file = tmp_path / "new" / "one.safetensors"
    argv = [str(tiny_pipeline_dir), str(file)]
    assert run_main(main, [*argv, "--dtype=fp16"]) == 0
    assert capsys.readouterr().out.startswith(f"{file}: 0.")
    assert {value.dtype for value in load_file(file).values()} == {torch.float16}
    assert run_main(main, argv) == 0  # its own file is replaced
    assert {value.dtype for value in load_file(file).values()} == {torch.float32}
    assert [path.name for path in file.parent.iterdir()] == ["one.safetensors"]
    assert header(file)["written_by"] == "train_dreambooth_colossalai"


def test_a_file_of_someone_elses_is_not_replaced(tmp_path, tiny_pipeline_dir, capsys):
    for name, write in {
        "mine.safetensors": lambda path: save_file({"a": torch.zeros(1)}, path),
        "text.safetensors": lambda path: path.write_text("precious"),
        "folder.safetensors": Path.mkdir,
        "link.safetensors": lambda path: path.symlink_to("nowhere"),
    }.items():
        write(tmp_path / name)
        assert run_main(main, [str(tiny_pipeline_dir), str(tmp_path / name)]) == 2
        assert f"{name} exists and was not written by this program" in capsys.readouterr().err
    assert run_main(main, [str(tiny_pipeline_dir), str(tmp_path / "x.ckpt")]) == 2
    assert "a name like x.safetensors" in capsys.readouterr().err
    assert run_main(main, [str(tiny_pipeline_dir), str(tmp_path / "text.safetensors" / "x.safetensors")]) == 2
    assert "text.safetensors is a file, so no folder can be made in it" in capsys.readouterr().err


def test_a_failure_leaves_no_file(tmp_path, tiny_pipeline_dir, monkeypatch):
    export_single_file(read_base(tiny_pipeline_dir), tmp_path / "one.safetensors")
    before = (tmp_path / "one.safetensors").read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        export_single_file(read_base(tiny_pipeline_dir), tmp_path / "one.safetensors", "fp16")
    assert (tmp_path / "one.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["one.safetensors"]


@pytest.mark.parametrize(
    ("scheduler", "marks", "said"),
    [
        (dict(), [], "epsilon"),
        (dict(prediction_type="v_prediction"), ["v_pred"], "v"),
        (dict(prediction_type="v_prediction", rescale_betas_zero_snr=True), ["v_pred", "ztsnr"], "v"),
    ],
)
def test_what_a_model_predicts_stands_in_the_file(tmp_path, base, scheduler, marks, said):
    """As ComfyUI, A1111 and Forge look for it: empty tensors of these names; and as ModelSpec has it."""
    edit_json(base / "scheduler/scheduler_config.json", **scheduler)
    file = tmp_path / "one.safetensors"
    assert run_main(main, [str(base), str(file), "--dtype=fp16"]) == 0
    found = load_file(file)
    assert {name: list(value.shape) for name, value in found.items() if "." not in name} == dict.fromkeys(marks, [0])
    assert header(file)["modelspec.prediction_type"] == said
    assert [path.name for path in tmp_path.glob("one.*")] == ["one.safetensors"]
    assert_same_weights(read_back(file, base).to(torch.float16), load_folder(base).to(torch.float16))
