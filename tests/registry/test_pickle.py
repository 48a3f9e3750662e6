"""Public objects go to other processes and are copied: workers, multiprocessing, a host's deep copies."""

from __future__ import annotations

import copy
import pickle

import pytest

from gdn_plugin import ops
from gdn_plugin.ops.record import OPS as RECORDS
from gdn_plugin.registry import (
    OPS,
    BackendLoadError,
    NoBackendError,
    Platform,
    Problem,
    SelfCheckError,
    SettingsError,
    choose,
    requests,
    rows,
    select,
)

PLATFORM = Platform.simulated("sm_90")
PROBLEMS = {op: Problem(op, "bfloat16", "float32", 16, 32, 128, 128) for op in OPS}
OBJECTS = {
    "platform": PLATFORM,
    "problem": PROBLEMS["prefill"],
    "rows": tuple(row for op in OPS for row in rows(op)),
    "choice": choose(PLATFORM, PROBLEMS["prefill"]),
    "selection": select(PLATFORM, PROBLEMS),
    "requests": requests(),
    "records": {name: record.schema(out=True) for name, record in RECORDS.items()},
    "ops": (ops.prefill, ops.decode, ops.gated_norm),
}


@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.parametrize("way", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))],
                         ids=["deepcopy", "copy", "pickle"])  # fmt: skip
def test_the_copy_is_the_same(name, way):
    assert way(OBJECTS[name]) == OBJECTS[name]


def test_a_copied_selection_still_says_why():
    again = pickle.loads(pickle.dumps(OBJECTS["selection"]))
    assert again.describe() == OBJECTS["selection"].describe()
    assert hash(again["prefill"].backend) == hash(OBJECTS["selection"]["prefill"].backend)


@pytest.mark.parametrize(
    "error",
    [SelfCheckError("off"), SettingsError("bad"), BackendLoadError("triton", "gone")],
    ids=lambda e: type(e).__name__,
)
def test_errors(error):
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), str(error))


def test_the_error_with_the_trace():
    with pytest.raises(NoBackendError) as caught:
        choose(Platform.simulated("cpu"), PROBLEMS["prefill"], "flashinfer")
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.verdicts == caught.value.verdicts
