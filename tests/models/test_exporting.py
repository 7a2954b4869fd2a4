"""The change at a strength: both ends to the bit, the line between and beyond; and as a LoRA, the nearest of its rank,
with which diffusers draws what the whole model draws."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.helpers.pipelines import UNET_CONFIG, write_pipeline
from tests.helpers.script import UNET_FILE, run_python
from utils.command_line import run_main
from utils.errors import UserError
from utils.export import main
from utils.models.check import check_same_unet
from utils.models.drawing import sample
from utils.models.exporting import blend, blended_weights, extract_lora, factors, load_weights, product
from utils.models.folder import read_base
from utils.models.loading import load_pipeline, load_unet

CPU = torch.device("cpu")
FULL = 4096  # more than any layer of the tiny model has


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """A base, and the same with a change of its linear layers and convolutions; its run.json names the base."""
    root = tmp_path_factory.mktemp("ends")
    base, tuned = (write_pipeline(root / name) for name in ("base", "tuned"))
    weights = load_file(tuned / UNET_FILE)
    noise = torch.Generator().manual_seed(0)
    for value in weights.values():
        if value.dim() > 1:
            value += 0.1 * torch.randn(value.shape, generator=noise)
    save_file(weights, tuned / UNET_FILE, {"format": "pt"})
    (tuned / "run.json").write_text(json.dumps(dict(arguments=dict(pretrained_model_name_or_path=str(base)))))
    return base, tuned


def test_both_ends_are_there_to_the_bit(ends):
    base, tuned = (load_file(folder / UNET_FILE) for folder in ends)
    base["conv_in.bias"][:2] = torch.tensor([-0.0, 1e30])
    for strength, expected in ((0, base), (1, tuned), (0.0, base), (1.0, tuned)):
        for name in base:
            assert blend(base[name], tuned[name], strength).numpy().tobytes() == expected[name].numpy().tobytes()


@pytest.mark.parametrize("strength", [0.25, 0.75, 1.5, 3])
def test_between_and_beyond_it_is_the_line(ends, strength):
    base, tuned = (load_file(folder / UNET_FILE) for folder in ends)
    for name, value in blended_weights(*ends, strength):
        exact = base[name].double() + strength * (tuned[name].double() - base[name].double())
        torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-6)


def test_it_is_computed_in_fp32_and_has_the_dtype_of_the_tuned_file():
    base, tuned = torch.tensor([1.0]), torch.tensor([1.001], dtype=torch.float16)
    expected = (1 + 0.9 * (tuned.float() - 1)).half()
    assert blend(base, tuned, 0.9).dtype == torch.float16
    assert torch.equal(blend(base, tuned, 0.9), expected)
    assert torch.equal(blend(base, tuned, 0), base.half())


def test_at_full_strength_the_base_is_not_read(ends, tmp_path):
    tuned = load_file(ends[1] / UNET_FILE)
    assert all(torch.equal(value, tuned[name]) for name, value in blended_weights(tmp_path / "gone", ends[1], 1))


def test_unets_of_two_architectures_are_refused(ends, tmp_path):
    other = write_pipeline(tmp_path / "other")
    UNet2DConditionModel(**UNET_CONFIG | dict(cross_attention_dim=64)).save_pretrained(other / "unet")
    for check in (lambda: check_same_unet(ends[0], other), lambda: list(blended_weights(ends[0], other, 0.5))):
        with pytest.raises(UserError, match="not of one architecture"):
            check()
    check_same_unet(*ends)


def test_weights_change_where_they_lie(ends):
    unet = load_unet(read_base(ends[0]))
    places = {name: parameter.data_ptr() for name, parameter in unet.named_parameters()}
    load_weights(unet, blended_weights(*ends, 1))
    assert {name: parameter.data_ptr() for name, parameter in unet.named_parameters()} == places
    unet.half()
    places = {name: parameter.data_ptr() for name, parameter in unet.named_parameters()}
    load_weights(unet, blended_weights(*ends, 0.5))
    assert {name: parameter.data_ptr() for name, parameter in unet.named_parameters()} == places
    expected = dict(blended_weights(*ends, 0.5))
    assert all(torch.equal(value, expected[name].half()) for name, value in unet.state_dict().items())
    with pytest.raises(KeyError):
        load_weights(unet, list(expected.items())[1:])


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (8, 6, 3, 3), (30, 2, 1, 1)])
def test_it_is_the_nearest_of_its_rank(shape):
    change = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    singular = torch.linalg.svdvals(change.flatten(1))
    for rank in (1, 2, 5, 99):
        down, up = factors(change, rank)
        kept = min(rank, len(singular))
        assert down.shape == (kept, *shape[1:]) and up.shape == (shape[0], kept, *(1 for _ in shape[2:]))
        rest = (change - product(down, up)).square().sum()
        torch.testing.assert_close(rest, singular[kept:].square().sum(), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(down.flatten(1).norm(dim=1), up.flatten(1).norm(dim=0))  # half in each


def test_a_change_of_a_lower_rank_has_no_wild_factors():
    change = torch.outer(torch.arange(1.0, 9), torch.arange(1.0, 7)).double()
    down, up = factors(change, 4)
    torch.testing.assert_close(product(down.half().double(), up.half().double()), change, rtol=1e-3, atol=1e-2)
    assert torch.isfinite(down.half()).all() and torch.isfinite(up.half()).all()


def test_the_share_is_of_the_whole_change(ends):
    base, tuned = (load_file(folder / UNET_FILE) for folder in ends)
    _, share = extract_lora(*ends, 2, dtype=torch.float32)
    held = whole = 0.0
    for name, value in tuned.items():
        change = (value - base[name]).double()
        whole += change.square().sum().item()
        if change.dim() > 1:
            held += torch.linalg.svdvals(change.flatten(1))[:2].square().sum().item()
    assert share == pytest.approx(held / whole, rel=1e-4) and 0.1 < share < 0.9
    assert extract_lora(*ends, FULL, dtype=torch.float32)[1] == pytest.approx(1, abs=1e-6)
    with pytest.raises(UserError, match="are equal"):
        extract_lora(ends[0], ends[0], 2, dtype=torch.float32)


# peft is imported first: utils.runtime.libraries hides it from diffusers otherwise.
DRAWS_WITH_LORAS = """
import pathlib, sys
import peft
import numpy as np, torch
from utils.models.drawing import sample
from utils.models.folder import read_base
from utils.models.loading import load_pipeline

