"""What a run is made from, as far as a resumed run compares it."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from utils.arguments import LR_SCHEDULERS
from utils.models.check import check_base_model
from utils.run.fingerprint import base_files, compared_arguments, photo_hashes
from utils.training.build import learning_rate_table


@pytest.mark.parametrize("lr_scheduler", LR_SCHEDULERS)
def test_the_number_of_steps_is_compared_if_the_learning_rates_depend_on_it(lr_scheduler):
    options = dict(num_warmup_steps=2, num_cycles=2, power=2.0)
    short, long = (learning_rate_table(1e-3, lr_scheduler, num_training_steps=n, **options)[:10] for n in (10, 20))
    compared = compared_arguments(dict(lr_scheduler=lr_scheduler, max_train_steps=10))
    assert ("max_train_steps" in compared) == (short != long)


def test_a_base_file_replaced_by_one_of_the_same_size_is_noticed(base):
    model = check_base_model(base)
    before, config = base_files(model), base / "vae/config.json"
    config.write_text(config.read_text().swapcase())
    assert {path for path, found in base_files(model).items() if found != before[path]} == {config}


def test_captions_and_folders_are_part_of_what_a_resumed_run_compares(tmp_path):
    def photo(path: str, prompt: str) -> SimpleNamespace:
        return SimpleNamespace(path=Path(path), sha256="abc", prompt=prompt)

    assert photo_hashes([photo("a/1.jpg", "my cat")], "my cat") == {"1.jpg": "abc"}
    assert photo_hashes([photo("a/1.jpg", "asleep")], "my cat") == {"1.jpg": "abc 'asleep'"}
    two = photo_hashes([photo("a/1.jpg", "my cat"), photo("b/1.jpg", "my dog")], None)
    assert two == {"1/1.jpg": "abc 'my cat'", "2/1.jpg": "abc 'my dog'"}
