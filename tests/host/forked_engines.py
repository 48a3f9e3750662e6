"""A process with vLLM imported, which is half of what a tiny engine takes, and a fork of it for every engine.

Run as `forked_engines.py socket`. What comes through the socket is (script, arguments, environment, log), what goes
back is the script's exit status. The plugin is not imported here: each engine loads it itself, as in a new process.
"""

from __future__ import annotations

import os
import runpy
import sys
from multiprocessing.connection import Listener


def main() -> None:
    from vllm.entrypoints import llm  # noqa: F401 (what `from vllm import LLM` imports)

    assert len(os.listdir("/proc/self/task")) == 1, "importing vLLM has started threads, which no fork has"
    assert "gdn_plugin" not in sys.modules
    client = Listener(sys.argv[1]).accept()
    while True:
        script, arguments, environment, log = client.recv()
        engine = os.fork()
        if engine == 0:
            break
        client.send(os.waitstatus_to_exitcode(os.waitpid(engine, 0)[1]))
    client.close()
    os.environ.clear()
    os.environ.update(environment)
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(script)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
