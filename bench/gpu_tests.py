"""A pytest plugin for tests that may crash or hang their process: `pytest -p bench.gpu_tests --outcomes FILE`.

`--share 2/12` runs every twelfth test and leaves the rest to others; `--among FILE` runs only tests whose ids are lines
of FILE.

The start and the outcome of every test are written to FILE at once, as JSON lines, and tests already in it are left
out: the same command once more goes on behind the test that crashed or hung. A test that takes longer than LONGEST, or
than the seconds of its mark `gpu(seconds)`, ends the process, even while it waits for a kernel that never ends; so does
an error after which nothing works on the device, or nothing can be captured there.
"""

import faulthandler
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.gpu_tools import CAPTURE, FINISHED, LASTING

# In seconds: several times what it takes to compile all kernels.
LONGEST = float(os.environ.get("HDFAST_LONGEST_TEST", 60))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="file of outcomes, one JSON line each")
    parser.addoption("--share", default="0/1", help="I/N: the tests I, I + N, I + 2 N, ...")
    parser.addoption(
        "--left", type=float, default=1e9, help="skip tests that may take longer than these seconds"
    )
    parser.addoption("--among", type=Path, help="file of test ids, one per line: run only these")


def pytest_configure(config: pytest.Config) -> None:
    if (path := config.getoption("outcomes")) is not None:
        config.pluginmanager.register(Outcomes(path))


class Outcomes:
    """Writes outcomes to `path`, and leaves out the tests already there."""

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.known = {json.loads(line)["test"] for line in lines}
        self.lasting = False

    @pytest.hookimpl(trylast=True)  # after the selection by mark
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        share, shares = map(int, config.getoption("share").split("/"))
        path = config.getoption("among")
        among = None if path is None else set(path.read_text().splitlines())
        seconds, left, others = config.getoption("left"), [], []
        for at, item in enumerate(items):
            mine = at % shares == share and (among is None or item.nodeid in among)
            mine = mine and item.nodeid not in self.known
            if mine and _limit(item) > max(seconds, LONGEST):
                self._write(item.nodeid, "skipped", f"may take {_limit(item):g} s, there are {seconds:.0f}")
                mine = False
            (left if mine else others).append(item)
        config.hook.pytest_deselected(items=others)
        items[:] = left

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._write(item.nodeid)
        faulthandler.dump_traceback_later(_limit(item), exit=True, file=sys.__stderr__)
        try:
            result = yield
        finally:
            faulthandler.cancel_dump_traceback_later()
        if self.lasting:
            item.session.shouldstop = "later tests would fail in this process"
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test that fails in its teardown has passed before: the later line counts.
        if report.when == "call" or not report.passed:
            self._write(report.nodeid, report.outcome, _reason(report))
            self.lasting |= report.failed and _lasts(report.longreprtext)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and report.nodeid not in self.known:
            self._write(report.nodeid, "failed", _reason(report))

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus in (
            pytest.ExitCode.OK,
            pytest.ExitCode.TESTS_FAILED,
            pytest.ExitCode.NO_TESTS_COLLECTED,
        ):
            self._write("", FINISHED)

    def _write(self, test: str, outcome: str | None = None, reason: str = "") -> None:
        with self.path.open("a") as file:
            told = {"test": test, "outcome": outcome, "reason": reason, "at": time.monotonic()}
            file.write(json.dumps(told) + "\n")


def _lasts(error: str) -> bool:
    """Whether later tests in this process would fail because of this error."""
    return re.search(f"{LASTING}|{CAPTURE}", error) is not None


def _limit(item: pytest.Item) -> float:
    """Seconds that a test may take."""
    mark = item.get_closest_marker("gpu")
    return mark.args[0] if mark and mark.args else LONGEST


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test failed or was skipped, in one line."""
    if report.passed:
        return ""
    if isinstance(report.longrepr, tuple):  # a skip: file, line and message
        text = report.longrepr[2].removeprefix("Skipped: ")
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        text = report.longreprtext if crash is None else crash.message
    return next(iter(text.strip().splitlines()), "")
