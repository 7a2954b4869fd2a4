"""Why a test may be left out, and what runs it all the same."""

import re
from collections import Counter
from typing import NamedTuple


class Skip(NamedTuple):
    """A reason, as a regular expression; what runs those tests; and whether CI, which is root on Debian, may skip."""

    reason: str
    remedy: str
    in_ci: bool = False


SKIPS = [
    Skip("needs a CUDA GPU", "bash test.sh -m gpu, on a machine with one", in_ci=True),
    Skip("needs two CUDA GPUs", "bash test.sh -m gpu, on a machine with two", in_ci=True),
    # .ci/run runs these in a step of its own.
    Skip("says something about Triton only|statistics of channels_last", "bash test.sh --interpreted", in_ci=True),
    Skip("needs Triton", "bash setup.sh --dev, on Linux x86-64"),
    Skip("is not installed .Debian: apt-get install chromium", "apt-get install chromium"),
    Skip("playwright is not installed|playwright-python is not installed", "bash setup.sh --dev"),
    Skip("older libraries import more", "the transformers and diffusers of requirements.txt"),
    Skip(
        "(scikit-image|OpenCV|EfficientNet) is only needed by tools/",
        ".venv/bin/python -m pip install -r requirements-tools.txt",
    ),
    # Only where tests/processors.py lowers what torch uses of a processor with AVX-512.
    Skip("bf16 of torch's plain kernels", "a processor without AVX-512", in_ci=True),
    Skip("where a GPU may be, torch is asked about it", "a machine without a GPU"),
    Skip("no second file system|the temporary folder is on /dev/shm", "a temporary folder on a disk"),
    Skip("not a checkout of git", "a clone of the repository"),
    Skip("this file system takes them for one", "a file system that tells capital letters from small ones"),
    Skip("other versions of diffusers draw other initial weights", "the diffusers of requirements.txt"),
]
NEVER_SEEN = Skip("", "nothing known: add the reason to tests/helpers/skips.py")


def _reasons(stats: dict) -> list[str]:
    """Of pytest's reports of skipped tests."""
    return [report.longrepr[2].removeprefix("Skipped: ") for report in stats.get("skipped", [])]


def _skip_of(reason: str) -> Skip:
    return next((skip for skip in SKIPS if re.search(skip.reason, reason)), NEVER_SEEN)


def unexpected(stats: dict) -> list[str]:
    """The reasons for which CI may not skip."""
    return sorted({reason for reason in _reasons(stats) if not _skip_of(reason).in_ci})


def lines(stats: dict) -> list[str]:
    """A line for each reason, and one for each kind of test that was not asked for; `stats` are the reporter's."""
    counts = Counter(_reasons(stats))
    found = [f"skipped {count}: {reason}; runs with: {_skip_of(reason).remedy}" for reason, count in counts.items()]
    marked = Counter("gpu" if item.get_closest_marker("gpu") else "slow" for item in stats.get("deselected", []))
    asked = dict(gpu="bash test.sh -m gpu, on a machine with a GPU", slow="bash test.sh -m slow")
    return found + [f"not asked for {count}: {mark}; run with: {asked[mark]}" for mark, count in marked.items()]
