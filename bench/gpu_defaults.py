"""Which backend of each op should be the default on CUDA, from a record of bench/gpu_record.py."""

from typing import Any

from bench.gpu_tools import outcomes_of
from hdfast.tuning.trials import FUSED

NOISE = 0.03  # of a ratio: at some shapes a backend does just what the reference does


def proposal(record: dict[str, Any], ops: dict[str, tuple[str, ...]]) -> list[dict[str, Any]]:
    """For each op the backend that should be the default on CUDA, and why.

    That is the fused backend (Triton or another) if all its tests on a GPU ran and passed and it was faster than the
    reference at some of the shapes and dtypes timed and slower at none; else the reference. A persistent backend, which
    does all in one launch, has to beat the fused one in the same way.

    ops: the backends of each op.
    """
    rows = []
    for op, have in sorted(ops.items()):
        times: dict[str, dict[str, float]] = {}
        for row in record.get("benchmarks", []):
            if row.get("op") == op:
                times.setdefault(row["group"], {})[row["implementation"]] = row["us"]
        for row in record.get("rows", []):
            if op == "rssm_observe" and row.get("part") == "scan" and "us" in row:
                group = f"scan {row['size']} {row['precision']} {'graph' if row['graph'] else 'eager'}"
                backend = row["backend"].removeprefix("triton-")
                times.setdefault(group, {})[backend] = row["us"]
        fused = next((name for name in FUSED["cuda"] if name in have), None)
        chosen, why = _judged(record, op, fused, times, "reference")
        if chosen == fused and "persistent" in have:  # one launch in place of many
            other, reason = _judged(record, op, "persistent", times, fused)
            chosen, why = (other, reason) if other == "persistent" else (chosen, why)
        rows.append({"op": op, "backend": chosen, "why": why})
    return rows


def _judged(
    record: dict[str, Any], op: str, backend: str | None, times: dict[str, dict[str, float]], before: str
) -> tuple[str, str]:
    """`backend` if it is right, faster than `before` somewhere and slower nowhere, else `before`; and the reason."""
    if backend is None:
        return before, "has no fused kernel"
    outcomes = outcomes_of(op, record.get("tests", []), persistent=backend == "persistent")
    if not outcomes["passed"] and not outcomes["failed"]:
        return before, "no test of it ran on a GPU"
    if outcomes["failed"]:
        return before, f"{outcomes['failed']} of {sum(outcomes.values())} tests failed"
    ratios = [one[before] / one[backend] for one in times.values() if {before, backend} <= one.keys()]
    if not ratios:
        return before, f"right ({outcomes['passed']} tests), not timed beside {_the(before)}"
    why = f"{outcomes['passed']} tests passed; {min(ratios):.2f} to {max(ratios):.2f} x {_the(before)}"
    return (backend if min(ratios) > 1 - NOISE and max(ratios) > 1 + NOISE else before), why


def _the(backend: str) -> str:
    return "the reference" if backend == "reference" else backend
