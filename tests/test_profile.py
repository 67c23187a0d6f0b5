"""Where the time of an update goes."""

import contextlib
import gzip
import json
import time

import pytest

from hdfast import profile
from hdfast.agent.behavior import Behavior
from hdfast.agent.learner import Learner
from tests.loop_cases import (
    door,
    flags,
    one_thread,  # noqa: F401
    tiny,
)


def test_profile_measures_the_phases_of_an_update(tmp_path, monkeypatch, capfd):
    trace = tmp_path / "trace.json.gz"
    argv = [*flags(), "--updates", "3", "--warmup", "1", "--top", "5", "--trace", str(trace)]
    code, out, err = door(profile.main, argv, monkeypatch, capfd)
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines() if line.strip()]
    assert "B2 T4 H2, float32 on" in out.splitlines()[0]
    assert out.splitlines()[0].endswith("ms CPU per update")
    table = {
        " ".join(words[:-2]): (float(words[-2]), words[-1]) for words in lines if words[-1].endswith("%")
    }
    names = (*profile.PHASES, "the rest")
    phases = {name: table[name][0] for name in names}
    assert all(ms > 0 for name, ms in phases.items() if name != "the rest")
    assert abs(sum(int(table[name][1].rstrip("%")) for name in names) - 100) <= 4
    assert len(table) == len(names) + 5
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    spans = [event for event in events if event.get("ph") == "X"]
    names = [span["name"] for span in spans]
    assert {name: names.count(name) for name in ("update", "imagination")} == {"update": 3, "imagination": 3}
    ranges = [(span["ts"], span["ts"] + span["dur"]) for span in spans if span["name"] in profile.PHASES]
    ops = [any(a <= span["ts"] <= b for a, b in ranges) for span in spans if span.get("cat") == "cpu_op"]
    assert sum(ops) > 0.8 * len(ops) > 0  # by number: their times depend on the machine
    assert "nsys" not in out  # it is a CPU


def test_profile_attributes_time_to_the_phase_that_took_it(tmp_path, monkeypatch):
    imagine = Behavior.imagine
    monkeypatch.setattr(Behavior, "imagine", lambda *args: time.sleep(0.3) or imagine(*args))
    learner, update = profile.build(tiny(tmp_path))
    found = profile.measure(learner, update, 1)
    assert found.phases["imagination"] > 300
    assert found.wall > 300
    assert found.cpu < found.wall - 250  # sleeping is not work
    calls = {name: count for name, count, _ in found.ops}
    assert not set(profile.PHASES) & set(calls)
    assert calls["hdfast::adam_step"] >= 3, "with kernels that no op of PyTorch's is around"


def test_a_learner_of_ones_own_need_not_have_all_phases(tmp_path, monkeypatch):
    """What it does outside of them is the rest."""
    learn = Learner.learn_model
    monkeypatch.setattr(Learner, "learn_model", lambda *args: time.sleep(0.3) or learn(*args))
    monkeypatch.setattr("hdfast.agent.learner.phase", lambda name: contextlib.nullcontext())
    found = profile.measure(*profile.build(tiny(tmp_path)), 1)
    assert found.phases["the rest"] > 300
    assert [found.phases[name] for name in profile.PHASES[1:]] == [0] * 4


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--updats", "2"], "there is no option --updats; did you mean '--updates'?"),
        (["--plain", "--trace", "t.json"], "argument --trace: not allowed with argument --plain"),
        (["--dry-run"], "--dry-run: only hdfast.train has a dry run; leave it out"),
        (["--device", "cpu", "--train.graph", "on"], "--train.graph: a CUDA graph needs a CUDA"),
        (["--trac=t.json"], "there is no option --trac; did you mean '--trace'"),
        (["--rssm.detr", "2"], "there is no option --rssm.detr; did you mean '--rssm.deter'"),
    ],
)
def test_a_wrong_flag_is_answered_with_what_is_right(argv, text, monkeypatch, capfd):
    code, out, err = door(profile.main, argv, monkeypatch, capfd)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {text}")
    assert err.count("\n") == 1


def test_profile_under_other_profilers(monkeypatch, capfd):
    code, out, err = door(
        profile.main, [*flags(), "--plain", "--updates", "1", "--warmup", "0"], monkeypatch, capfd
    )
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    assert ", 1 thread:" in out
    assert profile.nsight(["--suite", "demo", "--logdir", "a b"]).splitlines() == [
        "timeline: nsys profile --trace=cuda,nvtx --capture-range=cudaProfilerApi "
        "python -m hdfast.profile --plain --suite demo --logdir 'a b'",
        "kernels:  ncu --profile-from-start off --set basic --launch-count 200 "
        "python -m hdfast.profile --plain --suite demo --logdir 'a b'",
    ]


def test_profile_tells_what_is_wrong_in_one_line(tmp_path, monkeypatch, capfd):
    missing = tmp_path / "no" / "trace.json"
    for argv, code, text in (
        (["--updates", "0"], 2, "argument --updates: 0 is out of range: expected 1 or more"),
        (["--trace", ""], 2, "argument --trace: it is empty; '.' is the current folder"),
        (["--suite", "dmo"], 2, "no suite 'dmo'; did you mean 'demo'"),
        (["--rssm.detr", "3"], 2, "there is no option --rssm.detr; did you mean '--rssm.deter'"),
        (
            [*flags(), "--trace", str(missing)],
            1,
            f"{missing}: cannot write the trace: No such file or directory",
        ),
        ([*flags(), "--trace", str(tmp_path)], 1, f"{tmp_path}: cannot write the trace: Is a directory"),
    ):
        got, out, err = door(profile.main, argv, monkeypatch, capfd)
        assert (got, out) == (code, "")
        assert err.startswith(f"error: {text}")
        assert err.count("\n") == 1
