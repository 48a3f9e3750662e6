"""Platform and Problem: plain facts, by hand."""

from __future__ import annotations

import pickle

import pytest

from gdn_plugin.registry import Platform


def test_simulated_gpu_is_complete_and_current():
    platform = Platform.simulated("sm_100")
    assert (platform.device, platform.sm, platform.cuda, platform.sm_count) == ("cuda", 100, "13.0", 148)
    assert platform.version("flashinfer-python") == "0.7.2.post1"
    assert platform.has("flashinfer.prefill.state_indices")
    assert platform.name == "sm_100"


def test_simulated_cpu_has_no_gpu():
    platform = Platform.simulated("cpu")
    assert (platform.device, platform.sm, platform.cuda, platform.sm_count) == ("cpu", None, None, None)
    assert platform.name == "cpu"


@pytest.mark.parametrize(("name", "count"), [("sm_80", 108), ("sm_90", 132), ("sm_90a", 132), ("sm_120", 188)])
def test_simulated_sm_count(name, count):
    assert Platform.simulated(name).sm_count == count
    assert Platform.simulated(name, sm_count=7).sm_count == 7


@pytest.mark.parametrize("gone", [None, "none", "None"])
def test_a_package_can_be_taken_away(gone):
    platform = Platform.simulated("sm_90", packages={"flashinfer-python": gone, "triton": "3.5.0"})
    assert platform.version("flashinfer-python") is None
    assert platform.version("triton") == "3.5.0"
    assert not any(feature.startswith("flashinfer") for feature in platform.features)


def test_cutlass_dsl_takes_its_cuda_libraries_along():
    assert (
        Platform.simulated("sm_100", packages={"nvidia-cutlass-dsl": None}).version("nvidia-cutlass-dsl-libs-cu13")
        is None
    )


def test_features_change_one_by_one_or_all():
    one = Platform.simulated("cpu", features={"cpu.cxx_compiler": None, "triton.interpreter": True})
    assert not one.has("cpu.cxx_compiler")
    assert one.has("triton.interpreter")
    assert one.has("cpu.machine")
    assert dict(Platform.simulated("cpu", features=["x"]).features) == {"x": "yes"}


@pytest.mark.parametrize("name", ["sm100", "gpu", "sm_", "sm_1", "SM_100", ""])
def test_bad_platform_names_list_the_good_ones(name):
    with pytest.raises(ValueError, match=r"choose cpu or .*sm_100"):
        Platform.simulated(name)


def test_platform_is_frozen_hashable_and_picklable():
    packages = {"torch": "2.13.0"}
    platform = Platform("cpu", packages=packages)
    packages["torch"] = "1.0"
    assert platform.version("torch") == "2.13.0"
    with pytest.raises(TypeError):
        platform.packages["torch"] = "1.0"
    with pytest.raises(AttributeError):
        platform.device = "cuda"
    assert hash(platform) == hash(Platform("cpu", packages={"torch": "2.13.0"}))
    assert pickle.loads(pickle.dumps(platform)) == platform


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"op": "prefil"}, "op"),
        ({"dtype": "bf16"}, "dtype"),
        ({"state_dtype": "torch.float32"}, "state_dtype"),
        ({"num_v_heads": 33}, "num_v_heads"),
        ({"num_k_heads": 0}, "num_k_heads"),
        ({"head_k_dim": -1}, "head_k_dim"),
        ({"num_tokens": -1}, "num_tokens"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_bad_problems_name_the_field(problem, changed, named):
    with pytest.raises(ValueError, match=named):
        problem(**changed)


def test_problem_is_hashable_and_says_what_it_is(problem):
    assert len({problem(), problem(), problem(padded_pool=True)}) == 2
    assert str(problem("verify", max_spec_tokens=3)).startswith("verify(dtype=bfloat16")
    assert "max_spec_tokens=3" in str(problem("verify", max_spec_tokens=3))
    assert problem("conv_prologue").phase == "prefill"
    assert problem("fused_decode").phase == "decode"
