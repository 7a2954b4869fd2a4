"""What a result says of itself, in its card and in a file's header: what readers need, and nothing of this machine."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load
from safetensors.torch import load_file, save_file

from tests.helpers import evaluating
from tests.helpers.pipelines import edit_json, header, write_shards
from tests.helpers.script import SHORT, run, run_json
from utils.command_line import run_main
from utils.models.card import MARK, file_metadata, settings_of, write_card
from utils.models.folder import read_base
from utils.models.loading import load_pipeline
from utils.models.single_file import export_single_file
from utils.models.weight_files import read_tensors
from utils.run.resume import NOT_COMPARED
from utils.share import main as share


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_pipeline_dir, photos_dir) -> Path:
    """What a run left. Never write into it."""
    output = tmp_path_factory.mktemp("trained") / "output"
    inputs = dict(pretrained_model_name_or_path=tiny_pipeline_dir, instance_data_dir=photos_dir)
    run(SHORT | inputs | dict(output_dir=output), checkpointing_steps=2)
    return output


@pytest.fixture
def output(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "output")


def front_matter(folder: Path) -> dict:
    return metadata_load(folder / "README.md")


def test_training_writes_a_card(output, trained, flags):
    text = (output / "README.md").read_text(encoding="utf-8")
    front = front_matter(output)
    assert front["library_name"] == "diffusers" and front["instance_prompt"] == "a photo of my cat."
    assert {"text-to-image", "dreambooth", "stable-diffusion", "stable-diffusion-diffusers"} <= set(front["tags"])
    assert "base_model" not in front and "license" not in front  # a local folder, and not of v1's size
    assert "| max_train_steps | 3 |" in text and "| learning_rate | 0.001 |" in text and "4 photos" in text
    assert 'pipeline("' not in text and "pipeline('a photo of my cat.').images[0]" in text
    assert str(trained) not in text and "photo-0" not in text and str(flags["instance_data_dir"]) not in text


def test_a_flag_that_changes_the_weights_is_a_setting_by_itself(output):
    """And one that was left alone is named with its default; nobody keeps a list of them."""
    record, text = run_json(output), (output / "README.md").read_text(encoding="utf-8")
    assert record["defaults"].keys() == record["arguments"].keys() - NOT_COMPARED
    for name, default in record["defaults"].items():
        is_given = record["arguments"][name] != default
        assert is_given == (name in settings_of(record)) == (f"| {name} |" in text)
        assert (not is_given and default is not None) == (f"{name} {default}" in text.split("At their defaults: ")[1])
    new = dict(arguments=dict(huber_delta=0.1, max_train_steps=3), defaults=dict(huber_delta=None))
    assert settings_of(new) == dict(max_train_steps=3, huber_delta=0.1)


def test_the_four_lines_load_it(output, monkeypatch, tmp_path):
    code = (output / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    code = code.replace("PATH_OR_NAME", str(output)).replace('.to("cuda")', "").replace("float16", "float32")
    monkeypatch.chdir(tmp_path)
    exec(code.replace(").images", ", num_inference_steps=1).images"), {})
    assert (tmp_path / "picture.png").stat().st_size > 100
    assert len([line for line in code.splitlines() if line]) == 4


def test_an_evaluation_adds_scores_and_picture_and_another_run_takes_them_away(output, tmp_path, flags):
    assert evaluating.run(output, tmp_path / "result", "--num_drift_images=0") == 0
    text = (output / "README.md").read_text(encoding="utf-8")
    assert "(comparison.png)" in text and (output / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    write_card(read_base(output), metrics=dict(models=dict(baseline=dict(clip_i=dict(value=0.5)), finetuned={})))
    assert "| CLIP-I | 0.500 | - |" in (output / "README.md").read_text(encoding="utf-8")
    assert not (output / "comparison.png").exists()


def test_a_card_of_the_users_own_stays(output):
    mine = (output / "README.md").read_text(encoding="utf-8").replace(MARK, "") + "mine"
    (output / "README.md").write_text(mine)
    assert not write_card(read_base(output)) and (output / "README.md").read_text() == mine
    (output / "README.md").unlink()
    assert write_card(read_base(output))


@pytest.mark.parametrize("text", ["no front", "---\na: [\n---\n", "---\n- a\n---\n", "---\nlicense: [a]\n---\n"])
def test_a_damaged_card_of_the_base_does_not_keep_ours_from_being_written(output, base, text):
    (base / "README.md").write_text(text)
    (output / "run.json").write_text(json.dumps(run_json(output) | dict(base_model=dict(folder=str(base)))))
    assert write_card(read_base(output)) and "license" not in front_matter(output)


@pytest.mark.parametrize(
    ("named", "base"),
    [
        ("./model/stable-diffusion-v1-4", "CompVis/stable-diffusion-v1-4"),
        ("runwayml/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5"),
        ("/x/hub/models--someone--a-model/snapshots/abc", "someone/a-model"),
        ("/home/me/dreamlike.safetensors", None),
        ("model/tiny-stable-diffusion", None),
    ],
)
def test_the_bases_name_on_the_hub(output, named, base):
    record = run_json(output)
    record["arguments"]["pretrained_model_name_or_path"] = named
    (output / "run.json").write_text(json.dumps(record))
    write_card(read_base(output))
    assert front_matter(output).get("base_model") == base
    assert "/home/me" not in (output / "README.md").read_text(encoding="utf-8")


OTHERS_WORDS = [
    "a\n---\nb",
    "---",
    "a: b # c",
    "!!python/object:x",
    "x\x00",
    "&a *a",
    "```",
    "a\u2028b\rc",
    "caf\udce9",
    "a <b>photo</b> of [sks](http://x) | cat: 'yes'\n# no",
]


@pytest.mark.parametrize("words", OTHERS_WORDS)
def test_no_words_keep_the_card_from_being_written_and_none_are_markup(output, base, words):
    """A prompt, a name, what a base's card says of itself: text of others."""
    html = "<script>x</script>"
    (base / "README.md").write_text(json.dumps(dict(license=html)).join(["---\n", "\n---\n"]))
    arguments = dict(instance_prompt=words, pretrained_model_name_or_path=f"x/{html}{words}", seed=html)
    others = dict(
        arguments=arguments, defaults={"seed": 0, html: 1, "x": "`" + html}, base_model=dict(folder=str(base))
    )
    (output / "run.json").write_text(json.dumps(run_json(output) | others | dict(device=html, versions={html: html})))
    assert write_card(read_base(output))
    text = (output / "README.md").read_text(encoding="utf-8")
    assert front_matter(output)["instance_prompt"] == words and "license" not in front_matter(output)
    body = text.split(MARK)[1].replace("\\<script\\>", "")
    assert "<script>" not in body.replace(f"x '{html}`", "") and "\n---\nb" not in body
    assert "<b>" not in body.split("```")[0].replace("\\<b\\>", "") and "\n# no" not in body.split("```")[0]


