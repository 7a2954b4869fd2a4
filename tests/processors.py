"""The tests as other processors would run them: fewer instructions, more threads.

python -m tests.processors [--numeric] [--only NAME...] [PYTEST ARGUMENTS...]

torch, oneDNN and MKL choose their kernels by the processor's instructions, and those add in different orders. All
three can be told to use fewer, so one machine stands in for older ones. --numeric: only the tests whose results depend
on that. Unknown arguments go to pytest (-m slow: the slow ones). Ends with a line for each processor, and with 1 if a
test failed on any of them.
"""

import argparse
import os
import subprocess
import sys
import time

from tests.helpers.script import ROOT
from tests.helpers.tolerances import LIMITS, processor_flags

# What /proc/cpuinfo must name, and the environment. Threads: OMP_NUM_THREADS, which tests/conftest.py passes on; those
# that wait sleep, since there may be more of them than cores.
PROCESSORS: dict[str, tuple[str, dict[str, str]]] = {
    "sse4": ("sse4_1", dict(ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41", MKL_CBWR="COMPATIBLE")),
    "avx2": ("avx2", dict(ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2", MKL_CBWR="AVX2")),
    "avx512": ("avx512f", dict(ATEN_CPU_CAPABILITY="avx512", ONEDNN_MAX_CPU_ISA="AVX512_CORE", MKL_CBWR="AVX512")),
    "own": ("", {}),
    "two_threads": ("", dict(OMP_NUM_THREADS="2", OMP_WAIT_POLICY="PASSIVE")),
    "four_threads": ("", dict(OMP_NUM_THREADS="4", OMP_WAIT_POLICY="PASSIVE")),
}
NUMERIC = [
    "tests/data",
    "tests/end_to_end/test_cli.py",
    "tests/end_to_end/test_prior_preservation.py",
    "tests/evaluation/test_encoders.py",
    "tests/evaluation/test_generate.py",
    "tests/evaluation/test_metrics.py",
    "tests/kernels",
    "tests/models/test_drawing.py",
    "tests/models/test_fused_unet.py",
    "tests/models/test_loading.py",
    "tests/models/test_real_world_folders.py",
    "tests/run/test_resume.py",
    "tests/stacks",
    "tests/test_diffusion.py",
    "tests/training",
]


def environment_of(name: str) -> dict[str, str]:
    """This process's environment as processor `name` has it; one thread unless it says otherwise."""
    kept = {key: value for key, value in os.environ.items() if key not in (*LIMITS, "OMP_NUM_THREADS")}
    return kept | dict(OMP_NUM_THREADS="1") | PROCESSORS[name][1]


def is_here(name: str) -> bool:
    """Whether this machine can stand in for processor `name`."""
    needed = PROCESSORS[name][0]
    return not needed or needed in processor_flags()


def main(argv: list[str] | None = None) -> int:
    """Runs pytest once for each processor; 1 if a test failed on any."""
    parser = argparse.ArgumentParser(prog="python -m tests.processors", description=__doc__.partition("\n")[0])
    parser.add_argument("--numeric", action="store_true", help="only the tests whose results depend on the processor")
    parser.add_argument("--only", nargs="+", choices=PROCESSORS, default=list(PROCESSORS), metavar="NAME")
    args, pytest_arguments = parser.parse_known_args(argv)
    ends = {}
    for name in args.only:
        if not is_here(name):
            ends[name] = f"not run: this processor has no {PROCESSORS[name][0]}"
            continue
        print(f"=== {name}: {PROCESSORS[name][1] or 'as it is'}", flush=True)
        start = time.perf_counter()
        command = [sys.executable, "-m", "pytest", *(NUMERIC if args.numeric else []), *pytest_arguments]
        code = subprocess.run(command, cwd=ROOT, env=environment_of(name)).returncode
        ends[name] = f"{'passed' if code == 0 else 'FAILED'} in {time.perf_counter() - start:.0f} s"
    print("\n".join(f"{name}: {end}" for name, end in ends.items()))
    return int(any(end.startswith("FAILED") for end in ends.values()))


if __name__ == "__main__":
    sys.exit(main())
