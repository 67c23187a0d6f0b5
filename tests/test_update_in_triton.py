"""A whole update with all fused ops of a GPU equals that by definition, under Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hdfast.overrides import apply_overrides
from hdfast.tuning import trials as trying
from hdfast.tuning.choice import Job
from hdfast.tuning.trials import Trials
from hdfast_kernels import dispatch
from tests.agent_cases import SPECS, make_actions, small_config

interpreted = pytest.mark.skipif(
    not dispatch.triton_interpreted(), reason="runs in the process that test_under_the_interpreter starts"
)


@pytest.mark.skipif(
    not dispatch.triton_installed() or dispatch.triton_interpreted(),
    reason="needs triton; `pip install triton`",
)
def test_under_the_interpreter():
    here = Path(__file__)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(here.parent / "kernels")}
    environment.pop("HDFAST_BACKEND", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=here.parents[1], check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout, done.stdout


@interpreted
@pytest.mark.parametrize("continuous", [False, True], ids=["discrete", "continuous"])
def test_an_update_is_right(continuous):
    """In bfloat16: only there are products of bfloat16, one-hot matrices and blocks of pixels."""
    import interpreter_bf16
    import interpreter_memory

    interpreter_bf16.patch()
    interpreter_memory.patch()
    config = apply_overrides(
        small_config(), {"replay": {"batch": 2, "length": 3}, "behavior": {"horizon": 2}}
    )
    trials = Trials(Job(SPECS, make_actions(continuous), config, torch.device("cpu"), torch.bfloat16))
    trials.measure_definition()
    fused = dispatch.first_of(trying.FUSED["cuda"])
    assert {"adam_step", "image_deconv", "linear", "rssm_observe"} <= fused.keys()
    assert trials.judge(fused).why == ""
