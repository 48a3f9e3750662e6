"""Settings: precedence, and errors that list what would have been right."""

from __future__ import annotations

import os

import pytest

from gdn_plugin import settings
from gdn_plugin.registry import Backend
from gdn_plugin.registry.external import External, external
from gdn_plugin.registry.requests import Request, replay_request, requests
from gdn_plugin.settings import SettingsError

VARIABLES = {
    "GDN_PLUGIN_BACKEND",
    "GDN_PLUGIN_PREFILL_BACKEND",
    "GDN_PLUGIN_DECODE_BACKEND",
    "GDN_PLUGIN_VERIFY_BACKEND",
    "GDN_PLUGIN_REPLAY",
    "GDN_PLUGIN_DISABLE",
    "GDN_PLUGIN_SELF_CHECK",
    "GDN_PLUGIN_DEBUG",
    "GDN_PLUGIN_CACHE",
}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith("GDN_PLUGIN_"):
            monkeypatch.delenv(name)


def values(**arguments):
    return {phase: request.value for phase, request in requests(**arguments).items()}


def test_the_table_is_the_designs():
    assert set(settings.TABLE) == VARIABLES


def test_defaults():
    assert requests() == dict.fromkeys(("prefill", "decode", "verify"), Request("auto", "default"))
    assert (settings.disabled(), settings.self_check(), settings.debug()) == (False, True, False)


def test_each_level_wins_over_those_below(monkeypatch):
    config = {"gdn_plugin": {"prefill_backend": "cpu"}, "something_else": 1}
    assert values(gdn_prefill_backend="triton") == {"prefill": "triton", "decode": "auto", "verify": "auto"}
    assert values(additional_config=config, gdn_prefill_backend="triton")["prefill"] == "cpu"
    monkeypatch.setenv("GDN_PLUGIN_BACKEND", "torch")
    everywhere = values(additional_config=config, gdn_prefill_backend="triton")
    assert everywhere == {"prefill": "torch", "decode": "torch", "verify": "torch"}
    monkeypatch.setenv("GDN_PLUGIN_PREFILL_BACKEND", "reference")
    assert values(additional_config=config)["prefill"] == "reference"
    assert values(additional_config=config)["decode"] == "torch"
    monkeypatch.setenv("GDN_PLUGIN_DECODE_BACKEND", "auto")
    assert values()["decode"] == "auto"


def test_a_request_tells_where_it_comes_from(monkeypatch):
    monkeypatch.setenv("GDN_PLUGIN_BACKEND", "torch")
    monkeypatch.setenv("GDN_PLUGIN_VERIFY_BACKEND", "triton")
    found = requests({"gdn_plugin": {"prefill_backend": "cpu"}})
    assert found["prefill"] == Request("torch", "GDN_PLUGIN_BACKEND")
    assert found["verify"] == Request("triton", "GDN_PLUGIN_VERIFY_BACKEND")
    monkeypatch.delenv("GDN_PLUGIN_BACKEND")
    found = requests({"gdn_plugin": {"prefill_backend": "cpu"}}, "triton")
    assert found["prefill"] == Request("cpu", 'additional_config["gdn_plugin"]')
    assert requests(None, "triton")["prefill"] == Request("triton", "--gdn-prefill-backend")


def test_the_configs_phase_wins_over_its_backend():
    config = {"gdn_plugin": {"backend": "torch", "decode_backend": "cpu", "verify_backend": None}}
    assert values(additional_config=config) == {"prefill": "torch", "decode": "cpu", "verify": "torch"}


@pytest.mark.parametrize(
    ("raw", "value"),
    [("flashinfer,triton", "flashinfer,triton"), (" flashinfer , triton ", "flashinfer,triton"), ("", "auto")],
)
def test_lists_are_valid_and_empty_is_unset(monkeypatch, raw, value):
    monkeypatch.setenv("GDN_PLUGIN_PREFILL_BACKEND", raw)
    assert values()["prefill"] == value


def test_read_on_access(monkeypatch):
    assert not settings.debug()
    monkeypatch.setenv("GDN_PLUGIN_DEBUG", "1")
    assert settings.debug()


@pytest.mark.parametrize("name", sorted(VARIABLES - {"GDN_PLUGIN_CACHE"}))
def test_a_bad_value_lists_the_good_ones(monkeypatch, name):
    monkeypatch.setenv(name, "tritom")
    with pytest.raises(SettingsError) as caught:
        requests()
    message = str(caught.value)
    assert message.startswith(f"{name}='tritom' is not valid")
    if name.endswith("BACKEND"):
        assert "did you mean 'triton'?" in message
        assert "choose one of: auto, flashinfer, triton, cpu, torch, reference" in message
    elif name.endswith("REPLAY"):
        assert message.endswith("choose one of: auto, 0, slots of the ring, 4 to 64")
    else:
        assert message.endswith("choose one of: 0, 1")


