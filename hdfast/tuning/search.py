"""Finds how a run should compute, in a process of its own: a kernel that crashes or hangs costs that process alone.

The process writes a JSON line as each trial begins and ends. Where it dies, or a trial takes too long, that trial has
failed, and another process does the rest. Run as `python -m hdfast.tuning.search JOB LINES`.
"""

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

import hdfast
from hdfast.runtime.device import prepare_device
from hdfast.tuning.choice import POLL_SECONDS, Choice, Job
from hdfast.tuning.trials import EAGER, GRAPH, OVERLAP, WORTH, Trials

LIMIT = 180.0  # seconds for one trial; the first of an op compiles its kernels
BUDGET = 600.0  # seconds for all; no run should wait longer to begin
DEFINITION, TOGETHER, CAPTURING, TIMES = "plain PyTorch", "all together", "CUDA graphs", "times"
EAGER_TIMES, FINE, INSTEAD = "times without graphs", "times without each", "times with other kernels"
OVERLAPPING = "updates that overlap"

Report = Callable[[Mapping[str, Any]], object]
Known = dict[str, dict[str, Any]]  # verdicts: a trial's name -> its last line


class TuningError(RuntimeError):
    """Plain PyTorch could not be tried, so nothing can be compared with it."""


def search(
    job: Job, *, check: Callable[[], None], tell: Report, limit: float = LIMIT, budget: float = BUDGET
) -> Choice:
    """Tries all that could be chosen, and returns what is right and fastest.

    check: called while waiting; what it raises ends the search. tell: gets every line.
    limit, budget: seconds for one trial and for all; what is not done by then has failed. The first trial, of plain
        PyTorch, to which all others are compared, gets at least LIMIT.

    Raises: TuningError.
    """
    end, known = time.monotonic() + budget, Known()
    while True:
        begun, reason = None, None
        with tempfile.TemporaryDirectory(prefix="hdfast-") as folder:
            for line in _lines(job, known, Path(folder), check, limit, end):
                tell(line)
                if "reason" in line:
                    reason = line["reason"]
                elif "begin" in line:
                    begun = line["begin"]
                else:
                    known[line["end"]], begun = line, None
        if begun in (None, DEFINITION):
            if DEFINITION not in known:
                raise TuningError(reason)
            return chosen(known)  # all is done, or the time is over
        known[begun] = {"end": begun, "right": False, "why": reason}
        tell(known[begun])
        if begun == FINE or time.monotonic() > end:
            return chosen(known)


