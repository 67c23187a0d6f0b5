"""How long PyTorch's threads wait: set early enough, unless the environment sets it."""

import os
import subprocess
import sys

import pytest

from hdfast.runtime import threads


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"GOMP_SPINCOUNT": "30000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "passive"}, {"OMP_WAIT_POLICY": "passive"}),
    ],
)
def test_what_the_environment_says_stays(monkeypatch, before, after):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    threads.wait_briefly()
    assert {
        name: os.environ[name] for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") if name in os.environ
    } == after


def test_the_doors_say_it_before_torch_is_there():
    told = "os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules"
    code = f"import os, sys; sys.argv[0] = '-m'; import hdfast; print({told})"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP", "OMP"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["30000", "False"]
