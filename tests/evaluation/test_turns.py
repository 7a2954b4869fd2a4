"""Models that take turns in one UNet: the weights that a written model has, to the bit, where the graphs read them."""

import functools
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.graphs import replace_graphs
from tests.helpers.pipelines import write_pipeline
from tests.helpers.script import EMBEDDED, UNET_FILE
from utils.evaluation.samples import BASELINE, FINETUNED, plan_models
from utils.evaluation.turns import WeightsInTurn
from utils.models.captured_unet import CapturedUNet
from utils.models.drawing import sample
from utils.models.exporting import export_folder
from utils.models.folder import read_base
from utils.models.loading import common_components, load_pipeline

MODELS = {model.name: model for model in plan_models(["checkpoint-5"], [0.5, 0.75, 1.0])}
ORDER = [*MODELS, "finetuned@0.5", FINETUNED, BASELINE, "checkpoint-5@0.75"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A base, and what training made of it, with a checkpoint of its own weights."""
    root = tmp_path_factory.mktemp("turns")
    base, tuned, other = (write_pipeline(root / str(seed), seed) for seed in (0, 1, 2))
    copytree(other / "unet", tuned / "checkpoint-5" / "unet")
    return base, tuned


def take_turns(folders: tuple[Path, Path], dtype: torch.dtype, device: str = "cpu") -> WeightsInTurn:
    base, tuned = folders
    pipelines = {BASELINE: load_pipeline(read_base(base), dtype, torch.device(device))}
    pipelines[FINETUNED] = load_pipeline(
        read_base(tuned), dtype, torch.device(device), shared=common_components(pipelines[BASELINE], tuned)
    )
    plan = SimpleNamespace(
        pretrained_model_name_or_path=base, finetuned_model_name_or_path=tuned, all_models=list(MODELS.values())
    )
    return WeightsInTurn(plan, pipelines)


@pytest.fixture(scope="module")
def written(folders, tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a model as utils.export writes it."""
    root = tmp_path_factory.mktemp("written")
    return functools.cache(lambda name: write(folders, name, root / name))


def write(folders: tuple[Path, Path], name: str, target: Path) -> Path:
    base, tuned = folders
    if name == BASELINE:
        return base
    model = MODELS[name]
    export_folder(read_base(tuned), tuned / (model.checkpoint or ""), base, target, model.strength, None)
    return target


@pytest.mark.parametrize(
    ("dtype", "looks_ahead"), [(torch.float32, False), (torch.float16, True), (torch.bfloat16, True)]
)
def test_the_weights_are_the_written_models_to_the_bit_and_stay_where_they_are(folders, written, dtype, looks_ahead):
    turns = take_turns(folders, dtype)
    turns.looks_ahead = looks_ahead
    unets = [pipeline.unet for pipeline in turns.pipelines.values()]
    places = [parameter.data_ptr() for unet in unets for parameter in unet.parameters()]
    for number, name in enumerate(ORDER):
        weights = turns.pipeline(name, ORDER[number + 1 :]).unet.state_dict()
        expected = load_file(written(name) / UNET_FILE)
        assert weights.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(weights[key].view(torch.uint8), value.to(dtype).view(torch.uint8))
    assert [parameter.data_ptr() for unet in unets for parameter in unet.parameters()] == places


def test_what_comes_next_is_read_while_this_one_draws(folders, monkeypatch):
    turns, read = take_turns(folders, torch.float32), []
    turns.looks_ahead, real = True, WeightsInTurn.weights
    monkeypatch.setattr(WeightsInTurn, "weights", lambda self, name: (read.append(name), real(self, name))[1])
    turns.pipeline(BASELINE, [FINETUNED, "finetuned@0.5", "finetuned@0.75"])
    turns.coming["finetuned@0.5"].result()
    turns.pipeline(FINETUNED, ["finetuned@0.5", "finetuned@0.75"])
    assert read == ["finetuned@0.5"]  # the other two are in their UNets
    turns.pipeline("finetuned@0.5", ["finetuned@0.75"])
    turns.coming["finetuned@0.75"].result()
    turns.pipeline("finetuned@0.75")
    assert read == ["finetuned@0.5", "finetuned@0.75"] and not turns.coming
    turns.looks_ahead = False
    turns.pipeline(FINETUNED, ["finetuned@0.5"])
    assert read[2:] == [FINETUNED] and not turns.coming


def test_a_graph_that_was_captured_once_draws_every_model(folders, written, monkeypatch):
    stand_in, turns = replace_graphs(monkeypatch), take_turns(folders, torch.float32)
    captured = CapturedUNet(pytest.fail)
    for name in [BASELINE, "finetuned@0.5", "checkpoint-5", FINETUNED]:
        images = pixels(turns.pipeline(name), captured)
        fresh = load_pipeline(read_base(written(name)), torch.float32, torch.device("cpu"))
        assert np.abs(images - pixels(fresh)).max() <= 1
    assert stand_in.captures == 1


def pixels(pipeline, captured: CapturedUNet | None = None, steps: int = 3) -> np.ndarray:
    images = sample(pipeline, ["a cat", "a dog"], [0, 1], num_inference_steps=steps, captured=captured)
    return np.stack([np.asarray(image, int) for image in images])


@pytest.mark.gpu
def test_on_a_gpu_the_graph_draws_what_a_newly_captured_blended_pipeline_draws(tmp_path):
    tuned = copytree(EMBEDDED, tmp_path / "tuned")
    weights = load_file(tuned / UNET_FILE)
    save_file({key: 0.8 * value for key, value in weights.items()}, tuned / UNET_FILE, {"format": "pt"})
    copytree(tuned / "unet", tuned / "checkpoint-5" / "unet")
    folders = (EMBEDDED, tuned)
    turns, captured = take_turns(folders, torch.float16, "cuda"), CapturedUNet(pytest.fail)
    drawn, places = {}, set()
    for number, name in enumerate(names := [BASELINE, FINETUNED, "finetuned@0.5", "finetuned@0.75"]):
        pipeline = turns.pipeline(name, names[number + 1 :])
        drawn[name] = pixels(pipeline, captured, steps=10)
        places.add(pipeline.unet.conv_in.weight.data_ptr())
    assert len(places) == 1 and len(captured._graphs) == 1  # the graph's own buffer, whichever model's turn it is
    assert np.abs(drawn["finetuned@0.5"] - drawn[FINETUNED]).mean() > 2
    for name in names:
        fresh = load_pipeline(read_base(write(folders, name, tmp_path / name)), torch.float16, torch.device("cuda"))
        assert np.abs(pixels(fresh, CapturedUNet(pytest.fail), steps=10) - drawn[name]).mean() <= 0.1
