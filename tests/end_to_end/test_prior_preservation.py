"""Prior preservation: the script with class images, from end to end."""

from tests.helpers.script import as_argv, run, run_json
from train_dreambooth_colossalai import main
from utils.command_line import run_main
from utils.data import class_images
from utils.models.check import check_base_model
from utils.run.resume import hash_files


def test_class_images_are_made_once(prior, capsys):
    run(prior)
    assert "have 0, need 5, will make 5" in capsys.readouterr().out
    folder = prior["class_data_dir"]
    assert sorted(path.name for path in folder.iterdir()) == [f"class-{n:05d}.png" for n in range(5)]
    made = [class_images.read_metadata(path) for path in folder.iterdir()]
    settings = dict(scheduler="PNDMScheduler", num_inference_steps=2, guidance_scale=7.5, height=32, width=32)
    base = check_base_model(prior["pretrained_model_name_or_path"])
    model = class_images.model_hash(hash_files(base)["sha256"])
    settings |= dict(prompt="a photo of a cat.", model=model)
    assert all(metadata["settings"] == settings for metadata in made)
    assert len({metadata["seed"] for metadata in made}) == 5
    recorded = dict(folder=str(folder), prompt="a photo of a cat.", num_used=5)
    assert run_json(prior["output_dir"])["class_images"] == [recorded]
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    run(prior)
    assert "have 5, need 5, will make 0, will use 5" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_class_folder_that_cannot_be_written(prior, tmp_path, capsys, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device", "class-00000.png")

    monkeypatch.setattr("utils.data.class_images.write_class_image", full_disk)
    assert run_main(main, as_argv(prior)) == 2
    said = capsys.readouterr().err
    assert "No space left on device: 'class-00000.png'" in said and "Traceback" not in said
