"""`bench --engine`: numbers before times, what is kept of a run cut short, and one real run on this CPU."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gdn_plugin.tools import models
from gdn_plugin.tools.bench import engine, rounds
from gdn_plugin.tools.cli import main
from gdn_plugin.tools.cli.values import BadArguments
from gdn_plugin.tools.vllm_engine import OWN_PROCESS

ROOT = Path(__file__).parents[1]
OURS = "gdn_plugin.hosts.vllm.layer.GdnPluginAttention"
STOCKS = "vllm.model_executor.layers.mamba.gdn.QwenGatedDeltaNetAttention"


def said(tokens, prompt=(-1.0, -2.0), near=0.1):
    """An answer whose every token has one alternative, token 99, that is `near` it."""
    return {"tokens": tokens, "logprobs": [{token: -0.5, 99: -0.5 - near} for token in tokens], "prompt": list(prompt)}


class TestAgreement:
    def test_the_same(self):
        found = rounds.compare([said([1, 2])], [said([1, 2])])
        assert found.ok and (found.difference, found.same, found.tokens, found.worst_tie) == (0.0, 2, 2, 0.0)

    def test_another_prompt(self):
        assert not rounds.compare([said([1, 2])], [said([1, 2], prompt=(-1.0, -2.5))]).ok

    def test_answers_may_part_at_a_tie_alone(self):
        for near, ok in ((0.1, True), (1.0, False)):
            found = rounds.compare([said([1, 2, 3], near=near)], [said([1, 99, 5])])
            assert found.ok == ok and found.same == 1 and found.worst_tie == pytest.approx(near)
        assert not rounds.compare([said([1, 2, 3])], [said([1, 7, 5])]).ok, "a token that stock does not name"

    def test_nan_is_no_agreement(self):
        assert not rounds.compare([said([1])], [said([1], prompt=(float("nan"), -2.0))]).ok

    def test_what_stock_differs_by_from_itself_is_allowed_twice(self):
        other = [said([1, 2], prompt=(-1.1, -2.1))]
        assert not rounds.compare([said([1, 2])], other).ok and rounds.compare([said([1, 2])], other, noise=0.04).ok

    def test_it_goes_through_json(self):
        """Between processes the numbers of tokens become words."""
        stock = json.loads(json.dumps([said([1, 2])]))
        assert rounds.compare(stock, [said([1, 99])]).ok


def test_what_both_launch_alike_is_the_hosts():
    stock = {"gemm": [4.0, 100.0], "copy": [3.0, 9.0], "conv": [1.0, 50.0]}
    plugin = {"gemm": [4.0, 101.0], "copy": [1.0, 3.0], "fused": [1.0, 20.0]}
    own, shared = rounds.own_kernels({"stock": stock, "plugin": plugin})
    assert {who: list(rows) for who, rows in own.items()} == {"stock": ["copy", "conv"], "plugin": ["copy", "fused"]}
    assert shared == 100.0
    replay = {"gemm": [4.0, 100.0], "fused": [1.0, 20.0]}
    own, shared = rounds.own_kernels({"stock": stock, "plugin": plugin, "replay": replay})
    assert list(own["plugin"]) == ["copy", "fused"] and list(own["replay"]) == ["fused"] and shared == 100.0
    assert rounds.own_kernels({}) == ({}, 0)


@pytest.fixture
def engines(monkeypatch):
    """Stands for the engines' processes; `fake.jobs` are what they were asked."""

    class Fake:
        jobs: list = []  # noqa: RUF012
        fails = agrees = interrupts = None
        rings = True

        def __call__(self, job, folder, environment, *, hub, as_served):
            assert not as_served  # on a CPU
            stock = environment["GDN_PLUGIN_DISABLE"] == "1"
            ring = int(environment.get("GDN_PLUGIN_REPLAY", 0))
            name = "stock" if stock else "replay" if ring else "plugin"
            self.jobs.append((name, job))
            if self.interrupts == name:
                raise KeyboardInterrupt
            if self.fails == name:
                raise RuntimeError("ValueError: no")
            found = {"layers": [STOCKS if stock else OURS], "startup_s": 9.0, "rings": [ring if self.rings else 0]}
            if job["bench"].get("expected"):
                found["check"] = {"ok": self.agrees is not False, "difference": 0.5, "limit": 0.03, "same": 3,
                                  "tokens": 4, "worst_tie": 0.0}  # fmt: skip
                if self.agrees is False:
                    return found
            else:
                found |= {"said": [said([1])], "noise": 0.0}
            times = {"stock": [2.0, 1.0, 3.0], "plugin": [1.0, 0.5, 2.0], "replay": [0.5, 0.5, 0.5]}[name]
            seconds = dict.fromkeys(job["bench"]["rounds"], times)
            return found | {"seconds": seconds, "compiled": [None, None] if stock else [4, 4]}

    fake = Fake()
    fake.jobs = []
    monkeypatch.setattr(engine, "_run", fake)
    return fake


