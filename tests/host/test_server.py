"""vLLM's server with the plugin under a crowd: what each client gets is what a quiet server says."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.host.engines import needs_vllm
from tests.host.server import Server, ask, serve

openai = pytest.importorskip("openai", reason="the openai client is not installed")

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900), needs_vllm]

CLIENTS = 32
SECONDS = float(os.environ.get("SERVER_TEST_SECONDS", "60"))
MAX_TOKENS = 24
# One question in this many is dropped after its first tokens.
ABORTED = 5


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = [
        *("--dtype", "float32", "--max-model-len", "1024", "--max-num-batched-tokens", "512", "--max-num-seqs", "16"),
        *("--enforce-eager", "--enable-prefix-caching"),
    ]
    with serve(checkpoint, tmp_path_factory.mktemp("server"), *arguments) as running:
        yield running


def questions() -> list[list[int]]:
    """Prompts of random lengths; half of them begin like another."""
    rng = random.Random(1)
    shared = [rng.randrange(256) for _ in range(600)]
    found = []
    for i in range(24):
        own = [rng.randrange(256) for _ in range(rng.randrange(1, 300))]
        found.append((shared[: rng.randrange(50, 600)] + own) if i % 2 else own)
    return found


def resident_mib(pid: int) -> float:
    """Memory of a process and all that it started."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
            if os.getpgid(int(status.parent.name)) == os.getpgid(pid):
                total += int(fields.get("VmRSS", "0 kB").split()[0])
        except (OSError, ValueError):
            continue  # ended while it was being read
    return total / 1024


def test_a_crowd_gets_the_answers_of_a_quiet_server(server: Server) -> None:
    asked = questions()
    # By default a connection has to stand within 5 seconds; on two busy cores with 32 clients it may take longer.
    client = openai.AsyncOpenAI(base_url=server.url("/v1"), api_key="none", max_retries=0, timeout=300)
    counts = {"finished": 0, "aborted": 0}
    wrong: list[str] = []

    async def quiet() -> list[list[int] | None]:
        return [await ask(client, prompt, MAX_TOKENS) for prompt in asked]

    async def one(number: int, right: list[list[int] | None], until: float) -> None:
        rng = random.Random(number)
        while time.monotonic() < until:
            i = rng.randrange(len(asked))
            abort = rng.randrange(ABORTED) == 0
            got = await ask(client, asked[i], MAX_TOKENS, abort)
            counts["aborted" if got is None else "finished"] += 1
            if got is not None and got != right[i]:
                wrong.append(f"question {i}: {got}, quiet {right[i]}")

    async def crowd() -> tuple[float, float]:
        right = await quiet()
        assert all(answer is not None and len(answer) == MAX_TOKENS for answer in right)
        await asyncio.gather(*(one(n, right, time.monotonic() + SECONDS / 4) for n in range(CLIENTS)))
        early = resident_mib(server.process.pid)
        await asyncio.gather(*(one(n, right, time.monotonic() + SECONDS * 3 / 4) for n in range(CLIENTS)))
        late = resident_mib(server.process.pid)
        assert await quiet() == right
        return early, late

    early, late = asyncio.run(crowd())
    assert not wrong, wrong[:3]
    assert counts["finished"] > CLIENTS and counts["aborted"] > 0, counts
    assert late < early * 1.1 + 64, (early, late)
    check_at_rest(server, counts)
    assert "gdn_plugin: prefill: " in server.log()


def check_at_rest(server: Server, counts: dict[str, int]) -> None:
    """Nothing runs any more, no cache block is held, and what clients saw is what the engine counted."""
    metrics = server.metrics()
    held = ("vllm:num_requests_running{", "vllm:num_requests_waiting{", "vllm:kv_cache_usage_perc{")
    values = {name: value for name, value in metrics.items() if name.startswith(held)}
    assert len(values) == len(held) and set(values.values()) == {0.0}, values
    whole = sum(
        value
        for name, value in metrics.items()
        if name.startswith("vllm:request_success_total{") and 'finished_reason="length"' in name
    )
    # of those that hang up, some do so as the last token is made; the others were cut short
    asked = counts["finished"] + 2 * len(questions())
    assert asked <= whole < asked + counts["aborted"], (whole, counts)
    hits = sum(value for name, value in metrics.items() if name.startswith("vllm:prefix_cache_hits_total{"))
    assert hits > 0  # prefixes were shared


def test_sigterm_ends_it(server: Server) -> None:
    process = server.process
    group = os.getpgid(process.pid)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    assert process.returncode == 0
    deadline = time.monotonic() + 30
    while members(group) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert members(group) == []  # nor any of its workers
    # vLLM's own front end may see its engine gone first and log that; a frame of ours in any traceback is a defect.
    ours = re.search(r'File "[^"]*/gdn_plugin/', server.log())
    assert ours is None, ours


def members(group: int) -> list[int]:
    """Processes of a process group, by id."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, in_group = status.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # ended while it was being read
        if int(in_group) == group and state != "Z":
            found.append(int(status.parent.name))
    return found
