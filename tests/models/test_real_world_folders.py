"""Base folders as people have them: each trains as the same weights do in a folder of today, and its result loads."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from tests.helpers.pipelines import PARTS, rename_vae_attention, write_index, write_shards
from train_dreambooth_colossalai import main
from utils.models.folder import read_base
from utils.models.loading import load_pipeline

# .bin and .safetensors names of the parts differ for the text encoder.
BIN_NAMES = dict(
    unet="diffusion_pytorch_model.bin", vae="diffusion_pytorch_model.bin", text_encoder="pytorch_model.bin"
)


def edit_json(path: Path, **changes) -> None:
    """Sets keys of a JSON file; None takes one away."""
    values = {key: value for key, value in (json.loads(path.read_text()) | changes).items() if value is not None}
    path.write_text(json.dumps(values))


def weight_file(base: Path, part: str) -> Path:
    return next((base / part).glob("*.safetensors"))


def no_scaling_factor(base: Path) -> None:
    edit_json(base / "vae/config.json", scaling_factor=None, force_upcast=None)
    assert "scaling_factor" not in (base / "vae/config.json").read_text()


def bin_files(base: Path) -> None:
    for part in PARTS:
        file = weight_file(base, part)
        torch.save(load_file(file), base / part / BIN_NAMES[part])
        file.unlink()


def both_kinds_of_files(base: Path) -> None:
    for part in PARTS:
        zeros = {name: torch.zeros_like(value) for name, value in load_file(weight_file(base, part)).items()}
        torch.save(zeros, base / part / BIN_NAMES[part])  # not the file that is to be loaded


def fp16_variants_beside(base: Path) -> None:
    for part in PARTS:
        file = weight_file(base, part)
        halves = {name: torch.zeros_like(value).half() for name, value in load_file(file).items()}
        save_file(halves, file.with_name(f"{file.stem}.fp16.safetensors"), {"format": "pt"})


def non_ema_beside(base: Path) -> None:
    file = weight_file(base, "unet")
    zeros = {name: torch.zeros_like(value) for name, value in load_file(file).items()}
    save_file(zeros, file.with_name(f"{file.stem}.non_ema.safetensors"), {"format": "pt"})


def fp16_variants_only(base: Path) -> None:
    for part in PARTS:
        file = weight_file(base, part)
        halves = {name: value.half() for name, value in load_file(file).items()}
        save_file(halves, file.with_name(f"{file.stem}.fp16.safetensors"), {"format": "pt"})
        file.unlink()


def feature_extractor_of_old(base: Path) -> None:
    edit_json(base / "model_index.json", feature_extractor=["transformers", "CLIPFeatureExtractor"])
    (base / "feature_extractor").mkdir()
    config = dict(feature_extractor_type="CLIPFeatureExtractor", size=224, crop_size=224, do_resize=True)
    (base / "feature_extractor/preprocessor_config.json").write_text(json.dumps(config))


def index_without_safety_checker(base: Path) -> None:
    edit_json(base / "model_index.json", safety_checker=None, feature_extractor=None, requires_safety_checker=None)


def old_versions(base: Path) -> None:
    edit_json(base / "model_index.json", _diffusers_version="0.2.2")
    for part in ("unet", "vae"):
        edit_json(base / part / "config.json", _diffusers_version="0.2.2", _name_or_path="/somewhere/else")
    old = dict(clip_sample=False, _diffusers_version="0.8.0", skip_prk_steps=True, trained_betas=None)
    edit_json(base / "scheduler/scheduler_config.json", prediction_type=None, timestep_spacing=None, **old)


def shards_without_an_index(base: Path) -> None:
    for part in PARTS:
        write_shards(base, part)


def bin_shards_of_the_text_encoder(base: Path) -> None:
    write_shards(base, "text_encoder", ".bin")


def a_stale_index(base: Path) -> None:
    write_index(base)


def non_ema_alone(base: Path) -> None:
    for part in PARTS:
        file = weight_file(base, part)
        file.rename(file.with_name(f"{file.stem}.non_ema.safetensors"))


def image_to_image(base: Path) -> None:
    edit_json(base / "model_index.json", _class_name="StableDiffusionImg2ImgPipeline")


def half_precision_in_the_configurations(base: Path) -> None:
    for part in PARTS:
        edit_json(base / part / "config.json", torch_dtype="float16")
    edit_json(base / "text_encoder/config.json", dtype="float16")  # as transformers 5 calls it


def a_tokenizer_without_a_length(base: Path) -> None:
    edit_json(base / "tokenizer/tokenizer_config.json", model_max_length=None)


KINDS = [
    shards_without_an_index,
    bin_shards_of_the_text_encoder,
    a_stale_index,
    non_ema_alone,
    image_to_image,
    half_precision_in_the_configurations,
    a_tokenizer_without_a_length,
    no_scaling_factor,
    rename_vae_attention,
    bin_files,
    both_kinds_of_files,
    fp16_variants_beside,
    non_ema_beside,
    feature_extractor_of_old,
    index_without_safety_checker,
    old_versions,
]


def argv(base: Path, photos: Path, output: Path) -> list[str]:
    flags = [f"--pretrained_model_name_or_path={base}", f"--instance_data_dir={photos}", f"--output_dir={output}"]
    flags += ["--instance_prompt=a cat", "--resolution=32", "--train_batch_size=1", "--max_train_steps=1"]
    return [*flags, "--learning_rate=1e-3", "--lr_warmup_steps=0", "--mixed_precision=no"]


def loss_and_result(base: Path, photos: Path, output: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of one step, and the weights of the UNet that the finished pipeline loads."""
    assert main(argv(base, photos, output)) == 0
    StableDiffusionPipeline.from_pretrained(output)  # as a user would
    assert json.loads((output / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    pipeline = load_pipeline(read_base(output), torch.float32, torch.device("cpu"))
    return json.loads((output / "metrics.jsonl").read_text())["loss"], pipeline.unet.state_dict()


@pytest.fixture(scope="module")
def expected(tmp_path_factory, tiny_pipeline_dir, photos_dir) -> tuple[float, dict[str, torch.Tensor]]:
    return loss_and_result(tiny_pipeline_dir, photos_dir, tmp_path_factory.mktemp("expected") / "output")


@pytest.mark.parametrize("change", KINDS, ids=lambda change: change.__name__)
def test_it_trains_as_the_plain_folder_does(base, tmp_path, photos_dir, expected, change):
    change(base)
    loss, unet = loss_and_result(base, photos_dir, tmp_path / "output")
    assert loss == expected[0]
    assert all(torch.equal(unet[name], value) for name, value in expected[1].items())


def test_fp16_variants_alone(base, tmp_path, photos_dir, expected):
    fp16_variants_only(base)
    loss, unet = loss_and_result(base, photos_dir, tmp_path / "output")
    assert loss == pytest.approx(expected[0], rel=1e-3) and loss != expected[0]
    assert unet.keys() == expected[1].keys()