def test_in_turn_and_with_ratios(engines, tmp_path, capsys):
    pytest.importorskip("vllm", reason="vllm is not installed")
    out = tmp_path / "engine.json"
    assert main(["bench", "--engine", "--rounds", "prefill,ngram", "--turns", "2", "--json", str(out)]) == 0
    assert [name for name, _ in engines.jobs] == ["stock", "plugin"] * 4
    assert [list(job["bench"]["rounds"]) for _, job in engines.jobs] == [["prefill"]] * 4 + [["ngram"]] * 4
    assert ["speculative_config" in job["llm"] for _, job in engines.jobs] == [False] * 4 + [True] * 4
    data = json.loads(out.read_text())
    assert [(row["round"], row["ratio"]) for row in data["summary"]] == [("prefill", 2.0), ("ngram", 2.0)]
    shown = capsys.readouterr().out
    assert "stock / plugin" in shown and "kernels compiled while serving: 0" in shown and "not on a CPU" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_replay_is_a_third_kind(engines, tmp_path, capsys):
    pytest.importorskip("vllm", reason="vllm is not installed")
    out = tmp_path / "engine.json"
    assert main(["bench", "--engine", "--rounds", "few", "--turns", "1", "--replay", "16", "--json", str(out)]) == 0
    assert [name for name, _ in engines.jobs] == ["stock", "plugin", "replay"]
    assert all("expected" in job["bench"] for name, job in engines.jobs if name != "stock")
    assert json.loads(out.read_text())["summary"] == [
        {"round": "few", "stock": 2.0, "plugin": 1.0, "replay": 0.5, "ratio": 2.0, "replay_ratio": 4.0}
    ]
    shown = capsys.readouterr().out
    assert "stock / plugin" in shown and "stock / replay" in shown and "replay, greedy answers" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_replay_that_is_off_has_no_times_and_the_others_go_on(engines, tmp_path, capsys):
    pytest.importorskip("vllm", reason="vllm is not installed")
    engines.rings = False
    out = tmp_path / "engine.json"
    assert main(["bench", "--engine", "--rounds", "few,mtp", "--turns", "1", "--replay", "16", "--json", str(out)]) == 1
    assert [name for name, _ in engines.jobs] == ["stock", "plugin", "replay", "stock", "plugin"]
    few, mtp = json.loads(out.read_text())["summary"]
    assert few["ratio"] == mtp["ratio"] == 2.0 and few["replay"] is None and few["replay_ratio"] is None
    assert "replay is off" in capsys.readouterr().err


def test_tensor_parallel_engines(engines, tmp_path, capsys):
    pytest.importorskip("vllm", reason="vllm is not installed")
    arguments = ["bench", "--engine", "--rounds", "few", "--turns", "1", "--tensor-parallel"]
    assert main([*arguments, "2"]) == 0 and main([*arguments, "1"]) == 0
    assert [job["llm"].get("tensor_parallel_size") for _, job in engines.jobs] == [2, 2, None, None]
    assert "tensor parallel 2" in capsys.readouterr().out