def test_the_licence_is_that_of_the_bases_own_card(flags, base, tmp_path):
    (base / "README.md").write_text("---\nlicense: cc0-1.0\n---\nA base.")
    run(flags, pretrained_model_name_or_path=base)
    assert front_matter(tmp_path / "output")["license"] == "cc0-1.0"


def test_a_folder_to_upload(output, trained, tmp_path, capsys, flags):
    assert run_main(share, [str(output), str(tmp_path / "new/cat")]) == 0
    found = {str(path.relative_to(tmp_path / "new/cat")) for path in (tmp_path / "new/cat").rglob("*")}
    assert {"README.md", "run.json", "model_index.json", "unet/diffusion_pytorch_model.safetensors"} <= found
    assert not [name for name in found if name.startswith(("checkpoint-", "metrics", "logs"))]
    text = (tmp_path / "new/cat/run.json").read_text()
    for secret in (str(tmp_path), str(trained), "photo-0", run_json(output)["photos"][0]["sha256"]):
        assert secret not in text
    assert str(flags["instance_data_dir"]) not in text
    record = json.loads(text)
    assert record["arguments"]["learning_rate"] == 1e-3 and "command" not in record
    assert record["arguments"]["pretrained_model_name_or_path"] == "tiny"
    assert run_main(share, [str(output), str(tmp_path / "new/cat")]) == 2
    assert run_main(share, [str(output), str(output / "inside")]) == 2
    assert run_main(share, [str(flags["pretrained_model_name_or_path"]), str(tmp_path / "b")]) == 2
    said = capsys.readouterr().err
    assert "is not an empty folder" in said and "overlaps" in said and "was not written by training" in said


