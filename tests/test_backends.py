"""A whole update under each HDFAST_BACKEND, one setting for every op of a run: all give the same numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hdfast_kernels import dispatch

UPDATE = """
import json
import torch
torch.set_num_threads(1)
from tests.agent_cases import make_batch, make_learner
learner = make_learner()
for seed in range(2):  # the second starts from what the first one changed
    learner.update(lambda *_: make_batch(learner, seed))
metrics = learner.metrics()
state = {name: float(value.double().square().sum()) for name, value in learner.state_dict().items()}
print(json.dumps({**metrics, **{name: value for name, value in state.items() if name != "generator"}}))
"""


def update(backend: str) -> dict[str, float]:
    """Metrics of two updates, and the squared norms of everything in the state after them."""
    environment = {**os.environ, "HDFAST_BACKEND": backend}
    environment["TRITON_INTERPRET"] = "1" if backend == "triton" else "0"
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        UPDATE,
    ]  # the interpreter takes logarithms of masked lanes
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def reference() -> dict[str, float]:
    return update("reference")


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_an_update_is_the_same_under_every_backend(backend, reference):
    if backend == "triton" and not dispatch.triton_installed():
        pytest.skip("needs triton; `pip install triton`")
    got = update(backend)
    assert got.keys() == reference.keys()
    assert len([name for name in got if name.startswith("optimizer.model.mean.")]) > 20
    assert got == pytest.approx(reference, rel=1e-3, abs=1e-5)
