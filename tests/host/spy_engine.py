"""`run_engine` with a witness inside: kinds of batches, moved states, kernels compiled late, what torch.compile did.

Run as a script in place of examples/run_engine.py; the engine core must be in this process.
"""

from __future__ import annotations

import collections
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import run_engine


def main() -> None:
    import os

    for key, value in run_engine.ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from vllm.v1.core.sched.scheduler import Scheduler

    from gdn_plugin.hosts import core, warm_up
    from gdn_plugin.hosts.vllm import layer
    from gdn_plugin.hosts.vllm.patches.align_copies import _State

    job_file, result_file = sys.argv[1:]
    seen: collections.Counter[str] = collections.Counter()
    compiled: list[int] = []
    run, preempt = core.Core.run, Scheduler._preempt_request
    metadata_of, move = layer.GdnPluginAttention._metadata, _State.move

    def watched(self: Any, batch: Any, *args: Any) -> None:
        if serving["now"]:
            kinds = [kind for kind in ("decode", "prefill", "spec") if getattr(batch, kind) is not None]
            seen["+".join(kinds) or "nothing"] += 1
            if batch.prefill is not None and batch.prefill.checkpoints is not None:
                seen["checkpoints"] += 1
        run(self, batch, *args)
        if serving["now"]:
            compiled.append(warm_up.compile_count())

    def preempted(self: Any, *args: Any, **kwargs: Any) -> None:
        seen["preempted"] += 1
        preempt(self, *args, **kwargs)

    def moved(self: Any, table: int, source: int, target: int, bias: int) -> None:
        seen["moved from behind drafts" if bias else "moved"] += 1
        move(self, table, source, target, bias)

    def noticed(self: Any) -> Any:
        metadata = metadata_of(self)
        serving["now"] = metadata is not None
        return metadata

    serving = {"now": False}
    core.Core.run = watched  # type: ignore[method-assign]
    Scheduler._preempt_request = preempted  # type: ignore[method-assign]
    _State.move = moved  # type: ignore[method-assign]
    layer.GdnPluginAttention._metadata = noticed  # type: ignore[method-assign]
    result = run_engine.run_job(json.loads(Path(job_file).read_text()))
    result["seen"] = dict(seen)
    from torch._dynamo.utils import counters

    result["graph_breaks"] = dict(counters["graph_break"])
    result["compiled_graphs"] = counters["inductor"]["fxgraph_cache_miss"]
    result["compiled_while_serving"] = compiled[-1] - compiled[0] if compiled else 0
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
