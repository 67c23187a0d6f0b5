"""Which backends a run takes: what is wrong, crashes or hangs is found out, and what is found is remembered."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from hdfast import tune
from hdfast.runtime.errors import Interrupted
from hdfast.tuning import choice as choices
from hdfast.tuning import search as searching
from hdfast.tuning import settle as settling
from hdfast.tuning.choice import Choice, alone, key_of, path_of, remember, remembered
from hdfast.tuning.search import FINE, GRAPH, TIMES, Job, TuningError, chosen, leave_out
from hdfast.tuning.settle import settle, summary
from hdfast.tuning.trials import Verdict
from hdfast_kernels import dispatch
from tests.agent_cases import SPECS, make_actions, one_thread, small_config  # noqa: F401
from tests.loop_cases import door

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZES = {"replay": {"batch": 4, "length": 8}}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HDFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HDFAST_BACKEND", raising=False)


@pytest.fixture
def own_defaults():
    before = dispatch.use("cpu", None)
    yield
    dispatch.use("cpu", before)


def job(device="cpu", **options) -> Job:
    return Job(
        SPECS, make_actions(False), small_config(**SIZES), torch.device(device), torch.float32, **options
    )


@pytest.mark.parametrize("device", DEVICES)
def test_a_search_ends_with_what_is_right_and_fastest(device):
    lines = []
    found = searching.search(job(device), check=lambda: None, tell=lines.append)
    ms = found.report[TIMES]["ms"]
    fastest = min(ms, key=ms.__getitem__)
    assert found.graph == fastest.endswith("graph")
    assert bool(found.report[TIMES]["ops"]) == fastest.startswith("fused")
    if found.ops:
        assert set(found.ops) <= {op for op, line in found.report.items() if line["right"]}
    assert {line["begin"] for line in lines if "begin" in line} == set(found.report)
    assert all(line["right"] for line in found.report.values()), found.report
    assert summary(found)


def planted(monkeypatch, tmp_path, code: str) -> None:
    """Has Python run this when it starts, in processes that are started from here."""
    folder = tmp_path / "planted"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(textwrap.dedent(code))
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_ops_that_crash_or_hang_cost_only_themselves(monkeypatch, tmp_path):
    planted(
        monkeypatch,
        tmp_path,
        """
        import os, sys, time
        if "hdfast.tuning.search" in sys.orig_argv:
            from hdfast_kernels import dispatch

            def plant(op, fault):
                dispatch._ops[op].implementations["native"] = fault

            def refuse(*args, **kwargs):
                raise ValueError("out of registers")

            from hdfast.tuning import trials
            few = ("image_loss", "kl_balance", "lambda_return", "linear", "two_hot_mean")
            trials.Trials.candidates = lambda self: dict.fromkeys(few, "native")
            plant("kl_balance", lambda *args, **kwargs: os.abort())
            plant("lambda_return", lambda *args, **kwargs: time.sleep(1000))
            plant("two_hot_mean", refuse)
        """,
    )
    found = searching.search(job(), check=lambda: None, tell=lambda line: None, limit=6)
    wrong = {op: line["why"] for op, line in found.report.items() if not line["right"]}
    assert wrong == {
        "kl_balance": "its process ended by signal 6",
        "lambda_return": "no end within 6 s",
        "two_hot_mean": "ValueError: out of registers",
    }
    assert found.report[TIMES]["right"]
    assert not set(wrong) & set(found.ops or {})


def test_a_search_that_takes_too_long_ends_with_the_defaults(monkeypatch, tmp_path):
    planted(
        monkeypatch,
        tmp_path,
        """
        import sys, time
        if "hdfast.tuning.search" in sys.orig_argv:
            from hdfast.tuning import trials
            trials.Trials.milliseconds = lambda *args: time.sleep(1000)
        """,
    )
    found = searching.search(job(), check=lambda: None, tell=lambda line: None, budget=15)
    assert (found.ops, found.graph) == (None, False)
    assert found.report[TIMES]["why"] == "the time for all trials was over"
    assert found.report["kl_balance"]["right"]


def test_where_not_even_plain_pytorch_runs_there_is_no_choice(monkeypatch, tmp_path):
    planted(
        monkeypatch,
        tmp_path,
        "import sys\nif 'hdfast.tuning.search' in sys.orig_argv: sys.exit('no GPU today')",
    )
    with pytest.raises(TuningError, match="ended with code 1: SystemExit: no GPU today"):
        searching.search(job(), check=lambda: None, tell=lambda line: None)


def test_a_search_can_be_stopped():
    began = time.monotonic()

    def check():
        if time.monotonic() > began + 1:
            raise Interrupted(2)

    with pytest.raises(Interrupted):
        searching.search(job(), check=check, tell=lambda line: None)
    assert searches(os.getpid()) == []


def searches(parent: int) -> list[int]:
    """The processes of a search that a process has started."""
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(parent)], capture_output=True, text=True)
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if "hdfast.tuning.search" in line]


def until(true, what: str) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def test_a_search_ends_with_the_run_that_waits_for_it():
    code = """
        import torch
        from tests.agent_cases import SPECS, make_actions, small_config
        from hdfast.tuning.search import Job, search

        job = Job(SPECS, make_actions(False), small_config(), torch.device("cpu"), torch.float32)
        search(job, check=lambda: None, tell=lambda line: None)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT) as run:
        until(lambda: searches(run.pid), "it starts a process")
        (child,) = searches(run.pid)
        run.kill()
    until(
        lambda: (
            not Path(f"/proc/{child}/cmdline").exists()
            or b"search" not in Path(f"/proc/{child}/cmdline").read_bytes()
        ),
        "and that ends",
    )


