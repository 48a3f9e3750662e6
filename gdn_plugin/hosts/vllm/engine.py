"""vLLM as a user's script has it, for the tools, which import no engine. Call these in a process of its own."""

from __future__ import annotations

from typing import Any


def start(**arguments: Any) -> Any:
    """vllm.LLM of these arguments, with its counters."""
    from vllm import LLM

    return LLM(**arguments, disable_log_stats=False)


def sampling(**arguments: Any) -> Any:
    """vllm.SamplingParams of these arguments."""
    from vllm import SamplingParams

    return SamplingParams(**arguments)