def test_with_the_prefix_cache_past_the_ends_of_blocks(engines, capsys):
    pytest.importorskip("vllm", reason="vllm is not installed")
    arguments = ["bench", "--engine", "--turns", "1", "--rounds"]
    assert main([*arguments, "mtp,blocks", "--prefix-cache"]) == 0 and "prefix cache" in capsys.readouterr().out
    assert main([*arguments, "mtp"]) == 0 and "prefix cache" not in capsys.readouterr().out
    assert [job["llm"]["enable_prefix_caching"] for _, job in engines.jobs] == [True, True, False, False]
    assert all(job["llm"]["speculative_config"]["method"] == "mtp" for _, job in engines.jobs)
    assert main([*arguments, "blocks"]) == 2 and "--prefix-cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cuda", "said", "own"), [(True, None, True), (True, "0", False), (False, None, False), (False, "1", True)]
)
def test_on_a_gpu_the_core_has_a_process_of_its_own(monkeypatch, tmp_path, cuda, said, own):
    if said is None:
        monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    else:
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", said)
    plan = engine.Plan("tiny", ("few",), 3, "bfloat16", "", 1, 1, cuda=cuda)
    assert plan.as_served == own
    seen = {}

    def run(command, *, log, environment, timeout):
        seen.update(environment)
        Path(command[-1]).write_text("{}")
        return 0

    monkeypatch.setattr(engine.child, "run", run)
    engine._run({}, tmp_path, {}, hub=False, as_served=plan.as_served)
    assert seen["VLLM_ENABLE_V1_MULTIPROCESSING"] == str(int(own))
    assert (seen.get("VLLM_ALLOW_INSECURE_SERIALIZATION") == "1") == own


def test_rounds_have_no_prompt_in_common():
    """A prefix cache would find it, and the profile would be of less work than the seconds."""
    asked = []

    class Engine:
        llm_engine = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: 1000), step=None)

        def generate(self, prompts, sampling, use_tqdm):
            asked.append({tuple(prompt["prompt_token_ids"][:8]) for prompt in prompts})
            return []

        def apply_model(self, function):
            return [[]] if function is rounds._stop_profile else [None]

    job = {"rounds": {"one": [(2, 8, 1)], "two": [(2, 9, 1)]}, "repeats": 2, "expected": [], "noise": 0.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "answers", lambda *a, **k: [])
        patch.setattr(rounds, "compare", lambda *a: rounds.Agreement(0.0, 1.0, 0, 0, 0.0))
        patch.setattr(torch.cuda, "is_available", lambda: True)
        rounds.run(Engine(), SimpleNamespace, 1, job)
    assert len(asked) == 2 + 2 * 2 + 2 and len(set().union(*asked)) == 2 * len(asked)


def test_a_round_that_waits_for_the_host_shows():
    plan = engine.Plan("tiny", ("few",), 3, "bfloat16", "", 1, 1, cuda=True)
    found = [
        {"engine": name, "speculation": "", "layers": [], "seconds": {"few": [3.0, 3.1, 9.0]}, "compiled": [1, 1],
         "kernels": {"few": {kernel: [1.0, us], "gemm": [1.0, 50.0]}}, "device_s": {"few": seconds}}
        for name, kernel, us, seconds in (("stock", "theirs", 190.0, 2.9), ("plugin", "ours", 120.0, 2.25))
    ]  # fmt: skip
    shown = engine._text(plan, found)
    assert "alike in all: 50.0" in shown
    assert "stock: 190.0; the device works 2.90 of 3.10 s" in shown
    assert "plugin: 120.0; the device works 2.25 of 3.10 s" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_more_gpus_than_there_are(monkeypatch):
    pytest.importorskip("vllm", reason="vllm is not installed")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    plan = engine.Plan("tiny", ("few",), 3, "bfloat16", "", 1, 1, cuda=True, tensor_parallel=2)
    with pytest.raises(BadArguments, match="of GPUs there are 1 here"):
        plan.check()


@pytest.mark.parametrize("how", ["disagrees", "fails"])
def test_a_plugin_that_is_wrong_has_no_times(engines, tmp_path, capsys, how):
    pytest.importorskip("vllm", reason="vllm is not installed")
    engines.agrees, engines.fails = (False, None) if how == "disagrees" else (None, "plugin")
    out = tmp_path / "engine.json"
    assert main(["bench", "--engine", "--rounds", "prefill", "--json", str(out)]) == 1
    assert len(engines.jobs) == 2, "no more engines are started"
    shown = capsys.readouterr()
    assert ("its answers are not stock's" if how == "disagrees" else "ValueError: no") in shown.err
    assert json.loads(out.read_text())["summary"] == [{"round": "prefill", "stock": 2.0, "plugin": None, "ratio": None}]


