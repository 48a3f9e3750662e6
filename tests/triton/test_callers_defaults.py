"""tests/contract/test_callers_defaults.py, over Triton's kernels under its interpreter."""

from tests.contract.site import INTERPRETER
from tests.contract.test_callers_defaults import *  # noqa: F403

SITE = INTERPRETER
