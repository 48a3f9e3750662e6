"""The contract of tests/contract/test_contract.py, over every backend that a GPU has."""

from tests.contract.site import GPU
from tests.contract.test_contract import *  # noqa: F403

SITE = GPU
