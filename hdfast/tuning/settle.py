"""How a run computes: what is remembered for its machine and model, or what a search finds, which is remembered."""

import os
from collections import Counter
from collections.abc import Callable

from hdfast.runtime.device import describe_device
from hdfast.runtime.errors import warn
from hdfast.tuning.choice import Choice, Job, alone, path_of, remember, remembered
from hdfast.tuning.search import (
    BUDGET,
    DEFINITION,
    EAGER_TIMES,
    FINE,
    INSTEAD,
    LIMIT,
    Report,
    TuningError,
    milliseconds,
    search,
)

AUTOMATIC = ("cuda",)  # types of devices on which a run searches by itself; the CPU's defaults are measured


def settle(job: Job, *, check: Callable[[], None], say: Callable[[str], None]) -> Choice:
    """How a run is to compute: what is remembered for this machine and model, on CUDA else what a search finds.

    check: called while waiting; what it raises ends the search. say: gets a line before and after a search.
    If the search fails, the run goes on with the defaults. What failed in it is told at every run.
    """
    if not job.config.train.tune or job.device.type not in AUTOMATIC:
        return recalled(job)
    try:
        choice = find(job, check=check, say=say)
    except BrokenPipeError:  # nobody reads what `say` says
        raise
    except (TuningError, OSError) as error:
        warn(f"nothing could be tried, so the run computes as by default: {error}")
        return Choice()
    if left_out := failed(choice):
        warn(
            "left out, because they failed when they were tried: "
            + "; ".join(f"{name} ({why})" for name, why in left_out.items())
            + ". `python -m hdfast.tune --again` with the flags of this run tries them again"
        )
    return choice


def failed(choice: Choice) -> dict[str, str]:
    """What a search found not to be right, or could not try, and why: ops, and steps such as CUDA graphs."""
    only_timed = (EAGER_TIMES, FINE, INSTEAD)
    lines = {name: line for name, line in choice.report.items() if name not in only_timed}
    return {name: str(line.get("why")) for name, line in lines.items() if not line.get("right", True)}


def recalled(job: Job) -> Choice:
    """What is remembered for this machine and model, else the defaults; they, too, where the run does not tune."""
    return (remembered(job.key) if job.config.train.tune else None) or Choice()


def find(
    job: Job,
    *,
    check: Callable[[], None],
    say: Callable[[str], None] = lambda line: None,
    waits: Callable[[str], None] | None = None,
    tell: Report = lambda line: None,
    again: bool = False,
    patience: float = 1.0,
) -> Choice:
    """What is remembered; if nothing is, or `again`, what a search finds. One process searches, and others wait for it.

    check, say: as for `settle`. waits: gets the line about waiting, by default `say`. tell: as for `search`.
    patience: lengthens the time limits of `search` by this factor.

    Raises: TuningError.
    """
    if not again and (found := remembered(job.key)) is not None:
        return found
    name = describe_device(job.device)["name"]
    waiting = f"{name}: another run is finding the fastest kernels; waiting for it"
    with alone(job.key, check, lambda: (waits or say)(waiting)):
        if not again and (found := remembered(job.key)) is not None:
            return found
        say(
            f"{name}: finding the fastest kernels for this model, once; takes a minute or two (--train.no-tune: not)"
        )
        found = search(job, check=check, tell=tell, limit=patience * LIMIT, budget=patience * BUDGET)
        timed = bool(milliseconds(found.report))  # else something was in the way that may be gone next time
        path = remember(job.key, found) if timed else None
        say(summary(found) + (f"; kept in {path}" if path else ""))
    if timed and path is None:
        warn(f"{path_of(job.key).parent}: the result cannot be kept here, so it will be searched for again")
    return found


def summary(choice: Choice) -> str:
    """What was chosen and what it is worth, in one line."""
    if choice.ops is None:
        return "no update could be timed, so ops run as by default"
    fused, forced = Counter(choice.ops.values()), os.environ.get("HDFAST_BACKEND")
    plain = f"HDFAST_BACKEND={forced}" if forced else DEFINITION  # what the ops that have it ran on
    parts = [
        f"{count} {'op' if count == 1 else 'ops'} in {backend}" for backend, count in sorted(fused.items())
    ] or [plain]
    if choice.graph:
        parts.append(
            "as a CUDA graph" + (", halves of two updates beside each other" if choice.overlap else "")
        )
    ms = milliseconds(choice.report)
    named = {name.replace(DEFINITION, plain): one for name, one in ms.items()}
    times = ", ".join(
        f"{name} {one:,.0f}" if one >= 1000 else f"{name} {one:.3g}" for name, one in named.items()
    )
    return ", ".join(parts) + (f" (ms an update: {times})" if times else "")
