"""`make sanitize`: tests of backend `cpu`, its library compiled under AddressSanitizer and UndefinedBehaviorSanitizer.

First a call that lies about a tensor's size must be caught, so that a run that finds nothing means something.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from gdn_plugin.ops.cpu import build

ROOT = Path(__file__).parents[2]
# Every level and op: head sizes that fill no vector, those of the published models, tails, several threads.
TESTS = (
    "odd and (bfloat16-float16 or float32-bfloat16 or log-DS) or model and float32-bfloat16"
    " or checkpoints or speculative or null_row or number_of_threads or formula"
)
LIE = """
import torch
from gdn_plugin.ops.cpu.decode import decode
ones = torch.ones
decode(ones(1, 1, 64), ones(1, 1, 64), ones(1, 1, 64), ones(1, 1), ones(1, 1), ones(1), ones(1), ones(1, 1, 64, 64),
       torch.zeros(1, dtype=torch.int32), 1.0, True, -1, ones(1, 1, 8), True)  # out is too short
"""


def environment() -> dict[str, str]:
    def library(name: str) -> str:
        command = [*build.compiler(), f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return os.environ | {
        "CXXFLAGS": "-fsanitize=address,undefined -fno-sanitize-recover=all -O1 -g1",
        "LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
        "OMP_NUM_THREADS": "1",  # tests of threads set their own number
    }


def main() -> int:
    env = environment()
    lie = subprocess.run([sys.executable, "-c", LIE], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if lie.returncode == 0 or "ERROR: AddressSanitizer" not in lie.stderr:
        print(f"a write past the end of a tensor was not caught; the sanitizers are not at work\n{lie.stderr[-2000:]}")
        return 1
    print("control: a write past the end of a tensor is caught", flush=True)
    files = ["tests/cpu/test_numbers.py", "tests/cpu/test_build.py", "tests/cpu/test_gated_norm.py"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", TESTS, *files, *sys.argv[1:]]
    return subprocess.run(pytest, cwd=ROOT, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
