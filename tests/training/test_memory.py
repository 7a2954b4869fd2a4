"""The estimate of GPU memory, what it advises, and the line that a run out of memory ends with."""

import json
import os

import pytest
import torch

from bench.memory import main as measure
from bench.memory import smallest_card
from tests.helpers.script import EMBEDDED, REQUIRED, as_argv
from train_dreambooth_colossalai import main
from utils.arguments import parse_args
from utils.command_line import run_main
from utils.errors import RunFailed
from utils.run.plan import memory_needs
from utils.training import memory
from utils.training.memory import MemoryNeeds

SD = 859_520_964


def make_needs(*given: str) -> MemoryNeeds:
    args = parse_args([*REQUIRED, "--train_batch_size=1", "--mixed_precision=fp16", *given])
    return memory_needs(args, num_parameters=SD, num_ranks=int(os.environ.get("WORLD_SIZE", "1")))


def gigabytes(*given: str) -> float:
    return memory.memory_needed(make_needs(*given)) / 1e9


def test_what_was_measured():
    """docs/benchmarks.md, one H200."""
    assert gigabytes() == pytest.approx(12.36, abs=0.1)
    assert gigabytes("--gradient_checkpointing") == pytest.approx(12.29, abs=0.1)
    assert gigabytes("--train_batch_size=8") == pytest.approx(16.78, abs=0.1)


def test_each_flag_takes_away_its_part():
    in_fp32 = memory.memory_parts(make_needs("--mixed_precision=no", "--offload_optimizer=all"))
    assert (in_fp32["weights"], in_fp32["masters"]) == (4 * SD, 0)
    one, two = (gigabytes("--train_batch_size=4", *more) for more in ((), ("--resolution=256",)))
    assert one > two > gigabytes("--low_memory")
    assert gigabytes("--with_prior_preservation", "--class_prompt=x", "--class_data_dir=y") == pytest.approx(
        gigabytes("--train_batch_size=2")
    )


def test_several_ranks_have_buckets_all_the_time(monkeypatch):
    alone, in_8_bits = gigabytes(), gigabytes("--use_8bit_adam")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert gigabytes() == pytest.approx(alone + 0.77, abs=0.01)
    assert gigabytes("--use_8bit_adam") == pytest.approx(in_8_bits + 0.77, abs=0.01)


def test_host_memory():
    assert memory.host_memory_needed(make_needs()) == 0
    assert memory.host_memory_needed(make_needs("--offload_optimizer=moments")) == 8 * SD
    assert memory.host_memory_needed(make_needs("--low_memory")) == 10 * SD
    assert memory.host_memory_needed(make_needs("--low_memory", "--mixed_precision=no")) == 8 * SD
    assert memory.host_memory_needed(make_needs("--low_memory", "--use_8bit_adam")) < 4.1 * SD


GIB = 1 << 30


