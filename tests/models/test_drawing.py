"""utils/sampling.py: images depend on the seed alone; what two folders have in common is loaded once."""

import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from utils.drawing import initial_latents, is_blank
from utils.errors import UserError
from utils.sampling import (
    load_pipeline,
    num_denoising_steps,
    replace_file,
    same_component,
    sample,
    save_png,
    shared_components,
    truncated_text,
)

torch.set_num_threads(1)  # models this small are slower on more threads, much slower where the CPU is shared
CPU = torch.device("cpu")
PROMPT = "a photo of my cat."
STEPS = 4
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline_dir):
    return load_pipeline(tiny_pipeline_dir, torch.float32, CPU)


@pytest.fixture(scope="module")
def images(pipeline):
    return sample(pipeline, PROMPT, [0, 1, 2, 3], num_inference_steps=STEPS)


@pytest.fixture
def copy_of_tiny(tiny_pipeline_dir, tmp_path) -> Path:
    return shutil.copytree(tiny_pipeline_dir, tmp_path / "copy")


def largest_difference(images: list[Image.Image], others: list[Image.Image]) -> int:
    pairs = zip(images, others, strict=True)
    return max(int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max()) for a, b in pairs)


def test_latents_of_an_image_come_from_its_generator_alone(pipeline):
    def draw(*seeds):
        return initial_latents(pipeline, [torch.Generator().manual_seed(seed) for seed in seeds], 32, 48)

    assert draw(4, 5).shape == (2, 4, 8, 12)
    assert torch.equal(draw(4, 5, 6)[1:2], draw(5))
    assert not torch.equal(draw(4), draw(5))


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_images_do_not_depend_on_the_batch_size(pipeline, images, batch_size):
    others = sample(pipeline, PROMPT, [0, 1, 2, 3], num_inference_steps=STEPS, batch_size=batch_size)
    assert largest_difference(images, others) <= 1


def test_another_seed_or_prompt_makes_another_image(pipeline, images):
    assert largest_difference(images[:1], images[1:2]) > 10
    assert largest_difference(images[:1], sample(pipeline, "!!!!", [0], num_inference_steps=STEPS)) > 0


def test_an_image_is_the_one_that_the_pipeline_makes_with_the_same_seed(pipeline, images):
    generator = torch.Generator("cpu").manual_seed(2)
    expected = pipeline(PROMPT, num_inference_steps=STEPS, guidance_scale=7.5, generator=generator).images
    assert largest_difference(images[2:3], expected) <= 1


def test_a_stochastic_scheduler_is_independent_of_the_batch_size_too(copy_of_tiny):
    from diffusers import DDPMScheduler

    pipeline = load_pipeline(copy_of_tiny, torch.float32, CPU)
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    one_by_one, at_once = (
        sample(pipeline, PROMPT, [0, 1], num_inference_steps=STEPS, batch_size=batch_size) for batch_size in (1, 2)
    )
    assert largest_difference(one_by_one, at_once) <= 1


def test_sizes_guidance_and_negative_prompt_reach_the_pipeline(pipeline, images):
    (wide,) = sample(pipeline, PROMPT, [0], num_inference_steps=1, height=32, width=64)
    assert wide.size == (64, 32)
    unguided = sample(pipeline, PROMPT, [0], num_inference_steps=STEPS, guidance_scale=1)
    steered = sample(pipeline, PROMPT, [0], num_inference_steps=STEPS, negative_prompt="zzzz")
    assert largest_difference(images[:1], unguided) > 0
    assert largest_difference(images[:1], steered) > 0


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_on_step_is_called_as_often_as_announced(pipeline, batch_size):
    calls = []
    seeds = [0, 1, 2]
    sample(pipeline, PROMPT, seeds, num_inference_steps=3, batch_size=batch_size, on_step=lambda: calls.append(1))
    assert len(calls) == num_denoising_steps(pipeline, len(seeds), 3, batch_size)
    assert len(calls) % {None: 1, 1: 3, 2: 2}[batch_size] == 0


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.bfloat16])
def test_every_model_is_loaded_in_the_wanted_dtype(tiny_pipeline_dir, weight_dtype):
    pipeline = load_pipeline(tiny_pipeline_dir, weight_dtype, CPU)
    for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert {parameter.dtype for parameter in model.parameters()} == {weight_dtype}
    (image,) = sample(pipeline, PROMPT, [0], num_inference_steps=1)
    assert not is_blank(image)


def test_components_with_the_same_files_are_shared(pipeline, tiny_pipeline_dir, tmp_path):
    folder = shutil.copytree(tiny_pipeline_dir, tmp_path / "linked", copy_function=os.link)
    weights = load_file(folder / UNET_FILE)
    (folder / UNET_FILE).unlink()
    save_file({name: 1.5 * value for name, value in weights.items()}, folder / UNET_FILE, {"format": "pt"})
    other = load_pipeline(folder, torch.float32, CPU, shared_with=pipeline)
    assert shared_components(other, pipeline) == ["vae", "text_encoder", "tokenizer"]
    assert other.scheduler is not pipeline.scheduler
    seeds = [0]
    assert largest_difference(*(sample(p, PROMPT, seeds, num_inference_steps=STEPS) for p in (pipeline, other))) > 0


