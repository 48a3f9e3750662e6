"""Gated Delta Net linear attention for vLLM: ops, a registry of backends, and the plugin that ties them in.

Importing this package imports neither torch, triton, flashinfer nor vllm; its rooms do that when used.
"""

__version__ = "0.1.0"
