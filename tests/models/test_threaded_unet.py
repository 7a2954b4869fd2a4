"""A UNet that samples in threads draws the same pictures, and leaves no trace."""

import threading

import numpy as np
import pytest
import torch

from utils.models.drawing import sample
from utils.models.loading import load_pipeline
from utils.models.threaded_unet import ThreadedUNet


@pytest.fixture
def pipeline(tiny_pipeline_dir):
    pipeline = load_pipeline(tiny_pipeline_dir, torch.float32, torch.device("cpu"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(params=[2, 3])
def num_threads(request):
    """So many of torch's threads, whatever this machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def calls(pipeline, monkeypatch) -> list[tuple[int, int, bool]]:
    """Of each call of the UNet: its rows, the threads that share its operations, whether it was in the main thread."""
    found, forward = [], type(pipeline.unet).forward

    def watched(self, rows, *args, **kwargs):
        found.append((len(rows), torch.get_num_threads(), threading.current_thread() is threading.main_thread()))
        return forward(self, rows, *args, **kwargs)

    monkeypatch.setattr(type(pipeline.unet), "forward", watched)
    return found


def pixels(pipeline, **options) -> np.ndarray:
    images = sample(pipeline, ["a cat", "a dog", "a house"], [0, 1, 2], num_inference_steps=3, **options)
    return np.stack([np.asarray(image, int) for image in images])


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_pictures_are_those_of_the_whole_batch(pipeline, num_threads, guidance_scale):
    plain = pixels(pipeline, guidance_scale=guidance_scale)
    threaded = pixels(pipeline, guidance_scale=guidance_scale, captured=ThreadedUNet())
    assert np.abs(plain - threaded).max() <= 1
    assert np.array_equal(threaded, pixels(pipeline, guidance_scale=guidance_scale, captured=ThreadedUNet()))


def test_each_part_is_one_threads_own_work(pipeline, num_threads, calls):
    sample(pipeline, "a cat", [0, 1, 2], num_inference_steps=1, captured=ThreadedUNet())
    assert set(calls) == {(6 // num_threads, 1, False)} and len(calls) % num_threads == 0


def test_afterwards_everything_is_as_it_was(pipeline, num_threads):
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), ThreadedUNet().serving(pipeline):
        assert "forward" in vars(pipeline.unet) and threading.active_count() == before + num_threads
        _ = 1 / 0
    assert "forward" not in vars(pipeline.unet) and threading.active_count() == before
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start(), thread.join()
    assert [torch.get_num_threads(), *found] == [num_threads, num_threads]


def test_large_images_and_single_ones_are_not_divided(pipeline, num_threads, calls, monkeypatch):
    sample(pipeline, "a cat", [0], num_inference_steps=1, guidance_scale=1.0, captured=ThreadedUNet())
    monkeypatch.setattr("utils.models.threaded_unet._MAX_POSITIONS", 1)
    sample(pipeline, "a cat", [0, 1], num_inference_steps=1, captured=ThreadedUNet())
    assert set(calls) == {(1, num_threads, True), (4, num_threads, True)}
