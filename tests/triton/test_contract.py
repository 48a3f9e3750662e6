"""The contract of tests/contract/test_contract.py, over Triton's kernels under its interpreter; prefill beside."""

from tests.contract.site import INTERPRETER
from tests.contract.test_contract import *  # noqa: F403
from tests.contract.test_contract import TABLE as ALL

SITE = INTERPRETER
# A call takes seconds here, and tests/triton/test_replay.py goes through groups, fills, dtypes and layouts of replay.
REPLAY_ROWS = ("strided", "padding that has tokens, null row 0", "only padding, no rows", "tokens past the end",
               "int64 offsets", "no sequences", "no tokens", "nothing", "no batch", "shared pages")  # fmt: skip
TABLE = [(op, name) for op, name in ALL if op != "prefill" and (not op.startswith("replay_") or name in REPLAY_ROWS)]
