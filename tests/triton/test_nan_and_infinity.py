"""tests/contract/test_nan_and_infinity.py, over Triton's kernels under its interpreter."""

from tests.contract.site import INTERPRETER
from tests.contract.test_nan_and_infinity import *  # noqa: F403

SITE = INTERPRETER
