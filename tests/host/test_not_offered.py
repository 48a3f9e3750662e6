"""What vLLM 0.32 itself does not offer for GDN models on a CPU, in its own words: the gaps of the README's table.

Stock engines. Each of these fails as soon as the host offers it, and then wants a test of the plugin in its place.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.host.engines import MIXED, SPECULATIVE, SPECULATIVE_LENGTHS, STOCK, TWO_WORKERS, answers, needs_vllm
from tests.host.test_parallel import needs_ray

pytestmark = [needs_vllm]

BF16 = {"dtype": "bfloat16"}
NGRAM = {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1, "num_speculative_tokens": 3}
MTP = {"method": "mtp", "num_speculative_tokens": 2}
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@pytest.mark.engine
@pytest.mark.parametrize(
    ("name", "words", "environment", "llm"),
    [
        ("fp32", "CPU GDN attention requires BF16.", {}, {}),
        ("v2-runner", "Model Runner V2 requires Triton.", {"VLLM_USE_V2_MODEL_RUNNER": "1"}, BF16),
        (
            "cached-speculation",
            "TypeError: 'function' object is not subscriptable",
            {},
            BF16 | {"speculative_config": NGRAM, "enable_prefix_caching": True},
        ),
        ("lora-and-experts", "module 'triton.language' has no attribute 'bfloat16'", {}, BF16 | {"enable_lora": True}),
        pytest.param(
            "ray",
            "ValueError: current platform cpu does not support ray.",
            TWO_WORKERS | IN_PROCESS,
            BF16 | {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"},
            marks=needs_ray,
        ),
    ],
    ids=["fp32", "v2-runner", "cached-speculation", "lora-and-experts", "ray"],
)
def test_the_host_refuses(ask, name: str, words: str, environment: dict[str, str], llm: dict[str, Any]) -> None:
    _, log = ask(f"refused-{name}", MIXED, environment=STOCK | environment, fails=True, **llm)
    assert words in log, log[-3000:]


@pytest.mark.engine
def test_heads_that_do_not_divide_are_refused_by_the_host(ask) -> None:
    """Three ranks, in the same words with the plugin and without: before a layer is built."""
    said = []
    for name, environment in (("stock", STOCK), ("plugin", {})):
        job = {"environment": TWO_WORKERS | environment, "tensor_parallel_size": 3, "fails": True}
        _, log = ask(f"refused-heads-{name}", MIXED, **job, **BF16)
        said.append([line for line in log.splitlines() if "must be divisible by tensor parallel size (3)" in line])
    assert said[0] and said[0] == said[1], said


@pytest.mark.engine
@pytest.mark.slow
def test_the_host_refuses_two_eager_stages(ask, two_stages: str) -> None:
    _, log = ask(
        "refused-pp2-eager",
        MIXED,
        model=two_stages,
        pipeline_parallel_size=2,
        environment=TWO_WORKERS | STOCK,
        fails=True,
        **BF16,
    )
    assert "assert self.intermediate_tensors is not None" in log, log[-3000:]


@pytest.mark.engine
@pytest.mark.slow
def test_stock_speculation_changes_tokens(ask) -> None:
    """N-gram drafts: other tokens than without, or none at all; MTP drafts: the same."""
    job = {"max_tokens": SPECULATIVE_LENGTHS, "environment": STOCK, **BF16}
    drafting = {"max_num_batched_tokens": 64, "max_num_seqs": 3, "disable_log_stats": False}
    without, _ = ask("stock-unspeculated", SPECULATIVE, **job)
    mtp, _ = ask("stock-mtp", SPECULATIVE, speculative_config=MTP, **job, **drafting)
    assert answers(mtp) == answers(without)
    try:
        ngram, _ = ask("stock-ngram", SPECULATIVE, speculative_config=NGRAM, **job, **drafting)
    except AssertionError as ended:
        assert "must match the size of tensor" in str(ended)
        return
    assert answers(ngram) != answers(without)


def test_the_prefix_cache_has_no_mode_all() -> None:
    from typing import get_args

    from vllm.config.cache import CacheConfig, MambaCacheMode

    assert set(get_args(MambaCacheMode)) == {"align", "none"}
    with pytest.raises(ValueError, match="Input should be 'align' or 'none'"):
        CacheConfig(mamba_cache_mode="all")  # type: ignore[arg-type]


def test_experts_over_data_parallel_ranks_want_a_collective() -> None:
    from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    assert CpuCommunicator.all_gatherv is DeviceCommunicatorBase.all_gatherv
    with pytest.raises(NotImplementedError):
        DeviceCommunicatorBase.all_gatherv(None, None)  # type: ignore[arg-type]
