"""Model folders made by somebody else, with mistakes or with intent: one line, and nothing of theirs is run."""

import copy
import json
import os
import random
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.fuzzing import FUZZ, SECONDS_OF_FUZZ
from tests.helpers.pipelines import edited
from tests.helpers.script import UNET_FILE, dry_run
from utils.errors import UserError
from utils.models.check import check_base_model


def change_header(base: Path, change) -> None:
    content = (base / UNET_FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    (base / UNET_FILE).write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])


def swap_sizes(header: dict) -> None:
    header["conv_in.weight"]["shape"] = [1, 1]


def overlap(header: dict) -> None:
    one, other = list(header)[1:3]
    header[one]["data_offsets"] = header[other]["data_offsets"]


MODELS = {
    "channels a text": (edited("unet", in_channels="4"), "in_channels is '4', not a sensible"),
    "channels null": (edited("vae", latent_channels=None), "latent_channels is None"),
    "channels endless": (edited("unet", in_channels=10**12), "is 1000000000000, not a sens"),
    "blocks a text": (edited("vae", block_out_channels="many"), "block_out_channels is 'many'"),
    "blocks none": (edited("vae", block_out_channels=[]), r"channels is \[\], not"),
    "blocks true": (edited("unet", block_out_channels=[True]), "block_out_channels is True"),
    "width a list": (edited("text_encoder", hidden_size=[16]), r"hidden_size is \[16\]"),
    "nested": (lambda b: (b / "unet/config.json").write_text("[" * 100_000), "cannot be read as JSON"),
    "foreign class": (
        edited("", evil=["os", "system"]),
        r"evil is \['os', 'system'\]: only classes of diffusers and transformers are imported",
    ),
    "foreign unet": (edited("", unet=["evil", "UNet2DConditionModel"]), "unet is .'evil'"),
    "class of one": (edited("", vae=["diffusers"]), r"vae is \['diffusers'\]"),
    "class a number": (edited("", unet=7), "unet is 7, but"),
    "lying shape": (lambda b: change_header(b, swap_sizes), "is not a whole safetensors file .*(shape|offset)"),
    "overlapping": (lambda b: change_header(b, overlap), "is not a whole safetensors file .*offset"),
    "header of the file's length": (
        lambda b: (b / UNET_FILE).write_bytes(b"\xff" * 8 + (b / UNET_FILE).read_bytes()[8:]),
        "is not a whole safetensors file .*header too large",
    ),
    "negative shape": (
        lambda b: change_header(b, lambda h: h["conv_in.bias"].update(shape=[-16])),
        "not a whole .*-16",
    ),
    "a fifo for weights": (lambda b: ((b / UNET_FILE).unlink(), os.mkfifo(b / UNET_FILE)), "is not a regular file"),
    "a folder for weights": (lambda b: ((b / UNET_FILE).unlink(), (b / UNET_FILE).mkdir()), "is not a regular file"),
    "a fifo for a configuration": (
        lambda b: ((b / "unet/config.json").unlink(), os.mkfifo(b / "unet/config.json")),
        "unet/config.json is not a regular file",
    ),
    "vocabulary no JSON": (lambda b: (b / "tokenizer/vocab.json").write_text("{"), "holds no CLIP tokenizer"),
    "vocabulary of lists": (lambda b: (b / "tokenizer/vocab.json").write_text('{"a": []}'), "holds no CLIP tokenizer"),
    "merges of nothing": (lambda b: (b / "tokenizer/merges.txt").write_text("#version\nqq zz\n"), "no CLIP tokenizer"),
    "a schedule of text": (lambda b: (b / "scheduler/scheduler_config.json").write_text('"x"'), "JSON object"),
}


@pytest.mark.parametrize("case", MODELS)
def test_model_folders(tmp_path, base, photos_dir, capsys, case):
    spoil, message = MODELS[case]
    spoil(base)
    modules = set(sys.modules)
    code, out, err = dry_run(base, photos_dir, tmp_path, capsys)
    assert code == 2 and err == "" and "NOT READY" in out
    assert re.search(message, out), out
    assert not {name for name in set(sys.modules) - modules if name.split(".")[0] == "evil"}
    assert not (tmp_path / "output").exists()


def test_pickles_are_refused_where_torch_cannot_read_them_safely(base, monkeypatch):
    (base / UNET_FILE).unlink()
    torch.save({"conv_in.weight": torch.zeros(16, 4, 3, 3)}, base / "unet/diffusion_pytorch_model.bin")
    check_base_model(base)
    monkeypatch.setattr("utils.models.weight_files.torch_version", lambda: (2, 5))
    with pytest.raises(UserError, match=r"is a pickle, .*torch 2.6 \(CVE-2025-32434\): update it"):
        check_base_model(base)


def test_a_pickle_that_runs_code_runs_none(tmp_path, base, photos_dir, capsys):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harmed"),)

    (base / UNET_FILE).unlink()
    torch.save({"conv_in.weight": Evil()}, base / "unet/diffusion_pytorch_model.bin")
    code, out, _ = dry_run(base, photos_dir, tmp_path, capsys)
    assert code == 2 and "holds more than weights: reading it would run posix.mkdir" in out
    assert not (tmp_path / "harmed").exists()


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.slow
def test_fuzzed_model_folders(tmp_path, base):
    end, outcomes = time.monotonic() + SECONDS_OF_FUZZ, dict(passed=0, refused=0)
    names = ["model_index.json", *(f"{p}/config.json" for p in ("unet", "vae", "text_encoder"))]
    whole = {name: json.loads((base / name).read_text()) for name in [*names, "scheduler/scheduler_config.json"]}
    weights = (base / UNET_FILE).read_bytes()
    header_bytes = 8 + int.from_bytes(weights[:8], "little")

    @settings(max_examples=20_000, **FUZZ)
    @given(st.sampled_from(sorted(whole)), st.integers(0, 100), JSON_VALUES, st.integers(0, 2**32), st.booleans())
    def read(name: str, place: int, value, seed: int, in_weights: bool) -> None:
        if time.monotonic() > end:
            return
        changed, spoilt = copy.deepcopy(whole[name]), bytearray(weights)
        chance = random.Random(seed)
        if in_weights:
            for _ in range(chance.randrange(1, 5)):
                spoilt[chance.randrange(header_bytes)] = chance.randrange(256)
        else:
            changed[sorted(changed)[place % len(changed)]] = value
        (base / name).write_text(json.dumps(changed))
        (base / UNET_FILE).write_bytes(spoilt)
        try:
            check_base_model(base)
            outcomes["passed"] += 1
        except UserError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
        finally:
            (base / name).write_text(json.dumps(whole[name]))

    read()
    print(outcomes)
    assert min(outcomes.values()) > 100
