"""Images depend on prompt, settings and seed alone, whatever they are drawn together with."""

import warnings

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file

from tests.helpers.encoders import write_safety_checker
from tests.helpers.pipelines import largest_difference
from utils.errors import UserError
from utils.models.drawing import NotANumber, is_blank, num_denoising_steps, sample, truncated_text
from utils.models.folder import read_base
from utils.models.loading import load_pipeline

CPU = torch.device("cpu")
PROMPT = "a photo of my cat."
STEPS = 4


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline_dir):
    return load_pipeline(read_base(tiny_pipeline_dir), torch.float32, CPU)


@pytest.fixture(scope="module")
def images(pipeline):
    return sample(pipeline, PROMPT, [0, 1, 2, 3], num_inference_steps=STEPS)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_images_do_not_depend_on_the_batch_size(pipeline, images, batch_size):
    others = sample(pipeline, PROMPT, [0, 1, 2, 3], num_inference_steps=STEPS, batch_size=batch_size)
    assert largest_difference(images, others) <= 1


@pytest.mark.parametrize(("batch_size", "guidance_scale"), [(None, 7.5), (2, 7.5), (None, 1.0)])
def test_images_of_several_prompts_at_once_are_those_of_each(base, batch_size, guidance_scale):
    pipeline, prompts = load_pipeline(read_base(base), torch.float32, CPU), [PROMPT, "!!!!", PROMPT]
    for name, parameter in pipeline.unet.named_parameters():
        if name.endswith("proj_out.weight"):
            torch.nn.init.normal_(parameter)  # the prompt counts for more
    options = dict(num_inference_steps=STEPS, guidance_scale=guidance_scale)
    expected = [sample(pipeline, prompt, [seed], **options)[0] for seed, prompt in enumerate(prompts)]
    assert largest_difference(expected[:1], sample(pipeline, "!!!!", [0], **options)) > 3
    assert largest_difference(sample(pipeline, prompts, [0, 1, 2], batch_size=batch_size, **options), expected) <= 1


def test_another_seed_or_prompt_makes_another_image(pipeline, images):
    assert largest_difference(images[:1], images[1:2]) > 10
    assert largest_difference(images[:1], sample(pipeline, "!!!!", [0], num_inference_steps=STEPS)) > 0


def test_an_image_is_the_one_that_the_pipeline_makes_with_the_same_seed(pipeline, images):
    generator = torch.Generator("cpu").manual_seed(2)
    expected = pipeline(PROMPT, num_inference_steps=STEPS, guidance_scale=7.5, generator=generator).images
    assert largest_difference(images[2:3], expected) <= 1


def test_a_stochastic_scheduler_is_independent_of_the_batch_size_too(base):
    pipeline = load_pipeline(read_base(base), torch.float32, CPU)
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


@pytest.mark.parametrize(
    ("dtype", "advice"), [(torch.float32, "have grown too large"), (torch.float16, "try --mixed_precision no")]
)
def test_a_pipeline_that_draws_no_numbers_is_refused(base, dtype, advice):
    pipeline = load_pipeline(read_base(base), dtype, CPU)
    torch.nn.init.constant_(pipeline.unet.conv_out.bias, torch.finfo(dtype).max)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with pytest.raises(NotANumber, match=f"the images of .{PROMPT}. are not numbers: .*{advice}"):
            sample(pipeline, PROMPT, [0], num_inference_steps=2)


def test_the_prompt_whose_image_is_no_number_is_named(base, monkeypatch):
    pipeline = load_pipeline(read_base(base), torch.float32, CPU)
    decoded = pipeline.vae.decode

    def spoil_the_second(*args, **kwargs):
        images = decoded(*args, **kwargs)
        images[0][1] = torch.nan
        return images

    monkeypatch.setattr(pipeline.vae, "decode", spoil_the_second)
    with pytest.raises(NotANumber, match="the images of .!!!!. are"):
        sample(pipeline, [PROMPT, "!!!!", "zzzz"], [0, 0, 0], num_inference_steps=1)


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


@pytest.mark.parametrize(("threshold", "blank"), [(-2.0, True), (2.0, False)])
def test_the_safety_checker_blacks_out_what_it_objects_to(base, threshold, blank):
    file = write_safety_checker(base) / "safety_checker/model.safetensors"
    tensors = load_file(file)
    tensors["concept_embeds_weights"].fill_(threshold)  # it objects to every similarity above that
    save_file(tensors, file, {"format": "pt"})
    pipeline = load_pipeline(read_base(base), torch.float32, CPU, safety_checker=True)
    assert is_blank(sample(pipeline, PROMPT, [0], num_inference_steps=1)[0]) == blank
    assert load_pipeline(read_base(base), torch.float32, CPU).safety_checker is None
