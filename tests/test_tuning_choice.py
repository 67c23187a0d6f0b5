"""What a search chooses from what it measured: which ops, which kernels, whether updates overlap."""

import pytest

from hdfast.tuning import search as searching
from hdfast.tuning import trials
from hdfast.tuning.choice import Choice
from hdfast.tuning.search import (
    CAPTURING,
    FINE,
    INSTEAD,
    OVERLAPPING,
    TIMES,
    chosen,
    leave_out,
)
from hdfast.tuning.settle import summary
from hdfast.tuning.trials import Verdict
from tests.agent_cases import one_thread  # noqa: F401
from tests.tuning_cases import job, own_cache  # noqa: F401


class Clock:
    """Stands in for Trials: the time of an update is given, not measured."""

    def __init__(self, cost):
        self.cost = cost

    def milliseconds(self, *settings):
        return [self.cost(dict(ops), way) for ops, way in settings]


def test_the_fastest_is_chosen_and_no_op_stays_that_costs_time():
    worth = {"a": -2.0, "b": 0.5, "c": 0.02}  # of 10 ms
    clock = Clock(lambda ops, way: (100 if way == trials.EAGER else 10) + sum(worth[op] for op in ops))
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
    slow = searching.times(Clock(lambda ops, way: 1 + len(ops)), {"a": "triton"}, False)
    assert (slow["ops"], slow["graph"]) == ({}, False)


@pytest.mark.parametrize(
    ("wrong", "ms", "taken", "told"),
    [
        ("", 8.0, "persistent", {"right": True, "why": "", "without": 1.25}),
        ("", 11.0, "triton", {"right": True, "why": "", "without": 0.909}),
        ("op", 8.0, "triton", {"right": False, "why": "off"}),
        ("together", 8.0, "triton", {"right": False, "why": "off"}),
        ("", 9.95, "triton", {"right": True, "why": "", "without": 1.005}),
        ("graph", 8.0, "triton", {"right": False, "why": "stale"}),
    ],
)
def test_other_kernels_take_the_place_of_some_where_they_are_right_and_faster(wrong, ms, taken, told):
    class Fake(Clock):
        def judge(self, ops):
            assert ops["scan"] == "persistent"
            return (
                Verdict(False, "off") if wrong == ("op" if len(ops) == 1 else "together") else Verdict(True)
            )

        def judge_graph(self, ops):
            assert ops == {"scan": "persistent", "a": "triton"}
            return Verdict(False, "stale") if wrong == "graph" else Verdict(True)

    clock, alive = Fake(lambda ops, way: ms if ops["scan"] == "persistent" else 10.0), []
    found = {"right": True, "ops": {"scan": "triton", "a": "triton"}, "graph": True}
    line = searching.replace(clock, found, {"scan": "persistent"}, lambda: alive.append(1))
    assert line["ops"] == {"scan": taken, "a": "triton"}
    assert line["tried"] == {"scan, persistent": told}
    assert (line["right"], line["graph"]) == (True, True)
    assert alive
    assert chosen({TIMES: found, INSTEAD: line}).ops == line["ops"]


@pytest.mark.parametrize(
    ("ms", "wrong", "overlap"), [(8.0, "", True), (9.95, "", False), (8.0, "stale", False)]
)
def test_updates_overlap_where_they_are_right_and_faster(ms, wrong, overlap):
    class Fake(Clock):
        def judge_graph(self, ops, way):
            assert (ops, way) == ({"a": "triton"}, trials.OVERLAP)
            return Verdict(not wrong, wrong)

    clock = Fake(lambda ops, way: ms if way == trials.OVERLAP else 10.0)
    line = searching.beside(clock, {"a": "triton"})
    assert (line["right"], line["why"], line["overlap"]) == (not wrong, wrong, overlap)
    assert wrong or line["ms"] == {"one after the other": 10.0, "beside each other": ms}
    known = {TIMES: {"right": True, "ops": {"a": "triton"}, "graph": True}, OVERLAPPING: line}
    found = chosen(known)
    assert (found.graph, found.overlap) == (True, overlap)
    assert ("beside each other" in summary(found)) == overlap
    assert (f"overlapping {ms:.3g}" in summary(found)) == (not wrong)


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_worth_most_is_tried_first(fails, monkeypatch):
    """Whether a kernel is worth its time is asked last, with updates as they will run, whatever failed before."""

    class Fake(Clock):
        def __init__(self, *args):
            super().__init__(lambda ops, way: {"eager": 90.0, "graph": 9.0, "overlap": 7.0}[way] - len(ops))

        def measure_definition(self):
            pass

        def candidates(self):
            return {"kl_balance": "triton", "rssm_observe": "triton"}

        def others(self):
            return {"rssm_observe": "persistent", "linear": "persistent"}  # the second is no candidate

        def judge(self, ops):
            return Verdict(True)

        def judge_graph(self, ops, way=trials.GRAPH):
            if fails and way == trials.OVERLAP:
                raise RuntimeError("capture failed")
            return Verdict(True)

        def milliseconds(self, *settings):
            asked_ways.append({way for _, way in settings})
            return super().milliseconds(*settings)

    asked, known, lines, asked_ways = job("cuda"), {}, [], []
    monkeypatch.setattr(searching, "Trials", Fake)
    monkeypatch.setattr(searching, "prepare_device", lambda *args: None)
    if fails:
        with pytest.raises(RuntimeError, match="capture failed"):
            searching.work(asked, known, lines.append)
        known[OVERLAPPING] = {"end": OVERLAPPING, "right": False, "why": "capture failed"}
    searching.work(asked, known, lines.append)
    begun = [line["begin"] for line in lines if "begin" in line]
    assert list(dict.fromkeys(begun))[-4:] == [TIMES, INSTEAD, OVERLAPPING, FINE]
    assert asked_ways[-1] == {trials.GRAPH if fails else trials.OVERLAP}
    found = chosen(known)
    assert found.ops == {"kl_balance": "triton", "rssm_observe": "triton"}
    assert (found.graph, found.overlap) == (True, not fails)


def test_what_follows_from_the_lines():
    right = {"right": True, "graph": True}
    known = {
        "a": {"end": "a", "right": True, "why": ""},
        TIMES: {**right, "ops": {"a": "triton", "b": "triton"}},
    }
    assert chosen(known).ops == {"a": "triton", "b": "triton"}
    known[INSTEAD] = {**right, "ops": {"a": "triton", "b": "persistent"}}
    assert chosen(known).ops == {"a": "triton", "b": "persistent"}
    known[FINE] = {**right, "ops": {"a": "triton"}}
    assert (chosen(known).ops, chosen(known).graph) == ({"a": "triton"}, True)
    failed = {
        TIMES: {"end": TIMES, "right": False, "why": "crashed"},
        CAPTURING: {"end": CAPTURING, "right": True},
    }
    assert (chosen(failed).ops, chosen(failed).graph) == (None, False)
    assert chosen({}) == Choice()
