"""tests/contract/test_nan_and_infinity.py, on a GPU."""

from tests.contract.site import GPU
from tests.contract.test_nan_and_infinity import *  # noqa: F403

SITE = GPU
