"""Tests under Triton's interpreter. It is chosen when a kernel is decorated, at import, so it takes another process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hdfast_kernels import dispatch

KERNELS = Path(__file__).parent / "kernels"
outside = pytest.mark.skipif(
    not dispatch.triton_installed() or dispatch.triton_interpreted(),
    reason="needs triton, `pip install triton`, and to compile",
)
inside = pytest.mark.skipif(
    not dispatch.triton_interpreted(), reason="runs in the process that `interpreted` starts"
)


def interpreted(*files: str | Path, least: int, only: str = "", **environment: str) -> None:
    """Runs the tests of these files in a process with the interpreter; AssertionError unless all pass, in each some.

    least: how many must have passed, so that a condition that skips most does not go unnoticed.
    only: those whose names contain this. environment: variables of the process, besides those that every one has.
    """
    path = os.pathsep.join(filter(None, [str(KERNELS), os.environ.get("PYTHONPATH", "")]))
    # The interpreter is a single thread of Python.
    given = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
    given.pop("HDFAST_BACKEND", None)
    command = [sys.executable, "-m", "pytest", "-q", "-rpfE", "-p", "no:cacheprovider", "-k", only]
    done = subprocess.run(
        [*command, *map(str, files)],
        capture_output=True,
        text=True,
        env=given,
        cwd=KERNELS.parents[1],
        check=False,
    )
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    lines = [line for line in done.stdout.splitlines() if line.startswith("PASSED ")]
    without = {Path(file).name for file in files} - {
        Path(line.split()[1].partition("::")[0]).name for line in lines
    }
    assert not without, f"no test of {without} passed\n{told}"
    assert len(lines) >= least, f"only {len(lines)} tests passed\n{told}"
