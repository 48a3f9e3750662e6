"""vLLM's warm-up of its own GDN kernels, left out where no layer launches them.

Changes:  the name qwen_triton_warmup in vllm.model_executor.warmup.kernel_warmup, which a GPU worker calls behind the
          profile run: where each GDN layer of the model is served by the plugin, norm included, it does nothing.
Why:      It compiles the convolution, gates, recurrence and norm of the stock layer, in one process, one after the
          other: seconds of a cold start, and device memory, for kernels that nothing calls.
Versions: 0.32, 0.33, on GPUs.
Retires:  with the first vLLM that asks a layer what it wants warmed up; none yet.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

MODULE = "vllm.model_executor.warmup.kernel_warmup"


def leave_out() -> bool:
    """Put the change in. Idempotent.

    Returns:
        Whether the host was changed by this call.
    """
    module = importlib.import_module(MODULE)
    warm_up = getattr(module, "qwen_triton_warmup", None)
    if warm_up is None or hasattr(warm_up, "_gdn_plugin"):  # without it a start is as long as it was
        return False

    @functools.wraps(warm_up)
    def warm_up_what_is_used(runner: Any, model_config: Any) -> Any:
        layers = runner.compilation_config.static_forward_context.values()
        if not any(_is_stock(layer) for layer in layers if hasattr(layer, "A_log")):
            return None
        return warm_up(runner, model_config)

    warm_up_what_is_used._gdn_plugin = True  # type: ignore[attr-defined]
    module.qwen_triton_warmup = warm_up_what_is_used  # type: ignore[attr-defined]
    return True


def _is_stock(layer: Any) -> bool:
    """Whether a layer with a decay launches kernels of the host's, if only its norm."""
    return getattr(layer, "_gdn_core", None) is None or not layer._gdn_packed
