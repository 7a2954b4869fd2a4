"""What is loaded from a folder, in which dtype, and what two folders share."""

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from tests.helpers.pipelines import largest_difference, write_pipeline
from tests.helpers.script import UNET_FILE, run
from utils.errors import UserError
from utils.models.drawing import is_blank, sample
from utils.models.folder import read_base
from utils.models.loading import (
    check_finite,
    common_components,
    load_pipeline,
    load_unet,
    same_component,
    shared_components,
)
from utils.models.weight_files import read_onto

CPU = torch.device("cpu")
PROMPT = "a photo of my cat."
STEPS = 4


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("is_there", [False, True])
def test_weights_that_lack_a_tensor_or_have_it_in_another_shape_are_refused_when_loaded(base, part, is_there):
    path = next((base / part).glob("*.safetensors"))
    tensors = load_file(path)
    first = sorted(tensors)[0]
    tensors[first] = torch.zeros(1, 1)
    message = f"{part} cannot be loaded as a"
    if not is_there:
        del tensors[first]
        message = f"{part}.*(lacks 1 of|keys are missing).*{first.split('.')[-1]}"
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=message):
        load_unet(read_base(base)) if part == "unet" else load_pipeline(read_base(base), torch.float32, CPU)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weights_that_were_read_before_become_the_unets_and_nobody_elses(tmp_path, dtype):
    base = read_base(write_pipeline(tmp_path / "base", dtype=dtype))
    tensors = read_onto(base.weights["unet"].files, "cpu")
    places = {tensor.data_ptr() for tensor in tensors.values()}
    unet, plain = load_unet(base, tensors), UNet2DConditionModel.from_pretrained(base.folder / "unet").float()
    assert tensors == {} and unet.training
    assert ({p.data_ptr() for p in unet.parameters()} == places) is (dtype == torch.float32)  # no copy
    assert [name for name, _ in unet.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert all(map(torch.equal, unet.parameters(), plain.parameters()))


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline_dir):
    return load_pipeline(read_base(tiny_pipeline_dir), torch.float32, CPU)


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.bfloat16])
def test_every_model_is_loaded_in_the_wanted_dtype(tiny_pipeline_dir, weight_dtype):
    pipeline = load_pipeline(read_base(tiny_pipeline_dir), weight_dtype, CPU)
    for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert {parameter.dtype for parameter in model.parameters()} == {weight_dtype}
    (image,) = sample(pipeline, PROMPT, [0], num_inference_steps=1)
    assert not is_blank(image)


def test_components_with_the_same_files_are_shared(pipeline, tiny_pipeline_dir, tmp_path):
    folder = shutil.copytree(tiny_pipeline_dir, tmp_path / "linked", copy_function=os.link)
    weights = load_file(folder / UNET_FILE)
    (folder / UNET_FILE).unlink()
    save_file({name: 1.5 * value for name, value in weights.items()}, folder / UNET_FILE, {"format": "pt"})
    other = load_pipeline(read_base(folder), torch.float32, CPU, shared=common_components(pipeline, folder))
    assert shared_components(other, pipeline) == ["vae", "text_encoder", "tokenizer"]
    assert other.scheduler is not pipeline.scheduler
    seeds = [0]
    assert largest_difference(*(sample(p, PROMPT, seeds, num_inference_steps=STEPS) for p in (pipeline, other))) > 0


@pytest.mark.parametrize("changed", ["unet", "vae", "text_encoder"])
def test_one_changed_byte_of_a_component_ends_its_sharing(tiny_pipeline_dir, base, changed):
    weights = next((base / changed).glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    same_time = (tiny_pipeline_dir / weights.relative_to(base)).stat().st_mtime_ns
    os.utime(weights, ns=(same_time, same_time))
    for name in ("unet", "vae", "text_encoder"):
        assert same_component(tiny_pipeline_dir, base, name) == (name != changed)


def test_files_that_loading_passes_over_do_not_end_sharing(tiny_pipeline_dir, base):
    for name in ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin", ".hidden"):
        (base / "unet" / name).write_bytes(b"ignored")
    assert same_component(tiny_pipeline_dir, base, "unet")


def test_loading_is_silent(tiny_pipeline_dir, capfd, monkeypatch):
    monkeypatch.delenv("DREAMBOOTH_DEPRECATIONS")  # as users have it
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sample(load_pipeline(read_base(tiny_pipeline_dir), torch.float32, CPU), PROMPT, [0], num_inference_steps=1)
    assert not caught
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(base, part, value):
    path = next((base / part).glob("*.safetensors"))
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=f"{part}: 1 of .* values of {name} are NaN or infinite"):
        load_pipeline(read_base(base), torch.float32, CPU)


def test_large_finite_weights_are_not_taken_for_infinite():
    module = torch.nn.Linear(300, 300)
    module.weight.data.fill_(3e38)  # whose sum is infinite
    check_finite(module, Path("unet"))
    check_finite(torch.nn.Linear(300, 300).half(), Path("unet"))


def test_a_scheduler_configuration_that_does_not_name_its_class(base, prior):
    """model_index.json names it: the pipeline draws with that scheduler, also the class images of a training run."""
    path = base / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    del config["_class_name"]
    path.write_text(json.dumps(config))
    assert type(load_pipeline(read_base(base), torch.float32, CPU).scheduler).__name__ == "PNDMScheduler"
    run(prior | dict(pretrained_model_name_or_path=base), max_train_steps=1)
    assert len(list(prior["class_data_dir"].glob("class-*.png"))) == 5
