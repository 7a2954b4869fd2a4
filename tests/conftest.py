"""The fixtures that several folders of tests share: a tiny base model, photos, the flags of a short run."""

import gc
import os
import shutil
from pathlib import Path

os.environ["DREAMBOOTH_DEPRECATIONS"] = "1"  # before the libraries are imported: pyproject.toml makes errors of them

import pytest
import torch

from tests.helpers import processes, skips
from tests.helpers.pipelines import write_photos, write_pipeline
from tests.helpers.script import SHORT
from tests.helpers.tolerances import LIMITS
from utils.data import class_images

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # one: tiny models gain nothing by more


# torch asks the processor itself whether oneDNN can multiply bf16, but its own kernels were told to be lesser ones.
BF16_OF_A_STAND_IN = "pack_vnni2 is only supported when avx512 is supported"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Where this processor stands in for a lesser one (tests/processors.py), leaves out the bf16 that ends in that."""
    try:
        return (yield)
    except RuntimeError as error:
        if BF16_OF_A_STAND_IN in str(error) and any(name in os.environ for name in LIMITS):
            pytest.skip("bf16 of torch's plain kernels does not run on a processor with AVX-512")
        raise


def pytest_runtest_setup(item):
    """What is marked `gpu` needs one."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


def pytest_collection_finish():
    """A million objects of the libraries and of the tests stay to the end: the collector need not look at them."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter):
    """What was left out, and what would run it."""
    for line in skips.lines(terminalreporter.stats):
        terminalreporter.write_line(line)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """STRICT_SKIPS=1, as .ci/run has it: a skip that is not on the list of tests/helpers/skips.py is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("STRICT_SKIPS") == "1" and skips.unexpected(reporter.stats):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="module", autouse=True)
def one_thread_to_fork_with(request):
    """A forked process has none of OpenMP's threads but would wait for them: one thread in tests that fork."""
    num_threads = torch.get_num_threads()
    if any(getattr(value, "__module__", "") == processes.__name__ for value in vars(request.module).values()):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True)
def the_same_draws():
    """Whichever test ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> Path:
    """Where this test session keeps what it makes of single files."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["DREAMBOOTH_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pipeline_dir(tmp_path_factory) -> Path:
    """Never write into it: it is shared by all tests."""
    return write_pipeline(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def base(tmp_path, tiny_pipeline_dir) -> Path:
    """A copy of the tiny pipeline to spoil."""
    return shutil.copytree(tiny_pipeline_dir, tmp_path / "base")


@pytest.fixture(scope="session")
def photos_dir(tmp_path_factory) -> Path:
    """Four square photos; never write into it."""
    return write_photos(tmp_path_factory.mktemp("photos") / "instance")


@pytest.fixture
def flags(tmp_path, tiny_pipeline_dir, photos_dir) -> dict:
    """A run of 3 steps in fp32; a value of True is a flag without value, None leaves it out."""
    inputs = dict(pretrained_model_name_or_path=tiny_pipeline_dir, instance_data_dir=photos_dir)
    return inputs | dict(output_dir=tmp_path / "output") | SHORT


@pytest.fixture
def output(flags) -> Path:
    """Where such a run leaves its result."""
    return flags["output_dir"]


@pytest.fixture
def prior(flags, tmp_path, monkeypatch) -> dict:
    """A run with 5 class images, made in 2 denoising steps."""
    monkeypatch.setattr(class_images, "NUM_INFERENCE_STEPS", 2)
    return flags | dict(
        with_prior_preservation=True,
        class_data_dir=tmp_path / "class",
        class_prompt="a photo of a cat.",
        num_class_images=5,
    )
