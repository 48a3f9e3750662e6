"""Freed memory stays mapped once the C library has seen one large block go: page faults counted, no times."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, torch
from gdn_plugin.hosts.vllm.patches.freed_memory import keep_freed_memory

def faults():
    for turn in range(6):  # the first turns are malloc's own learning
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.empty(3 * 2**21).fill_(1.0) for _ in range(2)]  # 24 MiB each, as a layer's temporaries
        del blocks
        last = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return last

torch.set_num_threads(1)
print(faults())
keep_freed_memory()
print(faults())
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or "LD_PRELOAD" in os.environ, reason="needs glibc's malloc, not another"
)
def test_temporaries_are_not_mapped_anew() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True, env=environment)
    before, after = map(int, done.stdout.split())
    assert after < 100
    if before < 2000:
        pytest.skip("glibc had seen a larger block already (importing torch compiles its files once), so nothing shows")