@pytest.mark.parametrize("raw", ["3", "65", "08", "-8", "8.0", "on", "1"])
def test_bad_replay(monkeypatch, raw):
    monkeypatch.setenv("GDN_PLUGIN_REPLAY", raw)
    for ask in (requests, replay_request):
        with pytest.raises(SettingsError, match=r"^GDN_PLUGIN_REPLAY='.+' is not valid; choose one of: auto, 0, "):
            ask()
    monkeypatch.delenv("GDN_PLUGIN_REPLAY")
    with pytest.raises(SettingsError, match=r"\['replay'\]='.+' is not valid"):
        replay_request({"gdn_plugin": {"replay": raw}})


@pytest.mark.parametrize("raw", ["auto", "0", "4", "64"])
def test_replay_from_either_place(monkeypatch, raw):
    assert replay_request() == Request("auto", "default")
    said = {"gdn_plugin": {"replay": int(raw) if raw.isdigit() else raw, "backend": "torch"}}
    assert replay_request(said) == Request(raw, 'additional_config["gdn_plugin"]')
    monkeypatch.setenv("GDN_PLUGIN_REPLAY", "16")
    assert replay_request(said) == Request("16", "GDN_PLUGIN_REPLAY")


@pytest.mark.parametrize("raw", [True, 8.5, [8]])
def test_replay_of_another_type(raw):
    with pytest.raises(SettingsError, match="must be"):
        replay_request({"gdn_plugin": {"replay": raw}})


@pytest.mark.parametrize("raw", [",", "triton,nothing", "triton,auto"])
def test_bad_lists(monkeypatch, raw):
    monkeypatch.setenv("GDN_PLUGIN_BACKEND", raw)
    with pytest.raises(SettingsError, match="is not valid"):
        requests()


def test_an_unknown_variable_is_an_error_with_a_suggestion(monkeypatch):
    monkeypatch.setenv("GDN_PLUGIN_PREFIL_BACKEND", "triton")
    with pytest.raises(SettingsError) as caught:
        requests()
    message = str(caught.value)
    assert "GDN_PLUGIN_PREFIL_BACKEND is not a setting of gdn-plugin" in message
    assert "did you mean 'GDN_PLUGIN_PREFILL_BACKEND'?" in message
    assert all(name in message for name in VARIABLES)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prefil_backend": "triton"}, "has no key 'prefil_backend'; did you mean 'prefill_backend'"),
        ({"prefill_backend": "tritom"}, "did you mean 'triton'"),
        ({"prefill_backend": 3}, "must be a string; got 3"),
        ("triton", "must be a mapping with keys among backend, prefill_backend"),
    ],
    ids=["key", "value", "type", "no mapping"],
)
def test_bad_additional_config(config, message):
    with pytest.raises(SettingsError, match=r'additional_config\["gdn_plugin"\]') as caught:
        requests({"gdn_plugin": config})
    assert message in str(caught.value)


def test_a_bad_value_is_found_even_where_another_wins(monkeypatch):
    monkeypatch.setenv("GDN_PLUGIN_PREFILL_BACKEND", "torch")
    with pytest.raises(SettingsError):
        requests({"gdn_plugin": {"prefill_backend": "tritom"}})


def test_kernels_of_vllm_that_are_not_ours_are_no_silent_fallback():
    assert values(gdn_prefill_backend="auto")["prefill"] == "auto"
    with pytest.raises(SettingsError, match="GDN_PLUGIN_DISABLE=1"):
        requests(None, "cutedsl")


def test_third_parties_names_are_valid(monkeypatch):
    monkeypatch.setattr(
        "gdn_plugin.registry.table.external", lambda: External({"prefill": (Backend("mine", "json:loads"),)})
    )
    monkeypatch.setenv("GDN_PLUGIN_BACKEND", "mine,triton")
    assert values()["prefill"] == "mine,triton"
    monkeypatch.setenv("GDN_PLUGIN_BACKEND", "yours")
    with pytest.raises(SettingsError, match="reference, mine"):
        requests()
    assert external().rows == {}


def test_in_force_shows_every_setting(monkeypatch):
    monkeypatch.setenv("GDN_PLUGIN_DEBUG", "maybe")
    shown = settings.in_force()
    assert set(shown) == VARIABLES
    assert shown["GDN_PLUGIN_DEBUG"] == "maybe"
    assert shown["GDN_PLUGIN_BACKEND"] == "auto"
    assert shown["GDN_PLUGIN_PREFILL_BACKEND"] is None
