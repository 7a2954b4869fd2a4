"""What an exported file says of itself, and what it keeps to itself."""

import base64
import hashlib
import io
import json
import struct
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open

from tests.helpers.script import run, run_json
from utils.models.metadata import file_metadata
from utils.models.single_file import export_single_file

# What A1111's model cards, ComfyUI's managers and SwarmUI read: required and recommended keys of ModelSpec 1.0.1.
MODELSPEC = {"sai_model_spec", "architecture", "implementation", "title", "resolution", "date", "hash_sha256"}
MODELSPEC |= {"trigger_phrase", "prediction_type", "description"}


def header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def test_a_trained_file_says_what_it_is_and_nothing_of_the_machine(flags, tmp_path):
    run(flags, seed=7, snr_gamma=5, export_single_file=tmp_path / "my-cat.safetensors")
    found = header(tmp_path / "my-cat.safetensors")
    assert {f"modelspec.{key}" for key in MODELSPEC} <= found.keys()
    wanted = dict(architecture="stable-diffusion-v1", title="my-cat", resolution="32x32", prediction_type="epsilon")
    wanted |= dict(trigger_phrase="a photo of my cat.", date=run_json(tmp_path / "output")["started_at"])
    assert {key: found[f"modelspec.{key}"] for key in wanted} == wanted
    wanted = dict(ss_learning_rate="0.001", ss_max_train_steps="3", ss_seed="7", ss_resolution="(32, 32)")
    wanted |= dict(ss_min_snr_gamma="5.0", ss_mixed_precision="no", ss_base_model_version="sd_v1", ss_v2="False")
    wanted |= dict(ss_num_train_images="4", ss_num_reg_images="0", ss_sd_model_name="tiny")
    assert {key: found[key] for key in wanted} == wanted
    assert json.loads(found["ss_tag_frequency"]) == {"photos": {"a photo of my cat.": 4}}
    text = json.dumps(found)
    assert str(tmp_path) not in text and "photo-0" not in text and str(flags["instance_data_dir"]) not in text


def test_the_hash_is_of_all_that_follows_the_header(tmp_path, tiny_pipeline_dir):
    export_single_file(tiny_pipeline_dir, tmp_path / "one.safetensors")
    content = (tmp_path / "one.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    digest = hashlib.sha256(content[8 + length :]).hexdigest()
    assert header(tmp_path / "one.safetensors")["modelspec.hash_sha256"] == f"0x{digest}"


def test_a_base_has_no_keys_of_a_training(tmp_path, tiny_pipeline_dir):
    export_single_file(tiny_pipeline_dir, tmp_path / "one.safetensors")
    found = header(tmp_path / "one.safetensors")
    assert [key for key in found if key.startswith("ss_")] == []
    assert found["modelspec.resolution"] == "32x32" and "modelspec.trigger_phrase" not in found


def test_captions_and_several_subjects_are_the_trigger_phrase():
    photos = [dict(file="a.jpg"), dict(file="b.jpg", prompt="a sks dog, sitting"), dict(file="c.jpg")]
    made = dict(arguments=dict(instance_prompt="a sks dog"), photos=photos)
    found = file_metadata(made, title="x", image_size=(512, 768), prediction_type="v_prediction")
    assert found["modelspec.trigger_phrase"] == "a sks dog, a sks dog, sitting"
    assert (found["modelspec.resolution"], found["modelspec.prediction_type"]) == ("768x512", "v")
    assert json.loads(found["ss_tag_frequency"]) == {"photos": {"a sks dog": 2, "a sks dog, sitting": 1}}
    assert found["ss_v_parameterization"] == "True"


def test_a_damaged_run_json_does_not_keep_a_file_from_being_written():
    for made in (dict(arguments=3, photos=[4], class_images=None), dict(program="x"), dict(photos="no")):
        found = file_metadata(made, title="x", image_size=(64, 64))
        assert all(isinstance(value, str) for value in found.values())


def test_the_last_validation_picture_is_the_thumbnail(flags, tmp_path):
    file = tmp_path / "one.safetensors"
    pictures = dict(validation_prompt="a cat", validation_inference_steps=2, num_validation_images=2)
    run(flags, **pictures, validation_steps=3, export_single_file=file)
    kind, _, content = header(file)["modelspec.thumbnail"].partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as found:
        assert found.size == (32, 32)
        with Image.open(tmp_path / "output/validation/step-000003-seed-0.png") as drawn:
            assert np.abs(np.asarray(found, int) - np.asarray(drawn, int)).mean() < 30  # JPEG of noise
    (tmp_path / "output/validation/step-000003-seed-0.png").write_bytes(b"no picture")
    export_single_file(tmp_path / "output", file)
    assert "modelspec.thumbnail" not in header(file)