base, result, *files = map(pathlib.Path, sys.argv[1:])
pipeline = load_pipeline(read_base(base), torch.float32, torch.device("cpu"))
pictures = {}
for file in files:
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="cat")
    for name, weight in (("with", 1.0), ("without", 0.0)):
        pipeline.set_adapters(["cat"], [weight])
        images = sample(pipeline, "a photo of my cat.", [0, 1], num_inference_steps=3)
        pictures[f"{name} {file.stem}"] = np.stack([np.asarray(image) for image in images])
    pipeline.unload_lora_weights()
np.savez(result, **pictures)
"""
STRENGTHS = (1, 0.5)


def pictures(folder: Path) -> np.ndarray:
    pipeline = load_pipeline(read_base(folder), torch.float32, CPU)
    images = sample(pipeline, "a photo of my cat.", [0, 1], num_inference_steps=3)
    return np.stack([np.asarray(image, int) for image in images])


def export(ends, target: Path, strength: float, *more: str) -> Path:
    """What export makes of the change at `strength`."""
    assert run_main(main, [str(ends[1]), str(target), "--dtype", "fp32", "--strength", str(strength), *more]) == 0
    return target


@pytest.fixture(scope="module")
def drawn_with_loras(ends, tmp_path_factory) -> dict[str, np.ndarray]:
    """Pictures "with S" and "without S" of the LoRA at each strength S, by diffusers and peft in one other process."""
    folder = tmp_path_factory.mktemp("loras")
    files = [export(ends, folder / f"{each}.safetensors", each, "--lora_rank", str(FULL)) for each in STRENGTHS]
    drawn = run_python(DRAWS_WITH_LORAS, ends[0], folder / "drawn.npz", *files)
    assert drawn.returncode == 0, drawn.stderr
    return {name: images.astype(int) for name, images in np.load(folder / "drawn.npz").items()}


@pytest.mark.parametrize("strength", STRENGTHS)
def test_diffusers_draws_with_it_what_the_whole_model_draws(ends, drawn_with_loras, tmp_path, strength):
    before, expected = pictures(ends[0]), pictures(export(ends, tmp_path / "blended", strength))
    found = drawn_with_loras[f"with {strength}"]
    assert np.abs(found - expected).max() <= 1 < np.abs(before - expected).max()
    assert np.abs(drawn_with_loras[f"without {strength}"] - before).max() <= 1


def test_the_file_is_small_and_says_what_it_is(ends, tmp_path, capsys):
    path = tmp_path / "lora.safetensors"
    assert run_main(main, [str(ends[1]), str(path), "--lora_rank", "2"]) == 0
    said = capsys.readouterr().out
    assert f"{path.stat().st_size / 1e6:.1f} MB" in said and "% of the squared change" in said
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["ss_network_dim"] == file.metadata()["ss_network_alpha"] == "2"
        assert file.metadata()["modelspec.architecture"] == "stable-diffusion-v1/lora"
        assert file.metadata()["ss_base_model_version"] == "sd_v1"
        names = list(file.keys())
        layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
        assert {f"{layer}.{part}" for part in ("alpha", "lora_down.weight", "lora_up.weight")} <= set(names)
        assert file.get_tensor(f"{layer}.lora_down.weight").dtype == torch.float16
        assert all(name.startswith("lora_unet_") for name in names)
    assert run_main(main, [str(ends[1]), str(path), "--lora_rank", "3"]) == 0  # our own file is replaced
