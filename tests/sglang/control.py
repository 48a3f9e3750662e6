"""The engine tests' control, called in each of SGLang's processes: a plugin that is wrong, which they must notice."""

from __future__ import annotations

from typing import Any


def forget_initial_states() -> None:
    """Every extend starts from zero, whatever its slot holds."""
    from gdn_plugin.hosts.sglang import backend

    translate = backend.extend_batch

    def wrong(*args: Any) -> Any:
        batch = translate(*args)
        assert batch.prefill is not None
        batch.prefill.has_initial_state.zero_()
        return batch

    backend.extend_batch = wrong
