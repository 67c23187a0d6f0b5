"""Which backend of every op should run by default on CUDA, from a record of bench/gpu_record.py."""

from typing import Any

from bench.gpu_tools import tests_of
from hdfast.tuning.trials import FUSED


def proposal(record: dict[str, Any], ops: dict[str, tuple[str, ...]]) -> list[dict[str, Any]]:
    """For every op the backend that should run by default on CUDA, and why.

    Triton, or what else is fused, where its tests on a GPU ran and all passed, and it was faster than the reference at
    every shape and dtype that was timed; the reference otherwise.

    ops: the backends of every op.
    """
    rows = []
    for op, have in sorted(ops.items()):
        outcomes = tests_of(op, record.get("tests", []))
        times: dict[str, dict[str, float]] = {}
        for row in record.get("benchmarks", []):
            if row.get("op") == op:
                times.setdefault(row["group"], {})[row["implementation"]] = row["us"]
        for row in record.get("rows", []):
            if op == "rssm_observe" and row.get("part") == "scan" and "us" in row:
                group = f"scan {row['size']} {row['precision']} {'graph' if row['graph'] else 'eager'}"
                times.setdefault(group, {})[row["backend"]] = row["us"]
        fused = next((name for name in FUSED["cuda"] if name in have), None)
        ratios = [
            one["reference"] / one[fused] for one in times.values() if {"reference", fused} <= one.keys()
        ]
        right = outcomes["passed"] > 0 and not outcomes["failed"]
        if fused is None:
            why = "has no fused kernel"
        elif not outcomes["passed"] and not outcomes["failed"]:
            why = "no test of it ran on a GPU"
        elif not right:
            why = f"{outcomes['failed']} of {sum(outcomes.values())} tests failed"
        elif not ratios:
            why = f"right ({outcomes['passed']} tests), not timed beside the reference"
        else:
            why = f"{outcomes['passed']} tests passed; {min(ratios):.2f} to {max(ratios):.2f} x the reference"
        backend = fused if right and ratios and min(ratios) > 1 else "reference"
        rows.append({"op": op, "backend": backend, "why": why})
    return rows