def test_where_stock_fails_the_plugin_is_timed_unchecked(engines, capsys):
    pytest.importorskip("vllm", reason="vllm is not installed")
    engines.fails = "stock"
    assert main(["bench", "--engine", "--rounds", "ngram", "--turns", "1"]) == 1
    shown = capsys.readouterr()
    assert "unchecked" in shown.out and "stock: the engine ended: ValueError: no" in shown.err


def test_ctrl_c_keeps_what_was_measured(engines, tmp_path, capsys):
    pytest.importorskip("vllm", reason="vllm is not installed")
    engines.interrupts = "plugin"
    out = tmp_path / "engine.json"
    assert main(["bench", "--engine", "--rounds", "prefill", "--json", str(out)]) == 130
    assert [e["engine"] for e in json.loads(out.read_text())["engines"]] == ["stock"]
    shown = capsys.readouterr()
    assert shown.err == "gdn-plugin bench: interrupted\n" and "2.000" in shown.out


@pytest.mark.parametrize("name", [name for name, size in models.SIZES.items() if not size.weights])
def test_sizes_without_weights_are_configurations(name, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    models.SIZES[name].write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["linear_num_value_heads"] == 32 and len(config["layer_types"]) == config["num_hidden_layers"]


def test_made_up_weights_are_the_same_in_every_process_and_matter():
    def model():
        made = torch.nn.Module()
        made.linear_attn = torch.nn.Module()
        for name, shape in (("A_log", (4,)), ("dt_bias", (4,)), ("conv1d", (8, 1, 4)), ("out_proj", (16, 8))):
            setattr(made.linear_attn, name, torch.nn.Parameter(torch.zeros(shape)))
        rounds.randomise(made)
        return dict(made.linear_attn.named_parameters())

    one, other = model(), model()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]) and weight.std() > 0, name


@pytest.mark.engine
@pytest.mark.timeout(600)  # three starts of an engine
def test_a_real_run(monkeypatch, tmp_path, capsys):
    """As on a GPU, with the engine's core in a process of its own."""
    pytest.importorskip("vllm", reason="vllm is not installed")
    for name, value in OWN_PROCESS.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "engine.json"
    arguments = ["--turns", "1", "--repeats", "1", "--replay", "8", "--prefix-cache", "--json", str(out)]
    arguments += ["--rounds", "few"]
    assert main(["bench", "--engine", "--model", "tiny", *arguments]) == 0, capsys.readouterr().err
    data = json.loads(out.read_text())
    stock, plugin, replay = data["engines"]
    assert set(plugin["layers"]) == {OURS} and not set(stock["layers"]) & {OURS}
    assert set(plugin["rings"]) == {0} and set(replay["rings"]) == {8} and replay["check"]["ok"]
    assert plugin["check"]["ok"] and plugin["check"]["tokens"] == len(rounds.CHECK_LENGTHS) * rounds.CHECK_NEW
    assert data["summary"][0]["ratio"] > 0 and plugin["compiled"][0] == plugin["compiled"][1]


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(600)  # two starts of an engine
def test_a_real_run_of_two_ranks(monkeypatch, tmp_path, capsys):
    """What is asked of the model reaches processes that are not the engine's own."""
    pytest.importorskip("vllm", reason="vllm is not installed")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    out = tmp_path / "engine.json"
    arguments = ["--rounds", "few", "--turns", "1", "--repeats", "1", "--tensor-parallel", "2", "--json", str(out)]
    assert main(["bench", "--engine", "--model", "tiny", *arguments]) == 0, capsys.readouterr().err
    data = json.loads(out.read_text())
    assert data["tensor_parallel"] == 2 and data["engines"][1]["check"]["ok"]
    assert data["engines"][1]["compiled"] == [0, 0] and data["engines"][0]["compiled"] == [None, None]
