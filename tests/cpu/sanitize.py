"""`make sanitize`: tests of backend `cpu`, its library compiled under AddressSanitizer and UndefinedBehaviorSanitizer.

First a call that lies about a tensor's size must be caught, so that a run that finds nothing means something.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from gdn_plugin.backends.cpu import build

ROOT = Path(__file__).parents[2]
# Every level and op: head sizes that fill no vector, those of the published models, tails, several threads.
TESTS = (
    "odd and (bfloat16-float16 or float32-bfloat16 or float16-float32 or log-DS) or model and float32-bfloat16"
    " or checkpoints or speculative or null_row or number_of_threads or formula or nan_token or convolution"
)
LIE = """
import torch
from gdn_plugin.backends.cpu.kernels import DECODE
x, gate = torch.ones(1, 1, 64), torch.ones(1, 1)
DECODE.run(
    q=x, k=x, v=x, a=gate, b=gate, A_log=gate[0], dt_bias=gate[0], state=torch.ones(1, 1, 64, 64),
    state_indices=torch.zeros(1, dtype=torch.int32), scale=1.0, use_qk_l2norm=True, null_index=-1, padding="any",
    out=torch.ones(1, 1, 8), zero_padding=True,  # out is too short
)
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
    files = [
        "tests/cpu/test_numbers.py",
        "tests/cpu/test_build.py",
        "tests/cpu/test_gated_norm.py",
        "tests/cpu/test_not_finite.py",
    ]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", TESTS, *files, *sys.argv[1:]]
    return subprocess.run(pytest, cwd=ROOT, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
