"""What the tests of tuning have in common: sizes of a small job, and a cache for each test."""

import pytest
import torch

from hdfast.tuning.choice import Job
from tests.agent_cases import SPECS, make_actions, small_config

SIZES = {"replay": {"batch": 4, "length": 8}}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Importing it gives each test of a module a cache of its own, and no forced backend."""
    monkeypatch.setenv("HDFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HDFAST_BACKEND", raising=False)


def job(device="cpu") -> Job:
    """Of a small model with discrete actions, in float32."""
    return Job(SPECS, make_actions(False), small_config(**SIZES), torch.device(device), torch.float32)