@pytest.mark.parametrize(
    "path", ["/home/alice/acme", "~/acme", "$HOME/acme", r"C:\Users\alice\acme", "file:///mnt/acme", "../acme/sd"]
)
def test_no_file_of_the_base_names_a_place(flags, base, tmp_path, path):
    words = {"_name_or_path": f"{path}/unet", "from": [f"made by {path}/x.py"], "url": "https://a.org/b/c"}
    words |= {"hashes": {f"{path}/a.bin": "0"}}
    edit_json(base / "model_index.json", _name_or_path=f"{path}/sd")
    write_shards(base, "text_encoder")
    for name in ("unet/config.json", "scheduler/scheduler_config.json"):
        edit_json(base / name, **words)
    edit_json(base / "tokenizer/tokenizer_config.json", special_tokens_map_file=f"{path}/map.json")
    file = base / "vae/diffusion_pytorch_model.safetensors"
    save_file(load_file(file), file, {"format": "pt", "made_from": f"{path}/vae.ckpt"})
    run(flags, pretrained_model_name_or_path=base, export_single_file=tmp_path / "one.safetensors")
    assert run_main(share, [str(tmp_path / "output"), str(tmp_path / "new")]) == 0
    texts = [each.read_text() for each in (tmp_path / "new").rglob("*.json")]
    weights = [tmp_path / "one.safetensors", *(tmp_path / "new").rglob("*.safetensors")]
    texts += [str(read_tensors(each)[1]) for each in weights]
    assert not [text for text in texts if "acme" in text or "alice" in text] and len(texts) > 9
    assert "'made_from': 'vae.ckpt'" in str(texts)
    found = json.loads((tmp_path / "new/unet/config.json").read_text())
    assert (found["_name_or_path"], found["from"], found["url"]) == ("unet", ["made by x.py"], "https://a.org/b/c")
    vocabulary = "tokenizer/vocab.json"
    assert (tmp_path / "new" / vocabulary).read_bytes() == (base / vocabulary).read_bytes()
    load_pipeline(read_base(tmp_path / "new"), torch.float32, torch.device("cpu"))


# What A1111's model cards, ComfyUI's managers and SwarmUI read: required and recommended keys of ModelSpec 1.0.1.
MODELSPEC = {"sai_model_spec", "architecture", "implementation", "title", "resolution", "date"}
MODELSPEC |= {"trigger_phrase", "prediction_type", "description"}


def test_a_trained_file_says_what_it_is_and_nothing_of_the_machine(flags, tmp_path):
    run(flags, seed=7, snr_gamma=5, export_single_file=tmp_path / "my-cat.safetensors")
    found = header(tmp_path / "my-cat.safetensors")
    assert {f"modelspec.{key}" for key in MODELSPEC} <= found.keys()
    wanted = dict(architecture="stable-diffusion-v1", title="my-cat", resolution="32x32", prediction_type="epsilon")
    wanted |= dict(trigger_phrase="a photo of my cat.", date=run_json(tmp_path / "output")["started_at"])
    assert {key: found[f"modelspec.{key}"] for key in wanted} == wanted
    settings = dict(max_train_steps=3, learning_rate=0.001, seed=7, resolution=32, snr_gamma=5.0, mixed_precision="no")
    assert json.loads(found["settings"]).items() >= settings.items() and "ss_" not in "".join(found)
    text = json.dumps(found)
    assert str(tmp_path) not in text and "photo-0" not in text and str(flags["instance_data_dir"]) not in text


def test_a_bases_file_says_what_it_is(tmp_path, tiny_pipeline_dir):
    export_single_file(read_base(tiny_pipeline_dir), tmp_path / "one.safetensors")
    found = header(tmp_path / "one.safetensors")
    assert "settings" not in found
    assert found["modelspec.resolution"] == "32x32" and "modelspec.trigger_phrase" not in found


def test_captions_and_several_subjects_are_the_trigger_phrase(base):
    edit_json(base / "unet/config.json", sample_size=[128, 192])
    edit_json(base / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    photos = [dict(file="a.jpg"), dict(file="b.jpg", prompt="a sks dog, sitting"), dict(file="c.jpg")]
    made = dict(arguments=dict(instance_prompt="a sks dog"), photos=photos)
    found = file_metadata(read_base(base), made, title="x")
    assert found["modelspec.trigger_phrase"] == "a sks dog, a sks dog, sitting"
    assert (found["modelspec.resolution"], found["modelspec.prediction_type"]) == ("768x512", "v")