def test_what_is_known_counts_where_the_process_ends_badly(monkeypatch, tmp_path):
    """CUDA may crash when it is taken down."""
    planted(
        monkeypatch,
        tmp_path,
        """
        import atexit, os, sys
        if "hdfast.tuning.search" in sys.orig_argv:
            from hdfast.tuning import trials
            trials.Trials.candidates = lambda self: {"kl_balance": "native", "linear": "native"}
            atexit.register(os.abort)
        """,
    )
    found = searching.search(job(), check=lambda: None, tell=lambda line: None)
    assert found.ops is not None
    assert found.report[TIMES]["right"]


def test_times_without_graphs_stand_in_where_graphs_cannot_be_timed(monkeypatch):
    class Fake:
        def __init__(self, *args):
            pass

        def measure_definition(self):
            pass

        def candidates(self):
            return {"kl_balance": "triton"}

        def judge(self, ops):
            return Verdict(True)

        judge_graph = judge

        def milliseconds(self, *settings):
            if any(graph for _, graph in settings):
                raise RuntimeError("capture failed")
            return [1.0 if ops else 2.0 for ops, _ in settings]

    monkeypatch.setattr(searching, "Trials", Fake)
    monkeypatch.setattr(searching, "prepare_device", lambda *args: None)
    lines = []
    searching.work(job("cuda"), lines.append)
    found = chosen({line["end"]: line for line in lines if "end" in line})
    assert (found.ops, found.graph) == ({"kl_balance": "triton"}, False)
    assert found.report[TIMES] == {"right": False, "why": "RuntimeError: capture failed"}
    assert "ms an update: plain PyTorch 2, fused 1" in summary(found)


class Clock:
    """Stands in for Trials: what an update takes is told, not measured."""

    def __init__(self, cost):
        self.cost = cost

    def milliseconds(self, *settings):
        return [self.cost(dict(ops), graph) for ops, graph in settings]


def test_the_fastest_is_chosen_and_no_op_stays_that_costs_time():
    worth = {"a": -2.0, "b": 0.5, "c": 0.02}  # of 10 ms
    clock = Clock(lambda ops, graph: (10 if graph else 100) + sum(worth[op] for op in ops))
    found = searching.times(clock, {"a": "triton", "b": "triton", "c": "triton"}, True)
    assert (found["ops"].keys(), found["graph"]) == ({"a", "b", "c"}, True)
    assert found["ms"] == {
        "plain PyTorch": 100, "fused": 98.52, "plain PyTorch, graph": 10, "fused, graph": 8.52
    }  # fmt: skip
    alive = []
    left = leave_out(clock, found, lambda: alive.append(1))
    assert len(alive) == 3
    assert left["ops"] == {"a": "triton", "c": "triton"}, "c costs less than noise"
    assert left["without"]["a"] == pytest.approx(10.52 / 8.52, abs=1e-3)
    slow = searching.times(Clock(lambda ops, graph: 1 + len(ops)), {"a": "triton"}, False)
    assert (slow["ops"], slow["graph"]) == ({}, False)


