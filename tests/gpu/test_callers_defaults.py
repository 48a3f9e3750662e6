"""tests/contract/test_callers_defaults.py, on a GPU."""

from tests.contract.site import GPU
from tests.contract.test_callers_defaults import *  # noqa: F403

SITE = GPU
