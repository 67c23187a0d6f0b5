"""How a search finds what a run uses: ops that are wrong, crash or hang affect no other."""

import dataclasses
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from hdfast.runtime.errors import Interrupted
from hdfast.tuning import search as searching
from hdfast.tuning import trials
from hdfast.tuning.search import (
    CAPTURING,
    DEFINITION,
    FINE,
    TIMES,
    TuningError,
    chosen,
)
from hdfast.tuning.settle import summary
from hdfast.tuning.trials import Verdict
from tests.agent_cases import SPECS, make_actions, one_thread, small_config  # noqa: F401
from tests.tuning_cases import SIZES, job, own_cache  # noqa: F401

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(240))])
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
    """Makes Python run this at its start in processes started from here."""
    folder = tmp_path / "planted"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(textwrap.dedent(code))
    monkeypatch.setenv("PYTHONPATH", str(folder))


def late_at(trial: str, seconds: float, monkeypatch) -> searching.Report:
    """What to `tell` so that the clock of the search jumps ahead as this trial begins."""
    ahead = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0], sleep=time.sleep)
    monkeypatch.setattr(searching, "time", clock)

    def tell(line):
        if line.get("begin") == trial:
            ahead[0] += seconds

    return tell


def test_ops_that_crash_or_hang_cost_only_themselves(monkeypatch, tmp_path):
    planted(
        monkeypatch,
        tmp_path,
        """
        import os, sys, time
        if "hdfast.tuning.search" in sys.orig_argv:
            import contextlib
            from hdfast_kernels import dispatch
            planted = contextlib.ExitStack()

            def plant(op, fault):
                planted.enter_context(dispatch.replaced(op, "native", fault))

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
    tell = late_at("lambda_return", searching.LIMIT + 1, monkeypatch)
    found = searching.search(job(), check=lambda: None, tell=tell)
    wrong = {op: line["why"] for op, line in found.report.items() if not line["right"]}
    assert wrong == {
        "kl_balance": "its process ended by signal 6",
        "lambda_return": "no end within 180 s",
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
    tell = late_at(TIMES, 301, monkeypatch)
    found = searching.search(job(), check=lambda: None, tell=tell, limit=400, budget=300)
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


def test_plain_pytorch_has_time_to_begin_however_short_a_trial_may_be(monkeypatch, tmp_path):
    """Before it torch is imported, and CUDA begins."""
    planted(
        monkeypatch,
        tmp_path,
        """
        import sys
        if "hdfast.tuning.search" in sys.orig_argv:
            with open(sys.orig_argv[-1], "a") as lines:
                lines.write('{"begin": "plain PyTorch"}\\n')
            sys.exit("no GPU today")
        """,
    )
    tell = late_at(DEFINITION, 100, monkeypatch)
    with pytest.raises(TuningError, match="no GPU today"):
        searching.search(job(), check=lambda: None, tell=tell, limit=5)


def test_a_learner_is_found_where_the_run_finds_it(monkeypatch, tmp_path):
    """Beside the user's script, for example, whose folder is not that of another process."""
    (tmp_path / "beside_the_script.py").write_text("print('found')\nclass Mine:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    asked = job()
    asked = dataclasses.replace(
        asked, config=dataclasses.replace(asked.config, learner="beside_the_script:Mine")
    )
    with pytest.raises(TuningError, match="Mine is no subclass of"):
        searching.search(asked, check=lambda: None, tell=lambda line: None)


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
        from hdfast.tuning.choice import Job
        from hdfast.tuning.search import search

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
    """CUDA may crash when it is shut down."""
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


@pytest.mark.parametrize("failing", [CAPTURING, TIMES])
def test_where_a_capture_fails_another_process_does_the_rest_without(monkeypatch, failing):
    class Fake:
        def __init__(self, *args):
            pass

        def measure_definition(self):
            pass

        def candidates(self):
            return {"kl_balance": "triton"}

        def others(self):
            return {}

        def judge(self, ops):
            return Verdict(True)

        def judge_graph(self, ops):
            if failing == CAPTURING:
                raise RuntimeError("capture failed")
            return Verdict(True)

        def milliseconds(self, *settings):
            if any(way != trials.EAGER for _, way in settings):
                raise RuntimeError("capture failed")
            return [1.0 if ops else 2.0 for ops, _ in settings]

    monkeypatch.setattr(searching, "Trials", Fake)
    monkeypatch.setattr(searching, "prepare_device", lambda *args: None)
    asked, known, lines = job("cuda"), {}, []
    with pytest.raises(RuntimeError, match="capture failed"):
        searching.work(asked, known, lines.append)
    assert lines[-1] == {"begin": failing}
    known[failing] = {"end": failing, "right": False, "why": "capture failed"}
    searching.work(asked, known, lines.append)
    found = chosen(known)
    assert (found.ops, found.graph) == ({"kl_balance": "triton"}, False)
    assert "ms an update: plain PyTorch 2, fused 1" in summary(found)


def crashes_at(trial, monkeypatch) -> list[list[str]]:
    """Lets processes try the definition alone, and crash at this trial; returns what each knows as it begins."""
    begun: list[list[str]] = []

    def process(job, known, *_):
        begun.append(sorted(known))
        yield {"begin": DEFINITION}
        yield {"end": DEFINITION, "right": True}
        if trial not in known:
            yield {"begin": trial}
            yield {"reason": "crashed"}

    monkeypatch.setattr(searching, "_lines", process)
    return begun


def test_a_second_search_tries_everything_again(monkeypatch):
    """What one search finds out is not kept in its job."""
    begun, asked = crashes_at(TIMES, monkeypatch), job()
    for _ in range(2):
        found = searching.search(asked, check=lambda: None, tell=lambda line: None)
        assert found.report[TIMES] == {"right": False, "why": "crashed"}
    assert begun == [[], [DEFINITION, TIMES]] * 2


def test_a_search_whose_last_trial_fails_is_over(monkeypatch):
    """Another process would have nothing to do."""
    begun = crashes_at(FINE, monkeypatch)
    found = searching.search(job(), check=lambda: None, tell=lambda line: None)
    assert found.report[FINE] == {"right": False, "why": "crashed"}
    assert begun == [[]]


def test_the_module_is_the_process(tmp_path):
    """The process that a search starts, started by hand: without a job it fails with an exit code."""
    command = [sys.executable, "-m", "hdfast.tuning.search", str(tmp_path / "none"), str(tmp_path / "lines")]
    assert subprocess.run(command, capture_output=True).returncode == 1