def test_what_follows_from_the_lines():
    right = {"right": True, "graph": True}
    known = {
        "a": {"end": "a", "right": True, "why": ""},
        TIMES: {**right, "ops": {"a": "triton", "b": "triton"}},
    }
    assert chosen(known).ops == {"a": "triton", "b": "triton"}
    known[FINE] = {**right, "ops": {"a": "triton"}}
    assert (chosen(known).ops, chosen(known).graph) == ({"a": "triton"}, True)
    failed = {TIMES: {"end": TIMES, "right": False, "why": "crashed"}, GRAPH: {"end": GRAPH, "right": True}}
    assert (chosen(failed).ops, chosen(failed).graph) == (None, False)
    assert chosen({}) == Choice()


def a_key(**changes):
    config = small_config(**changes.pop("config", {}))
    arguments = {"obs_specs": SPECS, "actions": make_actions(False), "device": CPU, "dtype": torch.float32}
    return key_of(config=config, **{**arguments, **changes})


def test_a_choice_is_for_one_machine_and_model(monkeypatch):
    choice = Choice({"kl_balance": "native"}, True, {"kl_balance": {"right": True}})
    assert remembered(a_key()) is None
    path = remember(a_key(), choice)
    assert path == path_of(a_key())
    assert remembered(a_key()) == choice
    assert remembered(a_key(actions=make_actions(False, width=9))) == choice, "the game does not matter"
    assert remembered(a_key(config={"train": {"ratio": 3.0}, "seed": 4})) == choice
    assert remembered(a_key(actions=make_actions(True))) is None
    assert remembered(a_key(dtype=torch.bfloat16)) is None
    assert remembered(a_key(config={"rssm": {"deter": 20}})) is None
    monkeypatch.setattr(choices, "_source", lambda: "edited")
    assert remembered(a_key()) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: {},
        lambda found: [],
        lambda found: {**found, "ops": {"kl_balance": "cuda"}},
        lambda found: {**found, "ops": {"kl": "native"}},
        lambda found: {**found, "ops": 3},
        lambda found: {**found, "graph": "yes"},
        lambda found: {**found, "key": {**found["key"], "torch": "1.0"}},
    ],
)
def test_what_is_damaged_is_not_remembered(damage):
    path = remember(a_key(), Choice({"kl_balance": "native"}))
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    assert remembered(a_key()) is None
    path.write_text("{")
    assert remembered(a_key()) is None


