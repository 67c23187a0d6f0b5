"""bench.costs: which points it measures, each in a process of its own, and its tables."""

import json
from types import SimpleNamespace

import pytest
import torch

from bench import costs
from bench.costs import Point
from hdfast.runtime.errors import ConfigError, RunError
from hdfast.runtime.graphs import WARMUP


def row(point: Point, **values) -> dict:
    given = {"seconds": 1.0, "peak_bytes": 2e9, "parameters": 17_922_952, "gflop": 619.0}
    given |= {"gflop_per_second": 309.5, "share_of_peak": 0.25, "part": point.part}
    return {**costs.asdict(point), **given, **values}


def test_one_factor_is_varied_at_a_time():
    taken = list(costs.points(["tiny", "small"], [16, 32], [64], [5], [1, 8]))
    assert taken == [
        ("", Point()),
        ("size", Point(size="tiny")),
        ("batch", Point(batch=32)),
        ("horizon", Point(horizon=5)),
        ("num_envs", Point(num_envs=1)),
        ("num_envs", Point(num_envs=8)),
    ]
    assert [point.part for _, point in taken] == ["update"] * 4 + ["act"] * 2


def test_the_tables_tell_what_differs_and_by_how_much():
    rows = [row(Point()), row(Point(batch=32), seconds=2.5), row(Point(num_envs=8), seconds=0.004)]
    updates, acts = costs.report(rows).split("\n\n")
    assert updates.splitlines()[2:] == [
        "| small, B16, T64, H15 | 1.00 | 1.00 | 2.00 | 619 | 310 | 25% | 17.9 |",
        "| B 32 | 2.50 | 2.50 | 2.00 | 619 | 310 | 25% | 17.9 |",
    ]
    assert acts.splitlines()[2:] == ["| 8 | 4.00 | 2,000 | 2.00 | 619 | 310 | 25% |"]
    assert costs.report(rows[:2]) == updates


@pytest.mark.parametrize("num_envs", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_point_is_measured_in_a_process_of_its_own(num_envs):
    point = Point("tiny", batch=2, length=4, horizon=2, num_envs=num_envs)
    measured = costs.measure_alone(point, "cpu", "bfloat16", 2, {"float32": 50.0, "bfloat16": 100.0})
    assert Point(**{key: measured[key] for key in costs.asdict(point)}) == point
    assert measured["seconds"] > 0 < measured["gflop"]
    assert measured["rounds"] == (costs.ACTS if num_envs else 2)
    assert 1e8 < measured["peak_bytes"] < 4e9
    assert measured["gflop_per_second"] == pytest.approx(measured["gflop"] / measured["seconds"])
    rate = 50.0 if num_envs else 100.0  # the policy acts in float32
    assert measured["share_of_peak"] == pytest.approx(measured["gflop_per_second"] / rate)


@pytest.mark.parametrize("point", [Point(), Point(num_envs=2)], ids=["update", "act"])
def test_on_cuda_a_graph_is_measured_when_it_has_been_captured(point, monkeypatch):
    calls, timed = [], []
    act = lambda num_envs, graph: lambda: calls.append(("act", num_envs, graph))  # noqa: E731
    learner = SimpleNamespace(parameter_counts=lambda: {"total": 1})
    bench = SimpleNamespace(graph=lambda: lambda: calls.append("graph"), act=act, learner=learner)
    fakes = {
        "resolve_device": torch.device,
        "prepare_device": lambda *_: None,
        "Bench": lambda *_: bench,
        "synchronised": lambda run, where: run,
        "seconds": lambda run: timed.append(len(calls)) or 1.0,
        "gflop": lambda *_: 1.0,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(costs, name, fake)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda where: 5)
    row = costs.measure(point, "cuda", "float32", 2, {"float32": 4.0})
    assert (row["peak_bytes"], row["share_of_peak"]) == (5, 0.5 if point.num_envs else 0.25)
    assert min(timed) > WARMUP
    assert set(calls) == {("act", 2, True)} if point.num_envs else {"graph"}


def test_a_point_that_fails_is_told_in_one_line():
    with pytest.raises(RunError, match=r"bench\.costs size huge: error: .*no size 'huge'"):
        costs.measure_alone(Point("huge"), "cpu", "float32", 1, {})


def test_the_command_prints_and_writes_what_was_measured(tmp_path, monkeypatch, capsys):
    seen, rated = [], []
    rates = {torch.float32: 50.0, torch.bfloat16: 100.0}
    monkeypatch.setattr(
        costs, "gemm_gflop_per_second", lambda where, dtype: rated.append(dtype) or rates[dtype]
    )
    monkeypatch.setattr(costs, "measure_alone", lambda point, *how: seen.append((point, how)) or row(point))
    path = tmp_path / "costs.json"
    none = [f"--{name}" for name in ("batches", "lengths", "horizons")]
    how = ["--device", "cpu", "--precision", "bfloat16", "--json", str(path)]
    costs.main(["--sizes", "large", *none, "--envs", "2", "4", *how])
    told = ("cpu", "bfloat16", 3, {"bfloat16": 100.0, "float32": 50.0})
    wanted = (Point(), Point(size="large"), Point(num_envs=2), Point(num_envs=4))
    assert seen == [(point, told) for point in wanted]
    assert sorted(map(str, rated)) == ["torch.bfloat16", "torch.float32"], "each once"
    assert "| size large | 1.00 |" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert [point["factor"] for point in written["points"]] == ["", "size", "num_envs", "num_envs"]
    assert written["machine"]["device"] == "cpu"
    with pytest.raises(ConfigError, match="invalid choice: 'huge'"):
        costs.main(["--sizes", "huge"])
