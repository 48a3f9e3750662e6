"""The contract of tests/contract/test_contract.py, over Triton's prefill under its interpreter."""

from tests.contract.site import INTERPRETER
from tests.contract.test_contract import *  # noqa: F403
from tests.contract.test_contract import TABLE as ALL

SITE = INTERPRETER
TABLE = [(op, name) for op, name in ALL if op == "prefill"]
