"""Going on from an earlier checkpoint: a branch, to which the later checkpoints of the run do not belong."""

import json
import signal

import pytest

from tests.helpers.processes import Process, die_after
from tests.helpers.script import LATEST, as_argv, bits, rows, run
from train_dreambooth_colossalai import main
from utils.run.lineage import Lineage, lineage_of, list_checkpoints


class TestBranches:
    """Going on from an earlier checkpoint leaves the later ones behind: they are not the new line's, and not lost."""

    OTHER = dict(seed=1, allow_changes=True)

    def kill_a_branch(self, flags, tmp_path, killed_after: int, **changes) -> None:
        """Checkpoints 2, 4, 6 of one run; then another seed from checkpoint-2 on, killed."""
        output = tmp_path / "output"
        run(flags, max_train_steps=6, checkpointing_steps=2)
        branch = dict(self.OTHER, resume_from_checkpoint="checkpoint-2", checkpointing_steps=2, max_train_steps=5000)
        process = Process(as_argv(flags | branch | changes), tmp_path / "text", die_after(killed_after))
        assert process.wait() == -signal.SIGKILL
        assert "branches off at step 2: 'latest' passes over checkpoint-4, checkpoint-6" in process.text()
        assert [row["step"] for row in rows(output)][:2] == [1, 2]

    @pytest.mark.parametrize("killed_after", [3, 5])
    def test_latest_is_of_the_branch(self, flags, output, tmp_path, capsys, killed_after):
        self.kill_a_branch(flags, tmp_path, killed_after)
        assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
        more = dict(max_train_steps=7, checkpointing_steps=2)
        assert main(as_argv(flags | self.OTHER | LATEST | more)) == 0
        assert f"resuming from {output}/checkpoint-{2 if killed_after == 3 else 4}" in capsys.readouterr().err
        assert [found.step for found in list_checkpoints(output)] == [2, 4, 6]
        assert [row["step"] for row in rows(output)] == [1, 2, 3, 4, 5, 6, 7]
        run(flags, max_train_steps=2, checkpointing_steps=2, output_dir=tmp_path / "two")
        expected = self.OTHER | dict(max_train_steps=7, output_dir=tmp_path / "whole")
        assert main(as_argv(flags | expected | dict(resume_from_checkpoint=tmp_path / "two/checkpoint-2"))) == 0
        assert bits(output) == bits(tmp_path / "whole")

    def test_what_is_left_behind_stays_until_the_result(self, flags, output, tmp_path):
        self.kill_a_branch(flags, tmp_path, killed_after=5, checkpoints_total_limit=1)
        left = json.loads((output / "checkpoint-6/state.json").read_text())
        assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
        assert left["arguments"]["seed"] == 0
        assert main(as_argv(flags | self.OTHER | LATEST | dict(max_train_steps=5))) == 0
        assert [found.step for found in list_checkpoints(output)] == [4]

    def test_the_line_left_behind_can_be_gone_on_with(self, flags, output, tmp_path):
        self.kill_a_branch(flags, tmp_path, killed_after=5)
        assert main(as_argv(flags | dict(resume_from_checkpoint="checkpoint-6", max_train_steps=8))) == 0
        run(flags, max_train_steps=8, output_dir=tmp_path / "whole")
        assert bits(output) == bits(tmp_path / "whole")
        assert [found.step for found in list_checkpoints(output)] == [2, 6]

    @pytest.mark.parametrize("ancestors", [None, 3, "x", [1], [["a"]], [["a", "b"]], [[[], {}]]])
    def test_a_record_with_strange_ancestors(self, ancestors):
        assert lineage_of(dict(run_id="a", ancestors=ancestors)) == Lineage("a", [])
