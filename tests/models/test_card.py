"""The model card of a result: what the Hub needs, what a reader needs, and nothing of this machine."""

import json
from pathlib import Path

import pytest
import yaml

import evaluate
from tests.helpers.script import run, run_json
from utils.command_line import run_main
from utils.models.card import MARK, clean_record, write_card
from utils.share import main as share


@pytest.fixture
def output(flags, tmp_path) -> Path:
    """What a run left."""
    run(flags, checkpointing_steps=2)
    return tmp_path / "output"


def front_matter(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])


def test_training_writes_a_card(output, tmp_path, flags):
    text = (output / "README.md").read_text(encoding="utf-8")
    front = front_matter(output)
    assert front["library_name"] == "diffusers" and front["instance_prompt"] == "a photo of my cat."
    assert {"text-to-image", "dreambooth", "stable-diffusion", "stable-diffusion-diffusers"} <= set(front["tags"])
    assert "base_model" not in front and "license" not in front  # a local folder, and not of v1's size
    assert "| steps | 3 |" in text and "| learning rate | 0.001 |" in text and "4 photos" in text
    assert 'pipeline("' not in text and "pipeline('a photo of my cat.').images[0]" in text
    assert str(tmp_path) not in text and "photo-0" not in text and str(flags["instance_data_dir"]) not in text


def test_the_four_lines_load_it(output, monkeypatch, tmp_path):
    code = (output / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    code = code.replace("PATH_OR_NAME", str(output)).replace('.to("cuda")', "").replace("float16", "float32")
    monkeypatch.chdir(tmp_path)
    exec(code.replace(").images", ", num_inference_steps=1).images"), {})
    assert (tmp_path / "picture.png").stat().st_size > 100
    assert len([line for line in code.splitlines() if line]) == 4


def test_an_evaluation_adds_scores_and_picture_and_another_run_takes_them_away(output, tmp_path, flags):
    quick = ["--num_images=1", "--num_drift_images=0", "--num_inference_steps=1"]
    evaluate.main([f"--finetuned_model_name_or_path={output}", f"--output_dir={tmp_path / 'result'}", *quick])
    text = (output / "README.md").read_text(encoding="utf-8")
    assert "(comparison.png)" in text and (output / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    write_card(output, metrics=dict(models=dict(baseline=dict(clip_i=dict(value=0.5)), finetuned={})))
    assert "| CLIP-I | 0.500 | - |" in (output / "README.md").read_text(encoding="utf-8")
    assert not (output / "comparison.png").exists()


def test_a_card_of_the_users_own_stays(output):
    mine = (output / "README.md").read_text(encoding="utf-8").replace(MARK, "") + "mine"
    (output / "README.md").write_text(mine)
    assert not write_card(output) and (output / "README.md").read_text() == mine
    (output / "README.md").unlink()
    assert write_card(output)


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
    write_card(output)
    assert front_matter(output).get("base_model") == base
    assert "/home/me" not in (output / "README.md").read_text(encoding="utf-8")


def test_words_of_the_user_are_no_markup(output):
    record = run_json(output)
    record["arguments"]["instance_prompt"] = "a <b>photo</b> of [sks](http://x) | cat: 'yes'\n# no"
    (output / "run.json").write_text(json.dumps(record))
    write_card(output)
    text = (output / "README.md").read_text(encoding="utf-8")
    assert front_matter(output)["instance_prompt"] == record["arguments"]["instance_prompt"]
    body = text.split("```")[0].split("---", 2)[2]
    assert "<b>" not in body.replace("\\<b\\>", "") and "\n# no" not in body


def test_the_licence_is_that_of_the_bases_own_card(flags, base, tmp_path):
    (base / "README.md").write_text("---\nlicense: cc0-1.0\n---\nA base.")
    run(flags, pretrained_model_name_or_path=base)
    assert front_matter(tmp_path / "output")["license"] == "cc0-1.0"


def test_a_folder_to_upload(output, tmp_path, capsys, flags):
    assert run_main(share, [str(output), str(tmp_path / "new/cat")]) == 0
    found = {str(path.relative_to(tmp_path / "new/cat")) for path in (tmp_path / "new/cat").rglob("*")}
    assert {"README.md", "run.json", "model_index.json", "unet/diffusion_pytorch_model.safetensors"} <= found
    assert not [name for name in found if name.startswith(("checkpoint-", "metrics", "logs"))]
    text = (tmp_path / "new/cat/run.json").read_text()
    for secret in (str(tmp_path), "photo-0", str(flags["instance_data_dir"]), run_json(output)["photos"][0]["sha256"]):
        assert secret not in text
    record = json.loads(text)
    assert record["arguments"]["learning_rate"] == 1e-3 and "command" not in record
    assert record["arguments"]["pretrained_model_name_or_path"] == "tiny"
    assert run_main(share, [str(output), str(tmp_path / "new/cat")]) == 2
    assert run_main(share, [str(output), str(output / "inside")]) == 2
    assert run_main(share, [str(flags["pretrained_model_name_or_path"]), str(tmp_path / "b")]) == 2
    said = capsys.readouterr().err
    assert "is not an empty folder" in said and "overlaps" in said and "was not written by training" in said


def test_a_damaged_record_is_cleaned_without_a_fault():
    assert clean_record({"arguments": 3, "photos": "x", "device": "/dev/x"}) == {
        "arguments": 3,
        "photos": "x",
        "device": "x",
    }
