"""Every reason that a row can give, over platforms that need not exist."""

from __future__ import annotations

import inspect

import pytest

from gdn_plugin.ops.record import OPS as RECORDS
from gdn_plugin.registry import OPS, Backend, NoBackendError, Platform, choose, judge, load, rows
from gdn_plugin.registry.backend import in_build
from gdn_plugin.registry.known_bad import KNOWN_BAD

NAMES = {
    "conv_prologue": ["triton", "cpu", "torch", "reference"],
    "prefill": ["flashinfer", "triton", "cpu", "torch", "reference"],
    "decode": ["flashinfer", "triton", "cpu", "torch", "reference"],
    "fused_decode": ["triton", "cpu", "torch", "reference"],
    "verify": ["flashinfer", "triton", "cpu", "torch", "reference"],
    "fused_verify": ["triton", "torch", "reference"],
    "gated_norm": ["triton", "cpu", "torch", "reference"],
    "replay_decode": ["triton", "torch", "reference"],
    "replay_verify": ["triton", "torch", "reference"],
    "replay_fold": ["triton", "torch", "reference"],
}

EVERY_ROW = [(op, name) for op, names in NAMES.items() for name in names]


def row(op: str, name: str) -> Backend:
    return next(row for row in rows(op) if row.name == name)


def reasons(platform, problem, name="flashinfer"):
    return judge(row(problem.op, name), platform, problem).reasons


@pytest.mark.parametrize("op", OPS)
def test_rank(op):
    assert [row.name for row in rows(op)] == NAMES[op]


@pytest.mark.parametrize(("op", "name"), EVERY_ROW, ids=lambda value: value)
def test_every_row_loads_and_takes_the_records_arguments(op, name):
    """By keyword, every one of them that is not a hint, and nothing else."""
    record = RECORDS[op]
    known = {argument.name for argument in record.arguments}
    needed = known - {argument.name for argument in record.inputs if argument.hint}
    parameters = inspect.signature(load(row(op, name)).run).parameters.values()
    required = {p.name for p in parameters if p.default is p.empty}
    assert needed <= {p.name for p in parameters}
    assert required <= known


def test_a_missing_module_is_said_and_not_imported():
    assert not in_build("gdn_plugin.backends.triton.not_there:run")
    assert not in_build("no_such_package.module:run")
    assert not in_build("json.decoder.deeper:run")
    assert in_build("json.decoder:JSONDecoder")
    verdict = judge(Backend("x", "gdn_plugin.ops.not_there:run"), Platform.simulated("cpu"), None)
    assert verdict.reasons == ("not in this build (gdn_plugin.ops.not_there is missing)",)