@pytest.mark.parametrize("changed", ["unet", "vae", "text_encoder"])
def test_one_changed_byte_of_a_component_ends_its_sharing(tiny_pipeline_dir, copy_of_tiny, changed):
    weights = next((copy_of_tiny / changed).glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for name in ("unet", "vae", "text_encoder"):
        assert same_component(tiny_pipeline_dir, copy_of_tiny, name) == (name != changed)


def test_files_that_loading_passes_over_do_not_end_sharing(tiny_pipeline_dir, copy_of_tiny):
    for name in ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin", ".hidden"):
        (copy_of_tiny / "unet" / name).write_bytes(b"ignored")
    assert same_component(tiny_pipeline_dir, copy_of_tiny, "unet")


def make_old_format(folder: Path) -> None:
    """Rewrites the folder as in 2022: .bin files, the VAE's old attention names, no scaling_factor, other variants."""
    for part, name in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        weights = load_file(folder / part / f"{name}.safetensors")
        if part == "vae":
            for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                weights = {key.replace(f".{new}.", f".{old}."): value for key, value in weights.items()}
            assert any(".proj_attn." in key for key in weights)
        bin_name = "pytorch_model.bin" if part == "text_encoder" else f"{name}.bin"
        torch.save(weights, folder / part / bin_name)
        (folder / part / f"{name}.safetensors").unlink()
    for variant in ("fp16", "non_ema"):
        (folder / "unet" / f"diffusion_pytorch_model.{variant}.bin").write_bytes(b"not to be read")
    config = json.loads((folder / "vae" / "config.json").read_text())
    del config["scaling_factor"]
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model_index.json").read_text())
    index |= dict(_diffusers_version="0.2.2", feature_extractor=["transformers", "CLIPFeatureExtractor"])
    index |= dict(safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    (folder / "model_index.json").write_text(json.dumps(index))


def test_a_folder_in_the_old_format_makes_the_same_images(copy_of_tiny, images):
    make_old_format(copy_of_tiny)
    pipeline = load_pipeline(copy_of_tiny, torch.float32, CPU)
    assert pipeline.safety_checker is None and pipeline.feature_extractor is None
    assert largest_difference(images[:2], sample(pipeline, PROMPT, [0, 1], num_inference_steps=STEPS)) <= 1


def test_a_folder_with_fp16_files_only_is_loaded(copy_of_tiny, images):
    for path in copy_of_tiny.rglob("*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    pipeline = load_pipeline(copy_of_tiny, torch.float32, CPU)
    assert largest_difference(images[:1], sample(pipeline, PROMPT, [0], num_inference_steps=STEPS)) == 0


def test_loading_is_silent(tiny_pipeline_dir, capfd):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sample(load_pipeline(tiny_pipeline_dir, torch.float32, CPU), PROMPT, [0], num_inference_steps=1)
    assert not caught
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_does_not_load_is_a_user_error(copy_of_tiny):
    (copy_of_tiny / UNET_FILE).write_bytes(b"nothing")
    with pytest.raises(UserError, match="copy could not be loaded"):
        load_pipeline(copy_of_tiny, torch.float32, CPU)


def test_not_a_number_is_seen_as_a_blank_image_and_gives_no_numpy_warning(copy_of_tiny, images):
    pipeline = load_pipeline(copy_of_tiny, torch.float32, CPU)
    torch.nn.init.constant_(pipeline.unet.conv_out.bias, float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        (image,) = sample(pipeline, PROMPT, [0], num_inference_steps=1)
    assert is_blank(image)
    assert not is_blank(images[0])


@pytest.mark.parametrize(("num_images", "mend"), [(4, "--batch_size 2"), (1, "--height and --width")])
def test_too_little_gpu_memory_is_a_user_error_that_names_the_flag(pipeline, monkeypatch, num_images, mend):
    def fail(*_args, **_kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipeline.unet, "forward", fail)
    with pytest.raises(UserError, match=mend):
        sample(pipeline, PROMPT, list(range(num_images)), num_inference_steps=1)


def test_truncated_text(pipeline):
    assert truncated_text(pipeline, PROMPT) == ""
    assert truncated_text(pipeline, "a " * 75) == ""
    assert "zebra" in truncated_text(pipeline, "a " * 75 + "zebra").replace(" ", "")


def test_the_prompt_of_no_words_is_sampled(pipeline):
    assert len(sample(pipeline, "", [0, 1], num_inference_steps=1)) == 2


def test_save_png_keeps_text_of_any_script(tmp_path):
    save_png(tmp_path / "a.png", Image.new("RGB", (8, 8)), dict(prompt="фото 猫 🐈", seed=3, negative_prompt=None))
    with Image.open(tmp_path / "a.png") as image:
        assert image.text == {"prompt": "фото 猫 🐈", "seed": "3"}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    replace_file(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(path, fail)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def add_safety_checker(folder: Path, threshold: float) -> None:
    """Adds a feature extractor and a safety checker that objects to every similarity above `threshold`."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision = sizes | dict(image_size=32, patch_size=16)
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=sizes, vision_config=vision, projection_dim=8))
    torch.nn.init.constant_(checker.concept_embeds_weights, threshold)
    torch.nn.init.normal_(checker.concept_embeds)
    checker.save_pretrained(folder / "safety_checker")
    (folder / "feature_extractor").mkdir()
    size = dict(size=32, crop_size=32, feature_extractor_type="CLIPFeatureExtractor")
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(size))
    index = json.loads((folder / "model_index.json").read_text())
    index |= dict(feature_extractor=["transformers", "CLIPFeatureExtractor"])
    index |= dict(safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(("threshold", "blank"), [(-2.0, True), (2.0, False)])
def test_the_safety_checker_blacks_out_what_it_objects_to(copy_of_tiny, threshold, blank):
    add_safety_checker(copy_of_tiny, threshold)
    pipeline = load_pipeline(copy_of_tiny, torch.float32, CPU, safety_checker=True)
    assert is_blank(sample(pipeline, PROMPT, [0], num_inference_steps=1)[0]) == blank
    assert load_pipeline(copy_of_tiny, torch.float32, CPU).safety_checker is None
