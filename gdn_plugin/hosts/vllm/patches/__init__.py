"""Each change to the host's or torch's own code, in a file of its own that says what, why, where and until when."""

# File: (what it is for, when it is applied).
PATCHES = {
    "align_copies": (
        "states at a block's end: replay with drafts, less time, and drafts on a CPU",
        "when a layer is built in align mode; on a CPU with drafts",
    ),
    "freed_memory": ("page faults on a CPU", "in the profile run"),
    "fresh_speculative_rows": (
        "a prompt of one token sees no other user's state and no draft",
        "when a layer is built with drafts",
    ),
    "replay_pages": ("a page has room for the ring of its row", "when a layer is built with replay on"),
    "saved_models": ("compiled models load again", "when a layer is built"),
    "unused_kernels": ("a cold start compiles no kernel of the stock layer", "when a layer is built on a GPU"),
}
