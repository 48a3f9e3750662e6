"""The C library's threshold for giving freed memory back, raised as far as it raises itself.

Changes:  nothing of vLLM or torch: glibc's M_MMAP_THRESHOLD of this process, which glibc adjusts as it goes.
Why:      glibc serves a large block by a mapping of its own and unmaps it when it is freed, so that the next block of
          that size is mapped, and faulted in page by page, again. It learns: freeing such a block of up to 32 MiB
          raises the threshold to that block's size, and what is kept at the top of the heap to twice that. vLLM's GDN
          kernels teach it by their large temporaries. Ours have none, the threshold stays where the model's smaller
          activations left it, and every fp32 temporary of the model's norms is mapped anew in each layer: 41000 page
          faults a step of 4096 tokens on the tiny model where the stock engine had 10000, a fifth of the step on a
          machine with slow faults. One block of that size does what theirs do. Other allocators (tcmalloc, jemalloc,
          musl) do not notice.
Versions: all, on CPUs.
Retires:  with a model whose norms make no large temporaries on a CPU; none yet.
"""

from __future__ import annotations

import torch

# Below DEFAULT_MMAP_THRESHOLD_MAX (32 MiB), the most that glibc learns, by more than a block's header and alignment.
_LARGEST_LESSON = 31 * 2**20


def keep_freed_memory() -> None:
    """Allocate and free one large block, without touching its pages."""
    block = torch.empty(_LARGEST_LESSON, dtype=torch.uint8, device="cpu")
    del block
