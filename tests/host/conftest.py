"""Engines that several tests compare with are started once a session."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.host.engines import (
    LLM,
    MIXED,
    QWEN3_5,
    SPECULATIVE,
    SPECULATIVE_LENGTHS,
    TinyConfig,
    run_in_subprocess,
    write_tiny_qwen3_next,
)

Ask = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3_next(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def qwen3_5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense Qwen3.5: flat projections, no experts."""
    return write_tiny_qwen3_next(tmp_path_factory.mktemp("model") / "flat", TinyConfig(flat=True))


@pytest.fixture(scope="session")
def two_stages(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An attention layer and a mixture of experts on each of two stages."""
    sizes = TinyConfig(layers=8, moe_layers=(0, 4))
    return str(write_tiny_qwen3_next(tmp_path_factory.mktemp("model") / "eight", sizes))


@pytest.fixture(scope="session")
def ask(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """ask(name, rounds, environment..., **llm) -> (result, log): one engine in a process of its own."""
    folder = tmp_path_factory.mktemp("engines")

    def ask(
        name: str,
        rounds: list[list[list[int]]],
        *,
        max_tokens: Any = 16,
        prompt_logprobs: bool = False,
        logprobs: bool = False,
        environment: dict[str, str] | None = None,
        spy: bool = False,
        script: Path | None = None,
        fails: bool = False,
        adapters: list[str | None] | None = None,
        **llm: Any,
    ) -> tuple[dict[str, Any], str]:
        job = {
            "llm": {"model": str(checkpoint), **LLM, **llm},
            "rounds": rounds,
            "max_tokens": max_tokens,
            "prompt_logprobs": prompt_logprobs,
            "logprobs": logprobs,
            "adapters": adapters,
        }
        script = Path(__file__).with_name("spy_engine.py") if spy else script
        result, log = run_in_subprocess(job, folder, name, environment=environment, script=script)
        if fails:
            assert result is None, "the engine started"
            return {}, log
        assert result is not None, log[-4000:]
        return result, log

    return ask


@pytest.fixture(scope="session")
def plain(ask: Ask) -> Callable[[], dict[str, Any]]:
    """The plugin's engine in fp32, everything in one chunk, no cache: what the others must equal."""
    return functools.cache(lambda: ask("plain", MIXED, prompt_logprobs=True, spy=True)[0])


@pytest.fixture(scope="session")
def bf16(ask: Ask) -> Callable[[], tuple[dict[str, Any], str]]:
    return functools.cache(lambda: ask("bf16", MIXED, prompt_logprobs=True, dtype="bfloat16", spy=True))


@pytest.fixture(scope="session")
def plain_qwen3_5(ask: Ask, qwen3_5: Path) -> Callable[[], dict[str, Any]]:
    """As `plain`; and what MTP is compared with behind it."""
    return functools.cache(
        lambda: ask(
            "plain-qwen3_5",
            MIXED + SPECULATIVE,
            max_tokens=[[16] * len(MIXED[0]), *SPECULATIVE_LENGTHS],
            prompt_logprobs=True,
            model=str(qwen3_5),
            environment=QWEN3_5,
            spy=True,
        )[0]
    )


@pytest.fixture(scope="session")
def unspeculated(ask: Ask) -> Callable[[], dict[str, Any]]:
    return functools.cache(lambda: ask("unspeculated", SPECULATIVE, max_tokens=SPECULATIVE_LENGTHS)[0])
