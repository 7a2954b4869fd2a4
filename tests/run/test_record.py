"""run.json and what stands beside it: what was done, said after it is in place."""

import pytest

from tests.helpers.script import run
from utils.files.ownership import HOLDER_FILE
from utils.run.record import start_output

PLANTED = [HOLDER_FILE, ".run.json.part", ".metrics.jsonl.part", "run.json.previous", "metrics.jsonl.previous"]


@pytest.mark.parametrize("target", ["a file", "a folder"])
def test_no_link_that_somebody_planted_is_followed(flags, output, tmp_path, target):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "step-000001-seed-0.png").write_text("theirs")
    (theirs / "file").write_text("theirs")
    run(flags)
    for name in (*PLANTED, ".assembling-x", "validation", "validation.previous"):
        (output / name).symlink_to(theirs if target == "a folder" else theirs / "file")
    run(flags)
    assert {path.name: path.read_text() for path in theirs.iterdir()} == dict.fromkeys(
        ["step-000001-seed-0.png", "file"], "theirs"
    )
    assert not [path for path in output.iterdir() if path.is_symlink()]


def test_what_a_kill_left_half_written_goes_at_the_next_start(tmp_path):
    for name in (".run.json.part", ".README.md.7.part"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".assembling-checkpoint-2-7/unet").mkdir(parents=True)
    start_output(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
