"""--compile, and what it says of itself."""

import pytest
import torch

from tests.helpers.script import as_argv, rows
from train_dreambooth_colossalai import main
from utils.arguments import parse_args
from utils.compiled_step import TRIAL_STEPS, report
from utils.errors import UserError


def test_the_report_says_when_it_pays():
    assert report(0.0, 1.0, 101.0, 101.8) == (
        "--compile took 100 s; a step takes 40.0 ms, it took 50.0 ms: it pays in runs of more than 10,000 steps"
    )
    assert report(0.0, 0.4, 190.4, 190.9).endswith("it never pays on this machine, leave it out")


def test_it_needs_the_graph(flags):
    with pytest.raises(UserError, match="leave out --no_cuda_graph"):
        parse_args(as_argv(flags | dict(compile=True, no_cuda_graph=True)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says this on a CPU")
def test_on_a_cpu_it_changes_nothing(flags, capsys):
    assert main(as_argv(flags | dict(compile=True))) == 0
    assert "--compile is for GPUs: it changes nothing here" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_it_trains_as_without(flags, tmp_path, capsys):
    flags |= dict(max_train_steps=2 * TRIAL_STEPS + 12, learning_rate=1e-4)
    assert main(as_argv(flags | dict(output_dir=tmp_path / "plain"))) == 0
    assert main(as_argv(flags | dict(output_dir=tmp_path / "compiled", compile=True))) == 0
    said = capsys.readouterr().err
    assert "torch.compile begins" in said and "--compile took" in said and "could not be captured" not in said
    for ours, theirs in zip(rows(tmp_path / "compiled"), rows(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