@pytest.mark.usefixtures("complete_build")
class TestFlashInfer:
    def test_runs_prefill_on_what_it_was_made_for(self, problem):
        for sm in ("sm_90", "sm_100", "sm_103", "sm_120"):
            assert reasons_against_running(Platform.simulated(sm), problem()) == ()

    @pytest.mark.parametrize(
        ("name", "simulated", "changed", "expected"),
        [
            ("sm_100", {"cuda": "12.8"}, {}, "needs CUDA >= 13.0 on SM 100, found 12.8"),
            ("sm_103", {"cuda": "12.9"}, {}, "needs CUDA >= 13.0 on SM 103, found 12.9"),
            (
                "sm_100",
                {"packages": {"nvidia-cutlass-dsl": None}},
                {},
                "needs nvidia-cutlass-dsl >= 4.4.2, which is not installed; "
                "pip install 'nvidia-cutlass-dsl[cu13]>=4.4.2'",
            ),
            (
                "sm_100",
                {"packages": {"nvidia-cutlass-dsl": "4.4.1"}},
                {},
                "needs nvidia-cutlass-dsl >= 4.4.2, found 4.4.1; pip install 'nvidia-cutlass-dsl[cu13]>=4.4.2'",
            ),
            (
                "sm_100",
                {"packages": {"nvidia-cutlass-dsl-libs-cu13": None}},
                {},
                "needs nvidia-cutlass-dsl-libs-cu13 >= 4.4.2, which is not installed; "
                "pip install 'nvidia-cutlass-dsl[cu13]>=4.4.2'",
            ),
            (
                "sm_100",
                {"packages": {"flashinfer-python": "0.6.13"}},
                {},
                "needs flashinfer-python >= 0.6.14, found 0.6.13; pip install 'flashinfer-python>=0.6.14'",
            ),
            ("sm_100", {}, {"head_k_dim": 64}, "needs K=128, V=128; got K=64, V=128"),
            ("sm_100", {}, {"dtype": "float32"}, "needs dtype bfloat16/float16; got float32"),
            ("sm_100", {}, {"state_dtype": "float64"}, "needs state dtype float32/bfloat16/float16; got float64"),
            ("sm_80", {}, {}, "needs SM 90/100/103/120, this device is 80"),
            ("cpu", {}, {}, "needs SM 90/100/103/120, this device is cpu"),
            (
                "sm_100",
                {"features": {"flashinfer.prefill": None}},
                {},
                "needs flashinfer.gdn_prefill.chunk_gated_delta_rule, which was not found",
            ),
        ],
        ids=[
            "CUDA 12.8",
            "CUDA 12.9 on SM 103",
            "no cutlass-dsl",
            "old cutlass-dsl",
            "no CUDA 13 libraries",
            "FlashInfer 0.6.13",
            "K=64",
            "fp32",
            "fp64 state",
            "SM 80",
            "CPU",
            "no such function",
        ],
    )
    def test_prefill_refuses(self, problem, name, simulated, changed, expected):
        found = reasons_against_running(Platform.simulated(name, **simulated), problem(**changed))
        assert expected in found
        assert choose(Platform.simulated(name, **simulated), problem(**changed)).name != "flashinfer"

    def test_cuda_12_needs_no_cuda_13_libraries_on_hopper(self, problem):
        platform = Platform.simulated("sm_90", cuda="12.8", packages={"nvidia-cutlass-dsl-libs-cu13": None})
        assert reasons_against_running(platform, problem()) == ()

    def test_an_older_one_copies_and_says_so(self, problem):
        older = Platform.simulated("sm_100", packages={"flashinfer-python": "0.6.14"})
        choice = choose(older, problem())
        assert choice.name == "flashinfer"
        assert "[copying: needs flashinfer-python >= 0.7 for in-place state]" in choice.describe()
        assert "copying" not in choose(Platform.simulated("sm_100"), problem()).describe()
        asked = {"flashinfer.prefill.state_indices": "yes"}  # a fork or a nightly with an old number
        told = Platform.simulated("sm_100", packages={"flashinfer-python": "0.6.14"}, features=asked)
        assert "copying" not in choose(told, problem()).describe()
        assert "which was not found" in reasons_against_running(older, problem("decode"))[0]

    def test_checkpoints_need_their_argument(self, problem):
        without = Platform.simulated("sm_100", features={"flashinfer.prefill.checkpoints": None})
        assert "state_checkpoints" in reasons_against_running(without, problem(checkpoints=True))[0]
        assert reasons_against_running(without, problem()) == ()

    def test_checkpoints_of_bf16_states_need_them_in_place(self, problem):
        older = Platform.simulated("sm_90", packages={"flashinfer-python": "0.6.14"})
        (reason,) = reasons_against_running(older, problem(checkpoints=True, state_dtype="bfloat16"))
        assert reason.startswith("needs flashinfer-python >= 0.7 for checkpoints of bfloat16 states")
        assert reasons_against_running(older, problem(checkpoints=True)) == ()
        assert reasons_against_running(older, problem(state_dtype="bfloat16")) == ()

    def test_all_reasons_are_collected(self, problem):
        platform = Platform.simulated("sm_100", cuda="12.8", packages={"nvidia-cutlass-dsl": None})
        assert len(reasons_against_running(platform, problem(head_k_dim=64))) == 3

    @pytest.mark.parametrize("op", ["decode", "verify"])
    @pytest.mark.parametrize("sm", ["sm_90", "sm_100", "sm_103", "sm_120"])
    def test_decode_and_verify_run_from_sm_90(self, problem, op, sm):
        assert reasons_against_running(Platform.simulated(sm), problem(op)) == ()
        old = reasons_against_running(Platform.simulated("sm_89"), problem(op))
        assert old == ("needs SM 90 or newer, this device is 89",)

    def test_decode_and_verify_need_indexed_pools(self, problem):
        platform = Platform.simulated(
            "sm_90",
            features={"flashinfer.decode.initial_state_indices": None, "flashinfer.mtp.ssm_state_indices": None},
        )
        assert "initial_state_indices" in reasons_against_running(platform, problem("decode"))[0]
        assert "ssm_state_indices" in reasons_against_running(platform, problem("verify"))[0]

    def test_verify_knows_no_padded_fp32_pool(self, problem):
        found = reasons_against_running(Platform.simulated("sm_100"), problem("verify", padded_pool=True))
        assert found == ("needs a dense state pool where state is float32; this pool's rows are padded",)
        bf16 = problem("verify", padded_pool=True, state_dtype="bfloat16")
        assert reasons_against_running(Platform.simulated("sm_100"), bf16) == ()

    def test_verify_takes_no_ragged_batches(self, problem):
        ragged = problem("verify", state_dtype="bfloat16", max_spec_tokens=4, ragged=True)
        (reason,) = reasons_against_running(Platform.simulated("sm_100"), ragged)
        assert reason.startswith("needs as many tokens of every sequence")
        assert choose(Platform.simulated("sm_100"), ragged).name == "triton"
        with pytest.raises(NoBackendError, match="this batch is ragged"):
            choose(Platform.simulated("sm_100"), ragged, "flashinfer")


