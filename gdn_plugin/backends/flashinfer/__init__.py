"""Backend `flashinfer`: FlashInfer's CuTe-DSL kernels behind the backend contract, with nothing around them.

Importing this package imports neither torch nor FlashInfer; `api.flashinfer_api()` does, when a row is first run.
"""
