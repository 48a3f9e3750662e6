"""vLLM's saved compiled models, where it cannot load them again.

Changes:  BundledAOTAutogradSerializableCallable (torch._dynamo.aot_compile_types): gets a `finalize_loading` that does
          nothing.
Why:      vLLM saves a compiled model and, when it loads one, asks the artefact to finish (`finalize_loading`). Its
          own artefacts have that method. Where it compiles in mode DYNAMO_TRACE_ONCE, which is what a CPU gets, the
          artefact is torch's, which has not: every start then compiles the model anew ("no attribute
          'finalize_loading'").
Versions: 0.32, 0.33, with torch 2.13.
Retires:  with the first vLLM that asks only its own artefacts, or a torch whose artefact has the method; this one then
          changes nothing.
"""

from __future__ import annotations

import importlib

_MODULE = "torch._dynamo.aot_compile_types"
_CLASS = "BundledAOTAutogradSerializableCallable"
_METHOD = "finalize_loading"


def let_artefacts_load() -> bool:
    """Give torch's artefact the method that vLLM calls; there is nothing left for it to do. Idempotent.

    Returns:
        Whether the method had been missing and is there now; False where torch has it or has no such artefact.
    """
    try:
        artefact = getattr(importlib.import_module(_MODULE), _CLASS)
    except (ImportError, AttributeError):
        return False
    if hasattr(artefact, _METHOD):
        return False
    setattr(artefact, _METHOD, _nothing_left)
    return True


def _nothing_left(self: object, vllm_config: object) -> None:
    """The artefact is whole once it has been read."""