@pytest.mark.usefixtures("complete_build")
class TestTriton:
    @pytest.mark.parametrize("op", OPS)
    @pytest.mark.parametrize("sm", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120"])
    def test_runs_everything_from_sm_80(self, problem, op, sm):
        verdict = judge(row(op, "triton"), Platform.simulated(sm), problem(op, dtype="float16"))
        assert verdict.preferred

    @pytest.mark.parametrize(
        ("name", "simulated", "changed", "expected"),
        [
            ("sm_75", {}, {}, "needs SM 80 or newer, this device is 75"),
            ("sm_90", {"packages": {"triton": None}}, {}, "needs triton, which is not installed"),
            ("sm_90", {}, {"head_k_dim": 96}, "needs K=64/128/256, V=64/128/256; got K=96, V=128"),
            ("sm_90", {}, {"dtype": "float64"}, "needs dtype bfloat16/float16/float32; got float64"),
            ("sm_90", {}, {"state_dtype": "float64"}, "needs state dtype float32/bfloat16/float16; got float64"),
            (
                "cpu",
                {},
                {},
                "needs SM 80 or newer, this device is cpu (TRITON_INTERPRET=1 would interpret the kernels)",
            ),
        ],
        ids=["SM 75", "no triton", "K=96", "fp64", "fp64 state", "CPU"],
    )
    def test_refuses(self, problem, name, simulated, changed, expected):
        assert expected in reasons(Platform.simulated(name, **simulated), problem(**changed), "triton")

    def test_interpreted_only_by_name(self, problem):
        platform = Platform.simulated("cpu", features={"triton.interpreter": True})
        assert choose(platform, problem(), "triton").name == "triton"
        assert choose(platform, problem()).name == "cpu"


@pytest.mark.usefixtures("complete_build")
class TestCpu:
    @pytest.mark.parametrize("op", [op for op, names in NAMES.items() if "cpu" in names])
    def test_preferred_where_it_can_be_built(self, problem, op):
        assert choose(Platform.simulated("cpu"), problem(op)).name == "cpu"
        without = Platform.simulated("cpu", features={"cpu.cxx_compiler": None})
        choice = choose(without, problem(op))
        assert choice.name == "torch"
        assert "needs a C++ compiler" in choice.describe()
        kept = Platform.simulated("cpu", features={"cpu.cxx_compiler": None, "cpu.library": True})
        assert choose(kept, problem(op)).name == "cpu"

    def test_refuses_other_devices_and_processors(self, problem):
        assert "needs a cpu device, this one is cuda" in reasons(Platform.simulated("sm_90"), problem(), "cpu")
        other = Platform.simulated("cpu", features={"cpu.machine": "riscv64"})
        assert "needs a CPU of type x86_64/arm64, this one is riscv64" in reasons(other, problem(), "cpu")


@pytest.mark.usefixtures("complete_build")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["cpu", "sm_75", "sm_90"])
def test_torch_takes_everything_and_reference_only_by_name(problem, op, name):
    bare = Platform.simulated(name, packages={"triton": None, "flashinfer-python": None}, features=[])
    odd = problem(op, dtype="float32", head_k_dim=48, head_v_dim=20, num_k_heads=1, num_v_heads=3, padded_pool=True)
    choice = choose(bare, odd)
    assert choice.name == "torch"
    assert not next(v for v in choice.verdicts if v.backend == "reference").preferred
    assert choose(bare, odd, "reference").name == "reference"


@pytest.mark.usefixtures("complete_build")
class TestKnownBad:
    @pytest.mark.parametrize("bad", KNOWN_BAD, ids=lambda bad: f"{bad.package}{bad.versions}-{bad.issue.split(',')[0]}")
    def test_every_row_bites_where_it_says_and_nowhere_else(self, problem, bad):
        version = {"<0.6.14": "0.6.13", "<=0.6.13": "0.6.13"}.get(bad.versions, bad.versions.lstrip("="))
        sm = f"sm_{(bad.sms or (90,))[0]}"
        op = (bad.ops or ("prefill",))[0]
        case = problem(op, **dict(bad.problem))
        affected = Platform.simulated(sm, packages={bad.package: version})
        sentence = bad.reason(affected, case)
        assert sentence is not None
        assert bad.issue in sentence and version in sentence
        with pytest.raises(NoBackendError) as caught:
            choose(affected, case, bad.backend)
        assert sentence in str(caught.value)
        assert bad.reason(Platform.simulated(sm), case) is None
        assert bad.reason(Platform.simulated(sm, packages={bad.package: None}), case) is None
        if bad.sms:
            assert bad.reason(Platform.simulated("sm_120", packages={bad.package: version}), case) is None
        if bad.problem:
            assert bad.reason(affected, problem(op)) is None

    def test_a_local_version_counts_as_its_release(self, problem):
        bad = next(row for row in KNOWN_BAD if row.versions == "==4.5.1")
        platform = Platform.simulated("sm_100", packages={"nvidia-cutlass-dsl": "4.5.1+build7"})
        assert bad.reason(platform, problem()) is not None
        unreadable = Platform.simulated("sm_100", packages={"nvidia-cutlass-dsl": "main"})
        assert bad.reason(unreadable, problem()) is None
        assert "needs nvidia-cutlass-dsl >= 4.4.2, found main" in " ".join(reasons(unreadable, problem()))


def reasons_against_running(platform, problem):
    """Reasons why flashinfer cannot run; none where it merely is not preferred."""
    verdict = judge(row(problem.op, "flashinfer"), platform, problem)
    return () if verdict.supported else verdict.reasons
