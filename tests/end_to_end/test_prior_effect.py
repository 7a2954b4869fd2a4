"""What prior preservation is for, on the embedded model: the subject is learned, and the class stays what it was."""

from pathlib import Path

import pytest

from bench.prompt_distance import distances
from tests.helpers.likeness import likeness
from tests.helpers.script import EMBEDDED, ROOT, as_argv
from train_dreambooth_colossalai import main
from utils.data import class_images

CLASS = "a photo of a cat"
SUBJECT = "a photo of whiskers cat"


def train(folder: Path, **changes) -> Path:
    """100 steps of run.sh's values at twice its learning rate: a third of docs/more_than_one_wish.md's runs."""
    flags = dict(
        pretrained_model_name_or_path=EMBEDDED,
        instance_data_dir=ROOT / "instance",
        output_dir=folder,
        instance_prompt=SUBJECT,
        resolution=64,
        train_batch_size=4,
        mixed_precision="no",
        learning_rate=2e-4,
        max_train_steps=100,
    )
    assert main(as_argv(flags | changes)) == 0
    return folder


@pytest.mark.slow
def test_the_subject_is_learned_and_cats_stay_cats(tmp_path, monkeypatch):
    monkeypatch.setattr(class_images, "NUM_INFERENCE_STEPS", 20)
    photos = {SUBJECT: ROOT / "instance", CLASS: ROOT / "instance"}
    baseline_subject, baseline_leak = likeness(EMBEDDED, photos)
    _, drifted = likeness(train(tmp_path / "without"), photos)
    made = dict(class_prompt=CLASS, class_data_dir=tmp_path / "class", num_class_images=24)
    subject, leak = likeness(train(tmp_path / "with", with_prior_preservation=True, **made), photos)
    # 0.205 -> 0.805, 0.177 -> 0.054 and 0.889 with the model of November 2026, whose cats were drawings.
    assert subject > baseline_subject + 0.3
    assert drifted > baseline_leak + 0.3 > baseline_leak + 0.15 > leak


def test_a_rare_word_is_farther_from_the_class_than_my():
    """The ground on which docs/more_than_one_wish.md chooses the subject's word."""
    prompts = [CLASS, "a photo of my cat.", SUBJECT, "a photo of a dog"]
    own, my, rare, dog = (distance for _, _, distance in distances(EMBEDDED, prompts))
    assert own == 0 and 0.1 < my < 0.2 < rare < 0.35 < dog < 0.6