def test_where_nothing_can_be_kept_a_run_goes_on(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HDFAST_CACHE", str(tmp_path / "file" / "below"))
    assert remember(a_key(), Choice()) is None
    with alone(a_key(), lambda: None):
        assert remembered(a_key()) is None


def test_one_process_tries_and_the_others_wait():
    waited = []

    def check():
        waited.append(1)
        raise Interrupted(15)

    with alone(a_key(), lambda: pytest.fail("nobody else is there")), pytest.raises(Interrupted):  # noqa: SIM117
        with alone(a_key(), check):
            pass
    assert waited == [1]
    with alone(a_key(config={"rssm": {"deter": 20}}), check):
        pass


def settled(say, **changes) -> Choice:
    config = small_config(**{**SIZES, **changes})
    job = Job(SPECS, make_actions(False), config, CPU, torch.float32)
    return settle(job, check=lambda: None, say=say.append)


def test_a_run_searches_once_where_it_does_so_by_itself(monkeypatch):
    said, searched = [], []
    found = Choice({"kl_balance": "native"}, False, {TIMES: {"ms": {"plain PyTorch": 12.34, "fused": 5.0}}})

    def search(job, *, check, tell, limit, budget):
        searched.append(job)
        return found

    monkeypatch.setattr(settling, "search", search)
    assert settled(said) == Choice()
    assert (said, searched) == ([], []), "not on the CPU"
    monkeypatch.setattr(settling, "AUTOMATIC", ("cpu",))
    assert settled(said, train={"tune": False}) == Choice()
    assert not searched
    assert settled(said) == found
    assert settled(said) == found
    assert len(searched) == 1
    assert len(said) == 2
    assert "--train.no-tune" in said[0]
    assert said[1].startswith("1 ops in native (ms an update: plain PyTorch 12.3, fused 5); kept in ")
    assert settled(said, train={"tune": False}) == Choice(), "nor what is remembered"


def test_a_search_that_could_time_nothing_is_not_remembered(monkeypatch):
    """Another program on the card, say, which is gone the next time."""
    nothing = Choice(None, False, {TIMES: {"right": False, "why": "OutOfMemoryError: ..."}})
    monkeypatch.setattr(settling, "AUTOMATIC", ("cpu",))
    monkeypatch.setattr(settling, "search", lambda job, **options: nothing)
    said = []
    assert settled(said) == nothing
    assert said[1] == "no update could be timed, so ops run as by default"
    assert remembered(a_key(config=SIZES)) is None


@pytest.mark.parametrize("error", [TuningError, OSError])
def test_a_run_goes_on_where_the_search_fails(error, monkeypatch, capsys):
    def search(job, **options):
        raise error("no memory")

    monkeypatch.setattr(settling, "AUTOMATIC", ("cpu",))
    monkeypatch.setattr(settling, "search", search)
    assert settled([]) == Choice()
    assert "computes as by default: no memory" in capsys.readouterr().err
    assert remembered(a_key(config=SIZES)) is None


def test_a_choice_is_used(own_defaults):
    Choice({"kl_balance": "native"}).use(CPU)
    assert dispatch.resolve_name("kl_balance", None, torch.zeros(1)) == "native"
    assert dispatch.resolve_name("image_loss", None, torch.zeros(1)) == "reference"
    Choice({}).use(CPU)
    assert dispatch._DEFAULTS["cpu"] == {}
    Choice().use(CPU)
    assert dispatch._DEFAULTS["cpu"] == dispatch.CPU_DEFAULT, "nothing of the run before is left"


def test_the_door_tells_and_remembers(monkeypatch, capfd):
    report = {
        "kl_balance": {"right": True, "why": ""},
        "linear": {"right": False, "why": "off"},
        TIMES: {"right": True, "ms": {"plain PyTorch": 2.0, "fused": 1.0}},
        FINE: {"right": True, "without": {"kl_balance": 1.25}},
    }
    searched = []

    def search(job, *, check, tell, limit, budget):
        searched.append(job)
        tell({"begin": "linear"})
        tell({"end": "linear", "right": False, "why": "off"})
        return Choice({"kl_balance": "native"}, False, report)

    monkeypatch.setattr(settling, "search", search)
    code, out, err = door(tune.main, ["--suite", "demo"], monkeypatch, capfd)
    assert (code, err) == (0, "")
    assert "linear: no: off" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["kl_balance", "yes", "1.25", "native"] in rows
    assert ["linear", "no", "reference"] in rows
    assert "1 ops in native (ms an update: plain PyTorch 2, fused 1)" in out
    assert door(tune.main, ["--suite", "demo"], monkeypatch, capfd)[0] == 0
    assert len(searched) == 1
    assert door(tune.main, ["--suite", "demo", "--again"], monkeypatch, capfd)[0] == 0
    assert len(searched) == 2
    assert searched[0].config.suite == "demo"
    assert dataclasses.asdict(searched[0].config) == dataclasses.asdict(searched[1].config)


def test_the_module_is_the_process(tmp_path):
    """What a search starts, started by hand: without a job it fails, and says so by its code."""
    command = [sys.executable, "-m", "hdfast.tuning.search", str(tmp_path / "none"), str(tmp_path / "lines")]
    assert subprocess.run(command, capture_output=True).returncode == 1
