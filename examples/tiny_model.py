"""Write a tiny Qwen3-Next checkpoint from nothing, in a second: `python examples/tiny_model.py [DIR]`.

What it is made of, and the other built-in models, are in `gdn_plugin.tools.models`.
"""

from __future__ import annotations

import sys

from gdn_plugin.tools.models import TinyConfig, write_tiny_qwen3_next

__all__ = ["TinyConfig", "write_tiny_qwen3_next"]

if __name__ == "__main__":
    print(write_tiny_qwen3_next(sys.argv[1] if len(sys.argv) > 1 else "tiny-qwen3-next"))