def milliseconds(report: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """How long an update took in each way that was last timed, in ms."""
    ms: dict[str, float] = next(
        (report[name]["ms"] for name in (EAGER_TIMES, TIMES) if "ms" in report.get(name, {})), {}
    )
    overlapping = report.get(OVERLAPPING, {}).get("ms", {}).get("beside each other")
    return {**ms, **({} if overlapping is None else {"overlapping": overlapping})}


def chosen(known: Mapping[str, Mapping[str, Any]]) -> Choice:
    """The choice that follows from the last lines of all trials."""
    order = (FINE, INSTEAD, EAGER_TIMES, TIMES)
    last = next((known[name] for name in order if known.get(name, {}).get("right")), {})
    report = {name: {k: v for k, v in line.items() if k != "end"} for name, line in known.items()}
    overlap = bool(known.get(OVERLAPPING, {}).get("overlap", False))
    return Choice(last.get("ops"), bool(last.get("graph", False)), report, overlap)


class _Tried:
    """Does the trials whose verdict is not known yet, and writes a line as each begins and ends."""

    def __init__(self, known: Known, write: Report) -> None:
        self._known, self._write = known, write

    def begin(self, name: str) -> None:
        self._write({"begin": name})

    def trial(
        self, name: str, do: Callable[..., Mapping[str, Any]], *args: Any, survive: bool = True
    ) -> dict[str, Any]:
        """The last line of a trial, which `do(*args)` does if need be.

        survive: an error is the trial's failure; otherwise it ends this process, and another does the rest.
        """
        if name not in self._known:
            self.begin(name)
            self._known[name] = {"end": name, **(_surviving(do, *args) if survive else do(*args))}
            self._write(self._known[name])
        return self._known[name]


def _surviving(do: Callable[..., Mapping[str, Any]], *args: Any) -> Mapping[str, Any]:
    """What `do(*args)` returns, or the failure that it raised, unless CUDA is lost with it."""
    try:
        return do(*args)
    except Exception as error:  # Triton and CUDA raise what they like
        if _lasting(error):
            raise
        return {"right": False, "why": f"{type(error).__name__}: {_first_line(error)}"}


def work(job: Job, known: Known, write: Report) -> None:
    """All trials whose verdict is not known, to which it is added; a line as each begins and ends."""
    prepare_device(job.device, job.config.little_work)
    write({"begin": DEFINITION})  # in every process: the others are compared with it
    trials = Trials(job)
    trials.measure_definition()
    write({"end": DEFINITION, "right": True})
    tried = _Tried(known, write)
    ops = {
        op: backend
        for op, backend in trials.candidates().items()
        if tried.trial(op, judged, trials, {op: backend})["right"]
    }
    if len(ops) > 1 and not tried.trial(TOGETHER, judged, trials, ops)["right"]:
        ops = {}
    graph = False
    if job.device.type == "cuda" and job.config.train.graph != "off":
        # A failed capture can leave PyTorch's allocator in capture mode, so another process does the rest.
        graph = tried.trial(CAPTURING, judged_graph, trials, ops, survive=False)["right"]
    found = tried.trial(TIMES, times, trials, ops, graph, survive=not graph)
    if graph and not found["right"]:
        found = tried.trial(EAGER_TIMES, times, trials, ops, False)
    if not found["right"]:
        return
    best = found
    if others := {op: backend for op, backend in trials.others().items() if op in found["ops"]}:
        instead = tried.trial(
            INSTEAD, replace, trials, found, others, partial(tried.begin, INSTEAD), survive=not graph
        )
        best = instead if instead["right"] else found
    if best["graph"]:
        line = tried.trial(OVERLAPPING, beside, trials, best["ops"], survive=False)
        best = {**best, "overlap": line.get("overlap", False)}
    if best["ops"]:  # last, because it takes longest and is worth least
        tried.trial(FINE, leave_out, trials, best, partial(tried.begin, FINE))


def judged(trials: Trials, ops: Mapping[str, str]) -> dict[str, Any]:
    """Whether an update with these ops is right, and why not."""
    return asdict(trials.judge(ops))


def judged_graph(trials: Trials, ops: Mapping[str, str]) -> dict[str, Any]:
    """Whether updates and actions with these ops are right as CUDA graphs, and why not."""
    return asdict(trials.judge_graph(ops))


def times(trials: Trials, ops: Mapping[str, str], graph: bool) -> dict[str, Any]:
    """The fastest of plain PyTorch and all ops that are right, eager and captured, in ms an update."""
    settings = {"plain PyTorch": ({}, EAGER), "fused": (ops, EAGER)}
    if graph:
        settings |= {"plain PyTorch, graph": ({}, GRAPH), "fused, graph": (ops, GRAPH)}
    if not ops:
        settings = {name: setting for name, setting in settings.items() if name.startswith("plain")}
    took = trials.milliseconds(*settings.values())
    ms = {name: round(one, 3) for name, one in zip(settings, took, strict=True)}
    best, way = settings[min(ms, key=ms.__getitem__)]
    return {"right": True, "ops": dict(best), "graph": way == GRAPH, "ms": ms}


def leave_out(trials: Trials, found: Mapping[str, Any], alive: Callable[[], None]) -> dict[str, Any]:
    """`found` without the ops that slow an update down, each timed in turns with and without.

    alive: called before each, since all together take longer than one trial may.
    """
    ops, without, way = dict(found["ops"]), {}, _way(found)
    for op in found["ops"]:
        alive()
        rest = {name: backend for name, backend in ops.items() if name != op}
        here, there = trials.milliseconds((ops, way), (rest, way))
        without[op] = round(there / here, 3)
        if there < WORTH * here:
            ops = rest
    return {"right": True, "ops": ops, "graph": found["graph"], "without": without}


def replace(
    trials: Trials, found: Mapping[str, Any], others: Mapping[str, str], alive: Callable[[], None]
) -> dict[str, Any]:
    """`found` with other backends of some ops, where they are right and make the update faster.

    others: backend by op. alive: called before each.
    """
    ops, tried, way = dict(found["ops"]), {}, _way(found)
    for op, backend in others.items():
        alive()
        swapped = {**ops, op: backend}
        verdict = trials.judge({op: backend})
        if verdict.right and len(swapped) > 1:
            verdict = trials.judge(swapped)
        if verdict.right and found["graph"]:
            verdict = trials.judge_graph(swapped)
        told = tried[f"{op}, {backend}"] = asdict(verdict)
        if verdict.right:
            alive()
            here, there = trials.milliseconds((ops, way), (swapped, way))
            told["without"] = round(here / there, 3)
            ops = swapped if there < WORTH * here else ops
    return {"right": True, "ops": ops, "graph": found["graph"], "tried": tried}


def beside(trials: Trials, ops: Mapping[str, str]) -> dict[str, Any]:
    """Whether halves of two updates may overlap in a graph, and whether that makes an update faster."""
    verdict = trials.judge_graph(ops, OVERLAP)
    if not verdict.right:
        return {**asdict(verdict), "overlap": False}
    apart, together = trials.milliseconds((ops, GRAPH), (ops, OVERLAP))
    ms = {"one after the other": round(apart, 3), "beside each other": round(together, 3)}
    return {**asdict(verdict), "overlap": together < WORTH * apart, "ms": ms}


def _way(found: Mapping[str, Any]) -> str:
    if found.get("overlap"):
        return OVERLAP
    return GRAPH if found["graph"] else EAGER


def _lines(
    job: Job, known: Known, folder: Path, check: Callable[[], None], limit: float, end: float
) -> Iterator[dict[str, Any]]:
    """The lines of a process that does what is not known of a job, as it writes them; if it fails, the `reason` last.

    limit: seconds from one line to the next. end: when to give up, on the monotonic clock.
    """
    lines, said = folder / "lines", folder / "said"
    (folder / "job").write_bytes(pickle.dumps((sys.path, job, known)))
    lines.touch()
    command = [sys.executable, "-m", "hdfast.tuning.search", str(folder / "job"), str(lines)]
    homes = [str(Path(hdfast.__file__).parents[1]), os.environ.get("PYTHONPATH")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, homes))}
    with (
        said.open("wb") as output,
        subprocess.Popen(
            command, stdin=subprocess.PIPE,  # which closes when this process ends, however it does
            stdout=output, stderr=output, env=environment,
            start_new_session=True,  # Ctrl-C is for the run, which ends this one
        ) as process,
        lines.open("rb") as reader,
    ):  # fmt: skip
        try:
            until, rest, over = time.monotonic() + max(limit, LIMIT), b"", False
            while not over:
                over = process.poll() is not None  # checked first, so that its last lines are still read
                rest += reader.read()
                *whole, rest = rest.split(b"\n")
                for line in whole:
                    told = json.loads(line)
                    first = told.get("begin") == DEFINITION
                    until = time.monotonic() + (max(limit, LIMIT) if first else limit)
                    yield told
                if time.monotonic() > min(until, end):
                    late = "the time for all trials was over"
                    yield {"reason": late if until > end else f"no end within {limit:.0f} s"}
                    return
                if not over:
                    check()
                    time.sleep(POLL_SECONDS)
            if process.returncode:
                yield {"reason": _reason(process.returncode, said)}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and the compilers that it has started


def _reason(code: int, said: Path) -> str:
    lines = said.read_text(errors="replace").strip().splitlines()
    last = f": {lines[-1].strip()[:300]}" if lines else ""
    return f"its process ended by signal {-code}" if code < 0 else f"its process ended with code {code}{last}"


def _lasting(error: Exception) -> bool:
    """Whether CUDA no longer works in this process, so that the next trial needs another."""
    if not torch.cuda.is_available():
        return False
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return False
    with contextlib.suppress(Exception):
        torch.cuda.synchronize()
        (torch.zeros(1, device="cuda") + 1).item()
        return False
    return True


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]


def _end_with_parent() -> None:
    """Ends this process, and all that it has started, when the one that waits for it is gone."""
    os.read(0, 1)  # not sys.stdin, whose lock a thread may not hold while Python exits
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def main(job: str, lines: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # With the run's own path, as a learner may be beside the user's script.
    sys.path[:], asked, known = pickle.loads(Path(job).read_bytes())
    with open(lines, "a", buffering=1) as file:
        work(asked, known, lambda line: file.write(json.dumps(dict(line)) + "\n"))


if __name__ == "__main__":
    main(*sys.argv[1:])