@pytest.mark.parametrize(
    ("files", "own", "expected"),
    [
        ({}, "", 100 * GIB),  # no limit
        ({"memory.max": "max", "memory.current": 5 * GIB}, "0::/", 100 * GIB),
        ({"memory.max": 12 * GIB, "memory.current": 5 * GIB}, "0::/", 7 * GIB),
        ({"memory.max": 12 * GIB, "memory.current": 5 * GIB, "memory.stat": f"inactive_file {GIB}"}, "0::/", 8 * GIB),
        ({"a/b/memory.max": 3 * GIB, "a/b/memory.current": GIB, "memory.max": "max"}, "0::/a/b", 2 * GIB),
        ({"a/memory.max": 3 * GIB, "a/memory.current": GIB}, "0::/a/b", 2 * GIB),  # the group above has the limit
        ({"a/memory.max": 3 * GIB, "a/memory.current": GIB}, "7:memory:/b\n0::/a", 2 * GIB),
    ],
)
def test_a_container_has_less_memory_than_its_machine(tmp_path, monkeypatch, files, own, expected):
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {100 * GIB // 1024} kB\n")
    (tmp_path / "own").write_text(own)
    for name, content in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
        if not path.with_name("memory.stat").exists():
            path.with_name("memory.stat").write_text("anon 1\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    assert memory.free_host_memory() == expected


def test_the_flags_that_are_advised_save_what_is_said():
    found = dict(memory.alternatives(make_needs("--train_batch_size=8")))
    assert list(found) == [
        "--gradient_checkpointing",
        "--use_8bit_adam",
        "--offload_optimizer moments",
        "--offload_optimizer all",
        "--low_memory",
        "--train_batch_size 4",
    ]
    for advice, needed in found.items():
        assert needed / 1e9 == pytest.approx(gigabytes("--train_batch_size=8", *advice.split()))
    assert dict(memory.alternatives(make_needs("--low_memory"))) == {}
    assert list(dict(memory.alternatives(make_needs("--offload_optimizer=moments")))) == [
        "--offload_optimizer all",
        "--low_memory",
    ]


def test_the_line():
    line = memory.out_of_memory_line(make_needs("--gradient_checkpointing"))
    assert "needs about 12.3 GB" in line and "--offload_optimizer all 8.6 GB" in line
    assert "--gradient_checkpointing" not in line and "--low_memory" not in line
    assert "What saves" not in memory.out_of_memory_line(make_needs("--low_memory"))


def full(*args, **kwargs):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def host_full(*args, **kwargs):
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")


PLACES = [
    "utils.training.train_step.TrainStep.__call__",
    "utils.data.inputs.encode_inputs",
    "utils.training.flat_parameters.FlatParameters.__init__",
]


@pytest.mark.parametrize("place", PLACES)
def test_out_of_memory_anywhere_is_one_line(flags, tmp_path, monkeypatch, capsys, place):
    monkeypatch.setattr(place, full)
    assert run_main(main, as_argv(flags)) == 1
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith("error: the GPU's memory is full") and "--resolution" in last
    assert not torch.distributed.is_initialized() and not (tmp_path / "output/model_index.json").exists()
    monkeypatch.setattr(place, host_full)
    assert run_main(main, as_argv(flags | dict(overwrite_output_dir=True))) == 1
    assert "error: the host's memory is full" in capsys.readouterr().err


def test_other_errors_stay_what_they_are(flags, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a matrix of the wrong shape")

    monkeypatch.setattr("utils.training.train_step.TrainStep.__call__", broken)
    with pytest.raises(RuntimeError, match="wrong shape"):
        main(as_argv(flags))


def test_another_rank_says_it_itself(flags, monkeypatch, capsys):
    for name, value in dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="head").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunFailed), memory.out_of_memory_in_one_line(make_needs()):
        full()
    assert capsys.readouterr().err.startswith("error: rank 1: the GPU's memory is full")


@pytest.mark.gpu
@pytest.mark.parametrize("fraction", [1e-6, 1e-3])
def test_a_gpu_that_is_too_small(flags, capsys, fraction):
    """The embedded model, on a card of which it may have next to nothing."""
    flags |= dict(pretrained_model_name_or_path=EMBEDDED, resolution=64, train_batch_size=64, mixed_precision="fp16")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(fraction)
    try:
        assert run_main(main, as_argv(flags)) == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    text = capsys.readouterr().err
    assert "error: the GPU's memory is full" in text and "Traceback" not in text


def test_the_table_of_measurements(tmp_path, tiny_pipeline_dir, photos_dir, capsys):
    """On a CPU there is no GPU memory to measure: the command, its flags and its table."""
    arguments = [f"--model={tiny_pipeline_dir}", f"--photos={photos_dir}", f"--json={tmp_path / 'a.json'}"]
    rows = measure([*arguments, "--only", "low_memory", "--steps=2", "--use_8bit_adam"])["rows"]
    assert [row["flags"] for row in rows] == ["--low_memory --use_8bit_adam"]
    assert rows[0]["ms_a_step"] > 0 and len(rows[0]["losses"]) == 2 and rows[0]["estimated_bytes"] > 3e8
    assert json.loads((tmp_path / "a.json").read_text())["rows"] == rows
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("| --low_memory --use_8bit_adam | 1 | - | ")
    assert len({line.count("|") for line in lines[1:]}) == 1
    assert smallest_card(7.8e9, None) == "8 GB" and smallest_card(7.8e9, 8.7e9) == "12 GB"
    assert smallest_card(23e9, 24e9) == "24 GB" and smallest_card(90e9, None) == "none"
